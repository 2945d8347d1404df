"""A problem for the forward kernels, what they make of it, and what plain float64 torch does."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headscope_kernels.attention import STATISTICS, BoundStatistic, attention_forward, attention_key_mass
from headscope_kernels.attention.configuration import ForwardConfiguration
from rounding import attention_tolerance, blend_tolerance

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FINFO_MIN = torch.finfo(torch.float32).min
GROUPS = 5
SIMPLE = ("entropy", "logsumexp", "max_logit", "max_prob", "collision_entropy")
ALL = (*SIMPLE, "distance", "group_mass", "group_entropy")
# one of every kind of accumulator, for cases that are about something else
SOME = ("entropy", "logsumexp", "group_mass")


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def group_ids(*shape: int, count: int = GROUPS) -> Tensor:
    """int32 ids from -1, none, to count - 1."""
    generator = torch.Generator().manual_seed(sum(shape) + count)
    return torch.randint(-1, count, shape, generator=generator, dtype=torch.int32).to(DEVICE)


def grid(tokens: int) -> tuple[int, int]:
    """(height, width) of a grid that holds them; the last row may be cut off."""
    width = max(1, math.isqrt(tokens))
    return -(-tokens // width), width


@dataclass
class Problem:
    """Inputs of one call; the defaults are an unmasked self-attention."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    gate: Tensor | None = None
    fill: Tensor | None = None
    temperature: Tensor | None = None
    key_bias: Tensor | None = None
    key_scale: Tensor | None = None
    groups: Tensor | None = None
    group_count: int = GROUPS
    first_group: int = 0

    @property
    def rows(self) -> tuple[int, int, int]:
        batch, heads, queries, _ = self.query.shape
        return batch, heads, queries

    @property
    def keys(self) -> int:
        return self.key.shape[2]

    @property
    def multiplier(self) -> float:
        return self.query.shape[3] ** -0.5 if self.scale is None else self.scale

    @property
    def group_ids(self) -> Tensor:
        """int32 [batch or 1, heads or 1, keys]."""
        return group_ids(1, 1, self.keys, count=self.group_count) if self.groups is None else self.groups

    def bound(self, name: str) -> BoundStatistic:
        """The statistic with this problem's constants and data."""
        if name == "distance":
            return BoundStatistic(STATISTICS[name]((*grid(self.rows[2]), *grid(self.keys))))
        if name.startswith("group_"):
            constants = (self.group_count, self.first_group) if self.first_group else (self.group_count,)
            return BoundStatistic(STATISTICS[name](constants), (self.group_ids,))
        return BoundStatistic(STATISTICS[name](()))

    def call(
        self,
        statistics: Sequence[BoundStatistic],
        output: Tensor | None,
        configuration: ForwardConfiguration | None = None,
        **saved: Tensor,
    ) -> list[Tensor]:
        """The kernel; returns the statistics, out of poisoned buffers."""
        buffers = [
            torch.full((*self.rows, *([bound.statistic.width] if bound.statistic.width else [])), math.nan).to(DEVICE)
            for bound in statistics
        ]
        attention_forward(
            self.query,
            self.key,
            self.value,
            attn_mask=self.attn_mask,
            is_causal=self.is_causal,
            scale=self.multiplier,
            gate=self.gate,
            fill=self.fill,
            temperature=self.temperature,
            key_bias=self.key_bias,
            key_scale=self.key_scale,
            statistics=statistics,
            statistic_outputs=buffers,
            output=output,
            configuration=configuration,
            **saved,
        )
        return buffers

    def run(
        self,
        statistics: tuple[str, ...] = ALL,
        configuration: ForwardConfiguration | None = None,
        output: Tensor | None = None,
        **saved: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The output and the statistics by name, out of poisoned buffers."""
        if output is None:
            output = self.query.new_empty(*self.rows, self.value.shape[3])
        output.fill_(math.nan)
        values = self.call([self.bound(name) for name in statistics], output, configuration, **saved)
        return output, dict(zip(statistics, values, strict=True))

    def key_mass(self, configuration: ForwardConfiguration | None = None) -> Tensor:
        """The second pass on what the first one saved."""
        row_max, log2_sum = (torch.full(self.rows, math.nan, device=DEVICE) for _ in range(2))
        self.call((), None, configuration, row_max=row_max, log2_sum=log2_sum)
        mass = torch.full((*self.rows[:2], self.keys), math.nan, device=DEVICE)
        attention_key_mass(
            self.query,
            self.key,
            attn_mask=self.attn_mask,
            is_causal=self.is_causal,
            scale=self.multiplier,
            temperature=self.temperature,
            key_bias=self.key_bias,
            row_max=row_max,
            log2_sum=log2_sum,
            output=mass,
            configuration=configuration,
        )
        return mass

    def logits(self) -> Tensor:
        """[batch, heads, queries, keys], float64, -inf where masked."""
        group = self.query.shape[1] // self.key.shape[1]
        key = self.key.double().repeat_interleave(group, 1)
        logits = self.query.double() @ key.mT * self.multiplier
        if self.temperature is not None:
            logits = logits / self.temperature.double().expand(self.rows[:2])[..., None, None]
        if self.key_bias is not None:
            logits = logits + self.key_bias.double()[..., None, :]
        if self.is_causal:
            logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -math.inf)
        if self.attn_mask is not None and self.attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~self.attn_mask, -math.inf)
        elif self.attn_mask is not None:
            # as float32 arithmetic has it: next to the lowest float the product disappears
            lowest = self.attn_mask.double() == FINFO_MIN
            logits = torch.where(lowest, FINFO_MIN, logits + self.attn_mask.double())
        return logits

    def weights(self) -> Tensor:
        """p: [batch, heads, queries, keys], float64, 0 in rows without a valid key."""
        logits = self.logits()
        empty = (logits == -math.inf).all(-1, keepdim=True)
        return torch.where(empty, 0.0, logits.softmax(-1))

    def gated(self, output: Tensor) -> Tensor:
        """What becomes of attention's output, float64."""
        if self.gate is None:
            return output
        gate = self.gate.double().expand(self.rows[:2])[..., None, None]
        fill = torch.zeros_like(output) if self.fill is None else self.fill.double().expand_as(output)
        mixed = torch.where(gate == 0, fill, gate * output + (1 - gate) * fill)
        return torch.where(gate == 1, output, mixed)

    def output_tolerance(self) -> Tensor:
        """What the output may err by, gated."""
        group = self.query.shape[1] // self.key.shape[1]
        query, key, value = (tensor.double() for tensor in (self.query, self.key, self.value))
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scale: float | Tensor = self.multiplier
        if self.temperature is not None:
            scale = scale / self.temperature.double().expand(self.rows[:2])[..., None, None]
        factors = torch.ones((), device=DEVICE) if self.key_scale is None else self.key_scale.double()[..., None, :]
        dtype = self.query.dtype
        error = attention_tolerance(
            query, key, value, scale, self.added(), self.logits(), self.weights(), factors, dtype
        )
        if self.gate is None:
            return error
        fill = torch.zeros((), device=DEVICE) if self.fill is None else self.fill.double()
        gate = self.gate.double().expand(self.rows[:2])[..., None, None]
        return blend_tolerance(self.attention(), error, gate, fill, 0.0, dtype)

    def attention(self) -> Tensor:
        """The output before gate and fill, float64."""
        weights = self.weights()
        value = self.value.double().repeat_interleave(self.query.shape[1] // self.value.shape[1], 1)
        if self.key_scale is not None:
            weights = weights * self.key_scale.double()[..., None, :]
        return weights @ value

    def statistic(self, name: str) -> Tensor:
        """One statistic from its definition, float64."""
        logits, weights = self.logits(), self.weights()
        empty = (logits == -math.inf).all(-1)
        if name == "logsumexp":
            return (
                torch.where(empty, -math.inf, logits.logsumexp(-1))
                if self.keys
                else logits.new_full(empty.shape, -math.inf)
            )
        if name == "max_logit":
            return logits.amax(-1) if self.keys else logits.new_full(empty.shape, -math.inf)
        if name == "max_prob":
            return weights.amax(-1) if self.keys else logits.new_zeros(empty.shape)
        if name == "entropy":
            return _entropy(weights)
        if name == "collision_entropy":
            return torch.where(empty, 0.0, -weights.square().sum(-1).log())
        if name == "distance":
            (_, width), (_, key_width) = grid(self.rows[2]), grid(self.keys)
            query, key = torch.arange(self.rows[2], device=DEVICE), torch.arange(self.keys, device=DEVICE)
            down = (query // width)[:, None] - (key // key_width)[None, :]
            across = (query % width)[:, None] - (key % key_width)[None, :]
            return (weights * (down.square() + across.square()).double().sqrt()).sum(-1)
        members = self.members()
        if name == "group_mass":
            return torch.where(members, weights[..., None, :], members * weights[..., None, :]).sum(-1)
        within = torch.where(members, logits[..., None, :], -math.inf)  # [batch, heads, queries, groups, keys]
        nothing = (within == -math.inf).all(-1, keepdim=True)
        entropies = _entropy(torch.where(nothing, 0.0, within.softmax(-1)))
        return torch.where(weights.isnan().any(-1)[..., None], math.nan, entropies)

    def members(self) -> Tensor:
        """Which keys are in which group: bool [batch or 1, heads or 1, 1, groups, keys]."""
        last = min(self.group_count, self.first_group + 128)
        groups = torch.arange(self.first_group, last, device=DEVICE)
        return (self.group_ids[..., None, :] == groups[:, None])[..., None, :, :]

    def comparable(self, name: str) -> Tensor | bool:
        """Where a float32 backend can tell: an entropy within a group that doesn't vanish beside the row's largest."""
        if name != "group_entropy" or not self.keys:
            return True
        logits = self.logits()
        distance = logits.amax(-1, keepdim=True) - logits
        distance = torch.where(logits == -math.inf, -1.0, distance)
        own = self.members() & (distance >= 0)[..., None, :]  # [batch, heads, queries, groups, keys]
        nearest = torch.where(own, distance[..., None, :], math.inf).amin(-1)
        # 2^-96, with 26 bits below it left, or nothing at all
        return ~(nearest > 96 * math.log(2)) | (nearest == math.inf)

    def added(self) -> Tensor:
        """|key_bias| + |mask|, of the finite ones: [batch, heads, queries, keys]."""
        sizes = torch.zeros((*self.rows, self.keys), dtype=torch.float64, device=DEVICE)
        for tensor in (self.attn_mask, None if self.key_bias is None else self.key_bias[..., None, :]):
            if tensor is not None and tensor.dtype != torch.bool:
                sizes = sizes + torch.where(tensor.double() > 0.5 * FINFO_MIN, tensor.double().abs(), 0.0)
        return sizes

    def statistic_bound(self) -> float:
        """The contract's: 1e-5 + 2^-23 * (2 + sqrt(dim)) * L, L = max |scale| |query| |key| + |key_bias| + |mask|."""
        if not self.logits().numel():
            return 1e-5
        query, key = (tensor.double().square().sum(-1).sqrt().nan_to_num() for tensor in (self.query, self.key))
        scale = torch.full((1,), abs(self.multiplier), device=DEVICE).double()
        if self.temperature is not None:
            scale = scale / self.temperature.double().min()
        products = float(scale * query.max() * key.max())
        return 1e-5 + 2.0**-23 * (2 + math.sqrt(self.query.shape[3])) * (products + float(self.added().max()))

    def check(self, statistics: tuple[str, ...] = SOME, configuration: ForwardConfiguration | None = None) -> None:
        """Output within what rounding explains, statistics within the contract's bound; NaN for NaN."""
        output, values = self.run(statistics, configuration)
        self.check_output(output)
        for name in statistics:
            self.check_statistic(name, values[name])

    def check_output(self, output: Tensor) -> None:
        expected = self.gated(self.attention())
        assert torch.equal(output.isnan(), expected.isnan()), "output: NaN in other places"
        error, tolerance = (output.double() - expected).abs(), self.output_tolerance()
        within = expected.isnan() | (error <= tolerance)
        assert bool(within.all()), f"output: {float(error[~within].max()):.3g} > {float(tolerance[~within].min()):.3g}"

    def check_statistic(self, name: str, value: Tensor) -> None:
        comparable = self.comparable(name)
        bound = self.statistic_bound()
        torch.testing.assert_close(
            torch.where(torch.as_tensor(comparable, device=DEVICE), value.double(), 0.0),
            torch.where(torch.as_tensor(comparable, device=DEVICE), self.statistic(name), 0.0),
            # entries of the lowest float are compared at their own size, and so are distances
            rtol=bound if name == "distance" else 2**-22 if self.attn_mask is not None else 0,
            atol=bound,
            equal_nan=True,
            msg=lambda text: f"{name}: {text}",
        )

    def check_key_mass(self, configuration: ForwardConfiguration | None = None) -> None:
        """Within the contract's bound, times the mass where that is above 1."""
        bound = self.statistic_bound()
        expected = self.weights().sum(-2)
        torch.testing.assert_close(
            self.key_mass(configuration).double() / expected.clamp(min=1),
            expected / expected.clamp(min=1),
            rtol=0,
            atol=bound,
            equal_nan=True,
        )


def _entropy(weights: Tensor) -> Tensor:
    return -torch.where(weights == 0, 0.0, weights * weights.log()).sum(-1)


def attention(
    batch: int = 1,
    heads: int = 2,
    queries: int = 63,
    keys: int = 77,
    dim: int = 16,
    *,
    kv_heads: int | None = None,
    dim_v: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Problem:
    kv_heads = kv_heads or heads
    return Problem(
        normal(batch, heads, queries, dim, dtype=dtype, seed=1),
        normal(batch, kv_heads, keys, dim, dtype=dtype, seed=2),
        normal(batch, kv_heads, keys, dim_v or dim, dtype=dtype, seed=3),
    )
