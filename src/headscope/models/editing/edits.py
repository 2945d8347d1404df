"""The edits that a user may write in `scope.edit(...)`, checked against the sites before the model runs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

from torch import Tensor

from headscope.models.recording.recording import Recording, Resampled
from headscope.models.structure.index import SiteIndex, check_heads
from headscope.models.structure.sites import Site
from headscope.ops import HeadEdit

Source = Tensor | Recording | Resampled
Fill = Source | Literal["uniform", "identity"] | None
_KINDS = ("uniform", "identity")
# multiply (temperature, key_scale) or add (key_bias) when several edits meet
FACTORS = ("temperature", "key_bias", "key_scale")


@dataclass(frozen=True)
class Patch:
    """Another run's queries, keys or values in place of a head's.

    Attributes:
        heads: which heads; all if None.
        q, k, v: a Recording of that quantity (its mean at the same site, timestep and branch; or, made with
            reduce=None, the same sample's), `recording.take(...)`, or a tensor broadcastable to
            [batch, heads, tokens, dim]; None leaves it as it is.
    """

    heads: Sequence[int] | None = None
    q: Source | None = None
    k: Source | None = None
    v: Source | None = None


@dataclass(frozen=True)
class Where:
    """The place in a run that an edit given as a function is asked about.

    Attributes:
        site: the site.
        call: the number of the attention call within the site and forward.
        step: the pipeline's step (the number of the forward where no pipeline counts).
        timestep: the scheduler's timestep of that sample.
        branch: "uncond", "cond", ... (see `Recording.to_arrow`), or None where there is no guidance.
        sample: the sample within its branch.
    """

    site: Site
    call: int
    step: int
    timestep: float
    branch: str | None
    sample: int


Value = Iterable[int] | HeadEdit | Patch | Callable[[Where], Any] | Sequence[Any] | None
Edits = Mapping[str, Value]


def values_by_site(edits: Any, index: SiteIndex) -> dict[str, list[list[Any]]]:
    """By site, a list of values for the whole batch, or a list for each sample, in the order they are applied.

    Raises:
        KeyError: an unknown site, or one that can't be seen.
        TypeError, ValueError: values that the site can't be edited by.
    """
    samples = _mappings(edits)
    found: dict[str, list[list[Any]]] = {}
    for row, sample in enumerate(samples):
        for pattern, value in sample.items():
            for name in index.matching(pattern):
                values = checked(value, index.site(name), f"edits[{name!r}]")
                if len(samples) > 1:
                    check_one_row(values, f"edits[{row}][{name!r}]")
                found.setdefault(name, [[] for _ in samples])[row] += values
    return found


def _mappings(edits: Any) -> list[Edits]:
    """One mapping for the whole batch, or one per sample."""
    samples = [edits] if isinstance(edits, Mapping) else edits
    if not isinstance(samples, Sequence) or isinstance(samples, str):
        raise TypeError(f"edits: got {type(edits).__name__}, expected a mapping from sites to edits, or one per sample")
    if not samples:
        raise ValueError("edits: got an empty sequence, expected one mapping per sample")
    for row, sample in enumerate(samples):
        if not isinstance(sample, Mapping):
            raise TypeError(f"edits[{row}]: got {type(sample).__name__}, expected a mapping from sites to edits")
        for site in sample:
            if not isinstance(site, str):
                raise TypeError(f"edits[{row}]: got a key of type {type(site).__name__}, expected names of sites")
    return list(samples)


def check_one_row(values: list[Any], name: str) -> None:
    """Raises TypeError for a HeadEdit of several rows, where edits differ by sample."""
    if any(isinstance(value, HeadEdit) and _rows(value) > 1 for value in values):
        raise TypeError(f"{name}: got a HeadEdit of several rows, expected one row where edits differ by sample")


def checked(value: Any, site: Site, name: str) -> list[Any]:
    """A value as a list of heads (tuples), HeadEdits, Patches and functions."""
    if value is None:
        return []
    if isinstance(value, HeadEdit):
        if all(getattr(value, field) is None for field in ("gate", *FACTORS)):
            raise ValueError(f"{name}: got a HeadEdit without a gate, expected edit.gate or another change of a head")
        _check_shapes(value, site, name)
        check_fill(value.fill)
        return [value]
    if isinstance(value, Patch):
        _check_patch(value, site, name)
        return [value]
    if callable(value):
        return [value]
    if isinstance(value, (str, Tensor)) or not isinstance(value, Iterable):
        raise TypeError(
            f"{name}: got {type(value).__name__}, expected heads' numbers in a list, a HeadEdit, a Patch or a function"
        )
    members = list(value)
    if all(isinstance(member, Integral) for member in members):
        check_heads(members, site, name)
        return [tuple(map(int, members))]
    return [one for member in members for one in checked(member, site, name)]


def _check_shapes(edit: HeadEdit, site: Site, name: str) -> None:
    """Raises TypeError or ValueError for tensors that don't fit the site's heads."""
    for field in ("gate", *FACTORS):
        tensor = getattr(edit, field)
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {field} of type {type(tensor).__name__}, expected a tensor")
        of_keys = field.startswith("key")
        heads = {site.heads, 1} if of_keys else {site.heads}
        if tensor.ndim != 2 + of_keys or tensor.shape[1] not in heads:
            expected = f"[batch or 1, {site.heads} or 1, keys]" if of_keys else f"[batch or 1, {site.heads}]"
            raise ValueError(f"{name}: got {field} of shape {list(tensor.shape)}, expected {expected}")


def _check_patch(patch: Patch, site: Site, name: str) -> None:
    """Raises TypeError or ValueError for heads or sources that can't be patched."""
    sources = {quantity: getattr(patch, quantity) for quantity in ("q", "k", "v")}
    if all(source is None for source in sources.values()):
        raise ValueError(f"{name}: got a Patch of nothing, expected q, k or v")
    for quantity, source in sources.items():
        recording = source.recording if isinstance(source, Resampled) else source
        if recording is not None and not isinstance(recording, (Tensor, Recording)):
            raise TypeError(
                f"{name}: got {quantity} of type {type(source).__name__}, expected a tensor, a Recording of it or its"
                " take(...)"
            )
        if isinstance(recording, Tensor) and recording.ndim > 4:
            raise ValueError(f"{name}: got {quantity} of shape {list(recording.shape)}, expected at most 4 dimensions")
        if isinstance(recording, Recording) and quantity not in recording.quantities:
            raise ValueError(f"{name}: got a Recording without {quantity}, expected one of scope.record({quantity!r})")
    if patch.heads is not None:
        check_heads(patch.heads, site, name)


def check_fill(fill: Any) -> None:
    known = fill is None or (isinstance(fill, str) and fill in _KINDS)
    if not known and not isinstance(fill, (Tensor, Recording, Resampled)):
        raise ValueError(
            f'fill: got {fill!r}, expected None, "uniform", "identity", a tensor, a Recording of head_output or its'
            " take(...)"
        )
    recording = fill.recording if isinstance(fill, Resampled) else fill
    if isinstance(recording, Recording) and not recording.records_head_output:
        raise ValueError('fill: got a Recording without head outputs, expected one of scope.record("head_output")')


def _rows(edit: HeadEdit) -> int:
    return max(tensor.shape[0] for field in ("gate", *FACTORS) if (tensor := getattr(edit, field)) is not None)
