"""The units of work of a sweep: small, independent, and the same whatever machine or number of workers runs them.

A unit is of some kind. `UnitKind` is the base of the kinds, each of which is one class in one file of
`sweep/compute/kinds`; `KINDS` holds those there are. A `Plan` is the units of one sweep, in the order they run.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from headscope.models import Site, Task
from headscope.sweep.plan.config import SweepConfig
from headscope.sweep.plan.heads import Edit
from headscope.sweep.plan.items import GroupItems, PromptItem, SweptItem

# where a group would make more units of a kind, they hold more items each: tens of thousands of files are slow to list
UNITS_PER_GROUP = 2000
# suffixes of the files that units write
TABLE, TENSORS = ".parquet", ".safetensors"
# a kind's name, which is also its folder's
KIND_NAME = re.compile(r"[a-z]\w*", re.ASCII)
# in a run directory beside the folders of kinds: records of failures, claims on units, what Slurm writes of jobs
FOLDERS = FAILURES, CLAIMS, JOBS = "failures", "claims", "jobs"
# the kinds that others read: images drawn for prompts, and mean head outputs for the mean fill
IMAGES, REFERENCE = "images", "reference"

# is called with how many more rows have passed through the denoiser
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Unit:
    """One piece of work and the files that it writes.

    Attributes:
        kind: the name of its kind, a key of `KINDS`.
        group: the group's name.
        items: positions of the items among the group's swept (or reference) ones.
        timestep: the one it works at, None for all or none.
        score: of a reference, which score's forwards it averages over; of generations "generate"; else None.
        forwards: rows that pass through the denoiser, for progress and time left.
        id: sha256 of everything that decides the unit's numbers.
        replicate: of the noise.
    """

    kind: str
    group: str
    items: tuple[int, ...]
    timestep: int | None
    score: str | None
    forwards: int
    id: str
    replicate: int = 0


@dataclass(frozen=True)
class Asked:
    """A sweep as it is asked for, from which the kinds of unit plan.

    Attributes:
        sites: the model's, in the order of execution.
        timesteps: those of the sweep.
        heads: the (site, head) pairs to edit, each in turn.
        sets: the sets of heads to edit.
    """

    # plans of the same units are equal, however they were asked for
    config: SweepConfig = field(compare=False)
    task: Task = field(compare=False)
    sites: tuple[Site, ...] = field(compare=False)
    timesteps: tuple[int, ...]
    heads: tuple[tuple[str, int], ...]
    sets: tuple[Edit, ...]

    @property
    def teacher_forced(self) -> bool:
        """True if some score is of single forwards, and not of whole generations."""
        return any(score != "generate" for score in self.config.scores)

    @property
    def generates(self) -> bool:
        """True if whole generations are scored."""
        return "generate" in self.config.scores

    @property
    def rows_per_image(self) -> int:
        """How many rows pass through the denoiser while an image is sampled."""
        return self.task.sampling_rows * self.config.generate_steps


@dataclass(frozen=True)
class Planned:
    """A unit as its kind plans it, of repeated kinds one for every draw; the attributes are those of `Unit`.

    Attributes:
        first_forwards: rows that pass through the denoiser besides, in the first draw alone.
    """

    items: Sequence[int]
    forwards: int
    timestep: int | None = None
    score: str | None = None
    first_forwards: int = 0


class UnitKind:
    """A kind of unit: which units a sweep has of it, how one is computed, and which files that writes.

    Defining a subclass with a name registers it in `KINDS`. A new kind is one file in `sweep/compute/kinds`, and one
    line in that package's __init__, which imports the kinds in running order.

    Attributes:
        name: of the kind, its folder in the run directory, and its table.
        files: the suffixes of the files that a unit writes, `TABLE` and `TENSORS`. The first one is written last, and
            makes the unit done.
        images: its tensors are images, "clean" and "edited", the latter with one for each row of the table.
        optional: it runs only in sweeps whose `SweepConfig.kinds` names it; else wherever `plan` has units.
        reported: its table is one of the report's sections (`report.page.SECTIONS`).
        reads: the kinds whose files, of the same group, its units read; they run earlier.
        reference_score: the score of the reference units among those that it reads.
        shares: its edited forwards may take over what a clean one computed, so they take less time and more memory.
        differentiates: its forwards are followed by backwards.
        repeated: it has units for every draw of the noise, whose replicate is `Unit.replicate`; else for the
            first alone.
        parts: its units look at the part masks of items, which then decide their numbers, too.
        grids: its units need to know the grid of tokens of each site (`Plan.grids`).

    Raises:
        ValueError: a subclass takes the name of another kind, or reads one that isn't there yet.
    """

    name: ClassVar[str]
    files: ClassVar[tuple[str, ...]] = (TABLE,)
    images: ClassVar[bool] = False
    optional: ClassVar[bool] = False
    reported: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ()
    reference_score: ClassVar[str] = "loss"
    shares: ClassVar[bool] = False
    differentiates: ClassVar[bool] = False
    repeated: ClassVar[bool] = False
    parts: ClassVar[bool] = False
    grids: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        name = cls.__dict__.get("name")
        if name is None:
            # a base of others
            return
        if not KIND_NAME.fullmatch(name):
            raise ValueError(f"{cls.__name__}.name: got {name!r}, expected lower-case letters, digits and underscores")
        if name in FOLDERS:
            raise ValueError(f"{cls.__name__}.name: {name!r} is a folder of the run's own, expected another name")
        if name in KINDS and type(KINDS[name]).__module__ != cls.__module__:
            raise ValueError(f"{cls.__name__}.name: {name!r} is another kind's, expected a name of its own")
        for other in cls.reads:
            if other not in KINDS:
                known = ", ".join(KINDS)
                raise ValueError(f"{cls.__name__}.reads: got {other!r}, expected kinds that run earlier: {known}")
        KINDS[name] = cls()

    def members(self, group: GroupItems) -> Sequence[SweptItem | PromptItem]:
        """The items of a group that the positions in a unit are of: the swept ones unless overridden."""
        return group.swept

    def plan(self, asked: Asked, group: GroupItems) -> Iterator[Planned]:
        """The units that a sweep has of this kind and one group; none where the configuration doesn't ask for any."""
        raise NotImplementedError(f"{type(self).__name__} has no plan")

    def compute(self, unit: Unit, context: Any, advance: Advance) -> Any:
        """Compute a unit.

        Args:
            context: the model, the items and the results of earlier units (`sweep.compute.context.Context`).
            advance: is to be called with the rows of every batch of forwards.

        Returns:
            The unit's table and tensors, for each suffix in `files` one (`sweep.store.store.Results`).
        """
        raise NotImplementedError(f"{type(self).__name__} computes nothing")

    def edits(self, asked: Asked) -> tuple[Edit, ...]:
        """The edits that its units make: none unless overridden."""
        return ()


# every kind there is, by name, in the order they run
KINDS: dict[str, UnitKind] = {}


@dataclass(frozen=True)
class Plan(Asked):
    """A sweep worked out.

    Attributes:
        identity: all that decides the numbers, as JSON types; a run directory belongs to one identity.
        units: in the order they run.
        keys: how many keys the sites have that sets with a key_bias or key_scale edit; filled in when a run is opened.
        grids: (height, width) in tokens of the sites of self-attention whose queries and keys are the image's tokens,
            where some kind needs them; filled in when a run is opened.
    """

    identity: dict[str, Any]
    units: tuple[Unit, ...]
    keys: Mapping[str, int] = field(default_factory=dict)
    grids: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def needs(self, unit: Unit) -> list[Unit]:
        """The units whose files this one reads."""
        key = unit.kind, unit.group
        if key not in self._needs:
            kind = KINDS[unit.kind]
            found = (other for name in kind.reads for other in self._by_kind_and_group.get((name, unit.group), ()))
            self._needs[key] = [
                other for other in found if other.kind != REFERENCE or other.score == kind.reference_score
            ]
        return self._needs[key]

    @cached_property
    def _needs(self) -> dict[tuple[str, str], list[Unit]]:
        return {}

    @cached_property
    def _by_kind_and_group(self) -> dict[tuple[str, str], list[Unit]]:
        found: dict[tuple[str, str], list[Unit]] = {}
        for unit in self.units:
            found.setdefault((unit.kind, unit.group), []).append(unit)
        return found


def chunks(count: int, size: int, of_each: int = 1) -> list[range]:
    """Items in chunks of `size`, or larger, where `of_each` units of every chunk would be too many."""
    size = max(size, math.ceil(count * of_each / UNITS_PER_GROUP))
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def needs_images(group: GroupItems) -> bool:
    """True if some of a group's items are prompts, whose images the model has yet to draw."""
    return any(isinstance(item, PromptItem) for item in (*group.swept, *group.reference))
