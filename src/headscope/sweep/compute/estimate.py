"""The time and memory that a sweep would take, from its plan and a few forwards."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from headscope.sweep.compute.fitting import measured_bytes
from headscope.sweep.compute.kinds import KINDS
from headscope.sweep.compute.opened import Execution, Opened
from headscope.sweep.plan.config import SweepConfig

# seconds that the timing of one kind of forward may take
PATIENCE = 3.0


@dataclass(frozen=True)
class Estimate:
    """The time and memory that a sweep would take.

    Attributes:
        units: kind: (units, forwards).
        rows: how many pass through the denoiser at once.
        weight_bytes: of the denoiser's parameters and buffers.
        activation_bytes: what a forward of that many rows takes at most, and what clean ones cache for edited ones.
        seconds: in one process.
        shared: how many times faster edited forwards are for taking over what the clean one computed, on average over
            the edited sites; None where nothing is shared, with `reason`.
        reason: why not.
        notes: what the groups have less of than a sweep takes by itself.
    """

    units: dict[str, tuple[int, int]]
    rows: int
    weight_bytes: int
    activation_bytes: int
    seconds: float
    shared: float | None
    reason: str | None
    notes: list[str]

    @property
    def forwards(self) -> int:
        return sum(forwards for _, forwards in self.units.values())

    def summary(self, workers: int) -> str:
        """Time with so many processes, and memory, for a person to read."""
        sharing = "nothing is shared between forwards"
        if self.shared is not None:
            sharing = f"edited forwards {self.shared:.2f} times as fast for what they take over from clean ones"
        elif self.reason:
            sharing += f": {self.reason}"
        weights, activations = (count / 2**20 for count in (self.weight_bytes, self.activation_bytes))
        return (
            f"about {_duration(self.seconds / workers)} with {workers} process(es), {self.rows} rows at once;"
            f" {sharing}\nmemory: weights {weights:,.0f} MiB, and at most {activations:,.0f} MiB beside them, in each"
            " process"
        )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def estimate_sweep(config: SweepConfig, execution: Execution | None = None) -> Estimate:
    """Plan a sweep, and time a few forwards of its model; nothing is written.

    Raises:
        ValueError: the configuration can't be run.
    """
    opened = Opened(config, execution or Execution())
    fit = opened.fit()
    rows = fit.rows
    units: dict[str, tuple[int, int]] = {}
    for unit in opened.plan.units:
        count, forwards = units.get(unit.kind, (0, 0))
        units[unit.kind] = (count + 1, forwards + unit.forwards)
    whole = _seconds(opened, lambda: opened.forward(rows)) / rows
    edited, reason = whole, "the model is compiled" if config.compile else None
    shared = [edit for name in units if KINDS[name].shares for edit in KINDS[name].edits(opened.plan)]
    if not fit.clean:
        reason = "what a clean forward would keep doesn't fit in memory"
    elif shared and opened.share:
        edited, reason = _edited_seconds(opened, rows, [edit.sites for edit in shared], whole)
    seconds = 0.0
    for name, (_, forwards) in units.items():
        seconds += forwards * (edited if KINDS[name].shares else whole)
    denoiser = opened.task.denoiser
    weights = sum(tensor.numel() * tensor.element_size() for tensor in (*denoiser.parameters(), *denoiser.buffers()))
    with torch.inference_mode():
        activations = measured_bytes(opened.task.device, lambda: opened.forward(rows))
    activations += fit.clean * opened.sharing.cached
    faster = whole / edited if edited != whole else None
    return Estimate(units, rows, weights, activations, seconds, faster, reason, opened.notes)


def _edited_seconds(opened: Opened, rows: int, edited: list[frozenset[str]], whole: float) -> tuple[float, str | None]:
    """Seconds of a row of an edited forward, on average over the edits; why nothing is shared, if nothing is."""
    prefix = opened.prefix
    if not prefix.shares:
        return whole, prefix.reason
    # the first, the last and some between, weighted by how often each is edited
    different = sorted(set(edited), key=prefix.fraction_left)
    chosen = {different[round(index * (len(different) - 1) / 4)] for index in range(5)}
    timed = {}
    with prefix.attached():
        with torch.inference_mode(), prefix.clean(different) as cache:
            opened.forward(1)  # a row, which all rows of the replays take over
        for sites in chosen:
            index = torch.zeros(rows, dtype=torch.long, device=opened.task.device)
            inside = partial(prefix.replay, cache, sites, index)
            timed[sites] = _seconds(opened, lambda: opened.forward(rows), inside) / rows

    def nearest(sites: frozenset[str]) -> frozenset[str]:
        return min(timed, key=lambda other: abs(prefix.fraction_left(other) - prefix.fraction_left(sites)))

    close = {sites: nearest(sites) for sites in different}
    return sum(timed[close[sites]] for sites in edited) / len(edited), None


def _seconds(opened: Opened, call: Callable[[], Any], inside: Callable[[], Any] = nullcontext) -> float:
    """The median duration of a call, warmed up."""

    def once() -> float:
        started = time.perf_counter()
        with torch.inference_mode(), inside():
            call()
        if opened.task.device.type == "cuda":
            torch.cuda.synchronize(opened.task.device)
        return time.perf_counter() - started

    first = once()
    repeats = max(1, min(5, int(PATIENCE / max(first, 1e-6))))
    return sorted(once() for _ in range(repeats))[repeats // 2]
