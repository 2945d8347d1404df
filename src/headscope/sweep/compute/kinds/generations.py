"""Heads edited while whole images are sampled, and how far the images are from the clean ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import numpy as np
import pyarrow as pa
import torch

from headscope.sweep.compute.context import Context
from headscope.sweep.compute.editing import ITEMS, Batch, EditingKind, EveryEdit
from headscope.sweep.compute.edits import head_edits
from headscope.sweep.compute.scores import checked_score, image_distance
from headscope.sweep.compute.steps import EarlierSteps
from headscope.sweep.plan.heads import Edit
from headscope.sweep.plan.items import GroupItems
from headscope.sweep.plan.units import TABLE, TENSORS, Advance, Asked, Planned, Unit, chunks
from headscope.sweep.store.rows import Grid
from headscope.sweep.store.store import Results

# enters the edits of some rows
Enter = Callable[[list[Edit]], AbstractContextManager[None]]


class Generations(EditingKind):
    """A row for every head, fill and item.

    Its table: the item's labels (item, group, source_id, split, replicate), steps, first_step and end_step (the window
    in which edits act), site, head, fill, "distance", which is the mean squared difference between the edited image and
    the clean one of the same prompt and noise (on a scale from 0 to 1), and a column for each image score.

    Its tensors: the images, uint8, "clean" [items, height, width, 3] and "edited", one for each row.
    """

    name = "generations"
    files = (TABLE, TENSORS)
    images = True
    reported = True
    reference_score = "generate"

    def plan(self, asked: Asked, group: GroupItems) -> Iterator[Planned]:
        rows = self.edited_rows(asked, asked.config.seed)
        if not rows or not asked.generates:
            return
        *_, edited_rows = _window(asked)
        for items in chunks(len(group.swept), ITEMS):
            yield Planned(items, len(items) * (asked.rows_per_image + rows * edited_rows), score="generate")

    def compute(self, unit: Unit, context: Context, advance: Advance) -> Results:
        every = EveryEdit(self, unit, context)
        first, end, edited_rows = _window(context.plan)
        images = _Images(every.grid)

        def generate(piece: range) -> None:
            some = [every.items[index] for index in piece]
            earlier = EarlierSteps(context.task.denoiser, first, len(some))
            with earlier.cached():
                clean = context.generate(some, unit.replicate)
            images.put_clean(piece, clean)
            advance(context.plan.rows_per_image * len(some))

            def edit(batch: Batch, enter: Enter) -> None:
                with enter(batch.edits), earlier.repeated(batch.items):
                    edited = context.generate([some[item] for item in batch.items], unit.replicate)
                images.put(batch.places, edited)
                before = clean[batch.items]
                every.grid.put("distance", *batch.places, image_distance(edited, before))
                for name, score in context.image_scores.items():
                    every.grid.put(name, *batch.places, checked_score(name, score(before, edited), len(edited)))
                advance(edited_rows * len(batch.items))

            every.run(piece, lambda fill, _: _entering(context, unit, fill), edit)

        with context.pipeline_scope.keep_hooks():
            context.rows.run(len(every.items), generate)
        table = every.table(
            steps=pa.scalar(context.config.generate_steps, pa.int64()),
            first_step=pa.scalar(first, pa.int32()),
            end_step=pa.scalar(end, pa.int32()),
        )
        return Results(table, images.tensors())


class SetGenerations(Generations):
    """The same for sets of heads: "edit", the set's name, in place of site and head."""

    name = "set_generations"
    reported = False
    of_sets = True


def _window(asked: Asked) -> tuple[int, int, int]:
    """The first step in which edits act, the one after the last, and how many rows an edited image takes."""
    steps = asked.config.generate_steps
    first, end = asked.config.generate_window or (0, steps)
    # steps before the window are taken over from the clean run
    return first, end, asked.task.sampling_rows * (steps - first)


class _Images:
    """The images of a unit, uint8: clean ones by item, edited ones by edit, fill and item."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._clean = self._edited = np.zeros(0, np.uint8)

    def put_clean(self, piece: range, images: np.ndarray) -> None:
        if not self._clean.size:
            shape, image = self._grid.shape, images.shape[1:]
            self._clean = np.zeros((shape[-1], *image), np.uint8)
            self._edited = np.zeros((*shape, *image), np.uint8)
        self._clean[piece.start : piece.stop] = images

    def put(self, places: tuple[list[int], int, list[int]], images: np.ndarray) -> None:
        self._edited[places] = images

    def tensors(self) -> dict[str, torch.Tensor]:
        """The clean images [items, height, width, 3], and the edited ones, one for each row of the table."""
        edited = self._grid.repeated(self._edited)
        rows = edited.reshape(-1, *edited.shape[3:])
        return {"clean": torch.from_numpy(self._clean), "edited": torch.from_numpy(rows)}


def _entering(context: Context, unit: Unit, fill: str) -> Enter:
    """Makes the context in which some edits act in the window of sampling steps, a row each."""
    scope, taken = context.pipeline_scope, context.fill(unit, fill)
    window = context.config.generate_window
    steps = None if window is None else range(*window)
    # a single fill tensor would be shared by all sites, a recording knows each
    return lambda edits: scope.edit(head_edits(edits, scope, context.plan.keys), fill=taken, steps=steps)
