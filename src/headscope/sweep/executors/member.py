"""A process that takes part in a sweep, whoever started it."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import torch

from headscope.sweep.plan import Unit
from headscope.sweep.progress import Progress
from headscope.sweep.store import RunStore
from headscope.sweep.worker import Opened, Report, WorkOrder, work


class Silent:
    """Nobody listens: the run directory tells how far the work is. Others may end the work through it."""

    def __init__(self) -> None:
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End the work after the next forward, as Ctrl-C does."""
        self._stopped.set()

    def advance(self, forwards: int) -> None:
        if self._stopped.is_set():
            raise KeyboardInterrupt

    def finished(self, unit: Unit) -> None:
        pass

    def failed(self, unit: Unit, error: str, last: bool) -> None:
        pass

    def waiting(self, unit: Unit, what: str) -> None:
        pass


def take_part(order: WorkOrder, report: Report | None = None) -> None:
    """Open the run of an order and work until nothing is left."""
    opened = Opened(order.config, order.execution)
    runner = opened.runner(opened.store(Path(order.out)))
    work(runner, order.session, report or Silent())


def on_device(order: WorkOrder, number: int) -> WorkOrder:
    """The order for the `number`th process of a machine: with several GPUs each gets its own."""
    device = torch.device(order.config.device)
    if device.type != "cuda" or device.index is not None:
        return order
    count = max(1, torch.cuda.device_count())
    return replace(order, config=replace(order.config, device=f"cuda:{number % count}"))


class Watch:
    """Progress of processes elsewhere, read from the run directory."""

    def __init__(self, store: RunStore, units: tuple[Unit, ...], progress: Progress) -> None:
        self._store = store
        self.units = units
        self._by_file = {(unit.kind, unit.id): unit for unit in units}
        self._progress = progress
        self._seen = set(store.listed())

    def look(self) -> None:
        new = {key for key in self._store.listed() - self._seen if key in self._by_file}
        self._seen |= new
        for key in new:
            unit = self._by_file[key]
            self._progress.advance(unit.forwards)
            self._progress.finished(unit)
