"""From what a user writes in `scope.edit(...)` to the changes of one attention call."""

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from headscope.models.editing.edits import (
    FACTORS,
    Edits,
    Fill,
    Patch,
    Where,
    check_fill,
    check_one_row,
    checked,
    values_by_site,
)
from headscope.models.editing.rows import Change, EditedCall
from headscope.models.hooks.caches import Missing
from headscope.models.hooks.calls import SiteCall
from headscope.models.hooks.contexts import Context
from headscope.models.hooks.forwards import Forward
from headscope.models.recording.recording import HEAD_OUTPUT, Recording, Resampled
from headscope.models.recording.tensors import moved
from headscope.models.structure.index import SiteIndex
from headscope.ops import HeadEdit


class EditContext(Context):
    """An open context that edits.

    Args:
        edits, fill, steps, branches: as in `Scope.edit`; all are checked before the model runs.
        index: the sites that there are.
    """

    def __init__(
        self,
        edits: Edits | Sequence[Edits],
        fill: Fill,
        steps: range | None,
        branches: Iterable[str] | None,
        index: SiteIndex,
    ) -> None:
        check_fill(fill)
        # by site, for each sample or for the whole batch, the values in the order they are applied
        self._values = values_by_site(edits, index)
        super().__init__(self._values, steps, branches)
        self._fill = fill
        # an edit is moved to a device once, not at every call
        self._moved: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self._gates: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        # the branches that the edited sites' attention was of, in order
        self._branches_met: dict[str, None] = {}

    def changes(self, site_call: SiteCall, query: Tensor) -> list[Change]:
        """The changes of one attention call on `query` [rows, heads, queries, dim], in the order they are made.

        Raises:
            ValueError: the batch isn't made of one row per sample of the edit.
        """
        call, forward = EditedCall(site_call, query), site_call.forward
        if self.branches is not None:
            self._note_branches(call)
        values = self._values[call.site.name]
        if len(values) == 1:
            found = [change for value in values[0] for change in self._for_batch(value, call)]
        elif len(values) == forward.samples:
            found = self._for_rows([values[row % forward.samples] for row in range(forward.batch)], call)
        else:
            raise call.misfit(len(values))
        return [call.in_branches(change, self.branches) for change in found]

    def _note_branches(self, call: EditedCall) -> None:
        for part, branch in enumerate(call.forward.branches):
            if call.forward.samples_of(part, call.layout):
                self._branches_met[branch or "cond"] = None

    def check_met(self) -> None:
        super().check_met()
        # perturbed attention, for one, is no attention at all where it is perturbed
        for name in self.branches or ():
            if self._branches_met and name not in self._branches_met:
                listed = ", ".join(self._branches_met)
                raise ValueError(
                    f"branches: got {name!r}, in which none of the edited sites attends, expected some of {listed}"
                )

    def note_missing(self, missing: Missing, forward: Forward) -> None:
        """Raises RuntimeError where a cache gave what was to be edited: that can't be edited any more."""
        site, branch, cache = missing
        edited = site in self.sites and (self.branches is None or (branch or "cond") in self.branches)
        if cache is not None and edited and self.acts_in(forward):
            raise RuntimeError(
                f"site {site!r} can't be edited in step {self.step_of(forward)}, for {cache}"
                " took its attention from a cache; edit other sites or steps, or disable the cache"
            )

    # from values to changes

    def _for_batch(self, value: Any, call: EditedCall) -> list[Change]:
        """One value for the whole batch."""
        if isinstance(value, HeadEdit):
            return [self._head_edit(self._filled(value), call, reused=True)]
        if isinstance(value, Patch):
            return [_patch(value, call)]
        if callable(value):
            return self._for_rows(self._asked(value, call), call)
        key = (call.site.name, value)
        if key not in self._gates:
            self._gates[key] = _gate(value, call.site.heads)
        return [self._head_edit(HeadEdit(self._gates[key], self._fill), call, reused=True)]

    def _asked(self, function: Any, call: EditedCall) -> list[list[Any]]:
        """The values that a user's function returns for each row of the batch."""
        site, forward, timesteps = call.site, call.forward, call.timesteps
        found = []
        for row in range(forward.batch):
            timestep = timesteps[row % len(timesteps)]
            sample, branch = row % forward.samples, forward.branch_of(row)
            where = Where(site, call.number, self.step_of(forward), timestep, branch, sample)
            name = f"edits[{site.name!r}]({where})"
            found.append(checked(function(where), site, name))
            check_one_row(found[-1], name)
        return found

    def _for_rows(self, values: list[list[Any]], call: EditedCall) -> list[Change]:
        """Different values in every row of the batch: the first of each row are applied together, then the second."""
        longest = max(map(len, values))
        rounds = [[row[number] if number < len(row) else None for row in values] for number in range(longest)]
        return [change for one_each in rounds for change in self._one_each(one_each, call)]

    def _one_each(self, values: list[Any], call: EditedCall) -> list[Change]:
        """One value, or None, in every row of the batch."""
        # rows with the same fill share a gate
        gates: dict[int, HeadEdit] = {}
        others: list[Change] = []
        for row, value in enumerate(values):
            if value is None:
                continue
            if isinstance(value, Patch):
                others.append(call.in_row(_patch(value, call), row))
                continue
            if callable(value):
                name = call.site.name
                raise TypeError(f"edits[{name!r}]: got a function inside a sequence of edits, expected it alone")
            if not isinstance(value, HeadEdit):
                value = HeadEdit(_gate(value, call.site.heads))
            edit = self._filled(value)
            if edit.gate is None or any(getattr(edit, field) is not None for field in FACTORS):
                others.append(call.in_row(self._head_edit(edit, call), row))
                continue
            if id(edit.fill) not in gates:
                gates[id(edit.fill)] = HeadEdit(torch.ones(len(values), call.site.heads), edit.fill)
            shared = gates[id(edit.fill)].gate
            assert shared is not None
            shared[row] *= edit.gate[0].to(shared)
        return [*(self._head_edit(edit, call) for edit in gates.values()), *others]

    def _filled(self, edit: HeadEdit) -> HeadEdit:
        """The edit with the context's fill, where it removes heads and has none of its own."""
        return edit if edit.fill is not None or edit.gate is None else replace(edit, fill=self._fill)

    def _head_edit(self, edit: HeadEdit, call: EditedCall, reused: bool = False) -> Change:
        """The change that a HeadEdit makes; `reused` if its tensors will be asked for again."""
        given = {field.name: getattr(edit, field.name) for field in fields(edit)}
        fill = given.pop("fill")
        tensors = {
            name: call.spread(self._on(call.device, tensor, reused))
            for name, tensor in given.items()
            if isinstance(tensor, Tensor)
        }
        if isinstance(fill, (Recording, Resampled)):
            fill = call.recorded(fill, HEAD_OUTPUT)
        elif isinstance(fill, Tensor):
            fill = call.spread(_with_four_dimensions(self._on(call.device, fill, reused)))
        return Change(HeadEdit(**tensors, fill=fill))

    def _on(self, device: torch.device, tensor: Tensor, reused: bool) -> Tensor:
        if tensor.device == device or not reused:
            return moved(tensor, device)
        if (id(tensor), device) not in self._moved:
            # an ordinary tensor, which a later forward may save for its backward
            with torch.inference_mode(False):
                # with the tensor itself, so that no other gets its id
                self._moved[id(tensor), device] = (tensor, moved(tensor, device))
        return self._moved[id(tensor), device][1]


def _patch(patch: Patch, call: EditedCall) -> Change:
    """The change that a Patch makes."""
    heads = torch.zeros(1, call.site.heads, dtype=torch.bool)
    heads[:, list(range(call.site.heads) if patch.heads is None else patch.heads)] = True
    heads = moved(heads, call.device)
    patches = []
    for quantity in ("q", "k", "v"):
        source = getattr(patch, quantity)
        if isinstance(source, Tensor):
            tensor = call.spread(_with_four_dimensions(moved(source, call.device)))
            patches.append((quantity, heads, tensor))
        elif source is not None:
            patches.append((quantity, heads, call.recorded(source, quantity)))
    return Change(HeadEdit(), tuple(patches))


def _with_four_dimensions(tensor: Tensor) -> Tensor:
    """[..., tokens, dim] as [batch or 1, heads or 1, tokens, dim]."""
    return tensor[(None,) * (4 - tensor.ndim)]


def _gate(heads: Iterable[int], count: int) -> Tensor:
    """The gate [1, count] that removes some heads."""
    # an ordinary tensor, which a later forward may save for its backward
    with torch.inference_mode(False):
        gate = torch.ones(1, count)
        gate[:, list(heads)] = 0.0
    return gate
