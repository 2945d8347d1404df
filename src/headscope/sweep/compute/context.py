"""The context in which units are computed: the model, the items, and the results of earlier units."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headscope.models import Recording, Scope, Task
from headscope.models.editing.edits import Fill
from headscope.models.tasks import NoisyInputs, Prepared
from headscope.sweep.compute import means
from headscope.sweep.compute.features import own_features
from headscope.sweep.compute.fitting import Rows
from headscope.sweep.compute.graphs import Forwards, Graphs
from headscope.sweep.compute.scores import image_scores, own_scores
from headscope.sweep.compute.sharing import Prefix
from headscope.sweep.plan.config import fold_of
from headscope.sweep.plan.items import GroupItems, PromptItem, SweptItem
from headscope.sweep.plan.units import IMAGES, KINDS, REFERENCE, Plan, Unit
from headscope.sweep.store.store import Fit, RunStore

# encoded items that are kept for the next draw or timestep: those of a unit, as a rule
KEPT_ITEMS = 20


class Context:
    """The context in which units are computed.

    Args:
        store: the run's, from which the results of earlier units are read.
        fit: how many rows pass through the denoiser at once; it changes speed and memory, not the numbers (beyond
            rounding).
        share: let edited forwards take over what the clean one computed before the edited site.
        prefix: the part of clean forwards that edited ones take over, where it was learned before.

    Attributes:
        groups: the sweep's, by name.
        rows: how many rows pass through the denoiser at once from now on.
        forwards: computes teacher-forced forwards, or replays them from CUDA graphs.
        prefix: the part of clean forwards that edited ones take over; None until it is learned.
    """

    def __init__(
        self,
        plan: Plan,
        groups: Sequence[GroupItems],
        store: RunStore,
        fit: Fit,
        share: bool = True,
        prefix: Prefix | None = None,
    ) -> None:
        self.plan = plan
        self.config = config = plan.config
        self.task = task = plan.task
        self.groups = {group.name: group for group in groups}
        self.store = store
        self.share = share and fit.clean > 0
        self.prefix = prefix
        self.forwards = Graphs(task.denoiser) if config.graphs else Forwards()
        self.rows = Rows(fit.rows, fit.clean or fit.rows, self._release)
        self.image_scores: dict[str, Callable[..., Any]] = image_scores(config.image_scores)
        self.own_scores = own_scores(config.scores)
        self.own_features = own_features(config.features)
        # by the unit that wrote them
        self._means: dict[str, dict[str, Recording]] = {}
        self._drawn: dict[str, dict[str, Tensor]] = {}
        # by their items' keys, the last ones
        self._prepared: dict[tuple[str, ...], Prepared] = {}

    def _release(self) -> None:
        """Give memory back that is held to be used again."""
        self._prepared.clear()
        self.forwards.release()

    @cached_property
    def loss_scope(self) -> Scope:
        """A scope of the denoiser alone: teacher-forced forwards have no guidance branches."""
        return Scope(self.task.denoiser)

    @cached_property
    def pipeline_scope(self) -> Scope:
        """A scope of whole generations, in which a batch may hold several guidance branches."""
        return Scope(self.task.pipeline if hasattr(self.task.pipeline, "text_encoder") else self.task.denoiser)

    def members(self, unit: Unit) -> list[SweptItem | PromptItem]:
        """The unit's items as they were opened."""
        members = KINDS[unit.kind].members(self.groups[unit.group])
        return [members[index] for index in unit.items]

    def items(self, unit: Unit) -> list[SweptItem | PromptItem]:
        """The unit's items, prompts with the images that the model drew for them."""
        return self.with_images(unit, self.members(unit))

    def with_images(self, unit: Unit, members: list[SweptItem | PromptItem]) -> list[SweptItem | PromptItem]:
        """Items of a unit's group, prompts with the images that the model drew for them."""
        if not any(isinstance(item, PromptItem) for item in members):
            return members
        wrote = self._needed(unit, IMAGES)
        if wrote.id not in self._drawn:
            self._drawn[wrote.id] = self.store.read_tensors(wrote.kind, wrote.id)
        drawn = self._drawn[wrote.id]
        return [replace(item, image=drawn[item.key].numpy()) for item in members]

    def fill(self, unit: Unit, fill: str) -> Fill:
        """One of the sweep's fills, as a scope takes it."""
        if fill != "mean" and not fold_of(fill):
            return fill if fill in ("uniform", "identity") else None
        wrote = self._needed(unit, REFERENCE)
        if wrote.id not in self._means:
            # ordinary tensors, which attribution may save for its backwards
            with torch.inference_mode(False):
                self._means[wrote.id] = means.read(self.store.read_tensors(wrote.kind, wrote.id))
        return self._means[wrote.id][fill]

    def _needed(self, unit: Unit, kind: str) -> Unit:
        """The unit of a kind whose results this one reads."""
        found = next((other for other in self.plan.needs(unit) if other.kind == kind), None)
        if found is None:
            raise ValueError(f"{unit.kind}.reads: no unit of {kind!r} for {unit.group!r} to read, expected one")
        return found

    def prepared(self, items: Sequence[SweptItem | PromptItem]) -> Prepared:
        """Items encoded, which is done once where the same ones come again soon, as they do for every draw."""
        keys = tuple(item.key for item in items)
        if keys not in self._prepared:
            while self._prepared and sum(map(len, self._prepared)) + len(keys) > KEPT_ITEMS:
                del self._prepared[next(iter(self._prepared))]
            self._prepared[keys] = self.task.prepare(items)
        return self._prepared[keys]

    def noisy_inputs(self, prepared: Prepared, timestep: int, replicate: int | None = None) -> NoisyInputs:
        """Prepared items with the noise of a replicate; by default of the sweep's first draw."""
        return self.task.noisy_inputs(prepared, timestep, self._drawn_with(replicate))

    def generate(self, items: Sequence[SweptItem | PromptItem], replicate: int | None = None) -> np.ndarray:
        """The images that the model samples for some items, uint8 [items, height, width, 3], from the noise of a
        replicate; by default of the sweep's first draw."""
        return self.task.generate(items, steps=self.config.generate_steps, seed=self._drawn_with(replicate))

    def _drawn_with(self, replicate: int | None) -> int:
        return self.config.seed if replicate is None else replicate

    def shared(self, inputs: NoisyInputs) -> Prefix | None:
        """The part of clean forwards that edited ones can take over, learned from these inputs; None if none is."""
        if not self.share:
            return None
        if self.prefix is None:
            self.prefix = learned_prefix(self.task, self.loss_scope, inputs)
        return self.prefix if self.prefix.shares else None


def learned_prefix(task: Task, scope: Scope, inputs: NoisyInputs) -> Prefix:
    """Learn the part of clean forwards that edited ones can take over, from some forwards of these inputs."""
    example = _two_rows(inputs)

    def forward(rows: list[int]) -> Tensor:
        return task.predict(example.rows(torch.tensor(rows, device=task.device)))

    return Prefix.learn(task.denoiser, [site.name for site in scope.sites], forward)


def _two_rows(inputs: NoisyInputs) -> NoisyInputs:
    """The first and the last item; of a single one, itself and itself mirrored, so that the rows differ."""
    last = len(inputs.sample) - 1
    pair = inputs.rows(torch.tensor([0, last], device=inputs.sample.device))
    if last:
        return pair

    def mirrored(tensor: Tensor) -> Tensor:
        floating = tensor.is_floating_point() and tensor.ndim > 1
        return torch.cat([tensor[:1], tensor[1:].flip(-1)]) if floating else tensor

    conditioning = {name: mirrored(tensor) for name, tensor in pair.conditioning.items()}
    return replace(pair, sample=mirrored(pair.sample), conditioning=conditioning)
