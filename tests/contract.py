"""The operator's numeric contract, as data: cases, a float64 truth written apart from the library, and tolerances."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as functional
from torch import Tensor

FINFO_MIN = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Case:
    """One call of the operator.

    Attributes:
        shape: (batch, heads, kv_heads, queries, keys, dim, dim_v).
        mask: makes attn_mask from (batch, heads, queries, keys), or None.
        gate: makes the gate from (batch, heads), or None.
        fill: None, "uniform", or makes a tensor from (batch, heads, queries, dim_v).
        magnitude: standard deviation of the queries.
        poison: changes query, key and value in place.
    """

    name: str
    shape: tuple[int, int, int, int, int, int, int]
    mask: Callable[..., Tensor] | None = None
    is_causal: bool = False
    scale: float | None = None
    gate: Callable[..., Tensor] | None = None
    fill: Callable[..., Tensor] | str | None = None
    magnitude: float = 1.0
    poison: Callable[[Tensor, Tensor, Tensor], None] | None = None
    layout: Callable[[Tensor], Tensor] = field(default=lambda tensor: tensor)


def _bool_mask(batch, heads, queries, keys):
    mask = torch.rand(batch, 1, queries, keys) > 0.3
    mask[..., 0, :] = False
    return mask


def _padding(batch, heads, queries, keys):
    return torch.arange(keys) < torch.randint(1, keys + 1, (batch, 1, 1, 1))


def _additive(batch, heads, queries, keys):
    mask = torch.randn(1, heads, queries, keys)
    mask[..., ::3] = -math.inf
    return mask


def _finfo_min_row(batch, heads, queries, keys):
    mask = torch.zeros(1, 1, queries, keys)
    mask[..., queries // 2, :] = FINFO_MIN
    return mask


def _nan_row(query, key, value):
    query[0, 0, 1, 0] = math.nan


def _constant_row(query, key, value):
    query[..., 0, :] = 0.0


def _removed(batch, heads):
    return torch.zeros(1, heads)


def _fractional(batch, heads):
    gate = torch.rand(batch, heads)
    gate[0, 0], gate[-1, -1] = 0.0, 1.0
    return gate


def _heads_last(tensor: Tensor) -> Tensor:
    """[batch, heads, tokens, dim] laid out as [batch, tokens, heads, dim], as models have it."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


CASES = [
    Case("odd", (2, 3, 3, 63, 111, 24, 24)),
    Case("one_query", (1, 2, 2, 1, 40, 16, 16)),
    Case("one_key", (2, 2, 2, 17, 1, 8, 8)),
    Case("cross_77", (2, 2, 2, 70, 77, 40, 40)),
    Case("dim_80", (1, 2, 2, 33, 47, 80, 80)),
    Case("dim_160", (1, 1, 1, 19, 35, 160, 160)),
    Case("dim_v", (1, 2, 2, 21, 37, 12, 20)),
    Case("grouped", (2, 4, 2, 29, 31, 16, 16)),
    Case("causal", (1, 2, 2, 37, 37, 16, 16), is_causal=True),
    Case("causal_short_keys", (1, 2, 2, 50, 21, 16, 16), is_causal=True),
    Case("causal_long_keys", (1, 2, 2, 21, 50, 16, 16), is_causal=True),
    Case("bool_mask", (2, 2, 2, 23, 45, 16, 16), mask=_bool_mask),
    Case("padding", (3, 2, 2, 23, 77, 16, 16), mask=_padding),
    Case("additive_mask", (2, 2, 2, 23, 45, 16, 16), mask=_additive),
    Case("finfo_min_row", (1, 2, 2, 9, 45, 16, 16), mask=_finfo_min_row),
    Case("nan_row", (1, 2, 2, 9, 33, 16, 16), poison=_nan_row),
    Case("constant_row", (1, 2, 2, 9, 33, 16, 16), poison=_constant_row),
    Case("extreme_logits", (1, 2, 2, 40, 65, 16, 16), magnitude=2500.0),
    Case("negative_scale", (1, 2, 2, 20, 33, 16, 16), scale=-0.7),
    Case("zero_scale", (1, 2, 2, 20, 33, 16, 16), scale=0.0),
    Case("all_removed", (2, 3, 3, 20, 33, 16, 16), gate=_removed),
    Case("fractional_gate", (2, 3, 3, 20, 33, 16, 16), gate=_fractional),
    Case("uniform_fill", (2, 4, 2, 20, 33, 16, 16), gate=_fractional, fill="uniform"),
    Case("uniform_fill_masked", (2, 2, 2, 23, 45, 16, 16), mask=_bool_mask, gate=_removed, fill="uniform"),
    Case("uniform_fill_causal", (2, 2, 2, 23, 45, 16, 16), is_causal=True, gate=_fractional, fill="uniform"),
    Case("mean_fill", (2, 3, 3, 20, 33, 16, 16), gate=_fractional, fill=lambda b, h, q, d: torch.randn(h, q, d)),
    Case("row_fill", (2, 3, 3, 20, 33, 16, 16), gate=_removed, fill=lambda b, h, q, d: torch.randn(b, 1, 1, d)),
    Case("heads_last", (2, 3, 3, 31, 45, 24, 24), layout=_heads_last),
    Case("no_keys", (2, 2, 2, 5, 0, 8, 8)),
    Case("no_queries", (2, 2, 2, 0, 5, 8, 8)),
    Case("no_batch", (0, 2, 2, 5, 5, 8, 8)),
]


@dataclass(frozen=True)
class Inputs:
    query: Tensor
    key: Tensor
    value: Tensor
    options: dict
    gate: Tensor | None
    fill: Tensor | str | None


def make_inputs(case: Case, dtype: torch.dtype) -> Inputs:
    """The case's tensors, the same each time."""
    torch.manual_seed(sum(case.name.encode()))
    batch, heads, kv_heads, queries, keys, dim, dim_v = case.shape
    query = case.magnitude * torch.randn(batch, heads, queries, dim)
    key = torch.randn(batch, kv_heads, keys, dim)
    value = torch.randn(batch, kv_heads, keys, dim_v)
    if case.poison:
        case.poison(query, key, value)
    options = {
        "attn_mask": case.mask(batch, heads, queries, keys) if case.mask else None,
        "is_causal": case.is_causal,
        "scale": case.scale,
        "enable_gqa": kv_heads != heads,
    }
    fill = case.fill(batch, heads, queries, dim_v) if callable(case.fill) else case.fill
    query, key, value = (case.layout(tensor.to(dtype)) for tensor in (query, key, value))
    return Inputs(query, key, value, options, case.gate(batch, heads) if case.gate else None, fill)


@dataclass(frozen=True)
class Truth:
    """What the contract says, float64, and the largest finite |logit|."""

    output: Tensor
    statistics: dict[str, Tensor]
    largest_logit: float


def truth(inputs: Inputs) -> Truth:
    """The contract in float64, row by row from its definition; shares no code with the library."""
    query, key, value = (tensor.double() for tensor in (inputs.query, inputs.key, inputs.value))
    groups = query.shape[1] // max(1, key.shape[1])
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = inputs.options["scale"]
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    products = torch.einsum("bhqd,bhkd->bhqk", query, key)
    allowed, added = _mask_parts(inputs, products)
    logits = torch.where(allowed, scale * products + added, -math.inf)
    probabilities = _softmax(logits)
    attention = torch.einsum("bhqk,bhkd->bhqd", probabilities, value)
    output = _edited(attention, inputs, _softmax(torch.where(allowed, added, -math.inf)), value)
    finite = logits[logits.isfinite() & (logits > 0.5 * FINFO_MIN)].abs()
    if not logits.shape[-1]:
        lowest = torch.full(logits.shape[:-1], -math.inf, dtype=torch.float64)
        zero = torch.zeros_like(lowest)
        statistics = {"entropy": zero, "logsumexp": lowest, "max_logit": lowest, "max_prob": zero}
    else:
        statistics = {
            "entropy": torch.special.entr(probabilities).sum(-1),
            "logsumexp": torch.logsumexp(logits, -1),
            "max_logit": logits.amax(-1),
            "max_prob": probabilities.amax(-1),
        }
    return Truth(output, statistics, float(finite.max()) if len(finite) else 0.0)


def _mask_parts(inputs: Inputs, products: Tensor) -> tuple[Tensor, Tensor]:
    mask = inputs.options["attn_mask"]
    allowed = torch.ones(products.shape, dtype=torch.bool)
    if inputs.options["is_causal"]:
        allowed = allowed.tril()
    if mask is None:
        return allowed, torch.zeros_like(products)
    if mask.dtype == torch.bool:
        return mask.expand(products.shape), torch.zeros_like(products)
    mask = mask.expand(products.shape)
    if mask.shape[-1] and bool((mask == FINFO_MIN).all(-1).any()):
        # torch adds in float32, where finfo.min swallows the logit: such a row is uniform
        products[mask == FINFO_MIN] = 0.0
    return mask != -math.inf, torch.where(mask == -math.inf, 0.0, mask).double()


def _softmax(logits: Tensor) -> Tensor:
    if not logits.shape[-1]:
        return logits
    dead = (logits == -math.inf).all(-1, keepdim=True)
    return torch.where(dead, 0.0, torch.softmax(torch.where(dead, 0.0, logits), -1))


def _edited(attention: Tensor, inputs: Inputs, uniform: Tensor, value: Tensor) -> Tensor:
    if inputs.gate is None:
        return attention
    gate = inputs.gate.double()[..., None, None]
    fill = torch.zeros(()).double()
    if isinstance(inputs.fill, Tensor):
        fill = inputs.fill.double()
    elif inputs.fill == "uniform":
        fill = torch.einsum("bhqk,bhkd->bhqd", uniform, value)
    mixed = gate * attention + (1 - gate) * fill
    return torch.where(gate == 1, attention, torch.where(gate == 0, fill, mixed))


def statistic_tolerance(expected: Truth) -> float:
    """1e-5 + 4 * 2^-24 * max |logit|, for every input dtype."""
    return 1e-5 + 4 * 2.0**-24 * expected.largest_logit


def output_tolerance(inputs: Inputs, expected: Truth) -> float:
    """Twice the largest error of torch's own attention at this dtype, plus two roundings of the largest output.

    The floor is for cases where torch happens to be exact; fractional gates and fills round once more.
    """
    plain = Inputs(inputs.query, inputs.key, inputs.value, inputs.options, None, None)
    stock = functional.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, **_stock_options(inputs))
    error = (stock.double() - truth(plain).output).abs()
    worst = float(error[error.isfinite()].max()) if bool(error.isfinite().any()) else 0.0
    finite = expected.output[expected.output.isfinite()].abs()
    largest = float(finite.max()) if len(finite) else 0.0
    return 2 * worst + 2 * torch.finfo(inputs.query.dtype).eps * largest


def _stock_options(inputs: Inputs) -> dict:
    options = dict(inputs.options)
    mask = options["attn_mask"]
    if mask is not None and mask.dtype != torch.bool:
        options["attn_mask"] = mask.to(inputs.query.dtype)
    return options


def assert_close(name: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal infinities and NaN in the same places, everything else within the tolerance."""
    got = got.double()
    assert torch.equal(got.isnan(), expected.isnan()), f"{name}: NaN in other places"
    special = expected.isnan() | expected.isinf()
    assert torch.equal(got[expected.isinf()], expected[expected.isinf()]), f"{name}: other infinities"
    error = (got - expected)[~special].abs()
    assert not error.numel() or float(error.max()) <= tolerance, f"{name}: {float(error.max()):.3g} > {tolerance:.3g}"
