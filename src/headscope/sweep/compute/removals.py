"""What the removal of many different sets of heads costs one group's items: sets and items as rows of one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headscope.models.editing.edits import Fill
from headscope.models.tasks import NoisyInputs
from headscope.ops import HeadEdit
from headscope.sweep.compute.context import Context
from headscope.sweep.compute.edits import fills_at
from headscope.sweep.compute.predictions import prepared
from headscope.sweep.compute.scores import squared_error
from headscope.sweep.plan.items import PromptItem, SweptItem, source_weights
from headscope.sweep.plan.units import Advance, Unit

Heads = Sequence[tuple[str, int]]
# standard errors over sources by which a cost is clearly above 0
CLEAR = 2.0
# of a degradation, and of a squared difference, as fractions of the clean loss
ROUNDING = (1e-6, 1e-12)


class Removals:
    """The costs of removing sets of heads, over some items and all timesteps, each from the first draw of noise.

    A set edits sites from the first to the last, so nothing is taken over from the clean forward; instead the rows of a
    batch are of any set and any item.

    Args:
        unit: whose group's fills take the place of heads.
        items: those of one split.
        fill: one of the sweep's.
        heads: (site, head) pairs of all the heads that may be removed, in the order of execution.
        advance: is called with the rows of every batch.
    """

    def __init__(
        self,
        context: Context,
        unit: Unit,
        items: Sequence[SweptItem | PromptItem],
        fill: str,
        heads: Heads,
        advance: Advance,
    ) -> None:
        self.heads = tuple(heads)
        self._context, self._items, self._advance = context, list(items), advance
        self._places: dict[str, list[tuple[int, int]]] = {}
        for place, (site, head) in enumerate(self.heads):
            self._places.setdefault(site, []).append((place, head))
        self._counts = {site: context.loss_scope.site(site).heads for site in self._places}
        self._at = [self._clean(timestep, context.fill(unit, fill)) for timestep in context.plan.timesteps]
        self._weights = source_weights(self._items)

    def _clean(self, timestep: int, fill: Fill) -> _Clean:
        """The clean model at a timestep, and what takes the place of heads there."""
        context = self._context
        with torch.inference_mode(), context.loss_scope.keep_hooks():
            inputs = context.noisy_inputs(prepared(context, self._items), timestep)
            predictions: dict[int, Tensor] = {}

            def predict(piece: range) -> None:
                rows = torch.arange(piece.start, piece.stop, device=context.task.device)
                predictions[piece.start] = context.task.predict(inputs.rows(rows))
                self._advance(len(piece))

            context.rows.run(len(self._items), predict)
            fills = fills_at(context.loss_scope, fill, self._places, context.task.device)
            prediction = torch.cat([predictions[start] for start in sorted(predictions)])
            return _Clean(inputs, prediction, squared_error(prediction, inputs.target).cpu().numpy(), fills)

    def costs(self, removed: Sequence[frozenset[int]]) -> np.ndarray:
        """The costs of removing some sets, given by the places of their heads: [sets, 2].

        The first is the degradation, at every timestep the sum over sources of edited - clean loss by that of the clean
        loss, and then the mean over the timesteps; the second the same with the mean squared difference to the clean
        prediction in place of edited - clean loss. What isn't finite is NaN.
        """
        changes = self._changes(removed)
        clean = np.stack([at.loss for at in self._at])
        with np.errstate(all="ignore"):
            totals = ((changes * self._weights).sum(-1) / (clean * self._weights).sum(-1)).mean(-1).T
        return np.where(np.isfinite(totals), totals, np.nan)

    def clearly_costs(self, removed: frozenset[int], metric: int) -> bool:
        """True if one of the costs of a set is above 0 by more than `CLEAR` standard errors over sources, and above
        what single precision rounds."""
        change, clean = self._changes([removed])[metric, 0], np.stack([at.loss for at in self._at])
        # what each source adds to the degradation, to first order
        with np.errstate(all="ignore"):
            below = (clean * self._weights).sum(-1, keepdims=True)
            totals = (change * self._weights).sum(-1, keepdims=True) / below
            parts = ((change - totals * clean) * self._weights / below).mean(0)
        by_source: dict[str, float] = {}
        for item, part in zip(self._items, parts, strict=True):
            by_source[item.source_id] = by_source.get(item.source_id, 0.0) + float(part)
        count, squares = len(by_source), sum(part * part for part in by_source.values())
        error = float(np.sqrt(squares * count / (count - 1))) if count > 1 else 0.0
        # NaN is above nothing
        return bool(totals.mean() > max(CLEAR * error, ROUNDING[metric]))

    def _changes(self, removed: Sequence[frozenset[int]]) -> np.ndarray:
        """Edited - clean loss and distance to the clean prediction, [2, sets, timesteps, items]."""
        kept = np.ones((len(removed), len(self.heads)), np.float32)
        for row, heads in enumerate(removed):
            kept[row, list(heads)] = 0.0
        count, device = len(self._items), self._context.task.device
        found = np.full((2, len(removed), len(self._at), count), np.nan)
        for column, at in enumerate(self._at):

            def edit(piece: range, column=column, at=at) -> None:
                sets, items = np.divmod(np.arange(piece.start, piece.stop), count)
                rows = torch.from_numpy(items).to(device)
                mine = at.inputs.rows(rows)
                with torch.inference_mode(), self._context.loss_scope.edit(self._edits(kept[sets], at.fills)):
                    prediction = self._context.task.predict(mine)
                loss = squared_error(prediction, mine.target).cpu().numpy()
                distance = squared_error(prediction, at.prediction.index_select(0, rows)).cpu().numpy()
                with np.errstate(invalid="ignore"):
                    found[:, sets, column, items] = loss - at.loss[items], distance
                self._advance(len(piece))

            with self._context.loss_scope.keep_hooks():
                self._context.rows.run(len(removed) * count, edit)
        return found

    def _edits(self, kept: np.ndarray, fills: Mapping[str, Fill]) -> dict[str, HeadEdit]:
        """kept: [rows, heads], 1 or 0. The sites of which no row removes anything are left alone."""
        edits = {}
        for site, places in self._places.items():
            columns = [place for place, _ in places]
            if kept[:, columns].all():
                continue
            gate = np.ones((len(kept), self._counts[site]), np.float32)
            gate[:, [head for _, head in places]] = kept[:, columns]
            edits[site] = HeadEdit(torch.from_numpy(gate).to(self._context.task.device), fills[site])
        return edits


@dataclass(frozen=True)
class _Clean:
    """The clean model at a timestep: inputs, predictions and losses [items] of all items, and the fills by site."""

    inputs: NoisyInputs
    prediction: Tensor
    loss: np.ndarray
    fills: Mapping[str, Fill]
