"""Regions of the picture at a site's attention calls: those of its keys, and classes of its queries.

Masks are a sample's. A call's rows are samples of the batch, under guidance each one several times, or frames of them:
every frame of a sample has its masks.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from headscope._shapes import Bool
from headscope.models.hooks.calls import SiteCall
from headscope.models.hooks.forwards import Forward
from headscope.models.structure.layout import IMAGE, Segment
from headscope.ops import GroupMass, Regions, Statistic
from headscope.ops.regions import checked_names, coverage
from headscope.ops.statistics import GroupStatistic

# kinds of attention calls whose masks stay at hand: lengths may vary without end
_MOST_PLACES = 256

Queries = Regions | Mapping[str, Bool[Tensor, "_samples height width"]]


class CounterpartMass(GroupMass):
    """sum of p over the keys of all counterparts of the query's own region.

    For `scope.record(CounterpartMass(regions), queries=regions)`: reduced per class of queries alone. Classes without
    counterparts have none. The share of the keys that are in them, which is their mass under uniform attention, stands
    beside it.

    Args:
        regions: with counterparts.
        name: the name of its columns, NAME_mean and NAME_share.

    Raises:
        TypeError, ValueError: no regions, or none with counterparts.
    """

    description = "sum of p over the keys of the counterparts of the query's region"

    def __init__(self, regions: Regions, *, name: str = "counterpart_mass") -> None:
        if not isinstance(regions, Regions):
            raise TypeError(f"regions: got {type(regions).__name__}, expected headscope.Regions")
        if regions.counterparts is None:
            raise ValueError(
                "regions: got some without counterparts, expected items that have them, or Regions(...,"
                " counterparts={name: names})"
            )
        super().__init__(regions, name=name)

    def of_keys(self, groups: Tensor) -> GroupStatistic:
        return GroupMass(groups, int(self.constants[0]), name=self.name)


@dataclass(frozen=True, eq=False)
class Placed:
    """A statistic of regions at one kind of attention call.

    Attributes:
        statistic: as the operator takes it.
        share: of the call's keys, how many are in each region [1 or samples, regions], or, of a CounterpartMass, in the
            counterparts of each (NaN where it has none).
        own: of a CounterpartMass, the counterparts of each query's region, bool [1 or rows, 1, queries, regions].
    """

    statistic: GroupStatistic
    share: Tensor
    own: Tensor | None = None

    def finished(self, values: Tensor) -> Tensor:
        """The operator's [rows, heads, queries, regions], of a CounterpartMass their sum, NaN without counterparts."""
        if self.own is None:
            return values
        total = torch.where(self.own, values, 0).sum(-1)
        return total.masked_fill(~self.own.any(-1), torch.nan)

    def of_classes(self, count: int) -> Tensor:
        """`share` beside so many classes, [1 or samples, classes, regions], or of a CounterpartMass without regions."""
        return self.share if self.own is not None else self.share[:, None].expand(-1, count, -1)


_PLACED: WeakKeyDictionary[GroupStatistic, dict[Hashable, Placed]] = WeakKeyDictionary()


def placed(statistic: Statistic, call: SiteCall, keys: int, device: torch.device) -> Placed | None:
    """A statistic of regions at a call; None where the call's keys hold no image tokens whose place is known."""
    assert isinstance(statistic, GroupStatistic)
    segments = [] if call.site.kind == "cross" else _pictures(call, call.layout.keys)
    if not segments:
        return None
    known = _PLACED.setdefault(statistic, {})
    place = (*_place(call, device), keys)
    if place not in known:
        if len(known) >= _MOST_PLACES:
            known.clear()
        # ordinary tensors, which a later forward may save for its backward
        with torch.inference_mode(False), torch.no_grad():
            known[place] = _placed(statistic, call, segments, keys, device)
    return known[place]


def _placed(
    statistic: GroupStatistic, call: SiteCall, segments: Sequence[Segment], keys: int, device: torch.device
) -> Placed:
    regions, grid = statistic.regions, call.grid
    assert regions is not None
    assert grid is not None
    tokens = _of_call(regions.on_grid(grid, device), call)
    groups = tokens.new_full((len(tokens), keys), -1)
    for segment in segments:
        groups[:, segment.start : segment.stop] = tokens
    numbers = torch.arange(len(regions), device=device)
    share = (groups[..., None] == numbers).sum(1).float() / keys
    if not isinstance(statistic, CounterpartMass):
        return Placed(statistic.of_keys(_folded(groups, call)), share)
    assert regions.counterparts is not None
    relation = _of_call(regions.counterparts.to(device), call)
    samples = max(len(groups), len(relation))
    every, relation = groups.expand(samples, -1), relation.expand(samples, -1, -1)
    sums = (relation * share[:, None]).sum(-1).masked_fill(~relation.any(-1), torch.nan)
    # keys and queries are the same tokens
    own = relation[torch.arange(samples, device=device)[:, None], every.clamp(min=0).long()] & (every >= 0)[..., None]
    return Placed(statistic.of_keys(_folded(groups, call)), sums, _folded(own[:, None], call))


@dataclass(frozen=True, eq=False)
class Inside:
    """Classes of the image queries of one kind of attention call.

    Attributes:
        names: of the classes.
        tokens: in the picture, or in each frame.
        mask: True where a query is in a class, [1 or samples, classes, tokens].
        counts: how many are, [1 or samples, classes].
    """

    names: tuple[str, ...]
    tokens: int
    mask: Tensor
    counts: Tensor


class QueryClasses:
    """Classes of image queries, per which statistics are reduced: regions, or masks that may overlap.

    Args:
        queries: regions; or bool [samples or 1, height, width] by the classes' names. A token is in a class whose mask
            covers at least half of it.

    Raises:
        TypeError, ValueError: masks of another kind or shape, or of different numbers of samples.
    """

    def __init__(self, queries: Queries) -> None:
        if not isinstance(queries, (Regions, Mapping)):
            raise TypeError(
                f"queries: got {type(queries).__name__}, expected headscope.Regions or a dictionary of bool masks"
            )
        self.regions = queries if isinstance(queries, Regions) else None
        self.masks: dict[str, Tensor] = {} if isinstance(queries, Regions) else dict(queries)
        self.names = checked_names("queries", queries.names if isinstance(queries, Regions) else list(self.masks))
        self.samples = queries.samples if isinstance(queries, Regions) else 1
        for name, mask in self.masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"queries[{name!r}]: got {kind}, expected a bool tensor [samples or 1, height, width]")
            if mask.ndim != 3 or not all(mask.shape) or (1 < self.samples != mask.shape[0] > 1):
                samples = "samples" if self.samples == 1 else str(self.samples)
                raise ValueError(
                    f"queries[{name!r}]: got shape {list(mask.shape)}, expected [{samples} or 1, height, width]"
                )
            self.samples = max(self.samples, mask.shape[0])
        self._found: dict[Hashable, Inside] = {}

    def at(self, call: SiteCall, device: torch.device) -> Inside | None:
        """The classes of a call's image queries; None where it has none, or their places aren't known."""
        if not _pictures(call, call.layout.queries):
            return None
        place = _place(call, device)
        if place not in self._found:
            if len(self._found) >= _MOST_PLACES:
                self._found.clear()
            with torch.inference_mode(False), torch.no_grad():
                mask = _of_call(self._on_grid(call.grid, device), call)
                self._found[place] = Inside(self.names, mask.shape[2], mask, mask.sum(-1))
        return self._found[place]

    def _on_grid(self, grid: tuple[int, int] | None, device: torch.device) -> Bool[Tensor, "_samples classes tokens"]:
        assert grid is not None
        if self.regions is not None:
            tokens = self.regions.on_grid(grid, device)
            return tokens[:, None] == torch.arange(len(self.names), device=device)[:, None]
        inside = []
        for mask in self.masks.values():
            half = 2 * coverage(mask.to(device), grid) >= mask.shape[1] * mask.shape[2]
            inside.append(half.flatten(1).expand(self.samples, -1))
        return torch.stack(inside, 1)


def check_samples(statistics: Sequence[Statistic], classes: QueryClasses | None, forward: Forward) -> None:
    """Raises ValueError where masks are of another number of samples than a forward's."""
    given = {f"statistics: the regions of {one.name!r}": regions_of(one) for one in statistics}
    counts = {name: regions.samples for name, regions in given.items() if regions is not None}
    if classes is not None:
        counts["queries: the masks"] = classes.samples
    for name, samples in counts.items():
        if samples not in (1, forward.samples, forward.batch):
            raise ValueError(
                f"{name} are of {samples} samples, expected {forward.samples} or 1: the batch has {forward.batch} rows"
                f" in {len(forward.branches)} guidance branch(es); Regions.take repeats samples"
            )


def regions_of(statistic: Statistic) -> Regions | None:
    """The regions that a statistic is of; None where it is of none."""
    return statistic.regions if isinstance(statistic, GroupStatistic) else None


def _pictures(call: SiteCall, segments: Sequence[Segment]) -> list[Segment]:
    """The segments that are whole pictures of known height and width."""
    grid, layout = call.grid, call.layout
    if grid is None or (layout.fold != 1 and not layout.folds_frames):
        return []
    size = grid[0] * grid[1]
    return [segment for segment in segments if segment.group == IMAGE and segment.stop - segment.start == size]


def _place(call: SiteCall, device: torch.device) -> tuple[Hashable, ...]:
    """What masks at a call depend on."""
    return call.layout, call.grid, call.forward.samples, call.forward.batch, device


def _of_call(tensor: Tensor, call: SiteCall) -> Tensor:
    """[1, samples or batch, ...] as [1 or the call's samples, ...]; samples of the batch are those of each branch."""
    given, layout = len(tensor), call.layout
    if given == 1 or (given == layout.samples and layout.first_sample % given == 0):
        return tensor
    return tensor[torch.arange(layout.first_sample, layout.end_sample, device=tensor.device) % given]


def _folded(tensor: Tensor, call: SiteCall) -> Tensor:
    """[1 or samples, ...] as [1 or rows, ...]."""
    fold = call.layout.fold
    return tensor if fold == 1 or len(tensor) == 1 else tensor.repeat_interleave(fold, 0)
