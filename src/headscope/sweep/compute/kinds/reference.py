"""Mean head outputs over a group's reference items, which take the place of removed heads: the "mean" fill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from headscope.models import Recording
from headscope.sweep.compute.context import Context
from headscope.sweep.plan.items import GroupItems, PromptItem, SweptItem
from headscope.sweep.plan.units import IMAGES, REFERENCE, TENSORS, Advance, Asked, Planned, Unit, UnitKind
from headscope.sweep.store.store import Results


class Reference(UnitKind):
    """For each group a unit over teacher-forced forwards ("loss"), and one over whole generations ("generate").

    Its tensors: a recording of head outputs, as `Recording.to_tensors` gives it.
    """

    name = REFERENCE
    files = (TENSORS,)
    reads = (IMAGES,)

    def members(self, group: GroupItems) -> Sequence[SweptItem | PromptItem]:
        return group.reference

    def plan(self, asked: Asked, group: GroupItems) -> Iterator[Planned]:
        config = asked.config
        if "mean" not in config.fills or not (asked.heads or asked.sets or config.attribute):
            return
        items = range(len(group.reference))
        if asked.teacher_forced or config.attribute:
            yield Planned(items, len(items) * len(asked.timesteps), score="loss")
        if asked.generates:
            yield Planned(items, len(items) * asked.rows_per_image, score="generate")

    def compute(self, unit: Unit, context: Context, advance: Advance) -> Results:
        items = context.items(unit)
        scope = context.loss_scope if unit.score == "loss" else context.pipeline_scope
        total: Recording | None = None
        # not halved when memory runs out: a recording can't forget half a batch
        size = context.rows.most
        for start in range(0, len(items), size):
            some = items[start : start + size]
            if unit.score == "loss":
                prepared = context.task.prepare(some)
                with scope.record("head_output", into=total) as total:
                    for timestep in context.plan.timesteps:
                        context.task.predict(context.noisy_inputs(prepared, timestep))
                        advance(len(some))
            else:
                with scope.record("head_output", into=total) as total:
                    context.generate(some)
                advance(context.plan.rows_per_image * len(some))
        assert total is not None
        return Results(tensors=total.to_tensors())
