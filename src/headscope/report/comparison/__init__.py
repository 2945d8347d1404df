"""The page of two runs compared.

Reading order: page (the whole), findings (its sentences), tables.
"""

from headscope.report.comparison.page import write_comparison

__all__ = ["write_comparison"]
