"""Reports: one self-contained HTML file. Needs the extra study (plotly, Pillow, jinja2, polars, scipy).

Reading order: page (the whole), lead and caveats (its sentences), sections (a file each: figures, tables,
words), section, tables, marks and panels (what they are made of), naming and images. templates/ holds the HTML.
"""

from headscope.report.page import GroupInfo, write_report, write_sweep_report

__all__ = ["GroupInfo", "write_report", "write_sweep_report"]
