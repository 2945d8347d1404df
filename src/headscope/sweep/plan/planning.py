"""A sweep worked out: the units of work that its configuration comes to, and what decides their numbers."""

import hashlib
import json
from typing import Any

from headscope._version import __version__
from headscope.features import has_feature
from headscope.models import Site, Task
from headscope.sweep.plan.choosing import ITEMS
from headscope.sweep.plan.config import IN_MEMORY, ON, SweepConfig
from headscope.sweep.plan.functions import CODE, code_of, code_of_class
from headscope.sweep.plan.heads import attributed_sites, check_identity_fill, chosen_heads, chosen_sets
from headscope.sweep.plan.in_memory import structure
from headscope.sweep.plan.items import GroupItems, choose_timesteps, model_fingerprint
from headscope.sweep.plan.units import KINDS, Asked, Plan, Unit, needs_images


def make_plan(config: SweepConfig, task: Task, groups: list[GroupItems], sites: tuple[Site, ...]) -> Plan:
    """Work a sweep out, by asking every kind of unit, in running order, for its units of each group.

    Raises:
        ValueError: a kind of unit that can't be named, a head that the model doesn't have, a fill that a site can't
            have, or more sampling steps than the scheduler has timesteps.
    """
    _check_kinds(config)
    edited = chosen_heads(config, sites), chosen_sets(config, sites)
    asked = Asked(config, task, sites, choose_timesteps(config, task), *edited)
    attributed = attributed_sites(config, sites) if config.attribute else ()
    check_identity_fill(config, {name for name, _ in asked.heads} | set(attributed), asked.sets, sites)
    _check_steps(config, task, groups)
    _check_features(config, groups)
    identity = _identity(config, task, asked.timesteps, groups)
    units: list[Unit] = []
    for name, kind in KINDS.items():
        if kind.optional and name not in config.kinds:
            continue
        for group in groups:
            keys = _item_keys(kind.members(group))
            for one in kind.plan(asked, group):
                content = [name, group.name, [keys[item] for item in one.items], one.timestep, one.score]
                # the draws of some items in turn: items are encoded once for all of them
                for replicate in config.replicates if kind.repeated else (config.seed,):
                    # the seed is part of the identity
                    drawn = content if replicate == config.seed else [*content, replicate]
                    digest = _sha({**identity, "unit": drawn})
                    place = name, group.name, tuple(one.items), one.timestep, one.score
                    forwards = one.forwards + (one.first_forwards if replicate == config.seed else 0)
                    units.append(Unit(*place, forwards, digest, replicate))
    return Plan(**vars(asked), identity=identity, units=tuple(units))


def _check_kinds(config: SweepConfig) -> None:
    optional = [name for name, kind in KINDS.items() if kind.optional]
    for name in config.kinds:
        if name not in optional:
            expected = f"some of {', '.join(optional)}" if optional else "none: every kind runs where it is needed"
            raise ValueError(f"kinds: got {name!r}, expected {expected}")


def _check_steps(config: SweepConfig, task: Task, groups: list[GroupItems]) -> None:
    """Raises ValueError where images are drawn in more steps than the model has."""
    drawn = "generate" in config.scores or any(needs_images(group) for group in groups)
    if drawn and config.generate_steps > len(task.timesteps):
        raise ValueError(f"generate_steps: got {config.generate_steps}, expected at most {len(task.timesteps)}")


def _check_features(config: SweepConfig, groups: list[GroupItems]) -> None:
    """Raises ValueError where a score is of a feature that no item has anything of."""
    own = [name.rpartition(":")[2] for name in config.features]
    for name in config.scored_features:
        if not any(has_feature(item, name, own) for group in groups for item in group.swept):
            named = ", ".join(group.name for group in groups)
            raise ValueError(f"scores: got '{ON}{name}', which no item of {named} has anything of")


def _identity(
    config: SweepConfig,
    task: Task,
    timesteps: tuple[int, ...],
    groups: list[GroupItems],
) -> dict[str, Any]:
    """Paths stay out of it: a model or folder may move, its content may not change."""
    asked = config.as_dict()
    for name in ("model", "groups", "prompts", "device", "timesteps", "bands"):
        del asked[name]
    # they run in an order of their own
    if config.kinds:
        asked["kinds"] = sorted(config.kinds)
    scheduler = {name: value for name, value in task.scheduler.config.items() if not name.startswith("_")}
    own = (*config.scores, *config.image_scores, *config.features)
    identity = {
        **asked,
        # what was taken for granted and what was asked for are the same
        "items": config.items or ITEMS,
        "reference_items": [len(group.reference) for group in groups],
        "version": __version__,
        "model": model_fingerprint(task),
        "scheduler": [type(task.scheduler).__name__, json.loads(json.dumps(scheduler, sort_keys=True, default=str))],
        "device_type": task.device.type,
        "timesteps": list(timesteps),
        "groups": [[group.name, _sha(_item_keys(group.swept)), _sha(_item_keys(group.reference))] for group in groups],
        **{CODE + name: digest for name, digest in code_of(own).items()},
    }
    # masks may change while images don't; only runs that may look at them are known by them
    kinds = [kind for name, kind in KINDS.items() if name in config.kinds or not kind.optional]
    looked_at = any(":" in score for score in config.scores) or config.scored_features
    if looked_at or any(kind.parts for kind in kinds):
        masks = {group.name: [item.parts for item in group.swept] for group in groups}
        known = {name: _sha(found) for name, found in masks.items() if any(found)}
        identity |= {"parts": known} if known else {}
    # another task may ask the same weights for something else
    identity |= code_of_class(type(task))
    if config.model == IN_MEMORY:
        identity["structure"] = structure(task.pipeline)
    return json.loads(json.dumps(identity))


def _item_keys(items: tuple[Any, ...]) -> list[list[str]]:
    """Each item's key and a hash of its caption and image, which identify it."""
    return [[item.key, item.content] for item in items]


def _sha(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
