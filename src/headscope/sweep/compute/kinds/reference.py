"""Mean head outputs over a group's reference items, which take the place of removed heads: the "mean" fill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from headscope.models import Recording
from headscope.models.recording.recording import HEAD_OUTPUT
from headscope.sweep.compute.context import Context
from headscope.sweep.compute.means import stored
from headscope.sweep.plan.choosing import dealt
from headscope.sweep.plan.config import SweepConfig
from headscope.sweep.plan.items import GroupItems, PromptItem, SweptItem
from headscope.sweep.plan.units import IMAGES, KINDS, REFERENCE, TENSORS, Advance, Asked, Planned, Unit, UnitKind
from headscope.sweep.store.store import Results


class Reference(UnitKind):
    """For each group a unit over teacher-forced forwards ("loss"), and one over whole generations ("generate").

    Its tensors: the means of head outputs over all reference items and, over single forwards, of each of the
    configuration's folds, as `sweep.compute.means.stored` gives them.
    """

    name = REFERENCE
    files = (TENSORS,)
    reads = (IMAGES,)

    def members(self, group: GroupItems) -> Sequence[SweptItem | PromptItem]:
        return group.reference

    def plan(self, asked: Asked, group: GroupItems) -> Iterator[Planned]:
        config = asked.config
        read = any(REFERENCE in KINDS[name].reads for name in config.kinds)
        if "mean" not in config.fills or not (asked.heads or asked.sets or config.attribute or read):
            return
        items = range(len(group.reference))
        # what can't be dealt out is refused before work starts
        _folds(config, group)
        if asked.teacher_forced or config.attribute or read:
            yield Planned(items, len(items) * len(asked.timesteps), score="loss")
        if asked.generates:
            yield Planned(items, len(items) * asked.rows_per_image, score="generate")

    def compute(self, unit: Unit, context: Context, advance: Advance) -> Results:
        items, teacher_forced = context.items(unit), unit.score == "loss"
        scope = context.loss_scope if teacher_forced else context.pipeline_scope
        folds = _folds(context.config, context.groups[unit.group]) if teacher_forced else [range(len(items))]
        # sums of the folds, and of all items
        sums = [Recording((), (HEAD_OUTPUT,)) for _ in folds]
        for positions, total in zip(folds, sums, strict=True):

            def add(piece: range, positions=positions, total=total) -> None:
                some = [items[positions[index]] for index in piece]
                # in a recording of its own: what of it was recorded when memory runs out is forgotten
                with scope.record("head_output") as recording:
                    if teacher_forced:
                        prepared = context.task.prepare(some)
                        for timestep in context.plan.timesteps:
                            context.task.predict(context.noisy_inputs(prepared, timestep))
                            advance(len(some))
                    else:
                        context.generate(some)
                        advance(context.plan.rows_per_image * len(some))
                total.include_means(recording)

            context.rows.run(len(positions), add)
        if len(folds) == 1:
            return Results(tensors=stored({"mean": sums[0]}))
        whole = Recording((), (HEAD_OUTPUT,))
        for total in sums:
            whole.include_means(total)
        return Results(tensors=stored({"mean": whole, **dict(zip(context.config.fold_fills, sums, strict=True))}))


def _folds(config: SweepConfig, group: GroupItems) -> Sequence[Sequence[int]]:
    """The reference items of each fold, by their positions; of all in one where no folds are asked for."""
    if not config.reference_folds:
        return [range(len(group.reference))]
    folds = dealt(group.name, [item.source_id for item in group.reference], config.reference_folds)
    return [[item for item, own in enumerate(folds) if own == fold] for fold in range(config.reference_folds)]
