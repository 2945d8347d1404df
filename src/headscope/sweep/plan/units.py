"""The units of work of a sweep: small, independent, and the same whatever machine or number of workers runs them."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from headscope._version import __version__
from headscope.models import Site, Task
from headscope.sweep.plan.choosing import ITEMS, REFERENCE_ITEMS
from headscope.sweep.plan.config import IN_MEMORY, SweepConfig
from headscope.sweep.plan.functions import CODE, code_of
from headscope.sweep.plan.in_memory import structure
from headscope.sweep.plan.items import GroupItems, PromptItem, choose_timesteps, model_fingerprint

# items of a unit: some seconds of work on a laptop, so that little is lost when a run is killed
ITEMS_PER_UNIT = 4
# observing takes one forward an item and timestep, not one a head
ITEMS_PER_OBSERVATION = 20
# where a group would make more units of a kind, they hold more items each: tens of thousands of files are slow to list
UNITS_PER_GROUP = 2000

# kinds of unit, in the order they run: what a later kind needs, an earlier one has written
IMAGES, REFERENCE, OBSERVE, ABLATE, GENERATE = "images", "reference", "observations", "ablations", "generations"
ABLATE_SETS, GENERATE_SETS = "set_ablations", "set_generations"
ATTRIBUTE = "attributions"
KINDS = (IMAGES, REFERENCE, OBSERVE, ATTRIBUTE, ABLATE, ABLATE_SETS, GENERATE, GENERATE_SETS)


@dataclass(frozen=True)
class Edit:
    """Heads that are edited together.

    Attributes:
        name: of the set; of a single head, its site.
        heads: (site, head) pairs.
        keep: the gate of these heads.
        temperature, key_bias, key_scale: what else is done to them, as in `HeadSet`.
    """

    name: str
    heads: tuple[tuple[str, int], ...]
    keep: float = 0.0
    temperature: float | None = None
    key_bias: tuple[float, ...] = ()
    key_scale: tuple[float, ...] = ()

    @property
    def sites(self) -> frozenset[str]:
        return frozenset(site for site, _ in self.heads)

    def differing(self, fills: Sequence[str]) -> Sequence[str]:
        """Those of the fills that give different numbers: where all of the heads is kept, the first alone."""
        return fills[:1] if self.keep == 1.0 else fills


@dataclass(frozen=True)
class Unit:
    """One piece of work and the one file that it writes.

    Attributes:
        kind: "images" (prompts drawn by the model), "reference" (mean head outputs), "observations", "attributions", or
            of single heads "ablations" and "generations", of sets of them "set_ablations" and "set_generations".
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

    @property
    def generates(self) -> bool:
        """Whether it edits whole generations, of a single head or of sets."""
        return self.kind in (GENERATE, GENERATE_SETS)

    @property
    def reference_score(self) -> str:
        """The score of the reference whose means it fills with."""
        return "generate" if self.generates else "loss"


@dataclass(frozen=True)
class Plan:
    """A sweep worked out.

    Attributes:
        identity: what decides the numbers, as JSON types; a run directory belongs to one identity.
        timesteps: those of the sweep.
        heads: the (site, head) pairs to ablate, each in turn.
        sets: the sets of heads to edit.
        keys: how many keys the sites have that sets with a key_bias or key_scale edit; filled in when a run is opened.
        units: in the order they run.
    """

    identity: dict[str, Any]
    timesteps: tuple[int, ...]
    heads: tuple[tuple[str, int], ...]
    sets: tuple[Edit, ...]
    units: tuple[Unit, ...]
    keys: Mapping[str, int] = field(default_factory=dict)

    def edits(self, kind: str) -> tuple[Edit, ...]:
        """What a unit of that kind edits."""
        if kind in (ABLATE_SETS, GENERATE_SETS):
            return self.sets
        return tuple(Edit(site, ((site, head),)) for site, head in self.heads)

    def needs(self, unit: Unit) -> list[Unit]:
        """The units whose files this one reads."""
        if unit.kind == IMAGES:
            return []
        kinds = {IMAGES}
        if unit.kind in (ATTRIBUTE, ABLATE, ABLATE_SETS, GENERATE, GENERATE_SETS):
            kinds.add(REFERENCE)
        return [
            other
            for other in self._read_by_others
            if other.group == unit.group and other.kind in kinds and other.score in (None, unit.reference_score)
        ]

    @cached_property
    def _read_by_others(self) -> list[Unit]:
        return [unit for unit in self.units if unit.kind in (IMAGES, REFERENCE)]


def make_plan(config: SweepConfig, task: Task, groups: list[GroupItems], sites: tuple[Site, ...]) -> Plan:
    """Work a sweep out.

    Raises:
        ValueError: a head that the model doesn't have.
    """
    timesteps = choose_timesteps(config, task)
    heads = _heads(config, sites)
    sets = _sets(config, sites)
    attributed = attributed_sites(config, sites) if config.attribute else ()
    _check_identity(config, {name for name, _ in heads} | set(attributed), sets, sites)
    _check_steps(config, task, groups)
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

    teacher_forced = any(score != "generate" for score in config.scores)
    generated = "generate" in config.scores
    first_step = config.generate_window[0] if config.generate_window else 0
    # steps before the window are taken over from the clean run
    in_window = task.sampling_rows * (config.generate_steps - first_step)
    single = [Edit(site, ((site, head),)) for site, head in heads]
    edited = ((ABLATE, GENERATE, single), (ABLATE_SETS, GENERATE_SETS, sets))
    for group in groups:
        count = len(group.swept)
        reference = range(len(group.reference))
        sampling = task.sampling_rows * config.generate_steps
        if _needs_images(group):
            add(IMAGES, group, range(count), (count + len(group.reference)) * sampling)
        if "mean" in config.fills and (heads or sets or config.attribute):
            if teacher_forced or config.attribute:
                add(REFERENCE, group, reference, len(reference) * len(timesteps), score="loss")
            if generated:
                add(REFERENCE, group, reference, len(reference) * sampling, score="generate")
        if config.observe:
            for chunk in _chunks(count, ITEMS_PER_OBSERVATION):
                add(OBSERVE, group, chunk, len(chunk) * len(timesteps))
        if config.attribute:
            # a forward, and of each backward twice its work
            each = len(timesteps) * len(config.fills) * (3 + 2 * config.cotangents)
            for chunk in _chunks(count, ITEMS_PER_OBSERVATION):
                add(ATTRIBUTE, group, chunk, len(chunk) * each)
        for ablate, generate, edits in edited:
            rows = sum(len(edit.differing(config.fills)) for edit in edits)
            if rows and teacher_forced:
                for chunk in _chunks(count, ITEMS_PER_UNIT, len(timesteps)):
                    for timestep in timesteps:
                        add(ablate, group, chunk, len(chunk) * (1 + rows), timestep=timestep)
            if rows and generated:
                for chunk in _chunks(count, ITEMS_PER_UNIT):
                    add(generate, group, chunk, len(chunk) * (sampling + rows * in_window), score="generate")
    units.sort(key=lambda unit: KINDS.index(unit.kind))
    return Plan(identity, timesteps, heads, sets, tuple(units))


def _check_steps(config: SweepConfig, task: Task, groups: list[GroupItems]) -> None:
    """Raises ValueError where images are drawn in more steps than the model has."""
    drawn = "generate" in config.scores or any(_needs_images(group) for group in groups)
    if drawn and config.generate_steps > len(task.timesteps):
        raise ValueError(f"generate_steps: got {config.generate_steps}, expected at most {len(task.timesteps)}")


def _chunks(count: int, size: int, of_each: int = 1) -> list[range]:
    """Items in chunks of `size`, or larger, where `of_each` units of every chunk would be too many."""
    size = max(size, math.ceil(count * of_each / UNITS_PER_GROUP))
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _needs_images(group: GroupItems) -> bool:
    return any(isinstance(item, PromptItem) for item in (*group.swept, *group.reference))


def _heads(config: SweepConfig, sites: tuple[Site, ...]) -> tuple[tuple[str, int], ...]:
    """The single heads to ablate or attribute to, in the order of the model's sites."""
    if not config.fills or not (config.scores or config.attribute) or config.heads == ():
        return ()
    every = _matching(sites, config.sites or ("*",), "sites")
    if config.heads is None:
        return every
    _known(config.heads, sites, "heads")
    for pair in config.heads:
        if pair not in every:
            raise ValueError(f"heads: got {pair}, whose site isn't among the sites {', '.join(config.sites)}")
    return tuple(pair for pair in every if pair in set(config.heads))


def attributed_sites(config: SweepConfig, sites: tuple[Site, ...]) -> tuple[str, ...]:
    """The sites all of whose heads are attributed to: those of the heads to ablate, or, without any, all that match."""
    heads = _heads(config, sites) or _matching(sites, config.sites or ("*",), "sites")
    chosen = {name for name, _ in heads}
    return tuple(site.name for site in sites if site.name in chosen)


def _sets(config: SweepConfig, sites: tuple[Site, ...]) -> tuple[Edit, ...]:
    if not config.fills or not config.scores:
        return ()
    found = []
    for chosen in config.sets:
        _known(chosen.heads, sites, f"sets: {chosen.name!r}: heads")
        matching = _matching(sites, chosen.sites, f"sets: {chosen.name!r}: sites") if chosen.sites else ()
        heads = tuple(dict.fromkeys((*matching, *chosen.heads)))
        found.append(Edit(chosen.name, heads, chosen.gate, chosen.temperature, chosen.key_bias, chosen.key_scale))
    return tuple(found)


def _check_identity(config: SweepConfig, single: set[str], sets: tuple[Edit, ...], sites: tuple[Site, ...]) -> None:
    """Raises ValueError where a head would be filled with its own value and has none for each query.

    Args:
        single: the sites whose heads are ablated, each in turn, or attributed to.
    """
    if "identity" not in config.fills:
        return
    edited = single.union(*(chosen.sites for chosen in sets))
    for site in sites:
        if site.kind == "cross" and site.name in edited:
            raise ValueError(
                f"fills: got identity for {site.name!r}, whose keys come from elsewhere; expected sites of"
                " self-attention alone"
            )


def _matching(sites: tuple[Site, ...], patterns: Iterable[str], field: str) -> tuple[tuple[str, int], ...]:
    """All heads of the sites that match one of the patterns."""
    patterns = tuple(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(site.name, pattern) for site in sites):
            raise ValueError(f"{field}: got {pattern!r}, expected a pattern of {_described(sites)}")
    matching = [site for site in sites if any(fnmatchcase(site.name, pattern) for pattern in patterns)]
    return tuple((site.name, head) for site in matching for head in range(site.heads))


def _known(heads: Iterable[tuple[str, int]], sites: tuple[Site, ...], field: str) -> None:
    every = set(_matching(sites, ("*",), field))
    for site, head in heads:
        if (site, head) not in every:
            raise ValueError(f"{field}: got ({site!r}, {head}), expected heads of {_described(sites)}")


def _described(sites: tuple[Site, ...]) -> str:
    return ", ".join(f"{site.name} ({site.heads} heads)" for site in sites)


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
        # what was taken for granted and what was asked for are the same
        "items": config.items or ITEMS,
        "reference_items": config.reference_items or REFERENCE_ITEMS,
        "version": __version__,
        "model": model_fingerprint(task),
        "scheduler": [type(task.scheduler).__name__, json.loads(json.dumps(scheduler, sort_keys=True, default=str))],
        "device_type": task.device.type,
        "timesteps": list(timesteps),
        "groups": [[name, _sha(swept[name]), _sha(reference[name])] for name in swept],
        **{CODE + name: digest for name, digest in code_of((*config.scores, *config.image_scores)).items()},
    }
    if config.model == IN_MEMORY:
        identity["structure"] = structure(task.pipeline)
    return json.loads(json.dumps(identity))


def _item_keys(items: tuple[Any, ...]) -> list[list[str]]:
    """What identifies each item: its key, and a hash of its caption and image."""
    return [[item.key, item.content] for item in items]


def _sha(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
