"""The edges between heads: what one head's output does through one later head's query, key or value alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from headscope.sweep.compute.context import Context
from headscope.sweep.compute.patching import INPUTS, Head, Patching
from headscope.sweep.compute.predictions import prepared
from headscope.sweep.compute.scores import squared_error
from headscope.sweep.plan.config import PATHS
from headscope.sweep.plan.heads import Edit, heads_of
from headscope.sweep.plan.items import GroupItems
from headscope.sweep.plan.units import IMAGES, REFERENCE, Advance, Asked, Planned, Unit, UnitKind, chunks
from headscope.sweep.store.rows import coded, labels
from headscope.sweep.store.store import Results

# heads of a group: edges grow as their square
MOST_HEADS = 30
FILLS = ("mean", "zero")
# of the sender's own way to the prediction
OUTPUT = "output"
ITEMS = 8

# sender, receiver (None: the prediction), part
Edge = tuple[Head, Head | None, str]


class Paths(UnitKind):
    """A row for every edge, fill and item of one timestep.

    Its table: the item's labels (item, group, source_id, split, replicate), timestep, fill, sender_site, sender_head,
    receiver_site, receiver_head, part, and the losses "clean" and "edited". Edges go from each head of the group's set
    in `SweepConfig.paths` to each of its heads at a later site, through the part "q", "k" or "v" (of cross-attention
    "q" alone: its keys and values come from elsewhere); and to the prediction, part "output" without a receiver: the
    sender's own way, the outputs of all other heads held. See `sweep.compute.patching`.
    """

    name = PATHS
    optional = True
    repeated = True
    shares = True
    reads = (IMAGES, REFERENCE)

    def plan(self, asked: Asked, group: GroupItems) -> Iterator[Planned]:
        for fill in asked.config.fills:
            if fill not in FILLS:
                raise ValueError(f"fills: got {fill!r} with the kind {PATHS}, expected some of {', '.join(FILLS)}")
        if nodes := nodes_of(asked, group.name):
            rows = len(asked.config.fills) * (1 + len(edges_of(asked, nodes)))
            for items in chunks(len(group.swept), ITEMS, len(asked.timesteps)):
                for timestep in asked.timesteps:
                    yield Planned(items, len(items) * rows, timestep)

    def edits(self, asked: Asked) -> tuple[Edit, ...]:
        """For every edge the sites of the forward that it takes: a sender's begins at its site and goes on to the last,
        a receiver's begins at its own."""
        order = [site.name for site in asked.sites]
        found = []
        for chosen in asked.config.paths:
            for (sender, _), receiver, _ in edges_of(asked, nodes_of(asked, chosen.name)):
                sites = [receiver[0]] if receiver else order[order.index(sender) :]
                found.append(Edit(chosen.name, tuple((site, 0) for site in sites)))
        return tuple(found)

    def compute(self, unit: Unit, context: Context, advance: Advance) -> Results:
        edges = _Edges(unit, context, advance)
        prefix = context.shared(edges.inputs)
        with context.loss_scope.keep_hooks(), prefix.attached() if prefix else nullcontext():
            context.rows.run_clean(len(edges.items), edges.patch)
        return Results(edges.table())


class _Edges:
    """Every edge of a unit's group, with every fill, for each item of the unit."""

    def __init__(self, unit: Unit, context: Context, advance: Advance) -> None:
        assert unit.timestep is not None
        self._unit, self._context, self._advance = unit, context, advance
        self.items = context.items(unit)
        self.inputs = context.noisy_inputs(prepared(context, self.items), unit.timestep, unit.replicate)
        self._nodes = nodes_of(context.plan, unit.group)
        self._edges = edges_of(context.plan, self._nodes)
        self._places = {edge: place for place, edge in enumerate(self._edges)}
        self._fills = context.config.fills
        self._clean = np.full(len(self.items), np.nan)
        self._edited = np.full((len(self._edges), len(self._fills), len(self.items)), np.nan)

    def patch(self, piece: range) -> None:
        """Compute the edges for some of the items."""
        inputs = self.inputs.rows(torch.arange(piece.start, piece.stop, device=self._context.task.device))
        for number, fill in enumerate(self._fills):
            patching = Patching(self._context, inputs, self._nodes, self._context.fill(self._unit, fill))
            here = number, slice(piece.start, piece.stop)
            self._clean[here[1]] = squared_error(patching.prediction, inputs.target).cpu().numpy()
            self._advance(len(piece))
            for sender in self._nodes:
                prediction, sent = patching.send(sender)
                loss = squared_error(prediction, inputs.target).cpu().numpy()
                self._edited[self._places[sender, None, OUTPUT], *here] = loss
                self._advance(len(piece))
                for site, given in sent.items():
                    self._receive(piece, number, patching, sender, site, given)

    def _receive(
        self, piece: range, fill: int, patching: Patching, sender: Head, site: str, sent: Mapping[str, Tensor]
    ) -> None:
        """Compute the edges from a sender to the heads of a site."""
        mine = [
            (receiver, part, place)
            for (one, receiver, part), place in self._places.items()
            if one == sender and receiver is not None and receiver[0] == site
        ]
        rows = [(*edge, item) for edge in mine for item in range(len(piece))]

        def receive(some: range) -> None:
            receivers, parts, places, items = zip(*rows[some.start : some.stop], strict=True)
            indices = torch.tensor(items, device=self._context.task.device)
            found = patching.receive(site, [head for _, head in receivers], parts, indices, sent)
            loss = squared_error(found, patching.inputs.target.index_select(0, indices)).cpu().numpy()
            self._edited[list(places), fill, [piece.start + item for item in items]] = loss
            self._advance(len(items))

        self._context.rows.run(len(rows), receive)

    def table(self) -> pa.Table:
        edge, fill, item = (index.ravel() for index in np.indices(self._edited.shape))

        def heads(chosen: list[Head | None], name: str) -> dict[str, pa.Array]:
            sites = pa.array([head and head[0] for head in chosen], pa.string()).dictionary_encode()
            numbers = pa.array([head and head[1] for head in chosen], pa.int16())
            rows = pa.array(edge)
            return {f"{name}_site": sites.take(rows), f"{name}_head": numbers.take(rows)}

        return pa.table(
            {
                **labels(self.items, item, self._unit.replicate),
                "timestep": pa.array(np.full(len(item), self._unit.timestep, np.int32)),
                "fill": coded(self._fills, fill),
                **heads([sender for sender, _, _ in self._edges], "sender"),
                **heads([receiver for _, receiver, _ in self._edges], "receiver"),
                "part": coded([part for _, _, part in self._edges], edge),
                "clean": pa.array(self._clean[item]),
                "edited": pa.array(self._edited.ravel()),
            }
        )


def nodes_of(asked: Asked, group: str) -> tuple[Head, ...]:
    """The heads between which a group's edges are, in the order of execution; none where it has no set.

    Raises:
        ValueError: there are too many, or some that the model doesn't have.
    """
    chosen = next((chosen for chosen in asked.config.paths if chosen.name == group), None)
    if chosen is None:
        return ()
    heads = heads_of(chosen, asked.sites, PATHS)
    if len(heads) > MOST_HEADS:
        raise ValueError(f"paths: {group!r}: got {len(heads)} heads, expected at most {MOST_HEADS}")
    order = [site.name for site in asked.sites]
    return tuple(sorted(heads, key=lambda head: (order.index(head[0]), head[1])))


def edges_of(asked: Asked, nodes: tuple[Head, ...]) -> list[Edge]:
    """The edges between some heads and to the prediction; each sender's together, the last its own."""
    order = {site.name: place for place, site in enumerate(asked.sites)}
    kinds = {site.name: site.kind for site in asked.sites}
    found: list[Edge] = []
    for sender in nodes:
        for receiver in nodes:
            if order[receiver[0]] > order[sender[0]]:
                parts = INPUTS[:1] if kinds[receiver[0]] == "cross" else INPUTS
                found += [(sender, receiver, part) for part in parts]
        found.append((sender, None, OUTPUT))
    return found
