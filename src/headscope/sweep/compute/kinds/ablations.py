"""Heads edited in single teacher-forced forwards, and how much worse the denoiser predicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from headscope.models import Recording
from headscope.models.editing.edits import Fill
from headscope.models.recording.tensors import moved
from headscope.models.tasks import NoisyInputs, Prepared
from headscope.ops import HeadEdit
from headscope.sweep.compute.context import Context
from headscope.sweep.compute.editing import ITEMS, Batch, EditingKind, EveryEdit
from headscope.sweep.compute.edits import fills_at, head_edits, tensors
from headscope.sweep.compute.graphs import Forwards
from headscope.sweep.compute.scores import squared_error
from headscope.sweep.compute.sharing import Cache, Prefix
from headscope.sweep.plan.items import GroupItems, PromptItem, SweptItem
from headscope.sweep.plan.units import Advance, Asked, Planned, Unit, chunks
from headscope.sweep.store.store import Results


class Ablations(EditingKind):
    """Of every head, fill and item of one timestep a row: the loss of the clean and of the edited prediction, and what
    else the configuration's scores measure of them.

    Edits of one site share a batch, and take over what the clean forward computed before that site.
    """

    name = "ablations"
    reported = True
    shares = True

    def plan(self, asked: Asked, group: GroupItems) -> Iterator[Planned]:
        rows = self.edited_rows(asked)
        if rows and asked.teacher_forced:
            for items in chunks(len(group.swept), ITEMS, len(asked.timesteps)):
                for timestep in asked.timesteps:
                    yield Planned(items, len(items) * (1 + rows), timestep)

    def compute(self, unit: Unit, context: Context, advance: Advance) -> Results:
        assert unit.timestep is not None
        timestep: int = unit.timestep
        every = EveryEdit(self, unit, context)
        task, scope, scores = context.task, context.loss_scope, context.config.scores
        inputs = context.noisy_inputs(_prepared(context, every.items), timestep)
        x0 = task.x0_factor(timestep) if "x0" in scores else None
        prefix = context.shared(inputs)
        sites = frozenset(edit.sites for edit in every.edits)

        def ablate(piece: range) -> None:
            some = inputs.rows(torch.arange(piece.start, piece.stop, device=task.device))
            clean, cache = context.forwards.run(
                ("clean", sites),
                timestep,
                None,
                lambda _: prefix.clean(sites) if prefix else nullcontext(),
                lambda: task.predict(some),
            )
            clean_loss = squared_error(clean, some.target)
            everywhere = slice(None), slice(None), list(piece)
            every.grid.put("clean", *everywhere, clean_loss)
            if x0 is not None:
                every.grid.put("x0_clean", *everywhere, clean_loss * x0)
            advance(len(piece))

            def fills(fill: str, sites: frozenset[str]) -> Mapping[str, Fill]:
                return fills_at(scope, context.fill(unit, fill), sites, task.device)

            def edit(batch: Batch, fills: Mapping[str, Fill]) -> None:
                rows = moved(torch.tensor(batch.items), task.device)
                mine, before = some.rows(rows), clean.index_select(0, rows)
                made = head_edits(batch.edits, scope, context.plan.keys)
                edited = _edited_prediction(context, mine, made, fills, prefix, cache, rows)
                loss = squared_error(edited, mine.target)
                every.grid.put("edited", *batch.places, loss)
                if "distance" in scores:
                    every.grid.put("distance", *batch.places, squared_error(edited, before))
                if x0 is not None:
                    every.grid.put("x0_edited", *batch.places, loss * x0)
                for name, score in context.own_scores.items():
                    every.grid.put(name, *batch.places, score(edited, before, mine))
                advance(len(batch.items))

            every.run(piece, fills, edit)

        with prefix.attached() if prefix else nullcontext(), scope.keep_hooks():
            context.rows.run_clean(len(every.items), ablate)
        return Results(every.table(timestep=pa.scalar(timestep, pa.int32())))


class SetAblations(Ablations):
    """The same of the sweep's sets of heads."""

    name = "set_ablations"
    reported = False
    of_sets = True


def _prepared(context: Context, items: Sequence[SweptItem | PromptItem]) -> Prepared:
    """Items encoded, as many at once as fit."""
    pieces: dict[int, Prepared] = {}

    def prepare(piece: range) -> None:
        pieces[piece.start] = context.task.prepare([items[index] for index in piece])

    context.rows.run_clean(len(items), prepare)
    found = [pieces[start] for start in sorted(pieces)]
    conditioning = {name: torch.cat([one.conditioning[name] for one in found]) for name in found[0].conditioning}
    keys = tuple(key for one in found for key in one.keys)
    return Prepared(keys, torch.cat([one.clean for one in found]), conditioning)


def _edited_prediction(
    context: Context,
    inputs: NoisyInputs,
    edits: Mapping[str, HeadEdit],
    fills: Mapping[str, Fill],
    prefix: Prefix | None,
    cache: Cache | None,
    rows: Tensor,
) -> Tensor:
    """The denoiser's answer with an edit of each site.

    Args:
        fills: by site, of removed heads.
        cache: of the clean forward, whose row for each of the inputs' is in `rows`.
    """
    sites, device = frozenset(edits), context.task.device
    fields = {
        name: {**{part: moved(tensor, device) for part, tensor in tensors(edit).items()}, "fill": fills[name]}
        for name, edit in edits.items()
    }

    @contextmanager
    def inside(given: dict[str, Any]) -> Iterator[None]:
        made = {name: HeadEdit(**parts) for name, parts in given["edits"].items()}
        shared = prefix.replay(cache, sites, given["rows"]) if prefix and cache else nullcontext()
        with context.loss_scope.edit(made), shared:
            yield

    given = {"edits": fields, "rows": rows}
    key = ("edited", sites, cache)
    # a recording is looked up by the timestep, which a replay wouldn't do
    looked_up = any(isinstance(fill, Recording) for fill in fills.values())
    forwards = Forwards() if looked_up else context.forwards
    return forwards.run(key, inputs.timestep, given, inside, lambda: context.task.predict(inputs))[0]
