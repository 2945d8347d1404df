"""`headscope study`: sweeps, their analysis, and the page, with what was selected on one split tested on the other.

observe/         every head's entropy, all groups and splits
untrained/       the same of the model before it was trained, the contrast's groups
discover/        every head, site and level ablated (mean fill), the contrast's groups and a tied pair's, discover split
confirm/         the heads and sets selected there, sites and levels, every fill, confirm split
curves-GROUP/    more and more heads removed, and by degrees, confirm split
drawn/           images drawn with and without the selected sets
tables/          the numbers of the page, as CSV
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
from headscope.demonstration.runs import (
    REPORT,
    check_described,
    drawn_in,
    edits_in,
    group_infos,
    run_info,
    sites_of,
    table_in_memory,
    work_of,
)
from headscope.demonstration.stages import StudyConfig
from headscope.report.caveats import STUDY_CAVEATS
from headscope.report.page import write_report
from headscope.study.analysis import analyse
from headscope.sweep import Run, SweepConfig, run_sweep

STUDY = "study.json"
TITLE = "Attention heads of a small diffusion model"
TRAINING_CAVEAT = (
    "The model was trained on as many images and presentations of the drawn faces in grey as of photographed faces,"
    " none of them observed here; but drawn faces come in other groups, too (in colour), so it has met their shapes"
    " more often. The two differ in more than being photographs: sensor noise, varied poses."
)

PLANTED_CAVEAT = (
    "The model's heads were written by hand (docs/planted.md): what is found here can be held against what is known of"
    " them, and says nothing about models that were trained."
)


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
    _claim(out, config)
    ran: dict[str, Run] = {}
    for stage in config.stages:
        ran[stage] = run_sweep(
            _sweep_of(config, stage, ran), out / stage, title=_TITLES[stage.partition("-")[0]], **show
        )
    return report_study(out)


_TITLES = {
    "observe": "entropy of every head",
    "untrained": "entropy before training",
    "discover": "every head and site ablated",
    "confirm": "what was selected, tested",
    "curves": "more and more heads removed",
    "drawn": "images drawn without heads",
}


def _sweep_of(config: StudyConfig, stage: str, ran: dict[str, Run]) -> SweepConfig:
    """A stage's sweep, given those that ran before it."""
    name, _, group = stage.partition("-")
    if name in ("observe", "untrained"):
        return {"observe": stages.observe, "untrained": stages.untrained}[name](config)
    if name == "discover":
        return stages.discover(config, _wholes(ran["observe"]))
    ablations = table_in_memory(ran["discover"], "ablations")
    if name == "confirm":
        return stages.confirm(config, _wholes(ran["observe"]), ablations)
    return stages.curves(config, group, ablations) if name == "curves" else stages.drawn(config, ablations)


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
    """Write report.html and tables/ from a study's finished stages.

    Raises:
        ValueError: nothing is finished yet.
    """
    out = local_path("out", out)
    config = read_study(out)
    runs = {stage: Run.open(out / stage) for stage in config.stages if (out / stage / "manifest.json").is_file()}
    for run in runs.values():
        check_described(run)
    finished = {stage: run for stage, run in runs.items() if run.tables}
    if "observe" not in finished:
        raise ValueError(f"study: {str(out)!r} has no finished unit yet, expected some results to report")

    def table(stage: str, kind: str) -> pl.DataFrame | None:
        return table_in_memory(finished[stage], kind) if stage in finished and kind in finished[stage].tables else None

    curves = [table(stage, "set_ablations") for stage in config.stages if stage.startswith("curves-")]
    curves = [part for part in curves if part is not None]
    edits = {edit.name: edit for run in finished.values() for edit in edits_in(run)}
    result = analyse(
        table("observe", "observations"),
        table("discover", "ablations"),
        table("confirm", "ablations"),
        discover_sets=table("discover", "set_ablations"),
        confirm_sets=table("confirm", "set_ablations"),
        untrained=table("untrained", "observations"),
        curves=pl.concat(curves, how="diagonal") if curves else None,
        edits=tuple(edits.values()),
        targets=stages.targets_of(config),
        count_per_group=config.heads_per_group,
        sites=sites_of(finished["observe"]),
        seed=config.seed,
    )
    for name, numbers in result.tables().items():
        write_atomic(out / "tables" / f"{name}.csv", numbers.write_csv)
    manifest = finished["observe"].manifest
    info = run_info(manifest)
    for stage in config.stages[1:]:
        if stage in finished:
            info[f"Work, {stage}"] = work_of(finished[stage].manifest)
    unfinished = [stage for stage in config.stages if stage not in runs or not runs[stage].complete]
    planted = config.model.startswith("planted:")
    caveats = [*STUDY_CAVEATS, PLANTED_CAVEAT if planted else TRAINING_CAVEAT]
    if unfinished:
        caveats.insert(0, f"This study is not finished ({', '.join(unfinished)}): every number here will change.")
    return write_report(
        out / REPORT,
        title=TITLE,
        run_info=info,
        groups=group_infos(manifest),
        result=result,
        caveats=caveats,
        drawn=drawn_in(finished["drawn"]) if "drawn" in finished else (),
    )


def is_study(path: Path) -> bool:
    """True if the directory holds a study, finished or not."""
    return (path / STUDY).is_file()
