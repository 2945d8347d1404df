"""`headscope study`: three sweeps, the analysis, and the page, with what was selected on one split tested on the other.

observe/    every head's entropy, all groups, both splits
discover/   every head ablated (mean fill), the contrast's groups and a tied pair's, discover split
confirm/    the heads selected there, mean and zero fill, confirm split
tables/     the numbers of the page, as CSV
report.html
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from headscope._fields import settle
from headscope._files import local_path, write_atomic
from headscope._machine import checked_device
from headscope.demonstration.runs import (
    REPORT,
    check_described,
    group_infos,
    run_info,
    sites_of,
    table_in_memory,
    work_of,
)
from headscope.report.caveats import STUDY_CAVEATS
from headscope.report.page import write_report
from headscope.study.ablation import select_heads
from headscope.study.analysis import NATURAL, SYNTHETIC, analyse
from headscope.sweep import Run, SweepConfig, run_sweep
from headscope.sweep.plan.config import SPLITS
from headscope.zoo import BUNDLED, DEFAULT_MODEL, GROUPS, MODELS, open_group

STUDY = "study.json"
TITLE = "Attention heads of a small diffusion model"
TIED = ("twins", "distinct")
OBSERVED = ("faces", "faces_grey", "lfw", "photographs", *TIED)
STAGES = ("observe", "discover", "confirm")
TRAINING_CAVEAT = (
    "The model was trained on as many images and presentations of the drawn faces in grey as of photographed faces,"
    " none of them observed here; but drawn faces come in other groups, too (in colour), so it has met their shapes"
    " more often. The two differ in more than being photographs: sensor noise, varied poses."
)

PLANTED_CAVEAT = (
    "The model's heads were written by hand (docs/planted.md): what is found here can be held against what is known of"
    " them, and says nothing about models that were trained."
)


@dataclass(frozen=True)
class StudyConfig:
    """The settings of a study. The defaults take about two minutes on two cores.

    Attributes:
        model: the bundled model's name.
        groups: the zoo groups whose entropies are observed, and the contrast's two besides; none given are the faces,
            photographs and one tied pair, as far as the model was trained on them.
        ablate_groups: the groups on which heads are ablated; none given are the contrast's, and of a model that was
            trained on them "twins" and "distinct": images whose far parts are tied, and their untied control.
        items: items of each group and split, observed.
        discover_items: items of each group on which every head is ablated, to select some.
        confirm_items: items of each group on which the selected heads are tested.
        heads_per_group: how many heads each group selects.
        observe_bands, ablate_bands: how many log-SNR bands, one timestep each.
        seed: the noise replicate, and the resampling's seed.
        device, dtype: where and in what the model runs.
    """

    model: str = DEFAULT_MODEL
    groups: tuple[str, ...] = ()
    ablate_groups: tuple[str, ...] = ()
    items: int = 20
    discover_items: int = 16
    confirm_items: int = 20
    heads_per_group: int = 5
    observe_bands: int = 5
    ablate_bands: int = 3
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        settle(self)
        if self.model not in BUNDLED:
            raise ValueError(f"model: got {self.model!r}, expected one of {', '.join(BUNDLED)}")
        # planted models weren't taught any
        taught = MODELS[self.model].groups if self.model in MODELS else tuple(GROUPS)
        # frozen for everybody else
        if not self.groups:
            object.__setattr__(self, "groups", tuple(name for name in OBSERVED if name in taught))
        if not self.ablate_groups:
            object.__setattr__(self, "ablate_groups", (*self.contrast, *(name for name in TIED if name in taught)))
        for name in ("items", "discover_items", "confirm_items", "heads_per_group", "observe_bands", "ablate_bands"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        for field in ("groups", "ablate_groups"):
            unknown = [name for name in getattr(self, field) if name not in GROUPS]
            if unknown:
                raise ValueError(f"{field}: got {', '.join(unknown)}, expected some of {', '.join(GROUPS)}")
        # the later stages', too, before the first begins
        asked = [
            ("items", (*self.groups, *self.contrast)),
            *((f"{s}_items", self.ablate_groups) for s in ("discover", "confirm")),
        ]
        for name, groups in asked:
            least = min(len(open_group(group).indices(split)) for group in groups for split in SPLITS)
            if getattr(self, name) > least:
                raise ValueError(
                    f"{name}: got {getattr(self, name)} of each split, expected at most the groups' {least}"
                )
        # settings that no sweep can have are refused now, not when the sweeps begin
        self.observe()

    @property
    def contrast(self) -> tuple[str, str]:
        return SYNTHETIC, NATURAL

    def observe(self) -> SweepConfig:
        groups = tuple(dict.fromkeys((*self.groups, *self.contrast)))
        return self._sweep(groups=groups, items=self.items, bands=self.observe_bands, fills=(), scores=())

    def discover(self) -> SweepConfig:
        return self._ablate(splits=("discover",), items=self.discover_items, fills=("mean",))

    def confirm(self, heads: list[tuple[str, int]]) -> SweepConfig:
        return replace(
            self._ablate(splits=("confirm",), items=self.confirm_items, fills=("mean", "zero")), heads=tuple(heads)
        )

    def _ablate(self, **fields: Any) -> SweepConfig:
        return self._sweep(groups=self.ablate_groups, bands=self.ablate_bands, observe=False, **fields)

    def _sweep(self, **fields: Any) -> SweepConfig:
        return SweepConfig(model=self.model, seed=self.seed, device=self.device, dtype=self.dtype, **fields)


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
    run_sweep(config.observe(), out / "observe", title="entropy of every head", **show)
    discover = run_sweep(config.discover(), out / "discover", title="every head ablated", **show)
    heads = select_heads(table_in_memory(discover, "ablations"), config.heads_per_group)
    run_sweep(config.confirm(heads), out / "confirm", title="selected heads tested", **show)
    return report_study(out)


def _claim(out: Path, config: StudyConfig) -> None:
    """Make the directory this study's, or make sure it is."""
    asked = json.loads(json.dumps(asdict(config)))
    if is_study(out):
        stored = read_study(out)
        different = [name for name in asked if stored.get(name) != asked[name]]
        if different:
            changes = "".join(f"\n  {name}: {stored.get(name)} there, {asked[name]} now" for name in different)
            raise ValueError(
                f"out: {str(out)!r} holds a study of another configuration; choose another directory{changes}"
            )
        return
    if out.exists() and not (out.is_dir() and all(entry.name.startswith(f".{STUDY}.") for entry in out.iterdir())):
        raise ValueError(f"out: got {str(out)!r}, which holds something that isn't a study; expected a new directory")
    write_atomic(out / STUDY, json.dumps(asked, indent=2).encode())


def read_study(out: Path) -> dict[str, Any]:
    """The settings a study was started with."""
    try:
        settings = json.loads((out / STUDY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"study: {str(out / STUDY)!r} can't be read ({error})") from None
    whole = isinstance(settings, dict) and all(type(settings.get(name)) is int for name in ("heads_per_group", "seed"))
    if not whole:
        raise ValueError(f"study: {str(out / STUDY)!r} holds no study's settings, expected what headscope study wrote")
    return settings


def report_study(out: Path) -> Path:
    """Write report.html and tables/ from a study's finished stages.

    Raises:
        ValueError: nothing is finished yet.
    """
    settings = read_study(local_path("out", out))
    runs = {stage: Run.open(out / stage) for stage in STAGES if (out / stage / "manifest.json").is_file()}
    for run in runs.values():
        check_described(run)
    finished = {stage: run for stage, run in runs.items() if run.kinds}
    if "observe" not in finished:
        raise ValueError(f"study: {str(out)!r} has no finished unit yet, expected some results to report")
    tables = {
        stage: table_in_memory(finished[stage], kind) if stage in finished else None
        for stage, kind in zip(STAGES, ("observations", "ablations", "ablations"), strict=True)
    }
    result = analyse(
        tables["observe"],
        tables["discover"],
        tables["confirm"],
        count_per_group=settings["heads_per_group"],
        sites=sites_of(finished["observe"]),
        seed=settings["seed"],
    )
    for name, table in result.tables().items():
        write_atomic(out / "tables" / f"{name}.csv", table.write_csv)
    manifest = finished["observe"].manifest
    info = run_info(manifest)
    for stage in STAGES[1:]:
        if stage in finished:
            info[f"Ablations, {stage}"] = work_of(finished[stage].manifest)
    unfinished = [stage for stage in STAGES if stage not in runs or not runs[stage].complete]
    planted = manifest["config"]["model"].startswith("planted:")
    caveats = [*STUDY_CAVEATS, PLANTED_CAVEAT if planted else TRAINING_CAVEAT]
    if unfinished:
        caveats.insert(0, f"This study is not finished ({', '.join(unfinished)}): every number here will change.")
    return write_report(
        out / REPORT, title=TITLE, run_info=info, groups=group_infos(manifest), result=result, caveats=caveats
    )


def is_study(path: Path) -> bool:
    """True if the directory holds a study, finished or not."""
    return (path / STUDY).is_file()
