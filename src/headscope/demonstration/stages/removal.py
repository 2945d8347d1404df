"""The sweeps that remove heads: all of them to select some, then what was selected, curves, and whole images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from headscope.demonstration.config import ALL, CURVE_COUNTS, DOSES, RANDOM_ORDERS, REFERENCE_FOLDS, StudyConfig
from headscope.demonstration.stages.sweeping import ablating, sweeping
from headscope.study.ablation import ranked_heads, select_heads
from headscope.study.curves import curve_sets, dose_name
from headscope.sweep import HeadSet, SweepConfig
from headscope.zoo import Tied, open_group


def discover(config: StudyConfig, wholes: Mapping[str, Sequence[str]]) -> SweepConfig:
    """Every head, site and level, and all heads, removed on the discover split.

    wholes: the sites of each site and level, by name; see `wholes_of`.
    """
    return ablating(
        config,
        splits=("discover",),
        items=config.discover_items,
        draws=config.fewer_draws,
        fills=("mean",),
        sets=tuple(_whole_sets(wholes)),
    )


def confirm(config: StudyConfig, wholes: Mapping[str, Sequence[str]], ablations: pl.DataFrame) -> SweepConfig:
    """What was selected on discover, and every site and level, on the confirm split, in a full study with
    every fill.

    ablations: those of the discover split.
    """
    chosen = selected_sets(config, ablations)
    heads = [*select_heads(ablations, config.heads_per_group), *(head for one in chosen for head in one.heads)]
    return ablating(
        config,
        splits=("confirm",),
        items=config.confirm_items,
        fills=("mean", "zero", "uniform", "resample") if config.full else ("mean",),
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
    return ablating(
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
    return sweeping(
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
