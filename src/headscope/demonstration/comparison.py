"""`headscope compare`: the page of two finished runs, of two models or of two checkpoints of one."""

from pathlib import Path
from typing import Any

from headscope._files import local_path
from headscope.demonstration.runs import check_described, run_info, sites_of, table_in_memory, unfinished
from headscope.demonstration.study import is_study
from headscope.report.comparison import write_comparison
from headscope.study.compare import KINDS, Side, compare
from headscope.sweep import Run
from headscope.sweep.store.run import as_written

# what is shown of both runs beside each other
_SHOWN = ("Model", "Model fingerprint", "Device", "Versions", "Started", "Noise replicate (seed)", "Timesteps", "Work")


def compare_runs(first: str | Path, second: str | Path, out: str | Path) -> Path:
    """Write the page of two runs compared, second minus first.

    first, second: run directories, or a study's, which stands for its stages. out: the page.

    Raises:
        ValueError: one isn't a finished run, or they have nothing in common; says why.
    """
    paths = {"first": local_path("first", first), "second": local_path("second", second)}
    runs = {name: _stages(name, path) for name, path in paths.items()}
    pairs = _pairs(runs["first"], runs["second"])
    sides: dict[Path, Side] = {}
    for _, *both in pairs:
        for run in both:
            if run.path not in sides:
                sides[run.path] = _side(run)
    found = compare([(stage, sides[one.path], sides[two.path]) for stage, one, two in pairs])
    shown = pairs[0][1:]
    return write_comparison(
        local_path("out", out),
        title=f"{paths['first'].name} and {paths['second'].name}, compared",
        comparison=found,
        runs=[{"Run": paths[name].name, **_info(run)} for name, run in zip(paths, shown, strict=True)],
        sites=sites_of(shown[0]),
    )


def _stages(name: str, path: Path) -> dict[str, Run]:
    """A study's stages by name, a run by itself as ""."""
    if is_study(path):
        found = {
            folder.name: Run.open(folder) for folder in sorted(path.iterdir()) if (folder / "manifest.json").is_file()
        }
        if not found:
            raise ValueError(f"{name}: the study {str(path)!r} has no stage yet, expected a finished one")
    else:
        try:
            found = {"": Run.open(path)}
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for run in found.values():
        check_described(run)
        if lacking := unfinished(run):
            raise ValueError(f"{name}: {str(run.path)!r} isn't finished (units: {lacking}), expected a finished run")
    return found


def _pairs(first: dict[str, Run], second: dict[str, Run]) -> list[tuple[str, Run, Run]]:
    """The stages of two studies by name; a single run goes with every stage."""
    if "" in first or "" in second:
        return [(one or two, run, other) for one, run in first.items() for two, other in second.items()]
    shared = [stage for stage in first if stage in second]
    if not shared:
        raise ValueError(f"second: the studies have no stage in common: {', '.join(first)} against {', '.join(second)}")
    return [(stage, first[stage], second[stage]) for stage in shared]


def _side(run: Run) -> Side:
    with as_written(run):
        return Side(run.manifest, {kind: table_in_memory(run, kind) for kind in run.tables if kind in KINDS})


def _info(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run_info(run.manifest).items() if name in _SHOWN}
