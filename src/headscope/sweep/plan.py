"""The units of work of a sweep: small, independent, and the same whatever machine or number of workers runs them."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import headscope
from headscope.models import Site, Task
from headscope.sweep.config import SweepConfig
from headscope.sweep.items import GroupItems, choose_timesteps, model_fingerprint

# items of a unit: some seconds of work on a laptop, so that little is lost when a run is killed
ITEMS_PER_UNIT = 4
# observing takes one forward an item and timestep, not one a head
ITEMS_PER_OBSERVATION = 20

# kinds of unit, in the order they run: what a later kind needs, an earlier one has written
IMAGES, REFERENCE, OBSERVE, ABLATE, GENERATE = "images", "reference", "observations", "ablations", "generations"


@dataclass(frozen=True)
class Unit:
    """One piece of work and the one file that it writes.

    Attributes:
        kind: "images" (prompts drawn by the model), "reference" (mean head outputs), "observations", "ablations" or
            "generations".
        group: the group's name.
        items: positions of the items among the group's swept (or reference) ones.
        timestep: the one it works at, None for all or none.
        score: of a reference: which score's forwards it averages over.
        forwards: rows that pass through the denoiser, for progress and time left.
        id: sha256 of everything that decides the unit's numbers.
    """

    kind: str
    group: str
    items: tuple[int, ...]
    timestep: int | None
    score: str | None
    forwards: int
    id: str


@dataclass(frozen=True)
class Plan:
    """A sweep worked out.

    Attributes:
        identity: what decides the numbers, as JSON types; a run directory belongs to one identity.
        timesteps: those of the sweep.
        heads: the (site, head) pairs to ablate.
        units: in the order they run.
    """

    identity: dict[str, Any]
    timesteps: tuple[int, ...]
    heads: tuple[tuple[str, int], ...]
    units: tuple[Unit, ...]


def make_plan(config: SweepConfig, task: Task, groups: list[GroupItems], sites: tuple[Site, ...]) -> Plan:
    """Work a sweep out.

    Raises:
        ValueError: a head that the model doesn't have.
    """
    timesteps = choose_timesteps(config, task)
    heads = _heads(config, sites)
    swept = {group.name: _item_keys(group.swept) for group in groups}
    reference_keys = {group.name: _item_keys(group.reference) for group in groups}
    identity = _identity(config, task, timesteps, swept, reference_keys)
    units: list[Unit] = []

    def add(kind: str, group: GroupItems, items: range, forwards: int, timestep=None, score=None) -> None:
        members = (reference_keys if kind == REFERENCE else swept)[group.name]
        content = [kind, group.name, [members[i] for i in items], timestep, score]
        units.append(
            Unit(kind, group.name, tuple(items), timestep, score, forwards, _sha({**identity, "unit": content}))
        )

    for group in groups:
        reference = range(len(group.reference))
        sampling = 2 * config.generate_steps
        if _needs_images(group):
            everything = range(len(group.swept))
            add(IMAGES, group, everything, (len(group.swept) + len(group.reference)) * sampling)
        if "mean" in config.fills and heads:
            if "loss" in config.scores:
                add(REFERENCE, group, reference, len(reference) * len(timesteps), score="loss")
            if "generate" in config.scores:
                add(REFERENCE, group, reference, len(reference) * sampling, score="generate")
        if config.observe:
            for chunk in _chunks(len(group.swept), ITEMS_PER_OBSERVATION):
                add(OBSERVE, group, chunk, len(chunk) * len(timesteps))
        for chunk in _chunks(len(group.swept), ITEMS_PER_UNIT):
            edits = len(chunk) * len(heads) * len(config.fills)
            if edits and "loss" in config.scores:
                for timestep in timesteps:
                    add(ABLATE, group, chunk, len(chunk) + edits, timestep=timestep)
            if edits and "generate" in config.scores:
                add(GENERATE, group, chunk, (len(chunk) + edits) * sampling, score="generate")
    order = (IMAGES, REFERENCE, OBSERVE, ABLATE, GENERATE)
    units.sort(key=lambda unit: order.index(unit.kind))
    return Plan(identity, timesteps, heads, tuple(units))


def _chunks(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _needs_images(group: GroupItems) -> bool:
    return any(item.image is None for item in (*group.swept, *group.reference))


def _heads(config: SweepConfig, sites: tuple[Site, ...]) -> tuple[tuple[str, int], ...]:
    if not config.fills:
        return ()
    every = tuple((site.name, head) for site in sites for head in range(site.heads))
    if config.heads is None:
        return every
    for site, head in config.heads:
        if (site, head) not in every:
            known = ", ".join(f"{s.name} ({s.heads} heads)" for s in sites)
            raise ValueError(f"heads: got ({site!r}, {head}), expected heads of {known}")
    return tuple((site, head) for site, head in config.heads)


def _identity(
    config: SweepConfig,
    task: Task,
    timesteps: tuple[int, ...],
    swept: dict[str, list[list[str]]],
    reference: dict[str, list[list[str]]],
) -> dict[str, Any]:
    """Paths stay out of it: a model or folder may move, its content may not change."""
    asked = config.as_dict()
    for name in ("model", "groups", "prompts", "device", "timesteps", "bands"):
        del asked[name]
    scheduler = {name: value for name, value in task.scheduler.config.items() if not name.startswith("_")}
    identity = {
        **asked,
        "version": headscope.__version__,
        "model": model_fingerprint(task),
        "scheduler": [type(task.scheduler).__name__, json.loads(json.dumps(scheduler, sort_keys=True, default=str))],
        "device_type": task.device.type,
        "timesteps": list(timesteps),
        "groups": [[name, _sha(swept[name]), _sha(reference[name])] for name in swept],
    }
    return json.loads(json.dumps(identity))


def _item_keys(items: tuple[Any, ...]) -> list[list[str]]:
    """What identifies each item: its key, and a hash of its caption and image."""
    contents = (item.caption.encode() + (b"" if item.image is None else item.image.tobytes()) for item in items)
    hashes = (hashlib.sha256(content).hexdigest()[:16] for content in contents)
    return [[item.key, found] for item, found in zip(items, hashes, strict=True)]


def _sha(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
