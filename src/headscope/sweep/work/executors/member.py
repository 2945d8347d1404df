"""A process that takes part in a sweep, whoever started it, and what it tells."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from headscope.sweep.compute.opened import Opened
from headscope.sweep.plan.units import Unit
from headscope.sweep.work.progress import Progress
from headscope.sweep.work.worker import Report, WorkOrder, work


class Silent:
    """A report that nobody listens to."""

    def advance(self, forwards: int) -> None:
        pass

    def finished(self, unit: Unit) -> None:
        pass

    def failed(self, unit: Unit, error: str, last: bool) -> None:
        pass

    def waiting(self, unit: Unit, what: str) -> None:
        pass


class Telling:
    """A report in messages to the process that started this one, where `tell` makes a report of them again.

    Args:
        send: brings a message there, which can be pickled.
    """

    def __init__(self, send: Callable[[tuple[Any, ...]], None]) -> None:
        self._send = send

    def advance(self, forwards: int) -> None:
        self._send(("advance", forwards))

    def finished(self, unit: Unit) -> None:
        self._send(("finished", unit.id))

    def failed(self, unit: Unit, error: str, last: bool) -> None:
        self._send(("failed", unit.id, error, last))

    def waiting(self, unit: Unit, what: str) -> None:
        self._send(("waiting", unit.id, what))


def tell(message: tuple[Any, ...], known: Mapping[str, Unit], report: Report) -> None:
    """Pass on what another process has said to its `Telling`."""
    kind, about, *more = message
    getattr(report, kind)(about if kind == "advance" else known[about], *more)


def take_part(order: WorkOrder, report: Report | None = None) -> None:
    """Open the run of an order and work until nothing is left.

    Args:
        report: who hears of it; None has this process's log say what failed and whom it waits for.
    """
    opened = Opened(order.config, order.execution)
    context = opened.context(opened.store(Path(order.out)))
    # the run directory tells how far the work is
    work(context, order.session, report or Progress("sweep", opened.plan.units, interval=math.inf))


def on_device(order: WorkOrder, number: int) -> WorkOrder:
    """The order for the `number`th process of a machine: with several GPUs each gets its own."""
    device = torch.device(order.config.device)
    if device.type != "cuda" or device.index is not None:
        return order
    count = max(1, torch.cuda.device_count())
    return replace(order, config=replace(order.config, device=f"cuda:{number % count}"))
