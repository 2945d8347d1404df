"""The sweeps that search for circuits, and test what was found."""

from __future__ import annotations

import polars as pl

from headscope.demonstration.config import ALL, StudyConfig
from headscope.demonstration.stages.sweeping import ablating
from headscope.study.circuits import circuit_of, confirm_sets
from headscope.sweep import HeadSet, SweepConfig


def circuits(config: StudyConfig) -> SweepConfig:
    """The smallest set of heads that is enough for a group, searched on the discover split."""
    return ablating(
        config,
        groups=config.curve_groups,
        splits=("discover",),
        items=config.discover_items,
        draws=1,
        fills=("mean",),
        scores=(),
        kinds=("circuits",),
    )


def circuit(config: StudyConfig, group: str, trace: pl.DataFrame) -> SweepConfig:
    """The circuit of a group on the confirm split: what is left without it, and with it alone; and its edges.

    trace: the table of the search.
    """
    sets = confirm_sets(trace, group)
    edges = {"kinds": ("paths",), "paths": (HeadSet(group, heads=tuple(circuit_of(trace, group))),)} if sets else {}
    return ablating(
        config,
        groups=(group,),
        splits=("confirm",),
        items=config.confirm_items,
        draws=config.fewer_draws,
        fills=("mean",),
        scores=("loss", "distance"),
        heads=(),
        sets=tuple(sets) or (HeadSet(ALL, sites=("*",)),),
        **edges,
    )
