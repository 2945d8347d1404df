"""A run of `headscope bench`: its settings, and its file of numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from headscope._files import local_path, write_atomic
from headscope._machine import checked_device, device_name
from headscope.bench.denoisers import DENOISERS, Denoiser
from headscope.bench.measure import call_seconds, step_counts, step_seconds
from headscope.bench.records import software, write
from headscope.bench.throughput import page, table
from headscope.bench.timing import quartiles, ratio
from headscope.bench.ways import STOCK, ways_of
from headscope.counter import whole
from headscope.ops import backend_status


@dataclass(frozen=True)
class Settings:
    """The models to measure, and how.

    Attributes:
        models: names out of DENOISERS.
        full: True for the published sizes, False for small stand-ins; None: published sizes on a GPU.
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
    """Measure the settings' models; rows of other models in `out` stay. Return the path of the file of numbers.

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
    write(path, record)
    write_atomic(path.with_suffix(".html"), page(record).encode())
    Console(width=150).print(table(record))
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
        **software(),
        "ways": rows,
    }


def _summary(seconds: dict[str, np.ndarray], name: str, images: int) -> dict[str, list[float]]:
    """Quartiles over rounds: of seconds, of images per second, and of the time over stock's in the same round."""
    taken = seconds[name]
    return {
        "seconds": quartiles(taken),
        "images_per_second": quartiles(images / taken),
        "over_stock": ratio(taken, seconds[STOCK]),
    }
