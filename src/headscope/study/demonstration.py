"""`headscope study`: three sweeps, the analysis, and the page, with what was selected on one split tested on the other.

observe/    every head's entropy, all groups, both splits
discover/   every head ablated (mean fill), the contrast's groups, discover split
confirm/    the heads selected there, mean and zero fill, confirm split
tables/     the numbers of the page, as CSV
report.html
"""

import contextlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console

from headscope._fields import settle
from headscope._files import is_utf8, local_path, write_atomic
from headscope._machine import checked_device, memory_bytes
from headscope.counter import check_seed
from headscope.report.naming import listed
from headscope.report.page import STUDY_CAVEATS, GroupInfo, write_report, write_sweep_report
from headscope.study.ablation import select_heads
from headscope.study.analysis import NATURAL, SYNTHETIC, StudyResult, analyse
from headscope.sweep import Run, SweepConfig, run_sweep
from headscope.sweep.plan.config import SPLITS
from headscope.sweep.store.run import as_written
from headscope.zoo import GROUPS, open_group

REPORT = "report.html"
STUDY = "study.json"
TITLE = "Attention heads of a small diffusion model"
STAGES = ("observe", "discover", "confirm")
TRAINING_CAVEAT = (
    "The model was trained on equally many sources and presentations of each group, none of them observed here; but the"
    " drawn faces come in colour and in grey, so it has met their shapes twice as often as photographed faces. These"
    " differ in more than being photographs, too: sensor noise, varied poses."
)
# what a set of heads may have done to it
_EDITS = ("keep", "temperature", "key_bias", "key_scale")
# what reports read of a manifest: see `_fits`
_DESCRIPTION: dict[str, Any] = {
    "identity": {"model": str},
    "config": {
        "model": str,
        "dtype": str,
        "seed": int,
        "groups": [str],
        "sets": [{"name": str, "sites": [str], "heads": [(str, int)]}],
    },
    "sites": [{"name": str, "heads": int}],
    "groups": [{"name": str, "description": str, "items": object}],
    "device": str,
    "threads": object,
    "versions": dict,
    "created": str,
    "timesteps": list,
    "forwards": int,
}
# how many images of each group the page shows
SHOWN_IMAGES = 20


@dataclass(frozen=True)
class StudyConfig:
    """What a study is asked to do. The defaults take about two minutes on two cores.

    Attributes:
        groups: the zoo groups whose entropies are observed; the contrast's two are always among them.
        items: items of each group and split, observed.
        discover_items: items of each of the contrast's groups on which every head is ablated, to select some.
        confirm_items: items of each of the contrast's groups on which the selected heads are tested.
        heads_per_group: how many heads each group selects.
        observe_bands, ablate_bands: how many log-SNR bands, one timestep each.
        seed: the noise replicate, and the resampling's seed.
        device, dtype: where and in what the model runs.
    """

    groups: tuple[str, ...] = ("faces", "faces_grey", "lfw", "photographs")
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
        for name in ("items", "discover_items", "confirm_items", "heads_per_group", "observe_bands", "ablate_bands"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        unknown = [name for name in self.groups if name not in GROUPS]
        if unknown:
            raise ValueError(f"groups: got {', '.join(unknown)}, expected some of {', '.join(GROUPS)}")
        # the later stages', too, before the first begins
        asked = [
            ("items", (*self.groups, *self.contrast)),
            *((f"{s}_items", self.contrast) for s in ("discover", "confirm")),
        ]
        for name, groups in asked:
            least = min(len(open_group(group).indices(split)) for group in groups for split in SPLITS)
            if getattr(self, name) > least:
                raise ValueError(
                    f"{name}: got {getattr(self, name)} of each split, expected at most the groups' {least}"
                )
        # what its sweeps can't be refuses itself now, not when they begin
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
        return self._sweep(groups=self.contrast, bands=self.ablate_bands, observe=False, **fields)

    def _sweep(self, **fields: Any) -> SweepConfig:
        return SweepConfig(seed=self.seed, device=self.device, dtype=self.dtype, **fields)


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
        out: the study's directory; a study of the same configuration there is gone on with.
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
    heads = select_heads(_text(discover, "ablations"), config.heads_per_group)
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
        _check_described(run)
    finished = {stage: run for stage, run in runs.items() if run.kinds}
    if "observe" not in finished:
        raise ValueError(f"study: {str(out)!r} has no finished unit yet, expected some results to report")
    tables = {
        stage: _text(finished[stage], kind) if stage in finished else None
        for stage, kind in zip(STAGES, ("observations", "ablations", "ablations"), strict=True)
    }
    result = analyse(
        tables["observe"],
        tables["discover"],
        tables["confirm"],
        count_per_group=settings["heads_per_group"],
        sites=_sites(finished["observe"]),
        seed=settings["seed"],
    )
    write_tables(out / "tables", result)
    manifest = finished["observe"].manifest
    info = run_info(manifest)
    for stage in STAGES[1:]:
        if stage in finished:
            info[f"Ablations, {stage}"] = _work(finished[stage].manifest)
    unfinished = [stage for stage in STAGES if stage not in runs or not runs[stage].complete]
    caveats = [*STUDY_CAVEATS, TRAINING_CAVEAT]
    if unfinished:
        caveats.insert(0, f"This study is not finished ({', '.join(unfinished)}): every number here will change.")
    return write_report(
        out / REPORT,
        title=TITLE,
        run_info=info,
        groups=group_infos(manifest),
        result=result,
        caveats=caveats,
    )


def report_sweep(path: Path) -> Path:
    """Write report.html into a sweep's run directory, from whichever tables it has.

    Raises:
        ValueError: it isn't a run, has no finished unit, or its tables are damaged or of another shape.
    """
    run = Run.open(path)
    _check_described(run)
    with as_written(run):
        tables = {kind: _text(run, kind) for kind in run.tables}
        if not tables:
            raise ValueError(f"run: {str(path)!r} has no finished unit yet, expected some results to report")
        return write_sweep_report(
            run.path / REPORT,
            title=f"Sweep of {_model_name(run.manifest)}",
            run_info=run_info(run.manifest),
            groups=group_infos(run.manifest),
            sites=_sites(run),
            seed=run.manifest["config"]["seed"],
            others={kind: table for kind, table in tables.items() if kind not in run.kinds},
            caveats=_unfinished(run),
            **{kind: table for kind, table in tables.items() if kind in run.kinds},
        )


def _unfinished(run: Run) -> list[str]:
    """What a reader of an unfinished run's numbers must know."""
    lacking = [f"{kind} {done:,} of {every:,}" for kind, (done, every) in run.status().units.items() if done < every]
    if not lacking:
        return []
    return [f"This run is not finished: every number here will change. Units that are done: {', '.join(lacking)}."]


def _check_described(run: Run) -> None:
    """Raises ValueError where a whole manifest, made elsewhere, doesn't say what a report shows."""
    lacking = [name for name in _DESCRIPTION if name not in run.manifest]
    if lacking:
        raise ValueError(f"run: the manifest of {str(run.path)!r} lacks {', '.join(lacking)}, which reports show")
    for name, shape in _DESCRIPTION.items():
        if not _fits(run.manifest[name], shape):
            raise ValueError(
                f"run: the manifest of {str(run.path)!r} says something else of {name} than headscope writes, which"
                " reports show"
            )
    check_seed(run.manifest["config"]["seed"])


def _fits(value: Any, shape: Any) -> bool:
    """Whether JSON is of a shape: a type, a list of one shape, a tuple of one for each part, or one for each key."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(name in value and _fits(value[name], own) for name, own in shape.items())
    if isinstance(shape, tuple):
        return (
            isinstance(value, list)
            and len(value) == len(shape)
            and all(_fits(part, own) for part, own in zip(value, shape, strict=True))
        )
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(part, shape[0]) for part in value)
    if shape is str and isinstance(value, str):
        # JSON can say halves of characters, which no page and no table holds
        return is_utf8(value)
    return isinstance(value, shape)


def is_study(path: Path) -> bool:
    return (path / STUDY).is_file()


def write_tables(folder: Path, result: StudyResult) -> None:
    """The numbers of the page, a CSV file each."""
    for name, table in result.tables().items():
        write_atomic(folder / f"{name}.csv", table.write_csv)


def run_info(manifest: dict[str, Any]) -> dict[str, Any]:
    """What was run, in the order to show it."""
    config = manifest["config"]
    heads = sum(site["heads"] for site in manifest["sites"])
    sets = {"Sets of heads": _sets(config["sets"])} if config["sets"] else {}
    return {
        "Model": f"{_model_name(manifest)}: {len(manifest['sites'])} attention sites, {heads} heads",
        "Model fingerprint": manifest["identity"]["model"][:16],
        "Device": f"{manifest['device']}, {manifest['threads']} threads, {config['dtype']}",
        "Versions": manifest["versions"],
        "Started": manifest["created"],
        "Noise replicate (seed)": config["seed"],
        "Timesteps": manifest["timesteps"],
        "Work": _work(manifest),
        **sets,
    }


def _sets(sets: list[dict[str, Any]]) -> str:
    """What each set is: its sites and heads, and what is done to them."""
    described = []
    for chosen in sets:
        heads = [f"{site} h{head}" for site, head in chosen["heads"]]
        edits = [
            f"{name} {listed(value)}" for name, value in chosen.items() if name in _EDITS and value not in (None, [])
        ]
        described.append(f"{chosen['name']}: {', '.join([*chosen['sites'], *heads])} ({', '.join(edits) or 'removed'})")
    return "; ".join(described)


def group_infos(manifest: dict[str, Any]) -> list[GroupInfo]:
    """The run's groups with sample images, as far as they can be opened again."""
    folders = dict(text.partition("=")[::2] for text in manifest["config"]["groups"])
    infos = []
    for group in manifest["groups"]:
        images = np.zeros((0, 1, 1, 3), np.uint8)
        if group["name"] in folders:
            # a folder may be gone by now, or hold an image that the sweep had no use for and that can't be read
            with contextlib.suppress(ValueError, OSError):
                opened = open_group(group["name"], folders[group["name"]] or None)
                indices = opened.indices("confirm")
                chosen = indices[:: max(1, len(indices) // SHOWN_IMAGES)][:SHOWN_IMAGES]
                images = np.stack([opened.item(index).image for index in chosen]) if chosen else images
        infos.append(GroupInfo(group["name"], group["description"], images))
    return infos


def _sites(run: Run) -> list[str]:
    """The model's sites in the order of execution."""
    return [site["name"] for site in run.manifest["sites"]]


def _model_name(manifest: dict[str, Any]) -> str:
    model = manifest["config"]["model"]
    return "the bundled 2.6 M-parameter UNet (32 x 32 pixels)" if model == "builtin" else Path(model).name


def _work(manifest: dict[str, Any]) -> str:
    groups = ", ".join(f"{group['name']} {group['items']} items" for group in manifest["groups"])
    return f"{manifest['forwards']:,} forwards of one image; {groups}; timesteps {manifest['timesteps']}"


def _text(run: Run, kind: str) -> pl.DataFrame:
    """A run's table with its labels as strings.

    Raises:
        ValueError: it doesn't fit in memory. A small file may hold any number of equal rows.
    """
    table = run.table(kind)
    rows = table.select(pl.len()).collect().item()
    # numbers of 8 bytes and less, and texts of 16 and more
    needed, there = 8 * rows * len(table.collect_schema()), memory_bytes()
    if needed > there:
        raise ValueError(
            f"run: {kind} of {str(run.path)!r} has {rows:,} rows, about {needed / 2**30:,.1f} GiB; reports are made of"
            f" tables that fit in the {there / 2**30:,.1f} GiB of this machine's memory"
        )
    return table.with_columns(pl.col(pl.Categorical).cast(pl.String)).collect()
