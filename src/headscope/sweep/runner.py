"""Running a sweep in this process, with progress, and picking it up where it stopped."""

import datetime
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from headscope._machine import device_name, versions
from headscope.models import Scope
from headscope.sweep.config import SweepConfig
from headscope.sweep.items import GroupItems, load_task, open_items
from headscope.sweep.plan import Plan, make_plan
from headscope.sweep.store import Run, RunStore
from headscope.sweep.unit import UnitRunner

# seconds between two progress lines where the output isn't a terminal
QUIET_INTERVAL = 15.0


def run_sweep(
    config: SweepConfig,
    out: str | Path,
    *,
    batch: int = 64,
    progress: bool = True,
    console: Console | None = None,
    title: str = "sweep",
) -> Run:
    """Run a sweep, or what is left of it.

    Every unit is committed as it finishes. A run that was killed goes on from there when the same configuration is
    run into the same directory, and gives the same table.

    Args:
        config: what to do.
        out: the run directory; new, or one of the same configuration.
        batch: rows that pass through the denoiser at once.
        progress: show progress: a bar on a terminal, a line every 15 seconds elsewhere.

    Raises:
        ValueError: the configuration can't be run, or the directory holds another one; before any work starts.
    """
    if batch < 1:
        raise ValueError(f"batch: got {batch}, expected at least 1")
    task = load_task(config)
    groups = open_items(config, task)
    scope = Scope(task.denoiser)
    plan = make_plan(config, task, groups, scope.sites)
    store = RunStore(Path(out), plan.identity, describe(config, plan, groups, scope))
    runner = UnitRunner(config, task, groups, plan, store, batch)
    left = [unit for unit in plan.units if not runner.done(unit)]
    total = sum(unit.forwards for unit in plan.units)
    remaining = sum(unit.forwards for unit in left)
    with _progress(title, total, total - remaining, progress, console) as advance:
        for unit in left:
            runner.run(unit, advance)
    return Run.open(out)


def describe(config: SweepConfig, plan: Plan, groups: list[GroupItems], scope: Scope) -> dict:
    """What the manifest says of a run beside its identity."""
    return {
        "config": config.as_dict(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "device": device_name(config.device),
        "threads": torch.get_num_threads(),
        "timesteps": list(plan.timesteps),
        "sites": [{"name": s.name, "kind": s.kind, "heads": s.heads, "head_dim": s.head_dim} for s in scope.sites],
        "groups": [
            {
                "name": group.name,
                "description": group.description,
                "items": len(group.swept),
                "sources": group.source_count,
                "reference_items": len(group.reference),
            }
            for group in groups
        ],
        "units": len(plan.units),
        "forwards": sum(unit.forwards for unit in plan.units),
    }


@contextmanager
def _progress(
    title: str, total: int, done: int, enabled: bool, console: Console | None
) -> Iterator[Callable[[int], None]]:
    """A function that counts forwards and shows how far the sweep is."""
    console = console or Console(stderr=True)
    if not enabled or total == done:
        yield lambda forwards: None
        return
    if not console.is_terminal:
        yield _progress_lines(title, total, done, console)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("forwards"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        shown = bar.add_task(title, total=total, completed=done, rate="")
        started, counted = time.perf_counter(), 0

        def advance(forwards: int) -> None:
            nonlocal counted
            counted += forwards
            rate = counted / max(1e-9, time.perf_counter() - started)
            bar.update(shown, advance=forwards, rate=f"{rate:.0f}/s")

        yield advance


def _progress_lines(title: str, total: int, done: int, console: Console) -> Callable[[int], None]:
    started = last = time.perf_counter()
    counted = 0

    def advance(forwards: int) -> None:
        nonlocal counted, last
        counted += forwards
        now = time.perf_counter()
        if now - last < QUIET_INTERVAL:
            return
        last = now
        rate = counted / (now - started)
        left = (total - done - counted) / rate
        console.print(f"{title}: {done + counted}/{total} forwards, {rate:.0f}/s, {left:.0f} s left", highlight=False)

    return advance
