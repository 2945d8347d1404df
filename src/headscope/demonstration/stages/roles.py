"""The sweeps that look for heads' roles, and remove the heads of a role."""

from __future__ import annotations

from collections.abc import Sequence

from headscope.demonstration.config import ALL, SPARE_ITEMS, StudyConfig
from headscope.demonstration.stages.sweeping import ablating, sweeping
from headscope.study.roles import RoleSet
from headscope.sweep import HeadSet, SweepConfig


def roles(config: StudyConfig) -> SweepConfig:
    """What images without ties hold at every place, and the attention that each place receives from every head."""
    groups = tuple(group for group in config.role_groups if group not in config.tied_groups)
    return _looking(config, groups, config.items)


def ties(config: StudyConfig) -> SweepConfig:
    """The same of tied groups and their controls, and how far heads look at the counterparts of where they stand."""
    return _looking(config, config.tied_groups, config.items + SPARE_ITEMS, "counterparts")


def causal(config: StudyConfig, group: str, sets: Sequence[RoleSet]) -> SweepConfig:
    """The heads of each role of a group removed, their controls, and all heads, with the loss on the roles' pixels.

    sets: those of all groups; see `study.roles.sets_of`.
    """
    mine = [chosen for chosen in sets if chosen.group == group]
    features = dict.fromkeys(chosen.feature for chosen in mine)
    return ablating(
        config,
        groups=(group,),
        splits=("confirm",),
        items=config.confirm_items + (SPARE_ITEMS if group in config.tied_groups else 0),
        fills=("mean",),
        scores=("loss", *(f"on {feature}" for feature in features)),
        heads=(),
        sets=(*(HeadSet(chosen.name, heads=chosen.heads) for chosen in mine), HeadSet(ALL, sites=("*",))),
    )


def _looking(config: StudyConfig, groups: tuple[str, ...], items: int, *kinds: str) -> SweepConfig:
    return sweeping(
        config,
        groups=groups,
        items=items,
        bands=config.ablate_bands,
        observe=False,
        fills=(),
        scores=(),
        kinds=("features", "key_mass", *kinds),
    )
