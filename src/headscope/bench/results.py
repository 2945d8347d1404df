"""A run of the benchmark: its settings, its file of numbers, its table and its plot."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from headscope._extras import require
from headscope._files import local_path, write_atomic
from headscope._machine import checked_device, device_name, versions
from headscope.bench.denoisers import DENOISERS, Denoiser
from headscope.bench.measure import call_seconds, step_counts, step_seconds
from headscope.bench.ways import STOCK, ways_of
from headscope.counter import whole
from headscope.ops import backend_status

_QUARTILES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Settings:
    """What is measured, and how.

    Attributes:
        models: names out of DENOISERS.
        full: real configurations; None: where the device is a GPU.
        rounds: in which every way runs one step once; whole calls get a third of them.
    """

    models: Sequence[str] = tuple(DENOISERS)
    device: str = "cpu"
    dtype: str = "float32"
    full: bool | None = None
    rounds: int = 11

    def __post_init__(self) -> None:
        unknown = [name for name in self.models if name not in DENOISERS]
        if unknown or not self.models:
            raise ValueError(f"models: got {unknown or self.models!r}, expected names out of {', '.join(DENOISERS)}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype: got {self.dtype!r}, expected float32, bfloat16 or float16")
        # frozen for everybody else
        object.__setattr__(self, "rounds", whole("rounds", self.rounds, least=1))

    @property
    def real(self) -> bool:
        return torch.device(self.device).type != "cpu" if self.full is None else self.full

    @property
    def call_rounds(self) -> int:
        return max(1, self.rounds // 3)


def run_bench(settings: Settings, out: Path, console: Console) -> Path:
    """Measure the settings' models; rows of other models that `out` holds already are kept. Returns the numbers' file.

    Writes out/models-<device>-<dtype>.json and .html; prints the table of everything in it.
    """
    device = checked_device(settings.device).type
    path = local_path("out", out) / f"models-{device}-{settings.dtype}.json"
    record = json.loads(path.read_text()) if path.exists() else {"models": {}}
    for name in settings.models:
        console.print(f"[dim]{name}: {settings.rounds} rounds of every way[/]", highlight=False)
        torch.manual_seed(0)
        denoiser = DENOISERS[name](settings.real, settings.device, getattr(torch, settings.dtype))
        record["models"][name] = _measured(denoiser, settings)
    record |= {
        "what": "models",
        "device": device_name(settings.device),
        "dtype": settings.dtype,
        "backends": [name for name, reason in backend_status().items() if reason is None],
    }
    record["models"] = {name: record["models"][name] for name in DENOISERS if name in record["models"]}
    write_atomic(path, (json.dumps(record, indent=1) + "\n").encode())
    write_atomic(path.with_suffix(".html"), _page(record).encode())
    Console(width=150).print(_table(record))
    return path


def _measured(denoiser: Denoiser, settings: Settings) -> dict[str, Any]:
    ways = ways_of(denoiser)
    counts = {name: step_counts(denoiser, way, settings.device) for name, way in ways.items()}
    step = step_seconds(denoiser, ways, settings.rounds, settings.device)
    call = call_seconds(denoiser, ways, settings.call_rounds, settings.device)
    rows = {}
    for name in ways:
        rows[name] = vars(counts[name]) | {"step": _summary(step, name, denoiser.images)}
        if name in call:
            rows[name]["call"] = _summary(call, name, denoiser.images)
    return {
        "description": denoiser.description,
        "full": settings.real,
        "images": denoiser.images,
        "steps": denoiser.steps,
        "rounds": settings.rounds,
        "call_rounds": settings.call_rounds,
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "ways": rows,
    }


def _summary(seconds: dict[str, np.ndarray], name: str, images: int) -> dict[str, list[float]]:
    """Quartiles over rounds: of seconds, of images per second, and of the time over stock's in the same round."""
    taken = seconds[name]
    return {
        "seconds": np.quantile(taken, _QUARTILES).tolist(),
        "images_per_second": np.quantile(images / taken, _QUARTILES).tolist(),
        "over_stock": np.quantile(taken / seconds[STOCK], _QUARTILES).tolist(),
    }


def _table(record: dict[str, Any]) -> Table:
    table = Table(title=f"{record['device']}, {record['dtype']}", title_justify="left", caption_justify="left")
    table.caption = "medians with quartiles over interleaved rounds; time over stock's in the same round"
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
        table.add_column(column, justify="left" if column in ("model", "way") else "right")
    for model, entry in record["models"].items():
        for way, row in entry["ways"].items():
            step, call = row["step"], row.get("call")
            table.add_row(
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
        table.add_section()
    return table


def _spread(quartiles: Sequence[float], digits: int) -> str:
    low, middle, high = (f"{value:.{digits}g}" for value in quartiles)
    return f"{middle} ({low} to {high})"


def _page(record: dict[str, Any]) -> str:
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
                error_x={
                    "type": "data",
                    "array": [high - middle for _, middle, high in spreads],
                    "arrayminus": [middle - low for low, middle, _ in spreads],
                },
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
