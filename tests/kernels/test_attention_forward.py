"""The forward kernel against plain float64 torch, under Triton's interpreter or on a GPU."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as functional
import triton
from torch import Tensor

from headscope_kernels.attention import STATISTICS, attention_forward
from headscope_kernels.attention.configs import ForwardConfiguration

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL = tuple(STATISTICS)
FINFO_MIN = torch.finfo(torch.float32).min
# what rounding the weights and the output adds beyond torch's own error; the interpreter truncates to bfloat16, which
# doubles both and makes them one-sided
FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 3e-2 if DEVICE == "cpu" else 8e-3}


def test_interpreter_or_gpu():
    """Everything below needs one; without this check it would fail with an error about devices."""
    assert DEVICE == "cuda" or triton.knobs.runtime.interpret, "without a GPU these tests need TRITON_INTERPRET=1"


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

    def run(
        self,
        statistics: tuple[str, ...] = ALL,
        configuration: ForwardConfiguration | None = None,
        output: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The kernel on poisoned buffers."""
        batch, heads, queries, dim = self.query.shape
        if output is None:
            output = self.query.new_empty(batch, heads, queries, self.value.shape[3])
        output.fill_(math.nan)
        buffers = [torch.full((batch, heads, queries), math.nan, device=DEVICE) for _ in statistics]
        attention_forward(
            self.query,
            self.key,
            self.value,
            attn_mask=self.attn_mask,
            is_causal=self.is_causal,
            scale=dim**-0.5 if self.scale is None else self.scale,
            gate=self.gate,
            fill=self.fill,
            statistics=statistics,
            output=output,
            statistic_outputs=buffers,
            configuration=configuration,
        )
        return output, dict(zip(statistics, buffers, strict=True))

    def logits(self) -> Tensor:
        """[batch, heads, queries, keys], float64, -inf where masked."""
        group = self.query.shape[1] // self.key.shape[1]
        key = self.key.double().repeat_interleave(group, 1)
        scale = self.query.shape[3] ** -0.5 if self.scale is None else self.scale
        logits = self.query.double() @ key.mT * scale
        if self.is_causal:
            logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -math.inf)
        if self.attn_mask is not None and self.attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~self.attn_mask, -math.inf)
        elif self.attn_mask is not None:
            # as float32 arithmetic has it: next to the lowest float the product disappears
            lowest = self.attn_mask.double() == FINFO_MIN
            logits = torch.where(lowest, FINFO_MIN, logits + self.attn_mask.double())
        return logits

    def gated(self, output: Tensor) -> Tensor:
        """What becomes of attention's output, float64."""
        if self.gate is None:
            return output
        gate = self.gate.double().expand(self.query.shape[:2])[..., None, None]
        fill = torch.zeros_like(output) if self.fill is None else self.fill.double().expand_as(output)
        mixed = torch.where(gate == 0, fill, gate * output + (1 - gate) * fill)
        return torch.where(gate == 1, output, mixed)

    def torch_output(self) -> Tensor:
        """Torch's own attention in the inputs' dtype, then gated in float64."""
        mask = self.attn_mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(self.query.dtype)
        output = functional.scaled_dot_product_attention(
            self.query,
            self.key,
            self.value,
            attn_mask=mask,
            is_causal=self.is_causal,
            scale=self.scale,
            enable_gqa=True,
        )
        return self.gated(output.double())

    def truth(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Output and statistics, float64."""
        logits = self.logits()
        empty = (logits == -math.inf).all(-1)
        weights = torch.where(empty[..., None], 0.0, logits.softmax(-1))
        value = self.value.double().repeat_interleave(self.query.shape[1] // self.value.shape[1], 1)
        output = self.gated(weights @ value)
        keys = logits.shape[-1]
        nothing = logits.new_full(empty.shape, -math.inf)
        logarithm = torch.where(weights > 0, weights.log(), 0.0)
        return output, {
            "entropy": -(weights * logarithm).sum(-1),
            "logsumexp": torch.where(empty, -math.inf, logits.logsumexp(-1)) if keys else nothing,
            "max_logit": logits.amax(-1) if keys else nothing,
            "max_prob": weights.amax(-1) if keys else torch.zeros_like(nothing),
        }

    def check(self, statistics: tuple[str, ...] = ALL, configuration: ForwardConfiguration | None = None) -> None:
        """Output within twice torch's own error and a floor, statistics within the contract's bound; NaN for NaN."""
        output, values = self.run(statistics, configuration)
        expected, expected_values = self.truth()
        dtype = self.query.dtype
        torch_error = (self.torch_output() - expected).abs().nan_to_num().max().item() if expected.numel() else 0.0
        size = expected.abs().nan_to_num().max().item() if expected.numel() else 0.0
        tolerance = 2 * torch_error + FLOOR[dtype] * max(size, 1.0)
        torch.testing.assert_close(output.double(), expected, rtol=0, atol=tolerance, equal_nan=True)
        finite = self.logits().nan_to_num(0, 0, 0)
        finite = finite[finite > FINFO_MIN]
        largest = finite.abs().max().item() if finite.numel() else 0.0
        for name in statistics:
            torch.testing.assert_close(
                values[name].double(),
                expected_values[name],
                # entries of the lowest float are compared at their own size
                rtol=2**-22 if self.attn_mask is not None else 0,
                atol=1e-5 + 4 * 2**-24 * largest,
                equal_nan=True,
                msg=lambda text, name=name: f"{name}: {text}",
            )


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (63, 77), (77, 63), (1, 111), (64, 64)])
def test_sizes(queries: int, keys: int, dtype: torch.dtype):
    attention(queries=queries, keys=keys, dtype=dtype).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 8, 12, 40, 64, 80, 160, 256])
def test_head_dimensions(dim: int, dtype: torch.dtype):
    attention(heads=1, queries=17, keys=40, dim=dim, dtype=dtype).check()


@pytest.mark.parametrize(("dim", "dim_v"), [(16, 40), (40, 7), (64, 1)])
def test_value_dimension(dim: int, dim_v: int):
    attention(queries=20, keys=40, dim=dim, dim_v=dim_v).check()


@pytest.mark.parametrize(("dim", "widths"), [(40, (32, 16)), (80, (64, 16))])
def test_split_head_dimension(dim: int, widths: tuple[int, ...]):
    configuration = ForwardConfiguration(32, 32, dim_widths=widths, value_widths=widths)
    attention(queries=20, keys=40, dim=dim).check(configuration=configuration)


@pytest.mark.parametrize(("block_queries", "block_keys"), [(16, 64), (64, 16), (128, 128)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_tile_shapes(block_queries: int, block_keys: int, is_causal: bool):
    problem = attention(heads=1, queries=77, keys=111)
    problem.is_causal = is_causal
    problem.check(configuration=ForwardConfiguration(block_queries, block_keys))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads(kv_heads: int):
    attention(batch=2, heads=4, kv_heads=kv_heads, queries=33, keys=35).check()


@pytest.mark.parametrize(("queries", "keys"), [(63, 63), (100, 40), (40, 100), (1, 50)])
def test_causal(queries: int, keys: int):
    problem = attention(queries=queries, keys=keys)
    problem.is_causal = True
    problem.check()


@pytest.mark.parametrize("shape", [(2, 3, 20, 45), (2, 1, 20, 45), (1, 3, 1, 45), (1, 1, 20, 1)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16])
def test_masks(shape: tuple[int, ...], dtype: torch.dtype):
    problem = attention(batch=2, heads=3, queries=20, keys=45)
    if dtype == torch.bool:
        problem.attn_mask = normal(*shape) > -0.5
    else:
        problem.attn_mask = normal(*shape, dtype=dtype)
        problem.attn_mask[normal(*shape) > 1] = -math.inf
    problem.check()


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_rows_without_a_valid_key(dtype: torch.dtype):
    problem = attention(queries=40, keys=77)
    allowed = torch.ones(1, 1, 40, 77, dtype=torch.bool, device=DEVICE)
    allowed[..., ::3, :] = False
    # valid keys only in the last tile
    allowed[..., 1, :70] = False
    problem.attn_mask = allowed
    if dtype != torch.bool:
        problem.attn_mask = torch.zeros(allowed.shape, device=DEVICE).masked_fill(~allowed, -math.inf)
    problem.check()
    output, values = problem.run()
    assert (output[:, :, ::3] == 0).all()
    assert (values["entropy"][:, :, ::3] == 0).all()
    assert (values["logsumexp"][:, :, ::3] == -math.inf).all()


def test_rows_of_the_lowest_float_are_uniform():
    problem = attention(queries=20, keys=77)
    problem.attn_mask = torch.zeros(1, 1, 20, 77, device=DEVICE)
    problem.attn_mask[..., 3, :] = FINFO_MIN
    # the lowest float first, ordinary logits in a later tile; and the other way around
    problem.attn_mask[..., 5, :70] = FINFO_MIN
    problem.attn_mask[..., 7, 7:] = FINFO_MIN
    problem.check()
    _, values = problem.run(("entropy",))
    torch.testing.assert_close(values["entropy"][..., 3], torch.full((1, 2), math.log(77), device=DEVICE))


def test_nan_stays_in_its_row():
    problem = attention(queries=40, keys=77)
    problem.query[0, 1, 5] = math.nan
    problem.query[0, 0, 33, 2] = math.nan
    problem.check()


def test_nan_key_reaches_every_row_of_its_head():
    problem = attention(queries=20, keys=77)
    problem.key[0, 1, 50] = math.nan
    problem.check()


def test_masked_nan_key_is_ignored():
    problem = attention(queries=20, keys=77)
    clean_output, clean_values = problem.run()
    problem.attn_mask = torch.ones(1, 1, 1, 77, dtype=torch.bool, device=DEVICE)
    problem.attn_mask[..., 50] = False
    expected_output, expected_values = problem.run()
    problem.key[:, :, 50] = math.nan
    output, values = problem.run()
    assert torch.equal(output, expected_output)
    assert not torch.equal(output, clean_output)
    for name in ALL:
        assert torch.equal(values[name], expected_values[name])
        assert values[name].shape == clean_values[name].shape


def test_infinite_logit():
    problem = attention(queries=20, keys=77)
    problem.attn_mask = torch.zeros(1, 1, 20, 77, device=DEVICE)
    problem.attn_mask[..., 4, 40] = math.inf
    output, values = problem.run()
    assert output[:, :, 4].isnan().all()
    assert values["entropy"][:, :, 4].isnan().all()
    assert (values["logsumexp"][:, :, 4] == math.inf).all()
    assert (values["max_logit"][:, :, 4] == math.inf).all()
    others = torch.arange(20) != 4
    assert output[:, :, others].isfinite().all()
    assert values["entropy"][:, :, others].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e2, 1e4])
@pytest.mark.parametrize("masked", [False, True])
def test_extreme_logits(magnitude: float, dtype: torch.dtype, masked: bool):
    problem = attention(queries=40, keys=77, dtype=dtype)
    problem.scale = magnitude / problem.logits().abs().max().item() * 0.25
    if masked:
        problem.attn_mask = torch.zeros(1, 1, 1, 77, device=DEVICE)
    problem.check()


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_shifted_logits(offset: float):
    """A common offset of the logits leaves p alone, and costs no more precision than float32 has there."""
    problem = attention(queries=40, keys=77)
    problem.attn_mask = torch.full((1, 1, 40, 1), offset, device=DEVICE)
    problem.check()


def test_probabilities_stay_below_one():
    """The offset is rounded, the largest weight is not exactly 1, and max_prob knows."""
    problem = attention(queries=40, keys=77)
    problem.query[..., 0], problem.key[..., 0] = 100.0, 400.0
    _, values = problem.run()
    assert (values["max_prob"] <= 1).all()
    assert (values["entropy"] >= 0).all()


@pytest.mark.parametrize("scale", [-0.5, 0.0, 3.0])
@pytest.mark.parametrize(
    ("mask", "dtype"),
    [(None, torch.float32), (None, torch.bfloat16), (torch.bool, torch.float16), (torch.float32, torch.float32)],
)
def test_scales(scale: float, mask: torch.dtype | None, dtype: torch.dtype):
    problem = attention(heads=1, queries=20, keys=40, dtype=dtype)
    problem.scale = scale
    if mask is not None:
        problem.attn_mask = normal(1, 1, 20, 40) > 0 if mask == torch.bool else normal(1, 1, 20, 40)
    problem.check()


@pytest.mark.parametrize("statistics", [(), ("entropy",), ("max_prob", "entropy"), ("max_logit",), ("logsumexp",)])
def test_statistics_in_any_order(statistics: tuple[str, ...]):
    problem = attention(queries=20, keys=40)
    problem.check(statistics)


@pytest.mark.parametrize("gate", [[[0.0, 0.0, 0.0]], [[0.0, 1.0, 0.25], [1.0, 0.0, -2.0]], [[1.0, 1.0, 1.0]]])
@pytest.mark.parametrize(
    ("fill", "statistics"),
    [
        (None, ()),
        (None, ALL),
        ((2, 3, 20, 16), ()),
        ((1, 3, 1, 16), ("entropy",)),
        ((3, 20, 1), ()),
        ((16,), ()),
    ],
)
def test_gates(gate: list[list[float]], fill: Sequence[int] | None, statistics: tuple[str, ...]):
    problem = attention(batch=2, heads=3, queries=20, keys=20)
    problem.gate = torch.tensor(gate, device=DEVICE)
    if fill is not None:
        problem.fill = normal(*fill)
    problem.check(statistics)


@pytest.mark.parametrize("statistics", [(), ALL])
def test_gates_select(statistics: tuple[str, ...]):
    """What a gate of 0 or 1 drops may be NaN."""
    problem = attention(heads=2, queries=20, keys=40)
    problem.gate = torch.tensor([[0.0, 1.0]], device=DEVICE)
    problem.query[:, 0] = math.nan
    problem.fill = normal(1, 2, 20, 16, dtype=torch.bfloat16)
    problem.fill[:, 1] = math.nan
    output, values = problem.run(statistics)
    assert torch.equal(output[:, 0], problem.fill[:, 0].float())
    assert output.isfinite().all()
    if statistics:
        assert values["entropy"][:, 0].isnan().all()
        assert values["entropy"][:, 1].isfinite().all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_no_keys(is_causal: bool):
    problem = attention(queries=20, keys=0)
    problem.is_causal = is_causal
    problem.gate, problem.fill = torch.tensor([[0.5, 1.0]], device=DEVICE), normal(1, 2, 20, 16)
    problem.check()


@pytest.mark.parametrize("shape", [{"batch": 0}, {"queries": 0}, {"batch": 0, "keys": 0}])
def test_nothing_to_do(shape: dict[str, int]):
    problem = attention(**shape)
    problem.run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strides(dtype: torch.dtype):
    """Tokens before heads, transposed channels, an expanded key, an output that is a view."""
    problem = attention(batch=2, heads=3, queries=33, keys=45, dim=12, dtype=dtype)
    problem.query = problem.query.transpose(1, 2).contiguous().transpose(1, 2)
    problem.key = problem.key[:, :1].expand(2, 3, 45, 12)
    problem.value = problem.value.mT.contiguous().mT
    problem.fill = normal(12, 33, dtype=dtype).mT
    problem.gate = normal(3, 2).mT
    problem.attn_mask = normal(45, 33).mT[None, None]
    problem.check()
    wide = torch.zeros(2, 33, 3, 24, dtype=dtype, device=DEVICE)
    view = wide[..., ::2].transpose(1, 2)
    problem.run(output=view)
    assert torch.equal(view, problem.run()[0])
    assert (wide[..., 1::2] == 0).all()


def test_far_apart():
    """Rows, or channels, whose distance within a tile takes 64 bits."""
    problem = attention(queries=1, keys=20)
    reference = problem.run()
    problem.query = problem.query.as_strided((1, 2, 1, 16), (32, 16, 2**31, 1))
    output, values = problem.run()
    assert torch.equal(output, reference[0])
    assert torch.equal(values["entropy"], reference[1]["entropy"])


@pytest.mark.parametrize(
    ("name", "shape"), [("attn_mask", (1, 1, 5, 7)), ("gate", (3, 2)), ("fill", (5, 16))], ids=["mask", "gate", "fill"]
)
def test_shapes_that_do_not_broadcast(name: str, shape: tuple[int, ...]):
    problem = attention(queries=4, keys=4)
    setattr(problem, name, normal(*shape))
    with pytest.raises(ValueError, match=f"{name} must broadcast"):
        problem.run()


def test_deterministic():
    problem = attention(queries=63, keys=111)
    first, second = problem.run(), problem.run()
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in ALL)


def test_many_heads():
    """Beyond 65,535 programs."""
    if DEVICE == "cpu":
        pytest.skip("takes minutes in the interpreter; the launch grid is one-dimensional by construction")
    problem = attention(batch=700, heads=100, queries=16, keys=16)
    problem.check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 300}, "head dimensions"),
        ({"dtype": torch.float64}, "must share one of"),
        ({"kv_heads": 3}, "multiple of key's"),
    ],
)
def test_unsupported_inputs(change: dict, message: str):
    problem = attention(queries=4, keys=4, **change)
    with pytest.raises(ValueError, match=message):
        problem.run()


@pytest.mark.parametrize(("names", "message"), [(("kurtosis",), "kurtosis"), (("entropy", "entropy"), "differ")])
def test_unsupported_statistics(names: tuple[str, ...], message: str):
    problem = attention(queries=4, keys=4)
    batch, heads, queries, _ = problem.query.shape
    with pytest.raises(ValueError, match=message):
        attention_forward(
            problem.query,
            problem.key,
            problem.value,
            attn_mask=None,
            is_causal=False,
            scale=1.0,
            gate=None,
            fill=None,
            statistics=names,
            output=torch.empty_like(problem.query),
            statistic_outputs=[torch.empty(batch, heads, queries) for _ in names],
        )


def test_causal_and_mask_exclude_each_other():
    problem = attention(queries=4, keys=4)
    problem.is_causal, problem.attn_mask = True, normal(1, 1, 4, 4)
    with pytest.raises(ValueError, match="exclude"):
        problem.run()
