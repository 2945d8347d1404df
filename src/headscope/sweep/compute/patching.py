"""What flows from one head to a later one: a head's output replaced in the eyes of another head alone.

Path patching (Wang et al. 2022; Goldowsky-Dill et al. 2023) of a sender s and a receiver r in two forwards. In the
first one, s's output is replaced by its fill and the outputs of all other heads are held at what they are in the clean
model, so that the change reaches r's query, key and value through layers alone (norms, MLPs, skip connections), not
through other heads. In the second one, r's query, key or value alone is what it was in the first; all that comes after
r is computed anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from headscope.models import Recording
from headscope.models.editing.edits import Fill, Patch
from headscope.models.recording.recording import HEAD_OUTPUT
from headscope.models.tasks import NoisyInputs
from headscope.ops import HeadEdit
from headscope.sweep.compute.context import Context
from headscope.sweep.compute.edits import fills_at
from headscope.sweep.compute.sharing import Cache

Head = tuple[str, int]
INPUTS = ("q", "k", "v")
Parts = Mapping[str, Tensor]


class Patching:
    """The clean model on some items at one timestep, and the two forwards of path patching.

    Args:
        inputs: of the items.
        nodes: the heads that send and receive, in the order of execution.
        fill: what takes a sender's place: a recording of means, or None for zeros.

    Attributes:
        inputs: the items'.
        prediction: the clean one.

    Raises:
        ValueError: a site attends several times in a forward, folds rows into its batch, or shares keys between heads.
    """

    def __init__(self, context: Context, inputs: NoisyInputs, nodes: Sequence[Head], fill: Fill) -> None:
        self._context, self.inputs = context, inputs
        self._scope = context.loss_scope
        self._order = [site.name for site in self._scope.sites]
        self._nodes = list(nodes)
        self._prefix = context.shared(inputs)
        # a sender's forward begins at its site, a receiver's at its own
        starts = {frozenset(self._from(site)) for site, _ in nodes} | {frozenset([site]) for site, _ in nodes}
        caching = self._prefix.clean(starts) if self._prefix else nullcontext()
        with self._scope.record(HEAD_OUTPUT, *INPUTS, reduce=None) as recording, caching as self._cache:
            self.prediction = context.task.predict(inputs)
        sites = list(dict.fromkeys(site for site, _ in nodes))
        self._outputs = {site: _tensor(recording, HEAD_OUTPUT, site) for site in self._order}
        self._given = {site: {part: _tensor(recording, part, site) for part in INPUTS} for site in sites}
        for site, given in self._given.items():
            if len({tensor.shape[1] for tensor in given.values()}) > 1:
                raise ValueError(f"paths: {site!r} shares keys between heads, expected a key and a value of each head")
        self._fills = {site: _filled(fills_at(self._scope, fill, [site], context.task.device)[site]) for site in sites}

    def send(self, sender: Head) -> tuple[Tensor, dict[str, Parts]]:
        """The first forward, of all items.

        Returns:
            The prediction; and by later site of a node q, k and v, [items, heads, tokens, dim].
        """
        site, head = sender
        edits = {name: HeadEdit(self._none_left(name), self._outputs[name]) for name in self._from(site)}
        replaced = self._outputs[site].clone()
        fill = self._fills[site]
        replaced[:, head] = 0.0 if fill is None else fill[0, head]
        edits[site] = HeadEdit(self._none_left(site), replaced)
        receivers = [name for name in self._given if self._order.index(name) > self._order.index(site)]
        recorded = self._scope.record(*INPUTS, reduce=None, sites=receivers) if receivers else nullcontext()
        with self._scope.edit(edits), recorded as recording, self._shared(frozenset(edits), self._every()):
            prediction = self._context.task.predict(self.inputs)
        return prediction, {name: {part: _tensor(recording, part, name) for part in INPUTS} for name in receivers}

    def receive(self, site: str, heads: Sequence[int], parts: Sequence[str], items: Tensor, sent: Parts) -> Tensor:
        """The second forward: a row for each head, part and item.

        Args:
            site: the receivers', later than the sender's.
            heads, parts: of each row.
            items: of each row, by their place.
            sent: q, k and v at the site in the first forward.
        """
        patched = {}
        for part in dict.fromkeys(parts):
            tensor = self._given[site][part].index_select(0, items)
            rows = [row for row, name in enumerate(parts) if name == part]
            chosen = [heads[row] for row in rows]
            tensor[rows, chosen] = sent[part][items[rows], chosen]
            patched[part] = tensor
        with self._scope.edit({site: Patch(**patched)}), self._shared(frozenset([site]), items):
            return self._context.task.predict(self.inputs.rows(items))

    def _from(self, site: str) -> list[str]:
        """The sites from this one on."""
        return self._order[self._order.index(site) :]

    def _none_left(self, site: str) -> Tensor:
        return torch.zeros(1, self._scope.site(site).heads, device=self._context.task.device)

    def _every(self) -> Tensor:
        return torch.arange(len(self.inputs.sample), device=self._context.task.device)

    def _shared(self, edited: frozenset[str], rows: Tensor):
        """Inside, what ran before the edited sites is taken over from the clean forward."""
        if self._prefix is None or not isinstance(self._cache, Cache):
            return nullcontext()
        return self._prefix.replay(self._cache, edited, rows)


def _tensor(recording: Recording, quantity: str, site: str) -> Tensor:
    """What was recorded of a site in one forward, [items, heads, tokens, dim]."""
    keys = [key for key in recording.tensors.kept() if (key.quantity, key.site) == (quantity, site)]
    if len(keys) != 1:
        raise ValueError(f"paths: {site!r} attends {len(keys)} times in a forward, expected once")
    found = recording.samples(*keys[0])
    if found.ndim != 4:
        raise ValueError(f"paths: {site!r} has several rows of its batch to an item, expected one")
    return found


def _filled(fill: Fill) -> Tensor | None:
    """A fill as a tensor [1, heads, tokens, dim], None for zeros."""
    if fill is None or isinstance(fill, Tensor):
        return fill
    raise ValueError(f"paths: got the fill {fill!r}, expected means over reference items, of one call a site, or zeros")
