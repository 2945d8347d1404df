"""The statistics of attention calls, split into query groups and reduced over their queries."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from headscope.models.hooks.forwards import Forward
from headscope.models.recording.regions import Inside
from headscope.models.structure.layout import Layout, Segment

REDUCTIONS = ("mean", "std", "min", "max")
ENTROPY, NORMALISED = "entropy", "entropy_normalised"
# of a class of queries, how many they are
COUNT = "queries"


class Part(NamedTuple):
    """The rows of one attention call that belong to one query group (and video frame).

    Attributes:
        number: of the part within its forward, in the order of execution.
        forward_number: of the forward within the recording, over all its contexts.
        queries: how many there are; 0 where a statistic sums over them, or where they are of one class.
        class_number, query_class: of those of one class; -1 and None where they are all of the group.
    """

    number: int
    forward: Forward
    forward_number: int
    step: int
    site: str
    call: int
    segment: Segment
    first_sample: int
    samples: int
    heads: int
    queries: int
    keys: int
    class_number: int = -1
    query_class: str | None = None

    def of_classes(self, inside: Inside) -> list["Part"]:
        """The part's queries of each class."""
        return [
            self._replace(queries=0, class_number=number, query_class=name) for number, name in enumerate(inside.names)
        ]


class PartRows(NamedTuple):
    """A statistic of one part, not reduced yet: [samples, heads, queries, ...].

    Attributes:
        inside: the classes of its queries, per which it is reduced besides.
        apart: it is reduced per class alone.
    """

    part: Part
    name: str
    values: Tensor
    inside: Inside | None = None
    apart: bool = False


class ClassNumbers(NamedTuple):
    """Numbers of a part's classes that are the same for every head: [1 or samples, classes, ...]."""

    part: Part
    name: str
    values: Tensor
    inside: Inside


@dataclass(frozen=True, eq=False)
class Reduced:
    """A statistic of several parts of one shape.

    Attributes:
        values: for each of `reductions` [parts, 1 or samples, 1 or heads, ...].
        reductions: names out of mean, std, min, max; ("sum",) for sums over queries, and for numbers of classes.
        rows: [parts, samples, heads, queries, ...] where every query is recorded.
    """

    parts: tuple[Part, ...]
    name: str
    reductions: tuple[str, ...]
    values: tuple[Tensor, ...]
    rows: Tensor | None = None


def reduced(pending: Sequence[PartRows], numbers: Sequence[ClassNumbers], keep_rows: bool) -> list[Reduced]:
    """Reduce what a forward gave: the calls of one shape together."""
    alike: dict[tuple, list[PartRows]] = {}
    for rows in pending:
        shape = (rows.values.shape, rows.values.device, rows.values.dtype)
        # masks are worked out once for calls that are alike
        alike.setdefault((rows.name, *shape, id(rows.inside)), []).append(rows)
    same: dict[tuple, list[ClassNumbers]] = {}
    for entry in numbers:
        same.setdefault((entry.name, id(entry.values)), []).append(entry)
    found = [one for members in alike.values() for one in _reduced(members, keep_rows)]
    return found + [_of_every_head(members) for members in same.values()]


def _reduced(members: list[PartRows], keep_rows: bool) -> Iterator[Reduced]:
    """The reductions over all queries, then over those of each class."""
    parts, name = tuple(rows.part for rows in members), members[0].name
    stacked = torch.stack([rows.values for rows in members])
    if parts[0].queries == 0:
        yield Reduced(parts, name, ("sum",), (stacked.squeeze(3),))
        return
    rows = stacked if keep_rows else None
    if members[0].apart:
        pass
    elif name == NORMALISED:
        yield Reduced(parts, name, ("mean",), (stacked.nanmean(3),), rows)
    else:
        deviation, mean = torch.std_mean(stacked, 3, correction=0)
        lowest, highest = torch.aminmax(stacked, dim=3)
        yield Reduced(parts, name, REDUCTIONS, (mean, deviation, lowest, highest), rows)
    inside = members[0].inside
    if inside is not None:
        of_classes = tuple(one for part in parts for one in part.of_classes(inside))
        yield Reduced(of_classes, name, ("mean",), (_class_means(stacked, inside, name == NORMALISED).flatten(0, 1),))


def _class_means(stacked: Tensor, inside: Inside, skip_nan: bool) -> Tensor:
    """The mean over each class's queries, [parts, classes, samples, heads, ...]; NaN of none.

    Args:
        stacked: [parts, samples, heads, queries, ...].
        skip_nan: leave out the queries whose value is NaN.
    """
    means = []
    # one class after the other, and selected, not weighted: 0 times infinity is NaN
    for mask in inside.mask.unbind(1):
        # [1, 1 or samples, 1, queries, 1 ...]
        chosen = mask.view(1, len(mask), 1, -1, *[1] * (stacked.ndim - 4))
        if skip_nan:
            chosen = chosen & ~stacked.isnan()
        means.append(torch.where(chosen, stacked, 0).sum(3) / chosen.sum(3))
    return torch.stack(means, 1)


def _of_every_head(members: list[ClassNumbers]) -> Reduced:
    """Numbers of classes, [parts, 1 or samples, 1, ...]."""
    parts = tuple(one for entry in members for one in entry.part.of_classes(entry.inside))
    of_classes = members[0].values.transpose(0, 1)[:, :, None]
    return Reduced(parts, members[0].name, ("sum",), (of_classes.repeat(len(members), *[1] * (of_classes.ndim - 1)),))


def split_queries(rows: Tensor, layout: Layout) -> Iterator[tuple[Segment, Tensor]]:
    """The query groups of [rows, heads, queries, ...], each [samples, heads, queries of the group, ...]."""
    if layout.fold == 1 and len(layout.queries) == 1:
        yield layout.queries[0], rows
        return
    apart = rows.unflatten(0, (layout.samples, layout.fold)).movedim(1, 2)  # [samples, heads, fold, queries, ...]
    for segment in layout.queries:
        group = apart[:, :, :, segment.start : segment.stop]
        if layout.folds_frames:
            for frame in range(layout.fold):
                yield segment._replace(frame=frame), group[:, :, frame]
        else:
            yield segment, group.flatten(2, 3)


def normalised(entropy: Tensor, valid_keys: Tensor) -> Tensor:
    """H / ln(valid keys), NaN where a row sees fewer than two keys."""
    counts = valid_keys.to(entropy.dtype)
    return torch.where(counts > 1, entropy / counts.log(), torch.nan)
