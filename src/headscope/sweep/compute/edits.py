"""From the edits of a plan to those of a scope: one row of the batch for each."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from headscope.models import Recording, Scope
from headscope.models.editing.edits import Fill
from headscope.models.recording.tensors import moved
from headscope.ops import HeadEdit
from headscope.sweep.plan.heads import Edit


def head_edits(edits: Sequence[Edit], scope: Scope, keys: Mapping[str, int]) -> dict[str, HeadEdit]:
    """The edit of each site, with a row for each edit of the plan; all of them edit the same sites.

    Args:
        keys: how many keys the sites of edits with a key_bias or key_scale have.
    """
    return {name: _at(name, edits, scope.site(name).heads, keys) for name in edits[0].sites}


def _at(name: str, edits: Sequence[Edit], heads: int, keys: Mapping[str, int]) -> HeadEdit:
    chosen = [[head for site, head in edit.heads if site == name] for edit in edits]
    rows = [row for row, edited in enumerate(chosen) for _ in edited]
    columns = [head for edited in chosen for head in edited]

    def per_head(numbers: Sequence[float]) -> Tensor:
        """[rows, heads] with a row's number at its heads, 1 at all others; NumPy's indexing takes a tenth of torch's
        time."""
        values = np.ones((len(edits), heads), np.float32)
        values[rows, columns] = np.asarray(numbers, np.float32)[rows]
        return torch.from_numpy(values)

    gate = per_head([edit.keep for edit in edits])
    temperature = None
    if any(edit.temperature is not None for edit in edits):
        temperature = per_head([1.0 if edit.temperature is None else edit.temperature for edit in edits])

    def by_key(numbers: Sequence[Sequence[float]], neutral: float) -> Tensor | None:
        """[rows, heads, keys], or None where no edit says anything."""
        if not any(numbers):
            return None
        factors = torch.full((len(edits), heads, keys[name]), neutral)
        for row, (values, edited) in enumerate(zip(numbers, chosen, strict=True)):
            factors[row, edited, : len(values)] = torch.tensor(values, dtype=torch.float32)
        return factors

    return HeadEdit(
        gate,
        temperature=temperature,
        key_bias=by_key([edit.key_bias for edit in edits], 0.0),
        key_scale=by_key([edit.key_scale for edit in edits], 1.0),
    )


def tensors(edit: HeadEdit) -> dict[str, Tensor]:
    """The tensors of an edit without a fill, by field."""
    given = {field.name: getattr(edit, field.name) for field in fields(edit)}
    return {name: tensor for name, tensor in given.items() if isinstance(tensor, Tensor)}


def fills_at(scope: Scope, fill: Fill, sites: Iterable[str], device: torch.device) -> Mapping[str, Fill]:
    """By site, what takes the place of removed heads at the timestep of the forward that the scope saw last."""
    if not isinstance(fill, Recording) or (timestep := scope.timestep) is None:
        return dict.fromkeys(sites, fill)
    return {site: mean_fill(fill, site, timestep, device) for site in sites}


def mean_fill(recording: Recording, site: str, timestep: float, device: torch.device) -> Recording | Tensor:
    """A recording's mean head output at a site, [1, heads, tokens, dim] on the device; the recording itself where the
    site attends several times in a forward, or several rows belong to a sample.

    Args:
        timestep: as the denoiser takes it.
    """
    if {key.call for key in recording.tensors.kept() if key.site == site} != {0}:
        return recording
    mean = recording.mean_head_output(site, 0, timestep, None)
    return moved(mean[None], device) if mean.ndim == 3 else recording


def check_keys(edits: Sequence[Edit], keys: Mapping[str, int]) -> None:
    """Raises ValueError where an edit says something of keys that a site doesn't have."""
    for edit in edits:
        for field in ("key_bias", "key_scale"):
            for site in sorted(edit.sites):
                count = len(getattr(edit, field))
                if count > keys.get(site, count):
                    raise ValueError(
                        f"sets: {edit.name!r}: {field}: got {count} numbers, expected at most {keys[site]}, the keys of"
                        f" {site!r}"
                    )
