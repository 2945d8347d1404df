"""The sweeps of a study, in the order they run, and what each takes from those before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from headscope._fields import settle
from headscope.study.ablation import ranked_heads, select_heads
from headscope.study.analysis import NATURAL, SYNTHETIC
from headscope.study.curves import curve_sets, dose_name
from headscope.sweep import HeadSet, SweepConfig
from headscope.sweep.plan.config import SPLITS
from headscope.zoo import BUNDLED, DEFAULT_MODEL, GROUPS, MODELS, Tied, open_group

TIED = ("tiled", "untiled")
OBSERVED = ("faces", "faces_grey", "lfw", "photographs", *TIED)
# the contrast's groups with equal histograms
MATCHED = {NATURAL: f"{NATURAL}_matched", SYNTHETIC: f"{SYNTHETIC}_matched"}
ALL = "all heads"
CURVE_COUNTS = (1, 2, 4, 8, 16, 32)
RANDOM_ORDERS = 4
# of the mean fill's reference images
REFERENCE_FOLDS = 4
DOSES = (0.25, 0.5, 0.75, 1.25, 1.5)


@dataclass(frozen=True)
class StudyConfig:
    """The settings of a study. The defaults take about eight minutes on two cores.

    Attributes:
        model: the bundled model's name.
        groups: the zoo groups whose entropies are observed, and the contrast's two besides; none given are the faces,
            photographs and one tied pair, as far as the model was trained on them.
        ablate_groups: the groups on which heads are ablated; none given are the contrast's, and of a model that was
            trained on them "tiled" and "untiled": textures whose far parts are tied, and their untied control.
        items: items of each group and split, observed.
        discover_items: items of each group on which every head is ablated, to select some.
        confirm_items: items of each group on which the selected heads are tested.
        draws: noise draws of each item.
        heads_per_group: how many heads each group selects.
        observe_bands, ablate_bands: how many log-SNR bands, one timestep each.
        reference_items: of the mean fill; None takes all training items.
        drawn_images: how many images are drawn with and without some sets of heads; 0 for none.
        seed: the first noise replicate, and the resampling's seed.
        device, dtype: where and in what the model runs.
    """

    model: str = DEFAULT_MODEL
    groups: tuple[str, ...] = ()
    ablate_groups: tuple[str, ...] = ()
    items: int = 20
    discover_items: int = 20
    confirm_items: int = 20
    draws: int = 4
    heads_per_group: int = 3
    observe_bands: int = 5
    ablate_bands: int = 3
    reference_items: int | None = None
    drawn_images: int = 6
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
        for name in (
            *("items", "discover_items", "confirm_items", "draws", "heads_per_group", "observe_bands", "ablate_bands"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.reference_items is not None and self.reference_items < REFERENCE_FOLDS:
            raise ValueError(
                f"reference_items: got {self.reference_items}, expected at least {REFERENCE_FOLDS}, of the parts whose"
                " means give the fill's own error"
            )
        if self.drawn_images < 0:
            raise ValueError(f"drawn_images: got {self.drawn_images}, expected at least 0")
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
        for name in self.ablate_groups:
            count = len(open_group(name).sources("train"))
            if count < REFERENCE_FOLDS:
                raise ValueError(
                    f"ablate_groups: got {name}, whose training images are of {count} sources; expected groups of at"
                    f" least {REFERENCE_FOLDS}"
                )
        # settings that no sweep can have are refused now, not when the sweeps begin
        for stage in (observe(self), discover(self, {})):
            assert stage

    @property
    def contrast(self) -> tuple[str, str]:
        return SYNTHETIC, NATURAL

    @property
    def curve_groups(self) -> tuple[str, ...]:
        """The groups whose curves are drawn: the first of the contrast's and of the tied ones that is ablated."""
        found = [next((name for name in names if name in self.ablate_groups), None) for names in ((NATURAL,), TIED)]
        return tuple(name for name in found if name) or self.ablate_groups[:1]

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the sweeps, in the order they run."""
        untrained = ("untrained",) if f"untrained:{self.model}" in BUNDLED else ()
        drawn = ("drawn",) if self.drawn_images else ()
        curves = tuple(f"curves-{group}" for group in self.curve_groups)
        return ("observe", *untrained, "discover", "confirm", *curves, *drawn)


def observe(config: StudyConfig) -> SweepConfig:
    """Every head's entropy, all groups, training items as well as held-out ones."""
    groups = tuple(dict.fromkeys((*config.groups, *config.contrast, *MATCHED.values())))
    return _sweep(
        config,
        groups=groups,
        splits=("train", *SPLITS),
        items=config.items,
        bands=config.observe_bands,
        fills=(),
        scores=(),
    )


def untrained(config: StudyConfig) -> SweepConfig:
    """The contrast's groups seen by the model before it was trained."""
    return _sweep(
        config,
        model=f"untrained:{config.model}",
        groups=config.contrast,
        items=config.items,
        bands=config.observe_bands,
        fills=(),
        scores=(),
    )


def discover(config: StudyConfig, wholes: Mapping[str, Sequence[str]]) -> SweepConfig:
    """Every head, site and level, and all heads, removed on the discover split.

    wholes: the sites of each site and level, by name; see `wholes_of`.
    """
    return _ablate(
        config, splits=("discover",), items=config.discover_items, fills=("mean",), sets=tuple(_whole_sets(wholes))
    )


def confirm(config: StudyConfig, wholes: Mapping[str, Sequence[str]], ablations: pl.DataFrame) -> SweepConfig:
    """What was selected on discover, and every site and level, on the confirm split, with every fill.

    ablations: those of the discover split.
    """
    chosen = selected_sets(config, ablations)
    heads = [*select_heads(ablations, config.heads_per_group), *(head for one in chosen for head in one.heads)]
    return _ablate(
        config,
        splits=("confirm",),
        items=config.confirm_items,
        fills=("mean", "zero", "uniform", "resample"),
        reference_folds=REFERENCE_FOLDS,
        heads=tuple(dict.fromkeys(heads)),
        sets=(*_whole_sets(wholes), *chosen),
    )


def curves(config: StudyConfig, group: str, ablations: pl.DataFrame) -> SweepConfig:
    """More and more heads of a group removed in several orders, and its selected set turned down step by step."""
    ranked = ranked_heads(ablations, group)
    sets = [HeadSet(name, heads=heads) for name, heads in curve_sets(ranked, CURVE_COUNTS, RANDOM_ORDERS).items()]
    dosed = next(chosen for chosen in selected_sets(config, ablations) if chosen.name == top_name(config, group))
    for name, sites, heads in ((dosed.name, (), dosed.heads), (ALL, ("*",), ())):
        sets += [HeadSet(dose_name(name, gate), sites=sites, heads=heads, keep=gate) for gate in (0.0, *DOSES)]
    return _ablate(
        config,
        groups=(group,),
        splits=("confirm",),
        items=config.confirm_items,
        fills=("mean",),
        heads=(),
        sets=tuple(sets),
    )


def drawn(config: StudyConfig, ablations: pl.DataFrame) -> SweepConfig:
    """Images drawn from the same noise by the whole model and without the selected sets of heads."""
    sets = (*selected_sets(config, ablations), HeadSet(ALL, sites=("*",)))
    return _sweep(
        config,
        draws=1,
        # images are drawn from noise alone; the group names the noise
        groups=config.curve_groups[:1],
        splits=("confirm",),
        items=min(config.drawn_images, config.confirm_items),
        observe=False,
        fills=("mean",),
        scores=("generate",),
        generate_steps=20,
        reference_items=config.reference_items or 20,
        heads=(),
        sets=sets,
    )


def wholes_of(sizes: Mapping[str, int], sites: Sequence[str]) -> dict[str, list[str]]:
    """The sites of every site, and of every resolution that several, but not all, attend at, by their numbers of keys.

    sizes: each site's number of keys. sites: in the order of execution.
    """
    found = {site: [site] for site in sites} if len(sites) > 1 else {}
    for keys in dict.fromkeys(sizes[site] for site in sites):
        level = [site for site in sites if sizes[site] == keys]
        if 1 < len(level) < len(sites):
            found[f"level of {keys} keys"] = level
    return found


def top_name(config: StudyConfig, group: str) -> str:
    """What the set of a group's largest heads is called."""
    return f"top {config.heads_per_group} of {group}"


def control_of(group: str) -> str:
    """The untied control of a tied group; "" of every other group."""
    opened = open_group(group)
    return opened.control if isinstance(opened, Tied) else ""


def carriers_name(group: str) -> str:
    """What the set of the heads that carry a group's tie is called."""
    return f"carriers of {group}"


def targets_of(config: StudyConfig) -> dict[str, str]:
    """The group that each set was selected for, by the names that sets may have."""
    groups = config.ablate_groups
    return {name: group for group in groups for name in (top_name(config, group), carriers_name(group))}


def selected_sets(config: StudyConfig, ablations: pl.DataFrame) -> list[HeadSet]:
    """The sets that discover selects: each group's largest heads; of a tied group those that cost it most beyond what
    they cost its control."""
    count, groups = config.heads_per_group, sorted(ablations["group"].unique())
    sets = [HeadSet(top_name(config, group), heads=tuple(ranked_heads(ablations, group)[:count])) for group in groups]
    for group in groups:
        if (control := control_of(group)) in groups:
            heads = ranked_heads(ablations, group, beyond=control)[:count]
            # often they are the group's largest
            if all(set(heads) != set(chosen.heads) for chosen in sets):
                sets.append(HeadSet(carriers_name(group), heads=tuple(heads)))
    return sets


def _whole_sets(wholes: Mapping[str, Sequence[str]]) -> list[HeadSet]:
    return [*(HeadSet(name, sites=tuple(sites)) for name, sites in wholes.items()), HeadSet(ALL, sites=("*",))]


def _ablate(config: StudyConfig, **fields: Any) -> SweepConfig:
    fields = {"groups": config.ablate_groups, **fields}
    return _sweep(config, bands=config.ablate_bands, observe=False, reference_items=config.reference_items, **fields)


def _sweep(config: StudyConfig, **fields: Any) -> SweepConfig:
    fields = {"model": config.model, "draws": config.draws, **fields}
    return SweepConfig(seed=config.seed, device=config.device, dtype=config.dtype, **fields)
