"""From the finished stages of a study to its numbers, its page, its tables and its pictures."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import polars as pl

from headscope._files import write_atomic
from headscope.demonstration import stages
from headscope.demonstration.config import StudyConfig
from headscope.demonstration.runs import (
    REPORT,
    drawn_in,
    edits_in,
    group_infos,
    run_info,
    sites_of,
    table_in_memory,
    work_of,
)
from headscope.report.caveats import STUDY_CAVEATS
from headscope.report.page import pictures_of, write_report
from headscope.study.analysis import StudyResult, analyse
from headscope.study.circuits import analyse_circuits
from headscope.study.noise import log_snr_of
from headscope.study.roles import Roles, RoleSet, assess, causal, sets_of
from headscope.sweep import Run

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


# the stages that say where heads look
LOOKING = ("roles", "ties")


@dataclass
class Stages:
    """What the finished stages of a study hold.

    Attributes:
        seed: of the resampling.
        runs: the sweeps, by the stages' names.
    """

    seed: int
    runs: dict[str, Run] = field(default_factory=dict)

    def table(self, stage: str, kind: str) -> pl.DataFrame | None:
        """A table of a stage; None where there is none."""
        run = self.runs.get(stage)
        return table_in_memory(run, kind) if run is not None and kind in run.tables else None

    def of(self, stage: str, kind: str) -> pl.DataFrame:
        """A table that has to be there."""
        return table_in_memory(self.runs[stage], kind)

    def of_groups(self, stage: str, kind: str) -> pl.DataFrame | None:
        """The tables of the stages STAGE-GROUP, one below the other."""
        return self.together([name for name in self.runs if name.startswith(f"{stage}-")], kind)

    def together(self, names: Sequence[str], kind: str) -> pl.DataFrame | None:
        """The tables of some stages, one below the other; None where none of them has any."""
        parts = [part for part in (self.table(name, kind) for name in names) if part is not None]
        return pl.concat(parts, how="diagonal") if parts else None

    @cached_property
    def looked(self) -> pl.DataFrame | None:
        """What images show, of every group whose heads' roles were looked for."""
        return self.together([name for name in LOOKING if name in self.runs], "features")

    @cached_property
    def roles(self) -> Roles | None:
        """What every head does, as far as it was looked for."""
        looked = [name for name in LOOKING if name in self.runs]
        features, key_mass = self.looked, self.together(looked, "key_mass")
        if features is None or key_mass is None:
            return None
        ratios = log_snr_of(self.runs[looked[0]].manifest)
        controls = {group: control for group in key_mass["group"].unique() if (control := stages.control_of(group))}
        counterparts = self.table("ties", "counterparts")
        return assess(features, key_mass, counterparts, controls=controls, log_snr=ratios, seed=self.seed)

    @cached_property
    def role_sets(self) -> list[RoleSet]:
        """The heads of each role, to be removed together, with controls."""
        return [] if self.roles is None else sets_of(self.roles.chosen, seed=self.seed)


def result_of(config: StudyConfig, done: Stages) -> StudyResult:
    """All numbers of a study."""
    edits = {edit.name: edit for run in done.runs.values() for edit in edits_in(run)}
    result = analyse(
        done.table("observe", "observations"),
        done.table("discover", "ablations"),
        done.table("confirm", "ablations"),
        discover_sets=done.table("discover", "set_ablations"),
        confirm_sets=done.table("confirm", "set_ablations"),
        untrained=done.table("untrained", "observations"),
        curves=done.of_groups("curves", "set_ablations"),
        edits=tuple(edits.values()),
        targets=stages.targets_of(config),
        count_per_group=config.heads_per_group,
        sites=sites_of(done.runs["observe"]),
        seed=config.seed,
    )
    removed, tested = done.of_groups("causal", "set_ablations"), done.of_groups("circuit", "set_ablations")
    trace = done.table("circuits", "circuits")
    effects = None if removed is None else causal(removed, done.role_sets, seed=config.seed)
    circuits = None
    if trace is not None and tested is not None:
        circuits = analyse_circuits(tested, done.of_groups("circuit", "paths"), trace, seed=config.seed)
    sources = _with(result.sources, done.looked)
    groups = list(dict.fromkeys([*result.groups, *sources["group"]]))
    return replace(result, groups=groups, sources=sources, roles=done.roles, role_effects=effects, circuits=circuits)


def _with(sources: pl.DataFrame, looked: pl.DataFrame | None) -> pl.DataFrame:
    """How many items and sources of each group and split were looked at: by the larger of two sweeps that did."""
    if looked is None:
        return sources
    more = looked.group_by("group", "split", maintain_order=True).agg(
        items=pl.col("item").n_unique(), sources=pl.col("source_id").n_unique()
    )
    both = pl.concat([sources, more.select(pl.col(name).cast(sources[name].dtype) for name in sources.columns)])
    return both.group_by("group", "split", maintain_order=True).agg(pl.col("items", "sources").max())


def write_study(
    out: Path, config: StudyConfig, done: Stages, result: StudyResult, unfinished: Sequence[str] = ()
) -> Path:
    """Write a study's page, its tables as CSV, and its circuits as SVG.

    unfinished: the stages that are.
    """
    tables = result.tables()
    for name, numbers in tables.items():
        write_atomic(out / "tables" / f"{name}.csv", numbers.write_csv)
    # of an earlier report, when other stages were finished
    for old in (out / "tables").glob("*.csv"):
        if old.stem not in tables:
            old.unlink()
    manifest = done.runs["observe"].manifest
    infos = [info for run in done.runs.values() for info in group_infos(run.manifest)]
    groups = list({info.name: info for info in reversed(infos)}.values())[::-1]
    pictures = pictures_of(result, groups)
    for name, text in pictures.items():
        write_atomic(out / f"{name}.svg", text.encode())
    for old in out.glob("circuit-*.svg"):
        if old.stem not in pictures:
            old.unlink()
    info = run_info(manifest)
    for stage in config.stages[1:]:
        if stage in done.runs:
            info[f"Work, {stage}"] = work_of(done.runs[stage].manifest)
    planted = config.model.startswith("planted:")
    caveats = [*STUDY_CAVEATS, PLANTED_CAVEAT if planted else TRAINING_CAVEAT]
    if unfinished:
        caveats.insert(0, f"This study is not finished ({', '.join(unfinished)}): every number here will change.")
    return write_report(
        out / REPORT,
        title=TITLE,
        run_info=info,
        groups=groups,
        result=result,
        caveats=caveats,
        drawn=drawn_in(done.runs["drawn"]) if "drawn" in done.runs else (),
    )
