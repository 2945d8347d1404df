"""Heads edited while whole images are sampled, and how far the images are from the clean ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import numpy as np
import pyarrow as pa
import torch

from headscope.sweep.compute.context import Context
from headscope.sweep.compute.edited import ITEMS, Batch, EditingKind, EveryEdit
from headscope.sweep.compute.edits import head_edits, hooks_in_place
from headscope.sweep.compute.scores import checked_score, image_distance
from headscope.sweep.compute.steps import EarlierSteps
from headscope.sweep.plan.heads import Edit
from headscope.sweep.plan.items import GroupItems
from headscope.sweep.plan.units import TABLE, TENSORS, Advance, Asked, Unit, Work, chunks
from headscope.sweep.store.store import Results

# enters the edits of some rows
Enter = Callable[[list[Edit]], AbstractContextManager[None]]


class Generations(EditingKind):
    """Of every head, fill and item a row: the distance of the edited image to the clean one, which has the same prompt
    and noise, and the configuration's image scores. The images are stored beside the table.

    Edits act in a window of the sampling steps; earlier steps are the clean run's.
    """

    name = "generations"
    files = (TABLE, TENSORS)
    images = True
    reported = True
    reference_score = "generate"

    def plan(self, asked: Asked, group: GroupItems) -> Iterator[Work]:
        rows = self.edited_rows(asked)
        if not rows or not asked.generates:
            return
        config = asked.config
        # steps before the window are taken over from the clean run
        first, _ = config.generate_window or (0, config.generate_steps)
        in_window = asked.task.sampling_rows * (config.generate_steps - first)
        for items in chunks(len(group.swept), ITEMS):
            yield Work(items, len(items) * (asked.sampling_rows + rows * in_window), score="generate")

    def compute(self, unit: Unit, context: Context, advance: Advance) -> Results:
        every = EveryEdit(self, unit, context)
        config, task = context.config, context.task
        first, end = config.generate_window or (0, config.generate_steps)
        in_window = task.sampling_rows * (config.generate_steps - first)
        images = _Images(every)

        def generate(piece: range) -> None:
            some = [every.items[index] for index in piece]
            earlier = EarlierSteps(task.denoiser, first, len(some))
            with earlier.kept():
                clean = context.generate(some)
            images.put_clean(piece, clean)
            advance(context.sampling_rows * len(some))

            def edit(batch: Batch, enter: Enter) -> None:
                with enter(batch.edits), earlier.repeated(batch.items):
                    edited = context.generate([some[item] for item in batch.items])
                images.put(batch.places, edited)
                before = clean[batch.items]
                every.put("distance", batch.places, image_distance(edited, before))
                for name, score in context.image_scores.items():
                    every.put(name, batch.places, checked_score(name, score(before, edited), len(edited)))
                advance(in_window * len(batch.items))

            every.run(piece, lambda fill, _: _entering(context, unit, fill), edit)

        with hooks_in_place(context.pipeline_scope):
            context.rows.run(len(every.items), generate)
        table = every.table(
            steps=pa.scalar(config.generate_steps, pa.int64()),
            first_step=pa.scalar(first, pa.int32()),
            end_step=pa.scalar(end, pa.int32()),
        )
        return Results(table, images.tensors())


class SetGenerations(Generations):
    """The same of the sweep's sets of heads."""

    name = "set_generations"
    reported = False
    of_sets = True


class _Images:
    """The images of a unit, uint8: clean ones by item, edited ones by edit, fill and item."""

    def __init__(self, every: EveryEdit) -> None:
        self._every = every
        self._clean = self._edited = np.zeros(0, np.uint8)

    def put_clean(self, piece: range, images: np.ndarray) -> None:
        if not self._clean.size:
            shape, image = self._every.shape, images.shape[1:]
            self._clean = np.zeros((shape[-1], *image), np.uint8)
            self._edited = np.zeros((*shape, *image), np.uint8)
        self._clean[piece.start : piece.stop] = images

    def put(self, places: tuple[list[int], int, list[int]], images: np.ndarray) -> None:
        self._edited[places] = images

    def tensors(self) -> dict[str, torch.Tensor]:
        """ "clean" [items, height, width, 3], and "edited" with one image for each row of the table."""
        edited = self._every.repeated(self._edited)
        return {
            "clean": torch.from_numpy(self._clean),
            "edited": torch.from_numpy(edited.reshape(-1, *edited.shape[3:])),
        }


def _entering(context: Context, unit: Unit, fill: str) -> Enter:
    """Makes the context in which some edits act in the window of sampling steps, a row each."""
    scope, taken = context.pipeline_scope, context.fill(unit, fill)
    window = context.config.generate_window
    steps = None if window is None else range(*window)
    # a single fill tensor would be shared by all sites, a recording knows each
    return lambda edits: scope.edit(head_edits(edits, scope, context.plan.keys), fill=taken, steps=steps)
