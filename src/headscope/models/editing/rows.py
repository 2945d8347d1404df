"""One attention call that is edited: how its rows follow from the samples of the batch."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from headscope.models.editing.edits import FACTORS
from headscope.models.hooks.calls import SiteCall
from headscope.models.recording.recording import Recording, Resampled
from headscope.models.recording.tensors import Key, moved
from headscope.ops import HeadEdit


class Change(NamedTuple):
    """A change to one attention call; tensors are [rows or 1, ...] and on its device.

    Attributes:
        patches: "q", "k" or "v"; the heads [rows or 1, heads] bool that get the tensor; the tensor.
    """

    edit: HeadEdit
    patches: tuple[tuple[str, Tensor, Tensor], ...] = ()


class EditedCall:
    """An attention call whose rows are samples of the batch, or several rows (frames, pixels) of each.

    Args:
        query: [rows, heads, queries, dim].
    """

    def __init__(self, call: SiteCall, query: Tensor) -> None:
        self.site, self.number, self.forward, self.layout = call
        self.device = query.device
        self._dtype = query.dtype

    @property
    def timesteps(self) -> list[float]:
        """The scheduler's timesteps of the batch, one for all rows or one for each."""
        timestep = self.forward.timestep
        return timestep.tolist() if timestep.numel() > 1 else [self.forward.single_timestep]

    def misfit(self, got: int) -> ValueError:
        """The error where tensors or edits have a number of rows that the batch can't be split into."""
        return ValueError(
            f"edits: got {got} rows, expected 1 or one per sample; the batch at {self.site.name!r} has"
            f" {self.forward.batch} rows in {len(self.forward.branches)} guidance branch(es)"
        )

    def spread(self, tensor: Tensor) -> Tensor:
        """[1, samples or batch, ...] as [1 or rows, ...].

        Raises:
            ValueError: its first dimension is neither.
        """
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

    def recorded(self, source: Recording | Resampled, quantity: str) -> Tensor:
        """A recording's tensor at this call, [rows, heads, tokens, dim].

        Raises:
            KeyError: nothing was recorded there.
            ValueError: the recording has other samples than the batch.
        """
        recording, chosen = (source.recording, source.chosen) if isinstance(source, Resampled) else (source, None)
        pieces = []
        for part, branch in enumerate(self.forward.branches):
            samples = self.forward.samples_of(part, self.layout)
            if not samples:
                continue
            key = Key(quantity, self.site.name, self.number, self.forward.single_timestep, branch)
            if chosen is None and recording.reduce == "mean":
                found = recording.tensors.placed_mean(key, self.device, self._dtype)[None]
                pieces.append(found.expand(len(samples), -1, -1, -1, -1))
            else:
                pieces.append(self._recorded_samples(recording, key, chosen, samples))
        # of a single branch, rows of a mean stay one row in memory
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return whole.flatten(0, 1)

    def _recorded_samples(
        self, recording: Recording, key: Key, chosen: tuple[int, ...] | None, samples: range
    ) -> Tensor:
        """Each sample's own tensor, or that of the recorded sample chosen for it."""
        batch = self.forward.samples
        found = recording.tensors.samples(key._replace(visit=self.forward.visit))
        if chosen is None and found.shape[0] != batch:
            raise ValueError(
                f"recording: it has {found.shape[0]} samples of {key}, and the batch {batch}; say which"
                " with recording.take([...])"
            )
        picked = tuple(range(batch)) if chosen is None else chosen
        picked = picked * batch if len(picked) == 1 else picked
        if len(picked) != batch or max(picked, default=0) >= found.shape[0]:
            raise ValueError(
                f"recording: {list(picked)} of its {found.shape[0]} samples were asked for by a batch of"
                f" {batch}, expected one recorded sample per sample"
            )
        return found[[picked[sample] for sample in samples]].to(self.device, self._dtype)

    def in_row(self, change: Change, row: int) -> Change:
        """The change in one row of the batch, nothing in the others."""
        return self._in(torch.arange(self.forward.batch) == row, change)

    def in_branches(self, change: Change, branches: tuple[str, ...] | None) -> Change:
        """The change in some guidance branches; without guidance the one branch there is counts as "cond"."""
        if branches is None:
            return change
        inside = [(branch or "cond") in branches for branch in self.forward.branches]
        return self._in(torch.tensor(inside).repeat_interleave(self.forward.samples), change)

    def _in(self, samples: Tensor, change: Change) -> Change:
        """The change in some rows of the batch (bool [batch]), nothing in the others."""
        samples = moved(samples, self.device)
        inside = self.spread(samples) if samples.numel() > 1 else samples
        tensors: dict[str, Any] = {"fill": change.edit.fill}
        for name in ("gate", *FACTORS):
            tensor = getattr(change.edit, name)
            if tensor is not None:
                neutral = 0.0 if name == "key_bias" else 1.0
                tensors[name] = torch.where(inside.view(-1, *[1] * (tensor.ndim - 1)), tensor, neutral)
        patches = tuple((quantity, heads & inside[:, None], tensor) for quantity, heads, tensor in change.patches)
        return Change(HeadEdit(**tensors), patches)
