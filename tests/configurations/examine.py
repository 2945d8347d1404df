"""The checks of an entry: a stock run beside recorded and edited ones, every attention call captured by hand."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from configurations.case import Case
from headscope import Scope
from headscope.models.structure.sites import find_sites

# how far a float32 output may move when recording, in units of the larger of 1 and the output's largest entry; a random
# model may amplify rounding, so four times what lies between two of torch's own kernels is granted where that is more
OUTPUT_TOLERANCE = 1e-5
KERNELS_APART = 4.0
# nats
ENTROPY_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Call:
    """One call of scaled_dot_product_attention.

    Attributes:
        module: the path of the innermost module that was running.
        site: the innermost site among the running modules, or None.
        query, key: [batch, heads, tokens, dim].
        options: the call's keyword arguments.
    """

    module: str
    site: str | None
    query: Tensor
    key: Tensor
    options: Mapping[str, Any]

    def entropy(self) -> Tensor:
        """[batch, heads, queries] in nats, from the matrix itself, in float64."""
        query, key = self.query.double(), self.key.double()
        if key.shape[1] != query.shape[1]:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        scale = self.options.get("scale") or query.shape[-1] ** -0.5
        logits = scale * query @ key.transpose(-1, -2)
        mask = self.options.get("attn_mask")
        if self.options.get("is_causal"):
            mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
        if mask is not None and mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask, -torch.inf)
        elif mask is not None:
            logits = logits + mask
        return torch.special.entr(logits.softmax(-1).nan_to_num()).sum(-1)


@dataclass
class Examination:
    """The outcome of an entry.

    Attributes:
        calls: how often the class called scaled_dot_product_attention in one forward.
        sites: how many sites the Scope found.
        unseen: its reasons for modules it can't see, with how many each stands for.
        outside: calls made outside every site, by the class of the module that made them.
        output, entropy, recorded, removal: "" where the check passed, else what went wrong; None where there was
            nothing to check.
    """

    calls: int = 0
    sites: int = 0
    unseen: Counter[str] = field(default_factory=Counter)
    outside: Counter[str] = field(default_factory=Counter)
    output: str | None = None
    entropy: str | None = None
    recorded: str | None = None
    removal: str | None = None

    def problems(self) -> dict[str, str]:
        """The checks that failed, with why."""
        checks = {name: getattr(self, name) for name in ("output", "entropy", "recorded", "removal")}
        return {name: why for name, why in checks.items() if why}


def build(name: str, case: Case) -> nn.Module:
    """The entry's model with random weights, the same at every call, in evaluation mode."""
    torch.manual_seed(0)
    model = case.build(getattr(diffusers, class_of(name)), case.options)
    # some output layers start at zero, which would hide every difference
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model.eval()


def class_of(name: str) -> str:
    return name.partition(",")[0]


def run(model: nn.Module, case: Case) -> list[Tensor]:
    """The floating tensors of the model's output, in order; inputs and noise are the same at every call."""
    torch.manual_seed(1)
    inputs = case.inputs()
    with torch.inference_mode():
        return list(_tensors(model(**inputs)))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for entry in value:
            yield from _tensors(entry)
    elif hasattr(value, "mode"):
        yield value.mode()


def difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """The largest difference of two outputs, in units of the larger of 1 and the first's largest entry."""
    pairs = list(zip(first, second, strict=True))
    largest = max([1.0, *(float(a.abs().max()) for a, _ in pairs if a.numel())])
    return max(float((a - b).abs().max()) for a, b in pairs if a.numel()) / largest


@contextmanager
def watched(
    model: nn.Module,
    sites: Sequence[str] = (),
    remove: Mapping[str, int] | None = None,
    frames_for_heads: bool = False,
) -> Iterator[list[Call]]:
    """Capture every attention call of the model, and zero a head's output at the sites in `remove`.

    The head's output is zeroed as attention returns it: that is its slice of what the module hands to its output
    projection.
    """
    calls: list[Call] = []
    running: list[str] = []
    handles = []
    stock = functional.scaled_dot_product_attention
    wanted = dict(remove or {})
    names = frozenset(sites)

    def enter(name: str):
        return lambda module, args: running.append(name)

    def leave(module, args, output) -> None:
        running.pop()

    def spy(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        options = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        site = next((name for name in reversed(running) if name in names), None)
        # without a dimension of heads there is one; and where frames stand in its place
        if query.ndim == 3:
            heads = (query.unsqueeze(1), key.unsqueeze(1))
        elif frames_for_heads:
            heads = (query.flatten(0, 1).unsqueeze(1), key.flatten(0, 1).unsqueeze(1))
        else:
            heads = (query, key)
        calls.append(Call(running[-1], site, *heads, options))
        output = stock(query, key, value, dropout_p=dropout_p, **options)
        if site in wanted:
            output = output.clone()
            by_head = output.unsqueeze(-3) if output.ndim == 3 or frames_for_heads else output
            by_head[..., wanted[site], :, :] = 0
        return output

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    functional.scaled_dot_product_attention = spy
    try:
        yield calls
    finally:
        functional.scaled_dot_product_attention = stock
        for handle in handles:
            handle.remove()


def examine(name: str, whole: Case, samples: int = 2) -> Examination:
    """Run every check on an entry, in a batch of so many samples where it takes more than one."""
    model = build(name, whole)
    case = _with(whole, range(samples)) if whole.samples > 1 else whole
    found = Examination()
    stock = run(model, case)
    try:
        scope = Scope(model)
    except Exception as error:
        with watched(model) as calls:
            run(model, case)
        _count(model, calls, found)
        found.recorded = _short(error) if calls else None
        found.unseen = Counter(entry.reason for entry in find_sites(model)[1])
        return found
    sites = [site.name for site in scope.sites]
    with watched(model, sites, frames_for_heads=case.frames_for_heads) as calls:
        run(model, case)
    _count(model, calls, found)
    found.sites = len(sites)
    found.unseen = Counter(entry.reason for entry in scope.unseen)
    if not calls:
        return found
    # a recording of all sites is refused where it would be silently less than all of the model's attention
    named = sites if scope.unseen or found.outside else None
    try:
        with scope.record("entropy", sites=named) as recording:
            recorded = run(model, case)
    except Exception as error:
        found.output = found.recorded = _short(error)
        return found
    tolerance = _tolerance(model, case, stock)
    moved = difference(stock, recorded)
    found.output = "" if moved <= tolerance else f"the output moves by {moved:.1e}"
    inside = [call for call in calls if call.site is not None]
    try:
        table = recording.to_polars()
        units = _units(inside, case.samples)
        found.recorded = _same_calls(units, table) or _refused(model, case, scope, found)
        found.entropy = same_entropies(units, table, case.samples)
        if case.samples > 2:
            found.entropy = found.entropy or _same_alone(model, whole, scope, named, stock, table, case.samples)
    except Exception as error:
        found.entropy = _short(error)
    found.removal = _removal(model, case, scope, inside, stock, tolerance)
    return found


def _with(case: Case, samples: Sequence[int]) -> Case:
    """The entry with some of its samples."""
    return replace(case, samples=len(samples), inputs=partial(case.batch, samples))


def _tolerance(model: nn.Module, case: Case, stock: Sequence[Tensor]) -> float:
    with sdpa_kernel(SDPBackend.MATH):
        return max(OUTPUT_TOLERANCE, KERNELS_APART * difference(stock, run(model, case)))


def _count(model: nn.Module, calls: Sequence[Call], found: Examination) -> None:
    found.calls = len(calls)
    modules = dict(model.named_modules())
    unseen = {entry.name for entry in find_sites(model)[1]}
    outside = [call.module for call in calls if call.site is None and call.module not in unseen]
    found.outside = Counter(type(modules[name]).__name__ for name in outside)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def _same_calls(units: Mapping[tuple[str, int], Tensor], table) -> str:
    expected = set(units)
    got = (
        {(str(site), call) for site, call in table.select("site", "call").unique().iter_rows()} if len(table) else set()
    )
    return "" if expected == got else f"{len(got)} of {len(expected)} calls recorded, {len(expected - got)} missing"


def _refused(model: nn.Module, case: Case, scope: Scope, found: Examination) -> str:
    """The finding about calls outside of every site: a recording of all sites must raise."""
    if not found.outside:
        return ""
    try:
        with scope.record("entropy"):
            run(model, case)
    except (RuntimeError, ValueError):
        return "a recording of all sites is refused"
    return "a recording of all sites is silently less than all calls"


def _units(calls: Sequence[Call], samples: int) -> dict[tuple[str, int], Tensor]:
    """The entropies [rows, heads, queries] of every (site, call), the calls of a site counted from 0.

    A module that walks through the batch attends to one sample after the other; those calls make up one.
    """
    parts: dict[str, list[list[Tensor]]] = defaultdict(list)
    for call in calls:
        assert call.site is not None
        entropy = call.entropy()
        rows = sum(part.shape[0] for part in parts[call.site][-1]) if parts[call.site] else samples
        if rows < samples:
            parts[call.site][-1].append(entropy)
        else:
            parts[call.site].append([entropy])
    return {(site, number): _joined(entry) for site, entries in parts.items() for number, entry in enumerate(entries)}


def _joined(entropies: Sequence[Tensor]) -> Tensor:
    """[rows, heads, queries], NaN where a sample has fewer queries than another."""
    longest = max(entropy.shape[-1] for entropy in entropies)
    pad = torch.nn.functional.pad
    return torch.cat([pad(entropy, (0, longest - entropy.shape[-1]), value=torch.nan) for entropy in entropies])


def same_entropies(units: Mapping[tuple[str, int], Tensor], table, samples: int) -> str:
    """Compare what every query of every site, call, sample and head has, as the mean over queries."""
    columns = ("site", "call", "sample", "head", "queries", "entropy_mean")
    parts: dict[tuple[str, int, int, int], list[tuple[int, float]]] = defaultdict(list)
    for site, call, sample, head, queries, mean in table.select(columns).iter_rows():
        parts[str(site), call, sample, head].append((queries, mean))
    expected: dict[tuple[str, int, int, int], tuple[int, float]] = {}
    for (site, call), entropy in units.items():
        # attention may have folded frames, windows or pixels into its batch, sample by sample
        by_sample = entropy.unflatten(0, (samples, -1))
        for sample in range(samples):
            for head in range(entropy.shape[1]):
                own = by_sample[sample, :, head]
                own = own[~own.isnan()]
                expected[site, call, sample, head] = (own.numel(), float(own.mean()))
    if parts.keys() != expected.keys():
        missing, more = len(expected.keys() - parts.keys()), len(parts.keys() - expected.keys())
        some = min(expected.keys() ^ parts.keys())
        return f"{missing} of {len(expected)} rows (site, call, sample, head) missing and {more} too many, as {some}"
    differences = []
    for unit, (count, mean) in expected.items():
        queries = sum(own for own, _ in parts[unit])
        if queries != count:
            return f"{unit}: {queries} queries recorded, expected {count}"
        differences.append(abs(sum(own * value for own, value in parts[unit]) / queries - mean))
    # what isn't a number is no small difference
    if all(difference <= ENTROPY_TOLERANCE for difference in differences):
        return ""
    return f"entropies are off by {float(np.max(differences)):.1e} nats"


def _same_alone(
    model: nn.Module,
    case: Case,
    scope: Scope,
    named: Sequence[str] | None,
    stock: Sequence[Tensor],
    table,
    samples: int,
) -> str:
    """Compare every sample's rows with those of a run of that sample alone, where it gives the same output then."""
    columns = ("sample", "site", "call", "head", "queries", "entropy_mean")
    together: dict[tuple, list[tuple[int, float]]] = defaultdict(list)
    for sample, *unit, queries, mean in table.select(columns).iter_rows():
        together[sample, *unit].append((queries, mean))
    for sample in range(samples):
        one = _with(case, [sample])
        with scope.record("entropy", sites=named) as recording:
            output = run(model, one)
        # losses are of all samples together; some classes give a list with a tensor for each
        output = [tensor for tensor in output if tensor.ndim]
        own = [
            tensor.unflatten(0, (samples, -1))[sample] for tensor in stock if tensor.ndim and not len(tensor) % samples
        ]
        own = [stock[sample]] if not own and len(stock) == samples else own
        if [part.shape for part in own] != [part.shape for part in output] or difference(
            own, output
        ) > OUTPUT_TOLERANCE:
            continue
        alone: dict[tuple, list[tuple[int, float]]] = defaultdict(list)
        for _, *unit, queries, mean in recording.to_polars().select(columns).iter_rows():
            alone[sample, *unit].append((queries, mean))
        for unit, parts in alone.items():
            means = [sum(queries * mean for queries, mean in each) for each in (parts, together[unit])]
            counts = [sum(queries for queries, _ in each) for each in (parts, together[unit])]
            # padding to the longest of the batch aside
            if counts[0] == counts[1] and not abs(means[0] - means[1]) <= ENTROPY_TOLERANCE * counts[0]:
                return f"{unit[1:]}: sample {sample} has what another has when it runs alone"
    return ""


def _removal(
    model: nn.Module, case: Case, scope: Scope, calls: Sequence[Call], stock: Sequence[Tensor], tolerance: float
) -> str | None:
    """Remove the last head of a few sites, one of each kind of module, and compare with zeroing it by hand."""
    modules = dict(model.named_modules())
    chosen = {}
    for site in scope.sites:
        module = modules[site.name]
        kind = (type(module), type(getattr(module, "processor", None)), site.kind)
        heads = {call.query.shape[-3] for call in calls if call.site == site.name}
        if heads and heads != {site.heads}:
            return f"{site.name}: said to have {site.heads} heads, attention has {sorted(heads)}"
        if heads:
            chosen.setdefault(kind, site)
    if not chosen:
        return None
    names = [site.name for site in scope.sites]
    for site in chosen.values():
        head = site.heads - 1
        with watched(model, names, {site.name: head}, case.frames_for_heads):
            by_hand = run(model, case)
        try:
            with scope.edit({site.name: [head]}):
                edited = run(model, case)
        except Exception as error:
            return _short(error)
        moved = difference(by_hand, edited)
        if moved > tolerance:
            return f"{site.name}: differs from zeroing by hand by {moved:.1e}"
        if difference(stock, edited) == 0 and difference(stock, by_hand) > 0:
            return f"{site.name}: nothing was removed"
    return ""
