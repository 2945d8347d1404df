"""Images that the model itself draws for the prompts of a group."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from headscope.sweep.compute.context import Context
from headscope.sweep.plan.items import GroupItems
from headscope.sweep.plan.units import IMAGES, TENSORS, Advance, Asked, Planned, Unit, UnitKind, needs_images
from headscope.sweep.store.store import Results


class Images(UnitKind):
    """One unit for each group of prompts.

    Its tensors: each item's image by the item's key, uint8 [height, width, 3].
    """

    name = IMAGES
    files = (TENSORS,)

    def plan(self, asked: Asked, group: GroupItems) -> Iterator[Planned]:
        if needs_images(group):
            count = len(group.swept) + len(group.reference)
            yield Planned(range(len(group.swept)), count * asked.rows_per_image)

    def compute(self, unit: Unit, context: Context, advance: Advance) -> Results:
        group = context.groups[unit.group]
        members = [*group.swept, *group.reference]
        drawn = {}

        def draw(piece: range) -> None:
            some = [members[index] for index in piece]
            images = context.generate(some)
            drawn.update({item.key: torch.from_numpy(image) for item, image in zip(some, images, strict=True)})
            advance(context.plan.rows_per_image * len(some))

        context.rows.run(len(members), draw)
        return Results(tensors=drawn)
