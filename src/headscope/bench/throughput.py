"""The table and the plot of a run: images per second of every way, by model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from headscope._extras import require
from headscope._plots import error_bars
from headscope.bench.ways import STOCK


def table(record: dict[str, Any]) -> Table:
    found = Table(title=f"{record['device']}, {record['dtype']}", title_justify="left", caption_justify="left")
    found.caption = "medians with quartiles over interleaved rounds; time over stock's in the same round"
    for column in (
        "model",
        "way",
        "images/s, a step",
        "time",
        "images/s, a call",
        "time",
        "peak MB",
        "operators",
        "syncs",
    ):
        found.add_column(column, justify="left" if column in ("model", "way") else "right")
    for model, entry in record["models"].items():
        for way, row in entry["ways"].items():
            step, call = row["step"], row.get("call")
            found.add_row(
                model if way == STOCK else "",
                way,
                _spread(step["images_per_second"], 4),
                _spread(step["over_stock"], 3),
                _spread(call["images_per_second"], 4) if call else "-",
                _spread(call["over_stock"], 3) if call else "-",
                f"{row['peak_bytes'] / 1e6:.1f}",
                f"{row['operations']:,}",
                str(row["synchronisations"]),
            )
        found.add_section()
    return found


def _spread(quartiles: Sequence[float], digits: int) -> str:
    low, middle, high = (f"{value:.{digits}g}" for value in quartiles)
    return f"{middle} ({low} to {high})"


def page(record: dict[str, Any]) -> str:
    """One plot: images per second of a step and of a whole call, by way, a panel per model."""
    subplots = require("plotly.subplots", "study")
    models = record["models"]
    what = {"step": "one denoising step", "call": "a whole pipeline call"}
    titles = [f"{name}: {what[part]}" for name in models for part in what]
    figure = subplots.make_subplots(rows=len(models), cols=2, subplot_titles=titles, horizontal_spacing=0.03)
    for row, entry in enumerate(models.values(), start=1):
        for column, part in enumerate(what, start=1):
            shown = {way: values[part] for way, values in entry["ways"].items() if part in values}
            spreads = [values["images_per_second"] for values in shown.values()]
            figure.add_bar(
                x=[middle for _, middle, _ in spreads],
                y=list(shown),
                orientation="h",
                error_x=error_bars(spreads),
                marker_color=["#8a8f98" if way == STOCK else "#3b6fb6" for way in shown],
                hovertext=[f"{values['over_stock'][1]:.3f} of stock's time" for values in shown.values()],
                row=row,
                col=column,
            )
            figure.update_yaxes(autorange="reversed", showticklabels=column == 1, row=row, col=column)
    figure.update_layout(
        title=f"Images per second (median and quartiles), {record['device']}, {record['dtype']}",
        height=260 * len(models) + 80,
        showlegend=False,
        template="plotly_white",
    )
    return figure.to_html(include_plotlyjs="cdn", full_html=True)
