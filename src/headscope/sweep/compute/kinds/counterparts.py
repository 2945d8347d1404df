"""How far every head looks at the counterparts of where it stands, beside those that other images have there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from headscope.features import Relation, relation
from headscope.models import Recording
from headscope.sweep.compute.context import Context
from headscope.sweep.compute.observing import ITEMS
from headscope.sweep.plan.items import GroupItems, PromptItem, SweptItem
from headscope.sweep.plan.units import Advance, Asked, Planned, Unit, UnitKind, chunks
from headscope.sweep.store.rows import coded, labels, prepend
from headscope.sweep.store.store import Results

# up to this edge of the denoiser's input a unit has as many items as others; of larger ones fewer
EDGE = 32
# other items of the same group and split whose counterparts an item's attention is measured by, too
DONORS = 7
# of a site: above, the whole matrix of attention would be no small thing
MOST_TOKENS = 1024
# nats by which an entropy may differ from the operator's own before attention is taken to be another
_ALIKE = 1e-3

_Item = SweptItem | PromptItem


class Counterparts(UnitKind):
    """A row for every item, timestep, site, head and donor: the item itself and up to 7 others.

    The attention is the item's own. Which tokens are counterparts is said by the donor (`headscope.features.relation`).
    Sites are those whose queries and keys are the image's tokens, at most 1,024 of them.

    Donors are cyclic: those of an item are the next ones among the group's swept items of its split, in the order of
    the sweep, that have tokens with counterparts on the site's grid; each is of another source, and none of the item's
    own. An item without counterparts has no rows.

    Its table: the item's labels (item, group, source_id, split, replicate), timestep, site, call and head; "donor", 0
    of the item's own counterparts and k of those of the k-th donor, and "donor_source", that one's source; "tokens",
    how many queries have counterparts; "attention", the mean over these queries of the sum of p over their
    counterparts, and "share", what it would be if attention were uniform; and "mass", the attention less that on the
    *other* keys: as many, the counterparts of other queries of the same part.
    """

    name = "counterparts"
    optional = True
    repeated = True
    parts = True
    grids = True

    def plan(self, asked: Asked, group: GroupItems) -> Iterator[Planned]:
        for item in group.swept:
            if item.parts is None or item.counterparts is None:
                raise ValueError(
                    f"kinds: got {self.name!r}, which needs a part mask with counterparts of every item, and"
                    f" {item.key!r} of the group {group.name!r} has none; expected tied groups alone, such as twins, or"
                    " their controls"
                )
        for split in dict.fromkeys(item.split for item in group.swept):
            count = len({item.source_id for item in group.swept if item.split == split})
            if count < 2:
                raise ValueError(
                    f"kinds: got {self.name!r}, which compares an item with those of other sources of its group and"
                    f" split, and {group.name!r} has {count} of {split!r}; expected at least 2"
                )
        size = max(1, min(ITEMS, ITEMS * EDGE**2 // asked.task.sample_size**2))
        for items in chunks(len(group.swept), size):
            yield Planned(items, len(items) * len(asked.timesteps))

    def compute(self, unit: Unit, context: Context, advance: Advance) -> Results:
        items, swept = context.items(unit), context.groups[unit.group].swept
        sites = [site for site, (height, width) in context.plan.grids.items() if height * width <= MOST_TOKENS]
        if not sites:
            raise ValueError(
                f"kinds: got {self.name!r}, which looks at sites of at most {MOST_TOKENS:,} image tokens, and the model"
                " has none"
            )
        tables: dict[tuple[int, int], pa.Table] = {}

        def observe(piece: range) -> None:
            some = [items[index] for index in piece]
            grids = {site: context.plan.grids[site] for site in sites}
            related_of = lru_cache(maxsize=2 * DONORS)(relation)
            by_grid = {
                grid: [_relations(swept, item, lambda other, grid=grid: related_of(other, grid)) for item in some]
                for grid in set(grids.values())
            }
            related = {site: by_grid[grid] for site, grid in grids.items()}
            prepared = context.prepared(some)
            for timestep in context.plan.timesteps:
                with (
                    context.loss_scope.record("q", "k", reduce=None, sites=sites) as recording,
                    context.loss_scope.record("entropy", sites=sites) as checked,
                ):
                    context.task.predict(context.noisy_inputs(prepared, timestep, unit.replicate))
                advance(len(some))
                attention = _attention(recording, checked, len(some))
                tables[piece.start, timestep] = _table(attention, related, some, timestep, unit.replicate)

        context.rows.run(len(items), observe)
        return Results(pa.concat_tables(tables[key] for key in sorted(tables)).unify_dictionaries())


def _relations(
    swept: Sequence[_Item], item: _Item, relation_of: Callable[[_Item], Relation | None]
) -> list[tuple[str, Relation]]:
    """An item's own counterparts, then those of its donors, each with the source; none where it has none itself."""
    others = [other for other in swept if other.split == item.split]
    place = next(place for place, other in enumerate(others) if other.index == item.index)
    found = []
    sources: set[str] = set()
    for other in (*others[place:], *others[:place]):
        if other.source_id in sources:
            continue
        related = relation_of(other)
        if related is not None:
            found.append((other.source_id, related))
            sources.add(other.source_id)
        elif other is item:
            return []
        if len(found) > DONORS:
            break
    return found


def _attention(recording: Recording, checked: Recording, items: int) -> Iterator[tuple[str, int, int, Tensor]]:
    """Site, call, item and softmax(q k / sqrt(dim)) [heads, queries, keys] of a forward.

    Raises:
        ValueError: its entropies aren't the operator's: attention has a mask, another scale, or an edit.
    """
    table = checked.to_polars()
    for key in recording.tensors.kept():
        if key.quantity != "q":
            continue
        q, k = (recording.samples(name, key.site, key.call, key.timestep, key.branch).float() for name in ("q", "k"))
        own = table.filter(site=key.site, call=key.call).sort("sample", "head")
        entropies = own["entropy_mean"].to_numpy().reshape(items, -1)
        for item in range(items):
            # keys of fewer heads serve several
            keys = k[item].repeat_interleave(q.shape[1] // k.shape[1], 0)
            attention = torch.softmax(q[item] @ keys.transpose(1, 2) / q.shape[-1] ** 0.5, -1)
            entropy = torch.special.entr(attention).sum(-1).mean(-1).cpu().numpy()
            if not np.allclose(entropy, entropies[item], rtol=0, atol=_ALIKE, equal_nan=True):
                raise ValueError(
                    f"kinds: counterparts are looked for in softmax(q k / sqrt(dim)), and {key.site!r} attends"
                    " otherwise (with a mask or another scale); expected a site without"
                )
            yield key.site, key.call, item, attention


def _table(
    attention: Iterator[tuple[str, int, int, Tensor]],
    related: dict[str, list[list[tuple[str, Relation]]]],
    items: Sequence[_Item],
    timestep: int,
    replicate: int,
) -> pa.Table:
    """A forward's rows: every item, site, head and donor."""
    sites = list(related)
    rows: list[tuple[int, ...]] = []
    sources: list[str] = []
    numbers: list[np.ndarray] = [np.empty((0, 3))]
    for site, call, item, probabilities in attention:
        donors = related[site][item]
        if not donors:
            continue
        found = [relation for _, relation in donors]
        weights = np.stack([[one.own.ravel(), one.other.ravel()] for one in found])
        weighed = torch.from_numpy(weights).to(probabilities).flatten(0, 1) @ probabilities.flatten(1).T
        # [donors, heads]
        own, other = weighed.unflatten(0, (len(found), 2)).unbind(1)
        for number, (source, one) in enumerate(donors):
            heads = range(len(probabilities))
            rows += [(item, sites.index(site), call, head, number, one.queries) for head in heads]
            sources += [source] * len(heads)
            parts = (own[number], own[number] - other[number], torch.full_like(own[number], one.share))
            numbers.append(torch.stack(parts, 1).cpu().double().numpy())
    whole = np.array(rows, np.int64).reshape(-1, 6)
    known = sorted(set(sources))
    values = np.concatenate(numbers).astype(np.float32)
    columns = {
        "timestep": pa.array(np.full(len(whole), timestep, np.int32)),
        "site": coded(sites, whole[:, 1]),
        "call": pa.array(whole[:, 2].astype(np.int16)),
        "head": pa.array(whole[:, 3].astype(np.int16)),
        "donor": pa.array(whole[:, 4].astype(np.int16)),
        "donor_source": coded(known, np.searchsorted(known, sources) if known else np.empty(0, np.int64)),
        "tokens": pa.array(whole[:, 5].astype(np.int32)),
        **{name: pa.array(values[:, place]) for place, name in enumerate(("attention", "mass", "share"))},
    }
    return prepend(labels(items, whole[:, 0], replicate), pa.table(columns))
