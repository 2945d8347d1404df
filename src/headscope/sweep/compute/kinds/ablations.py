"""Heads edited in single teacher-forced forwards, and how much worse the denoiser predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import pyarrow as pa
import torch

from headscope.models.editing.edits import Fill
from headscope.models.recording.tensors import moved
from headscope.sweep.compute.context import Context
from headscope.sweep.compute.donors import Donors
from headscope.sweep.compute.editing import ITEMS, Batch, EditingKind, EveryEdit
from headscope.sweep.compute.features import FeatureErrors
from headscope.sweep.compute.predictions import Predictions, prepared
from headscope.sweep.compute.scores import squared_error
from headscope.sweep.plan.config import RESAMPLE, SweepConfig
from headscope.sweep.plan.items import GroupItems
from headscope.sweep.plan.units import Advance, Asked, Planned, Unit, chunks
from headscope.sweep.store.store import Results

# by site, the fills of a batch, from the items of its rows
Fills = Callable[[Sequence[int]], Mapping[str, Fill]]


class Ablations(EditingKind):
    """A row for every head, fill and item of one timestep.

    Its table: the item's labels (item, group, source_id, split, replicate), timestep, site, head, fill, and the losses
    of the two predictions, "clean" and "edited". Where the configuration's scores ask for them, also "distance" (of the
    two predictions), "x0_clean" and "x0_edited" (errors of the clean image that a prediction implies), a column for
    each score of the user's, and for each score "on FEATURE" "clean_on_FEATURE" and "edited_on_FEATURE", the losses
    over the feature's pixels alone (NaN where the item has none), and "share_on_FEATURE", which share of the item's
    pixels they are; _ stands for spaces.

    Edits of one site share a batch, and take over what the clean forward computed before that site.
    """

    name = "ablations"
    reported = True
    shares = True

    def plan(self, asked: Asked, group: GroupItems) -> Iterator[Planned]:
        first, later = (self.edited_rows(asked, asked.config.seed + draw) for draw in (0, 1))
        if later and asked.teacher_forced:
            for items in chunks(len(group.swept), ITEMS, len(asked.timesteps)):
                for timestep in asked.timesteps:
                    count = len(items)
                    clean = 1 + self._resamples(asked)
                    yield Planned(items, count * (clean + later), timestep, first_forwards=count * (first - later))

    def _resamples(self, asked: Asked) -> bool:
        """True if some edit's fill is the output of a donor, which then has a forward, too."""
        return any(RESAMPLE in edit.differing(asked.config.fills) for edit in self.edits(asked))

    def fills(self, config: SweepConfig, replicate: int) -> tuple[str, ...]:
        """In the first draw also the means over parts of the reference."""
        return (*config.fills, *config.fold_fills) if replicate == config.seed else config.fills

    def compute(self, unit: Unit, context: Context, advance: Advance) -> Results:
        assert unit.timestep is not None
        every = EveryEdit(self, unit, context)
        task, scores, grid = context.task, context.config.scores, every.grid
        inputs = context.noisy_inputs(prepared(context, every.items), unit.timestep, unit.replicate)
        x0 = task.x0_factor(unit.timestep) if "x0" in scores else None
        predictions = Predictions(context, inputs, (edit.sites for edit in every.edits))
        features = FeatureErrors(every.items, context.config.scored_features, context.own_features, inputs.target)
        everything = slice(None), slice(None), slice(None)
        for (_, _, share), values in features.shares.items():
            grid.put(share, *everything, values)

        def ablate(piece: range) -> None:
            some = inputs.rows(torch.arange(piece.start, piece.stop, device=task.device))
            clean, cache = predictions.clean(some)
            clean_loss = squared_error(clean, some.target)
            everywhere = slice(None), slice(None), list(piece)
            grid.put("clean", *everywhere, clean_loss)
            if x0 is not None:
                grid.put("x0_clean", *everywhere, clean_loss * x0)
            for (name, _, _), values in features.of(clean, some.target, list(piece)).items():
                grid.put(name, *everywhere, values)
            advance(len(piece))

            donors: Donors | None = None
            if self._resamples(context.plan):
                every_site = frozenset().union(*(edit.sites for edit in every.edits))
                mine = [every.items[index] for index in piece]
                donors = Donors(context, unit, mine, every_site, [some.timestep])
                advance(len(piece))

            def fills(fill: str, sites: frozenset[str]) -> Fills:
                if fill == RESAMPLE:
                    assert donors is not None
                    return partial(donors.rows, sites=sites)
                same = predictions.fills(context.fill(unit, fill), sites)
                return lambda items: same

            def edit(batch: Batch, fills: Fills) -> None:
                rows = moved(torch.tensor(batch.items), task.device)
                mine, before = some.rows(rows), clean.index_select(0, rows)
                edited = predictions.edited(mine, batch.edits, fills(batch.items), cache, rows)
                loss = squared_error(edited, mine.target)
                grid.put("edited", *batch.places, loss)
                if "distance" in scores:
                    grid.put("distance", *batch.places, squared_error(edited, before))
                if x0 is not None:
                    grid.put("x0_edited", *batch.places, loss * x0)
                for (_, name, _), values in features.of(edited, mine.target, batch.places[-1]).items():
                    grid.put(name, *batch.places, values)
                for name, score in context.own_scores.items():
                    grid.put(name, *batch.places, score(edited, before, mine))
                advance(len(batch.items))

            every.run(piece, fills, edit)

        with predictions.attached(), context.loss_scope.keep_hooks():
            context.rows.run_clean(len(every.items), ablate)
        return Results(every.table(timestep=pa.scalar(unit.timestep, pa.int32())))


class SetAblations(Ablations):
    """The same for sets of heads: "edit", the set's name, in place of site and head."""

    name = "set_ablations"
    reported = False
    of_sets = True
