"""From what a user writes in `scope.edit(...)` to the edit of one attention call."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

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
    mappings_of,
)
from headscope.models.hooks.forwards import Forward, Window
from headscope.models.recording.recording import HEAD_OUTPUT, Recording, Resampled
from headscope.models.recording.tensors import Key, moved
from headscope.models.structure.layout import Layout
from headscope.ops import HeadEdit

if TYPE_CHECKING:
    from headscope.models.scope import Scope


@dataclass(frozen=True)
class Change:
    """What one edit does to one attention call; tensors are [rows or 1, ...] and on its device."""

    edit: HeadEdit
    patches: tuple[tuple[str, Tensor, Tensor], ...] = ()  # "q", "k" or "v"; heads [rows or 1, heads] bool; tensor


class ActiveEdit(Window):
    """The edits of one context.

    Attributes:
        sites: the names of the sites it edits.
    """

    def __init__(
        self,
        values: dict[str, list[list[Any]]],
        fill: Fill,
        steps: range | None,
        branches: Iterable[str] | None,
        scope: "Scope",
    ) -> None:
        super().__init__(steps, branches)
        self._values = values
        self._fill = fill
        self._sites = {name: scope.site(name) for name in values}
        # an edit is moved to a device once, not at every call
        self._moved: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self._gates: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self.sites = frozenset(values)
        # the branches that the edited sites' attention was of, in order
        self._branches_met: dict[str, None] = {}

    @classmethod
    def build(
        cls,
        edits: Edits | Sequence[Edits],
        fill: Fill,
        steps: range | None,
        branches: Iterable[str] | None,
        scope: "Scope",
    ) -> "ActiveEdit":
        """Check everything before the model runs."""
        check_fill(fill)
        samples = mappings_of(edits)
        values: dict[str, list[list[Any]]] = {}
        for row, sample in enumerate(samples):
            for pattern, value in sample.items():
                for name in scope.matching(pattern):
                    one = checked(value, scope.site(name), f"edits[{name!r}]")
                    if len(samples) > 1:
                        check_one_row(one, f"edits[{row}][{name!r}]")
                    values.setdefault(name, [[] for _ in samples])[row] += one
        return cls(values, fill, steps, branches, scope)

    def changes(self, name: str, call: int, forward: Forward, layout: Layout, query: Tensor) -> list[Change]:
        """The changes of one attention call on `query` [rows, heads, queries, dim], in the order they are made.

        Raises:
            ValueError: the batch isn't made of one row per sample of the edit.
        """
        if self.branches is not None:
            for part, branch in enumerate(forward.branches):
                if forward.samples_of(part, layout):
                    self._branches_met[branch or "cond"] = None
        rows = _RowMap(forward, layout, query, name)
        values = self._values[name]
        if len(values) == 1:
            found = [change for value in values[0] for change in self._whole(value, name, call, rows)]
        else:
            if len(values) != forward.samples:
                raise rows.misfit(len(values))
            by_row = [values[row % forward.samples] for row in range(forward.batch)]
            found = self._by_row(by_row, name, call, rows)
        return [rows.only(change, self.branches) for change in found]

    def check_met(self) -> None:
        super().check_met()
        # perturbed attention, for one, is no attention at all where it is perturbed
        for name in self.branches or ():
            if self._branches_met and name not in self._branches_met:
                listed = ", ".join(self._branches_met)
                raise ValueError(
                    f"branches: got {name!r}, in which none of the edited sites attends, expected some of {listed}"
                )

    def _whole(self, value: Any, name: str, call: int, rows: "_RowMap") -> list[Change]:
        """One value for the whole batch."""
        if isinstance(value, HeadEdit):
            edit = value if value.fill is not None or value.gate is None else replace(value, fill=self._fill)
            return [self._resolve(edit, name, call, rows, keep=True)]
        if isinstance(value, Patch):
            return [self._patch(value, name, call, rows)]
        if not callable(value):
            gate = self._gates.get((name, value))
            if gate is None:
                gate = self._gates[name, value] = _gate(value, self._sites[name].heads)
            return [self._resolve(HeadEdit(gate, self._fill), name, call, rows, keep=True)]
        site, forward = self._sites[name], rows.forward
        by_row = []
        for row in range(forward.batch):
            timestep = rows.timesteps[row % len(rows.timesteps)]
            step = forward.step_since(self.first_forward)
            where = Where(site, call, step, timestep, forward.branch_of(row), row % forward.samples)
            by_row.append(checked(value(where), site, f"edits[{name!r}]({where})"))
            check_one_row(by_row[-1], f"edits[{name!r}]({where})")
        return self._by_row(by_row, name, call, rows)

    def _by_row(self, values: list[list[Any]], name: str, call: int, rows: "_RowMap") -> list[Change]:
        """Different values in every row of the batch: the n-th of every row are one change per kind of value."""
        longest = max(map(len, values))
        turns = [[own[turn] if turn < len(own) else None for own in values] for turn in range(longest)]
        return [change for turn in turns for change in self._turn(turn, name, call, rows)]

    def _turn(self, values: list[Any], name: str, call: int, rows: "_RowMap") -> list[Change]:
        """One value, or None, in every row of the batch."""
        site, batch = self._sites[name], len(values)
        heads: dict[int, tuple[Tensor, Any]] = {}
        others: list[Change] = []
        for row, value in enumerate(values):
            if value is None:
                continue
            if callable(value):
                raise TypeError(f"edits[{name!r}]: got a function inside a sequence of edits, expected it alone")
            if not isinstance(value, (HeadEdit, Patch)):
                value = HeadEdit(_gate(value, site.heads), self._fill)
            if isinstance(value, Patch):
                others += [rows.row(change, row) for change in self._whole(value, name, call, rows)]
                continue
            edit = value if value.fill is not None or value.gate is None else replace(value, fill=self._fill)
            if edit.gate is None or any(getattr(edit, field) is not None for field in FACTORS):
                others.append(rows.row(self._resolve(edit, name, call, rows), row))
                continue
            # rows with the same fill share a gate
            gate, _ = heads.setdefault(id(edit.fill), (torch.ones(batch, site.heads), edit.fill))
            gate[row] *= edit.gate[0].to(gate)
        gates = [self._resolve(HeadEdit(gate, fill), name, call, rows) for gate, fill in heads.values()]
        return [*gates, *others]

    def _resolve(self, edit: HeadEdit, name: str, call: int, rows: "_RowMap", keep: bool = False) -> Change:
        """keep: the edit's tensors will be asked for again."""
        given = {field.name: getattr(edit, field.name) for field in fields(edit)}
        fill = given.pop("fill")
        spread = {
            field: rows.spread(self._on(rows.device, tensor, keep))
            for field, tensor in given.items()
            if isinstance(tensor, Tensor)
        }
        if isinstance(fill, (Recording, Resampled)):
            fill = rows.source(fill, HEAD_OUTPUT, name, call)
        elif isinstance(fill, Tensor):
            fill = rows.spread(self._on(rows.device, fill, keep)[(None,) * (4 - fill.ndim)])
        return Change(HeadEdit(**spread, fill=fill))

    def _on(self, device: torch.device, tensor: Tensor, keep: bool) -> Tensor:
        if tensor.device == device or not keep:
            return moved(tensor, device)
        if (id(tensor), device) not in self._moved:
            # an ordinary tensor, which a later forward may save for its backward
            with torch.inference_mode(False):
                # with the tensor itself, so that its id stays its own
                self._moved[id(tensor), device] = (tensor, moved(tensor, device))
        return self._moved[id(tensor), device][1]

    def _patch(self, patch: Patch, name: str, call: int, rows: "_RowMap") -> Change:
        heads = torch.zeros(1, self._sites[name].heads, dtype=torch.bool)
        heads[:, list(range(heads.shape[1]) if patch.heads is None else patch.heads)] = True
        heads = moved(heads, rows.device)
        patches = []
        for quantity in ("q", "k", "v"):
            source = getattr(patch, quantity)
            if isinstance(source, Tensor):
                source = moved(source, rows.device)[(None,) * (4 - source.ndim)]
                patches.append((quantity, heads, rows.spread(source)))
            elif source is not None:
                patches.append((quantity, heads, rows.source(source, quantity, name, call)))
        return Change(HeadEdit(), tuple(patches))


class _RowMap:
    """How the rows of an attention call follow from the samples of the batch."""

    def __init__(self, forward: Forward, layout: Layout, query: Tensor, site: str) -> None:
        self.forward = forward
        self.layout = layout
        self.device = query.device
        self._dtype = query.dtype
        self._site = site

    @property
    def timesteps(self) -> list[float]:
        return self.forward.timestep.tolist() if self.forward.timestep.numel() > 1 else [self.forward.single_timestep]

    def misfit(self, got: int) -> ValueError:
        return ValueError(
            f"edits: got {got} rows, expected 1 or one per sample; the batch at {self._site!r} has"
            f" {self.forward.batch} rows in {len(self.forward.branches)} guidance branch(es)"
        )

    def spread(self, tensor: Tensor) -> Tensor:
        """[1, samples or batch, ...] as [1 or rows, ...]."""
        given = tensor.shape[0]
        forward, layout = self.forward, self.layout
        if given == 1:
            return tensor
        if given == forward.batch * layout.fold and layout.fold > 1:
            return tensor[layout.first_sample * layout.fold :][: layout.samples * layout.fold]
        if given == forward.samples and given != forward.batch:
            tensor = tensor.repeat(len(forward.branches), *[1] * (tensor.ndim - 1))
        elif given != forward.batch:
            raise self.misfit(given)
        if layout.samples != forward.batch:
            tensor = tensor[layout.first_sample : layout.end_sample]
        return tensor if layout.fold == 1 else tensor.repeat_interleave(layout.fold, 0)

    def source(self, source: Recording | Resampled, quantity: str, site: str, call: int) -> Tensor:
        """A recording's tensor at this call, [rows, heads, tokens, dim]."""
        recording, chosen = (source.recording, source.chosen) if isinstance(source, Resampled) else (source, None)
        forward, layout = self.forward, self.layout
        pieces = []
        for part, branch in enumerate(forward.branches):
            samples = forward.samples_of(part, layout)
            if not samples:
                continue
            key = Key(quantity, site, call, forward.single_timestep, branch)
            if chosen is None and recording.reduce == "mean":
                found = recording.tensors.placed_mean(key, self.device, self._dtype)[None]
                pieces.append(found.expand(len(samples), -1, -1, -1, -1))
                continue
            found = recording.tensors.samples(key._replace(visit=forward.visit))
            if chosen is None and found.shape[0] != forward.samples:
                raise ValueError(
                    f"recording: it has {found.shape[0]} samples of {key}, and the batch {forward.samples}; say which"
                    " with recording.take([...])"
                )
            picked = tuple(range(forward.samples)) if chosen is None else chosen
            picked = picked * forward.samples if len(picked) == 1 else picked
            if len(picked) != forward.samples or max(picked, default=0) >= found.shape[0]:
                raise ValueError(
                    f"recording: {list(picked)} of its {found.shape[0]} samples were asked for by a batch of"
                    f" {forward.samples}, expected one recorded sample per sample"
                )
            pieces.append(found[[picked[sample] for sample in samples]].to(self.device, self._dtype))
        # of a single branch, rows of a mean stay one row in memory
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return whole.flatten(0, 1)

    def row(self, change: Change, row: int) -> Change:
        """The change in one row of the batch, nothing in the others."""
        return self._where(change, torch.arange(self.forward.batch) == row)

    def only(self, change: Change, branches: tuple[str, ...] | None) -> Change:
        """The change in some guidance branches; without guidance the one branch there is counts as "cond"."""
        if branches is None:
            return change
        inside = [(branch or "cond") in branches for branch in self.forward.branches]
        return self._where(change, torch.tensor(inside).repeat_interleave(self.forward.samples))

    def _where(self, change: Change, samples: Tensor) -> Change:
        """samples: bool [batch]."""
        samples = moved(samples, self.device)
        inside = self.spread(samples) if samples.numel() > 1 else samples
        kept: dict[str, Any] = {"fill": change.edit.fill}
        for name in ("gate", *FACTORS):
            tensor = getattr(change.edit, name)
            if tensor is not None:
                neutral = 0.0 if name == "key_bias" else 1.0
                kept[name] = torch.where(inside.view(-1, *[1] * (tensor.ndim - 1)), tensor, neutral)
        patches = tuple((quantity, heads & inside[:, None], tensor) for quantity, heads, tensor in change.patches)
        return Change(HeadEdit(**kept), patches)


@dataclass(frozen=True)
class Combined:
    """Several changes as one attention call: patched tensors, the operator's own edit, and gates that come after it."""

    query: Tensor
    key: Tensor
    value: Tensor
    edit: HeadEdit | None
    later: tuple[HeadEdit, ...]


def combine(changes: list[Change], query: Tensor, key: Tensor, value: Tensor) -> Combined:
    """Apply patches; merge gates of one fill and all factors; what is left over comes after the operator."""
    tensors = {"q": query, "k": key, "v": value}
    factors: dict[str, Tensor] = {}
    gates: list[tuple[Tensor, Any]] = []
    for change in changes:
        for quantity, heads, patch in change.patches:
            own = tensors[quantity]
            if any(size not in (1, expected) for size, expected in zip(patch.shape[1:], own.shape[1:], strict=True)):
                raise ValueError(
                    f"patch: got {quantity} of shape {list(patch.shape)}, expected {list(own.shape)} or what"
                    " broadcasts to it"
                )
            own, patch = (_for_every_head(tensor, heads.shape[1]) for tensor in (own, patch))
            tensors[quantity] = torch.where(heads[..., None, None], patch.to(own.dtype), own)
        for name in FACTORS:
            own: Tensor | None = getattr(change.edit, name)
            if own is None:
                continue
            if name not in factors:
                factors[name] = own
            elif name == "key_bias":
                factors[name] = factors[name] + own
            else:
                factors[name] = factors[name] * own
        if change.edit.gate is not None:
            gate, fill = change.edit.gate, change.edit.fill
            # of one fill, two gates are one: g2 (g1 a + (1 - g1) f) + (1 - g2) f
            if gates and gates[-1][1] is fill:
                gates[-1] = (gates[-1][0] * gate, fill)
            else:
                gates.append((gate, fill))
    most = max(tensors["k"].shape[1], tensors["v"].shape[1])
    for quantity in ("k", "v"):
        tensors[quantity] = _for_every_head(tensors[quantity], most)
    edits = [HeadEdit(gate, fill) for gate, fill in gates]
    edit = replace(edits[0], **factors) if edits else HeadEdit(**factors) if factors else None
    return Combined(tensors["q"], tensors["k"], tensors["v"], edit, tuple(edits[1:]))


def _for_every_head(tensor: Tensor, heads: int) -> Tensor:
    """Keys or values [rows, groups, tokens, dim], which grouped heads share, as each head's own."""
    if tensor.shape[1] == 1:
        return tensor.expand(-1, heads, -1, -1)
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], 1)


def _gate(heads: Iterable[int], of: int) -> Tensor:
    # an ordinary tensor, which a later forward may save for its backward
    with torch.inference_mode(False):
        gate = torch.ones(1, of)
        gate[:, list(heads)] = 0.0
    return gate
