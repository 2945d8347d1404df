"""Resampled head outputs: those that another item of the same group, a donor, has with its own noise.

The donor of an item is one of its group's reference items, drawn by the item's key and the noise replicate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from headscope.counter import counter_integers
from headscope.models.editing.edits import Fill
from headscope.models.recording.recording import HEAD_OUTPUT
from headscope.sweep.compute.context import Context
from headscope.sweep.plan.items import GroupItems, PromptItem, SweptItem
from headscope.sweep.plan.units import Unit


def donor_of(key: str, replicate: int, reference: int) -> int:
    """The donor of the item with a key, by its position among so many reference items."""
    return int(counter_integers("resample", key, replicate, high=reference))


def donors(group: GroupItems, items: Sequence[SweptItem | PromptItem], replicate: int) -> list[SweptItem | PromptItem]:
    """The donors of some items of a group."""
    return [group.reference[donor_of(item.key, replicate, len(group.reference))] for item in items]


class Donors:
    """The head outputs of the donors of some items of a unit, in the item's order.

    Args:
        sites: those to record.
        timesteps: at which a forward each is made.
    """

    def __init__(
        self,
        context: Context,
        unit: Unit,
        items: Sequence[SweptItem | PromptItem],
        sites: Iterable[str],
        timesteps: Sequence[int],
    ) -> None:
        chosen = context.with_images(unit, donors(context.groups[unit.group], items, unit.replicate))
        # ordinary tensors, which attribution may save for its backwards
        recorded = context.loss_scope.record("head_output", reduce=None, sites=sorted(sites))
        with torch.no_grad(), recorded as self._recording:
            prepared = context.task.prepare(chosen)
            for timestep in timesteps:
                context.task.predict(context.noisy_inputs(prepared, timestep, unit.replicate))
        self._items = len(items)

    def of_all(self) -> Fill:
        """The fill of a batch in which every item has one row, in their order."""
        return self._recording.take(range(self._items))

    def rows(self, items: Sequence[int], sites: Iterable[str]) -> dict[str, Fill]:
        """By site, the fill of a batch whose rows are of these items."""
        return {site: self._at(site, items) for site in sites}

    def _at(self, site: str, items: Sequence[int]) -> Fill:
        kept = [key for key in self._recording.tensors.kept() if key.site == site]
        whole: Tensor | None = None
        if len(kept) == 1 and kept[0].call == 0:
            # [items, heads, tokens, dim], or with several rows per item
            whole = self._recording.samples(HEAD_OUTPUT, site, 0, kept[0].timestep, kept[0].branch)
        if whole is None or whole.ndim != 4:
            # of sites that attend several times in a forward, the scope knows which is meant
            return self._recording.take(items)
        return whole.index_select(0, torch.tensor(items, device=whole.device))
