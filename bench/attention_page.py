"""The page of a run of attention.py: times over stock SDPA for each shape, and TFLOP/s over the number of tokens.

    python bench/attention_page.py bench/results/attention-cpu-float32.json

draws the page of an earlier run again.
"""

import json
import sys
from pathlib import Path
from typing import Any

import plotly.graph_objects as graph
from plotly.subplots import make_subplots

from headscope._plots import error_bars

CAVEAT = (
    "Medians of interleaved rounds with quartiles; 1 is the fastest stock SDPA of the same run, which computes no"
    " statistics. TFLOP/s counts the matrix products (2 forward, 5 backward)."
)


def write(path: Path, record: dict[str, Any]) -> None:
    """Write the page beside its JSON."""
    rows = record["rows"]
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    titles = [f"{name}: {what}" for name in passes for what in ("time over stock SDPA", "TFLOP/s by number of tokens")]
    page = make_subplots(rows=len(passes), cols=2, subplot_titles=titles, column_widths=[0.6, 0.4])
    names = list(dict.fromkeys(row["call"] for row in rows))
    colours = dict(zip(names, _palette(len(names)), strict=True))
    for index, direction in enumerate(passes, start=1):
        for name in names:
            rows_of_call = [row for row in rows if row["pass"] == direction and row["call"] == name]
            models = [row for row in rows_of_call if row["where"] != "length"]
            sweep = [row for row in rows_of_call if row["where"] == "length"]
            page.add_trace(
                graph.Bar(
                    x=[f"{row['where']}<br>{tuple(row['shape'])}" for row in models],
                    y=[row["ratio"][1] for row in models],
                    error_y=error_bars([row["ratio"] for row in models]),
                    name=name,
                    legendgroup=name,
                    showlegend=index == 1,
                    marker_color=colours[name],
                ),
                row=index,
                col=1,
            )
            page.add_trace(
                graph.Scatter(
                    x=[row["shape"][2] for row in sweep],
                    y=[row["tflops_per_second"] for row in sweep],
                    mode="lines+markers",
                    name=name,
                    legendgroup=name,
                    showlegend=False,
                    line_color=colours[name],
                ),
                row=index,
                col=2,
            )
        page.add_hline(y=1, line_dash="dot", row=index, col=1)
        page.update_yaxes(type="log", title_text="times SDPA's time", row=index, col=1)
        page.update_xaxes(type="log", title_text="tokens", row=index, col=2)
        page.update_yaxes(type="log", title_text="TFLOP/s", row=index, col=2)
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    page.update_layout(
        title=f"{record['device']}, {record['dtype']}, {record['date']}<br><sup>{versions}<br>{CAVEAT}</sup>",
        template="plotly_white",
        height=480 * len(passes) + 160,
        margin={"t": 140},
        barmode="group",
    )
    path.write_text(page.to_html(include_plotlyjs=True))


def _palette(count: int) -> list[str]:
    return [f"hsl({round(360 * index / max(1, count))}, 60%, 45%)" for index in range(count)]


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        source = Path(argument)
        write(source.with_suffix(".html"), json.loads(source.read_text()))
