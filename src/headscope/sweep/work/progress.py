"""How far a sweep is: a bar on a terminal, a line of JSON every so often elsewhere."""

from __future__ import annotations

import contextlib
import json
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from headscope.sweep.plan.units import Unit

# seconds between two lines where the output isn't a terminal
INTERVAL = 15.0


class Progress:
    """Counts units, images and forwards, and shows them; a context, and a `Report` for workers.

    Args:
        units: all of the run.
        enabled: show anything at all.
        console: where to.
        interval: seconds between two lines of JSON.
    """

    def __init__(
        self,
        title: str,
        units: tuple[Unit, ...],
        *,
        enabled: bool = True,
        console: Console | None = None,
        interval: float = INTERVAL,
    ) -> None:
        self._title = title
        self._units = {unit.id: unit for unit in units}
        self._total = sum(unit.forwards for unit in units)
        self._console = console or Console(stderr=True)
        self._shown = enabled
        self._interval = interval
        self._finished: set[str] = set()
        self._finished_forwards = 0
        # forwards made here, of which those of a unit that fails are made again
        self._forwards = 0
        self._images = 0
        self._failures = 0
        self._waits: set[tuple[str, str]] = set()
        self._started = self._last = time.perf_counter()
        self._bar: Bar | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Progress:
        if self._shown and self._console.is_terminal:
            self._bar = Bar(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("units"),
                TextColumn("{task.fields[rates]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[failures]}"),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=len(self._units), rates="", failures="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def already(self, unit: Unit) -> None:
        """A unit that was finished before this process began."""
        self._finished.add(unit.id)
        self._finished_forwards += unit.forwards
        self._show()

    def advance(self, forwards: int) -> None:
        self._forwards += forwards
        self._show()

    def finished(self, unit: Unit) -> None:
        if unit.id in self._finished:
            return
        self._finished.add(unit.id)
        self._finished_forwards += unit.forwards
        self._images += len(unit.items)
        self._show()

    def failed(self, unit: Unit, error: str, last: bool) -> None:
        self._failures += last
        what = "given up" if last else "will be tried again"
        self.say(f"unit {unit.id[:12]} of {unit.kind} failed, {what}: {error}")

    def waiting(self, unit: Unit, what: str) -> None:
        """A unit that somebody else has claimed is all that is left to do for now; said once, whoever waits."""
        if (unit.id, what) in self._waits:
            return
        self._waits.add((unit.id, what))
        self.say(f"waiting for unit {unit.id[:12]} of {unit.kind}: {what}")

    def say(self, what: str) -> None:
        if self._shown:
            self._print(f"{self._title}: {what}")

    def _print(self, line: str) -> None:
        # a log on a full disk, a terminal that is gone: the work goes on
        with contextlib.suppress(OSError):
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def state(self) -> dict[str, float | int | str | None]:
        """The content of a line of JSON."""
        seconds = max(1e-9, time.perf_counter() - self._started)
        rate = self._forwards / seconds
        left = self._total - self._finished_forwards
        return {
            "title": self._title,
            "units": len(self._finished),
            "units_total": len(self._units),
            "forwards": self._finished_forwards,
            "forwards_total": self._total,
            "images_per_second": round(self._images / seconds, 2),
            "forwards_per_second": round(rate, 1),
            "seconds_left": round(left / rate, 1) if rate else None,
            "failures": self._failures,
        }

    def _show(self) -> None:
        if not self._shown:
            return
        if self._bar:
            state = self.state()
            rates = f"{state['images_per_second']} images/s  {state['forwards_per_second']} forwards/s"
            failures = f"[red]{self._failures} failed[/]" if self._failures else ""
            self._bar.update(self._task, completed=len(self._finished), rates=rates, failures=failures)
            return
        now = time.perf_counter()
        if now - self._last >= self._interval:
            self._last = now
            self._print(json.dumps(self.state()))
