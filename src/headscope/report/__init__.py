"""Reports: one self-contained HTML file. Needs the extra study (plotly, Pillow, jinja2, polars, scipy).

Reading order: page (the whole), findings and caveats (its sentences), tables, panels and figures (what is shown),
naming and images.
"""

from headscope.report.page import GroupInfo, write_report, write_sweep_report

__all__ = ["GroupInfo", "write_report", "write_sweep_report"]
