"""The statistics of attention calls, split into query groups and reduced over their queries."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from headscope.models.hooks.forwards import Forward
from headscope.models.structure.layout import Layout, Segment

REDUCTIONS = ("mean", "std", "min", "max")
ENTROPY, NORMALISED = "entropy", "entropy_normalised"


class Part(NamedTuple):
    """The rows of one attention call that belong to one query group (and video frame).

    Attributes:
        number: of the part within its forward, in the order of execution.
        forward_number: of the forward within the recording, over all its contexts.
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


class PartRows(NamedTuple):
    """A statistic of one part, not reduced yet: [samples, heads, queries, ...]."""

    part: Part
    name: str
    values: Tensor


@dataclass(frozen=True, eq=False)
class Reduced:
    """A statistic of several parts of one shape.

    Attributes:
        values: for each of `reductions` [parts, samples, heads, ...].
        reductions: names out of mean, std, min, max; ("sum",) for sums over queries.
        rows: [parts, samples, heads, queries, ...] where every query is recorded.
    """

    parts: tuple[Part, ...]
    name: str
    reductions: tuple[str, ...]
    values: tuple[Tensor, ...]
    rows: Tensor | None = None


def reduced(pending: Sequence[PartRows], keep_rows: bool) -> list[Reduced]:
    """Reduce what a forward gave: the calls of one shape together."""
    alike: dict[tuple, list[PartRows]] = {}
    for rows in pending:
        alike.setdefault((rows.name, rows.values.shape, rows.values.device, rows.values.dtype), []).append(rows)
    return [_reduced(members, keep_rows) for members in alike.values()]


def _reduced(members: list[PartRows], keep_rows: bool) -> Reduced:
    parts, name = tuple(rows.part for rows in members), members[0].name
    stacked = torch.stack([rows.values for rows in members])
    if parts[0].queries == 0:
        return Reduced(parts, name, ("sum",), (stacked.squeeze(3),))
    rows = stacked if keep_rows else None
    if name == NORMALISED:
        return Reduced(parts, name, ("mean",), (stacked.nanmean(3),), rows)
    deviation, mean = torch.std_mean(stacked, 3, correction=0)
    lowest, highest = torch.aminmax(stacked, dim=3)
    return Reduced(parts, name, REDUCTIONS, (mean, deviation, lowest, highest), rows)


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
