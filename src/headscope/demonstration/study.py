"""`headscope study`: sweeps, their analysis, and the page, with what was selected on one split tested on the other.

observe/         every head's entropy, all groups and splits
untrained/       the same of the model before it was trained, the contrast's groups
discover/        every head, site and level ablated (mean fill), the contrast's groups and a tied pair's, discover split
confirm/         the heads and sets selected there, sites and levels, every fill, confirm split
curves-GROUP/    more and more heads removed, and by degrees, confirm split; of a full study alone
drawn/           images drawn with and without the selected sets; of a full study alone
roles/           features of images, and the attention that each place receives, both splits
ties/            the same of tied groups and their controls, and the attention on counterparts
causal-GROUP/    the heads of each role removed, with the loss on the role's pixels, confirm split
circuits/        sets of heads that are enough, searched, discover split
circuit-GROUP/   what was found, tested, and its edges, confirm split
tables/          the numbers of the page, as CSV
circuit-*.svg    pictures of the circuits
report.html
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console

from headscope._fields import from_table
from headscope._files import local_path, write_atomic
from headscope._machine import checked_device
from headscope.demonstration import stages
from headscope.demonstration.config import StudyConfig
from headscope.demonstration.results import Stages, result_of, write_study
from headscope.demonstration.runs import check_described, sites_of
from headscope.sweep import Run, SweepConfig, run_sweep

STUDY = "study.json"


def run_study(
    config: StudyConfig,
    out: str | Path,
    *,
    batch: int | None = None,
    progress: bool = True,
    console: Console | None = None,
) -> Path:
    """Run the study, or what is left of it, and write its page.

    Args:
        out: the study's directory; a study of the same configuration there is continued.
        batch: rows that pass through the denoiser at once; None measures how many fit.
        progress: show progress.

    Returns:
        The path of report.html.

    Raises:
        ValueError: the directory holds a study of another configuration, or something else.
    """
    out = local_path("out", out)
    show: dict[str, Any] = {"batch": batch, "progress": progress, "console": console}
    checked_device(config.device)
    # settings that no sweep can have are refused now, not when the sweeps begin
    for stage in (stages.observe(config), stages.discover(config, {})):
        assert stage
    _claim(out, config)
    done = Stages(config.seed)
    for stage in config.stages:
        asked = _sweep_of(config, stage, done)
        done.runs[stage] = run_sweep(asked, out / stage, title=_TITLES[stage.partition("-")[0]], **show)
    return write_study(out, config, done, result_of(config, done))


_TITLES = {
    "observe": "entropy of every head",
    "untrained": "entropy before training",
    "discover": "every head and site ablated",
    "confirm": "what was selected, tested",
    "curves": "more and more heads removed",
    "drawn": "images drawn without heads",
    "roles": "where heads look",
    "ties": "where heads look in tied images",
    "causal": "heads of a role removed",
    "circuits": "circuits searched",
    "circuit": "a circuit tested",
}


def _sweep_of(config: StudyConfig, stage: str, done: Stages) -> SweepConfig:
    """A stage's sweep, given those that ran before it."""
    name, _, group = stage.partition("-")
    if name in _FIRST:
        return _FIRST[name](config)
    if name == "discover":
        return stages.discover(config, _wholes(done.runs["observe"]))
    if name == "causal":
        return stages.causal(config, group, done.role_sets)
    if name == "circuit":
        return stages.circuit(config, group, done.of("circuits", "circuits"))
    ablations = done.of("discover", "ablations")
    if name == "confirm":
        return stages.confirm(config, _wholes(done.runs["observe"]), ablations)
    return stages.curves(config, group, ablations) if name == "curves" else stages.drawn(config, ablations)


# the stages that take nothing from others
_FIRST = {
    "observe": stages.observe,
    "untrained": stages.untrained,
    "roles": stages.roles,
    "ties": stages.ties,
    "circuits": stages.circuits,
}


def _wholes(observed: Run) -> dict[str, list[str]]:
    sizes = observed.table("observations").select(pl.col("site").cast(pl.String), "keys").unique().collect()
    return stages.wholes_of(dict(sizes.iter_rows()), sites_of(observed))


def _claim(out: Path, config: StudyConfig) -> None:
    """Make the directory this study's, or make sure it is."""
    asked = json.loads(json.dumps(asdict(config)))
    if is_study(out):
        stored = json.loads(json.dumps(asdict(read_study(out))))
        different = [name for name in asked if stored[name] != asked[name]]
        if different:
            changes = "".join(f"\n  {name}: {stored[name]} there, {asked[name]} now" for name in different)
            raise ValueError(
                f"out: {str(out)!r} holds a study of another configuration; choose another directory{changes}"
            )
        return
    if out.exists() and not (out.is_dir() and all(entry.name.startswith(f".{STUDY}.") for entry in out.iterdir())):
        raise ValueError(f"out: got {str(out)!r}, which holds something that isn't a study; expected a new directory")
    write_atomic(out / STUDY, json.dumps(asked, indent=2).encode())


def read_study(out: Path) -> StudyConfig:
    """The settings a study was started with."""
    file = out / STUDY
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"study: {str(file)!r} can't be read ({error})") from None
    if not isinstance(settings, dict):
        raise ValueError(f"study: {str(file)!r} holds no study's settings, expected what headscope study wrote")
    try:
        return from_table(StudyConfig, settings)
    except ValueError as error:
        raise ValueError(f"study: {str(file)!r} holds no study's settings of this version ({error})") from None


def report_study(out: Path) -> Path:
    """Write report.html, tables/ and pictures from a study's finished stages.

    Raises:
        ValueError: nothing is finished yet.
    """
    out = local_path("out", out)
    config = read_study(out)
    runs = {stage: Run.open(out / stage) for stage in config.stages if (out / stage / "manifest.json").is_file()}
    for stage, run in runs.items():
        check_described(run)
        _check_stage(config, stage, run)
    finished = Stages(config.seed, {stage: run for stage, run in runs.items() if run.tables})
    if "observe" not in finished.runs:
        raise ValueError(f"study: {str(out)!r} has no finished unit yet, expected some results to report")
    unfinished = [stage for stage in config.stages if stage not in runs or not runs[stage].complete]
    return write_study(out, config, finished, result_of(config, finished), unfinished)


def _check_stage(config: StudyConfig, stage: str, run: Run) -> None:
    """Raise ValueError where a stage's directory holds a run of another stage or study."""
    made = run.manifest["config"]
    model = f"untrained:{config.model}" if stage == "untrained" else config.model
    group = stage.partition("-")[2]
    groups = [group] if group else _GROUPS.get(stage, lambda _: None)(config)
    for name, there, expected in (
        ("model", made["model"], model),
        ("seed", made["seed"], config.seed),
        ("groups", made["groups"], groups),
    ):
        if expected is not None and there != (list(expected) if name == "groups" else expected):
            raise ValueError(f"study: its stage {stage!r} holds a run with {name} {there}, expected {expected}")


# of the stages that are of several groups
_GROUPS = {
    "discover": lambda config: config.ablate_groups,
    "confirm": lambda config: config.ablate_groups,
    "ties": lambda config: config.tied_groups,
    "circuits": lambda config: config.curve_groups,
}


def is_study(path: Path) -> bool:
    """True if the directory holds a study, finished or not."""
    return (path / STUDY).is_file()
