"""The operator's numeric contract, as data: cases, their float64 truth (tests/definitions.py), and tolerances."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import definitions
from definitions import FINFO_MIN
from headscope.ops import (
    STATISTICS,
    AttentionResult,
    Distance,
    GroupEntropy,
    GroupMass,
    HeadEdit,
    Statistic,
    attention,
    cpu_structs,
)
from rounding import attention_tolerance, blend_tolerance


@dataclass(frozen=True)
class Case:
    """One call of the operator.

    Attributes:
        shape: (batch, heads, kv_heads, queries, keys, dim, dim_v).
        mask: makes attn_mask from (batch, heads, queries, keys), or None.
        gate: makes the gate from (batch, heads), or None.
        fill: None, "uniform", "identity", or makes a tensor from (batch, heads, queries, dim_v).
        temperature: makes the temperature from (batch, heads), or None.
        key_bias, key_scale: make [batch or 1, heads or 1, keys] from (batch, heads, keys), or None.
        groups: how many groups the keys are divided into.
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
    temperature: Callable[..., Tensor] | None = None
    key_bias: Callable[..., Tensor] | None = None
    key_scale: Callable[..., Tensor] | None = None
    groups: int = 3
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


def _temperature(batch, heads):
    return 0.3 + 2 * torch.rand(batch, heads)


def _key_bias(batch, heads, keys):
    return torch.randn(1, heads, keys)


def _muted(batch, heads, keys):
    bias = torch.randn(batch, 1, keys)
    bias[..., ::4] = -math.inf
    bias[0] = -math.inf
    return bias


def _key_scale(batch, heads, keys):
    return 3 * torch.randn(batch, heads, keys)


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
    Case("identity_fill", (2, 4, 2, 33, 33, 16, 12), gate=_fractional, fill="identity"),
    Case("temperature", (2, 3, 3, 20, 33, 16, 16), temperature=_temperature),
    Case("temperature_causal", (1, 3, 3, 20, 33, 16, 16), temperature=lambda b, h: _temperature(1, h), is_causal=True),
    Case("key_bias", (2, 3, 3, 20, 77, 16, 16), key_bias=_key_bias),
    Case("muted_keys", (2, 2, 2, 20, 45, 16, 16), key_bias=_muted, mask=_bool_mask),
    Case("key_bias_and_mask", (2, 2, 2, 20, 45, 16, 16), key_bias=_key_bias, mask=_additive),
    Case("key_scale", (2, 4, 2, 20, 77, 16, 16), key_scale=_key_scale),
    Case(
        "every_edit",
        (2, 4, 2, 35, 45, 24, 20),
        gate=_fractional,
        fill="uniform",
        temperature=_temperature,
        key_bias=_key_bias,
        key_scale=_key_scale,
        mask=_bool_mask,
    ),
    Case("many_groups", (2, 2, 2, 9, 300, 16, 16), groups=200),
    Case("dim_320", (1, 1, 1, 18, 35, 320, 320)),
    Case("dim_512", (1, 1, 1, 9, 35, 512, 512)),
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
    temperature: Tensor | None = None
    key_bias: Tensor | None = None
    key_scale: Tensor | None = None
    groups: Tensor | None = None
    group_count: int = 0

    def edit(self) -> HeadEdit:
        return HeadEdit(self.gate, self.fill, self.temperature, self.key_bias, self.key_scale)  # type: ignore[arg-type]

    def statistics(self, backend: str = "reference") -> list[str | Statistic]:
        """Every built-in statistic that a backend gives, on grids of one row and on the case's groups."""
        chosen: list[str | Statistic] = [name for name in (*ROW_STATISTICS, "key_mass") if gives(backend, name)]
        if self.query.shape[2] and self.key.shape[2]:
            chosen.append(Distance((1, self.query.shape[2]), (1, self.key.shape[2])))
        if self.groups is not None:
            chosen += [GroupMass(self.groups, self.group_count), GroupEntropy(self.groups, self.group_count)]
        return chosen

    def attend(self, backend: str) -> AttentionResult:
        """The operator's answer, with every statistic."""
        return attention(
            self.query,
            self.key,
            self.value,
            edit=self.edit(),
            statistics=self.statistics(backend),
            backend=backend,
            **self.options,
        )

    def to(self, device: str) -> "Inputs":
        """The same on another device."""
        moved = {name: tensor.to(device) for name, tensor in vars(self).items() if isinstance(tensor, Tensor)}
        options = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in self.options.items()}
        return dataclasses.replace(self, **moved, options=options)


# by name, [batch, heads, queries]
ROW_STATISTICS = tuple(definitions.ROWS)


def gives(backend: str, key: str) -> bool:
    """True if a fused backend has code for a built-in statistic; the plain-torch backends have it for every one."""
    if backend == "cpu":
        return key in cpu_structs.STATISTICS
    return backend != "triton" or key == "key_mass" or STATISTICS[key].kernel() is not None


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
    return Inputs(
        query,
        key,
        value,
        options,
        case.gate(batch, heads) if case.gate else None,
        fill,
        case.temperature(batch, heads) if case.temperature else None,
        case.key_bias(batch, heads, keys) if case.key_bias else None,
        case.key_scale(batch, heads, keys) if case.key_scale else None,
        # a third of the keys is in no group, and the groups differ by sample
        torch.where(torch.rand(batch, keys) < 0.3, -1, torch.randint(case.groups, (batch, keys))),
        case.groups,
    )


@dataclass(frozen=True)
class Truth:
    """The contract's results in float64, and the quantities that its tolerances are made of.

    Attributes:
        output_tolerance: for each output.
        reach: L of the statistics' bound, see statistic_tolerance.
        largest_logit: the largest finite |logit|.
        faint: [batch, heads, queries, groups], where a group's entropy can't be held to anything: its largest weight
            is below 2^-96 of the row's, but not so far that nothing is left of it; 2^-900 in float64.
    """

    output: Tensor
    output_tolerance: Tensor
    statistics: dict[str, Tensor]
    reach: float
    dim: int
    largest_logit: float
    faint: Tensor | None


def truth(inputs: Inputs, *, precise: bool | None = None) -> Truth:
    """The contract in float64.

    `precise`: weights count however small they are beside their row's largest; by default those of float64 inputs do.
    """
    least = 0.0 if (inputs.query.dtype == torch.float64 if precise is None else precise) else 2.0**-126
    query, heads, dtype = inputs.query.double(), inputs.query.shape[1], inputs.query.dtype
    key, value = (definitions.for_every_head(tensor, heads) for tensor in (inputs.key, inputs.value))
    options = {name: option for name, option in inputs.options.items() if name != "enable_gqa"}
    found = definitions.scores(query, inputs.key, temperature=inputs.temperature, key_bias=inputs.key_bias, **options)
    logits, probabilities, sizes = found.logits, found.probabilities, found.sizes
    scale = definitions.scale_of(options["scale"], query.shape[-1], inputs.temperature)
    factors = torch.ones(()) if inputs.key_scale is None else inputs.key_scale.double()[:, :, None]
    attention = torch.einsum("bhqk,bhkd->bhqd", probabilities * factors, value)
    error = attention_tolerance(query, key, value, scale, sizes, logits, probabilities, factors, dtype)
    flat = torch.where(found.allowed, found.added, -math.inf)
    uniform = definitions.softmax(flat)
    fill, fill_error = _fill(inputs, uniform * factors, value), 0.0
    if inputs.fill == "uniform":
        fill_error = attention_tolerance(
            torch.zeros_like(query), key, value, scale, sizes, flat, uniform, factors, dtype
        )
    output = definitions.blended(attention, inputs.gate, fill)
    if inputs.gate is not None:
        error = blend_tolerance(attention, error, inputs.gate.double()[..., None, None], fill, fill_error, dtype)
    counts = logits.isfinite() & (logits > 0.5 * FINFO_MIN)
    lengths = (tensor.square().sum(-1, keepdim=True).sqrt().nan_to_num() for tensor in (query, key))
    reach = torch.as_tensor(scale).abs() * next(lengths) * next(lengths).mT + sizes
    statistics, faint = _statistics(inputs, logits, probabilities, least)
    return Truth(
        output, error, statistics, _largest(reach[counts]), query.shape[-1], _largest(logits[counts].abs()), faint
    )


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


def _statistics(
    inputs: Inputs, logits: Tensor, probabilities: Tensor, least: float
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Every statistic by name, and Truth.faint. A weight below `least` of its row's largest counts as nothing."""
    values = {name: definition(logits, probabilities) for name, definition in definitions.ROWS.items()}
    values["key_mass"] = definitions.key_mass(probabilities)
    queries, keys = logits.shape[-2:]
    values["distance"] = definitions.distance(probabilities, max(1, queries), max(1, keys))
    if inputs.groups is None:
        return values, None
    ids = inputs.groups[:, None]
    values["group_mass"], values["group_entropy"] = definitions.groups(
        probabilities, ids, range(inputs.group_count), least
    )
    if not keys:
        return values, torch.zeros_like(values["group_mass"], dtype=torch.bool)
    largest = probabilities.amax(-1)
    faint = []
    for group in range(inputs.group_count):
        most = torch.where((ids == group)[:, :, None], probabilities, 0.0).amax(-1)
        below = most / torch.where(largest == 0, 1.0, largest)
        # several keys may add up to the smallest weight
        faint.append((below < 2.0**-96) & (below * keys > 0.5 * least) if least else below < 2.0**-900)
    return values, torch.stack(faint, -1)


def _fill(inputs: Inputs, uniform: Tensor, value: Tensor) -> Tensor:
    if isinstance(inputs.fill, Tensor):
        return inputs.fill.double()
    if inputs.fill == "identity":
        return value
    if inputs.fill == "uniform":
        return torch.einsum("bhqk,bhkd->bhqd", uniform, value)
    return torch.zeros(()).double()


def statistic_tolerance(expected: Truth, name: str = "entropy") -> float:
    """1e-5 + 2^-23 * (2 + sqrt(dim)) * L for every input dtype; with L the
    largest |scale| |query| |key| + |key_bias| + |mask|.

    A logit is a sum of dim products that float32 rounds as often, each by 2^-24 of a partial sum, which is L at the
    most: 2 sqrt(dim) of those are six standard deviations where the sum grows evenly to L, in whatever order. Sums that
    aren't bounded by about 1 have the bound relative to their largest value. In a group's entropy two terms of up to
    ln 2^126 = 87 nats cancel, each known to a few units in its last place.
    """
    bound = 1e-5 + 2.0**-23 * (2 + math.sqrt(expected.dim)) * expected.reach
    if name in ("distance", "key_mass"):
        values = expected.statistics[name].nan_to_num()
        bound *= max(1.0, float(values.max())) if values.numel() else 1.0
    if name == "group_entropy":
        bound += 4 * 2.0**-24 * 87
    return bound


def assert_close(name: str, got: Tensor, expected: Tensor, tolerance: float | Tensor) -> None:
    """Equal infinities and NaN in the same places, everything else within the tolerance, one or one for each."""
    got = got.double()
    assert torch.equal(got.isnan(), expected.isnan()), f"{name}: NaN in other places"
    special = expected.isnan() | expected.isinf()
    assert torch.equal(got[expected.isinf()], expected[expected.isinf()]), f"{name}: other infinities"
    error = torch.where(special, 0.0, got - expected).abs()
    allowed = torch.where(special, 0.0, torch.as_tensor(tolerance, dtype=torch.float64))
    if not bool((error <= allowed).all()):
        worst = int((error / allowed).argmax())
        found, most = float(error.flatten()[worst]), float(allowed.flatten()[worst])
        raise AssertionError(f"{name}: {found:.3g} > {most:.3g}")
