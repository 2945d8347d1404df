"""Predictions of the clean model and of the edited one, which takes over from the clean one what it can."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from headscope.models import Recording
from headscope.models.editing.edits import Fill
from headscope.models.recording.recording import Resampled
from headscope.models.recording.tensors import moved
from headscope.models.tasks import NoisyInputs, Prepared
from headscope.ops import HeadEdit
from headscope.sweep.compute.context import Context
from headscope.sweep.compute.edits import fills_at, head_edits, tensors
from headscope.sweep.compute.graphs import Forwards
from headscope.sweep.compute.sharing import Cache
from headscope.sweep.plan.heads import Edit
from headscope.sweep.plan.items import PromptItem, SweptItem


class Predictions:
    """The denoiser's predictions in one unit.

    Args:
        inputs: some of the unit, which are learned from where nothing was learned before.
        edited: the sets of sites that will be edited.
    """

    def __init__(self, context: Context, inputs: NoisyInputs, edited: Iterable[frozenset[str]]) -> None:
        self._context = context
        self._scope = context.loss_scope
        self._prefix = context.shared(inputs)
        self._edited = frozenset(edited)

    def attached(self) -> AbstractContextManager[Any]:
        """Makes predictions quick inside: modules are wrapped once for all."""
        return self._prefix.attached() if self._prefix else nullcontext()

    def clean(self, inputs: NoisyInputs) -> tuple[Tensor, Cache | None]:
        """The unedited prediction, and what edited ones of the same items take over; None if nothing."""
        prefix, edited = self._prefix, self._edited
        return self._context.forwards.run(
            ("clean", edited),
            inputs.timestep,
            None,
            lambda _: prefix.clean(edited) if prefix else nullcontext(),
            lambda: self._context.task.predict(inputs),
        )

    def fills(self, fill: Fill, sites: Iterable[str]) -> Mapping[str, Fill]:
        """By site, what takes the place of removed heads at the timestep of the prediction that was made last."""
        return fills_at(self._scope, fill, sites, self._context.task.device)

    def edited(
        self,
        inputs: NoisyInputs,
        edits: Sequence[Edit],
        fills: Mapping[str, Fill],
        cache: Cache | None,
        rows: Tensor,
    ) -> Tensor:
        """The prediction with an edit in each row, all of the same sites.

        Args:
            fills: by site, of removed heads.
            cache: of the clean prediction, whose row for each of the inputs' is in `rows`.
        """
        made = head_edits(edits, self._scope, self._context.plan.keys)
        sites, prefix, device = frozenset(made), self._prefix, self._context.task.device
        fields = {
            name: {**{part: moved(tensor, device) for part, tensor in tensors(edit).items()}, "fill": fills[name]}
            for name, edit in made.items()
        }

        @contextmanager
        def inside(given: dict[str, Any]) -> Iterator[None]:
            made = {name: HeadEdit(**parts) for name, parts in given["edits"].items()}
            shared = prefix.replay(cache, sites, given["rows"]) if prefix and cache else nullcontext()
            with self._scope.edit(made), shared:
                yield

        given = {"edits": fields, "rows": rows}
        key = ("edited", sites, cache)
        # a recording is looked up by the timestep, which a replay wouldn't do
        looked_up = any(isinstance(fill, (Recording, Resampled)) for fill in fills.values())
        forwards = Forwards() if looked_up else self._context.forwards
        return forwards.run(key, inputs.timestep, given, inside, lambda: self._context.task.predict(inputs))[0]


def prepared(context: Context, items: Sequence[SweptItem | PromptItem]) -> Prepared:
    """Items encoded, as many at once as fit."""
    pieces: dict[int, Prepared] = {}

    def prepare(piece: range) -> None:
        pieces[piece.start] = context.prepared([items[index] for index in piece])

    context.rows.run_clean(len(items), prepare)
    found = [pieces[start] for start in sorted(pieces)]
    conditioning = {name: torch.cat([one.conditioning[name] for one in found]) for name in found[0].conditioning}
    keys = tuple(key for one in found for key in one.keys)
    # a family of somebody's own may not give them
    return Prepared(keys, torch.cat([one.clean for one in found]), conditioning, tuple(items))
