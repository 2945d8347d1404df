"""Edits of heads and keys in the forward kernel, and the rows it leaves to the backward."""

import math
from collections.abc import Sequence

import pytest
import torch

from forward_problem import ALL, DEVICE, FINFO_MIN, attention, normal
from headscope_kernels.attention.configuration import ForwardConfiguration


def positive(*shape: int) -> torch.Tensor:
    return normal(*shape).exp()


@pytest.mark.parametrize("gate", [[[0.0, 0.0, 0.0]], [[0.0, 1.0, 0.25], [1.0, 0.0, -2.0]]])
@pytest.mark.parametrize(
    ("fill", "statistics"),
    [
        (None, ()),
        (None, ("entropy",)),
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


@pytest.mark.parametrize("statistics", [(), ("entropy", "group_mass")])
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
    for value in values.values():
        assert value[:, 0].isnan().all()
        assert value[:, 1].isfinite().all()


@pytest.mark.parametrize("mask", [None, torch.bool, torch.float32])
@pytest.mark.parametrize("scale", [None, -0.5])
def test_temperature(mask: torch.dtype | None, scale: float | None):
    problem = attention(batch=2, heads=2, queries=20, keys=40)
    problem.scale, problem.temperature = scale, positive(2, 2)
    if mask is not None:
        problem.attn_mask = normal(1, 1, 20, 40) > 0 if mask == torch.bool else normal(1, 1, 20, 40)
    problem.check()
    problem.check_key_mass()


@pytest.mark.parametrize("temperature", [1e-3, 1e38, math.inf])
def test_extreme_temperature(temperature: float):
    """Towards 0 a row picks its largest logit, towards infinity it is uniform; a masked key stays masked."""
    problem = attention(queries=20, keys=40)
    problem.temperature = torch.tensor([[temperature, 1.0]], device=DEVICE)
    problem.attn_mask = (torch.arange(40, device=DEVICE) < 37)[None, None, None]
    problem.check(ALL)
    problem.check_key_mass()


@pytest.mark.parametrize(
    ("shape", "mask"), [((2, 3, 45), None), ((1, 3, 45), torch.bool), ((2, 1, 45), torch.float32), ((1, 1, 45), None)]
)
def test_key_bias(shape: tuple[int, ...], mask: torch.dtype | None):
    """Beside every kind of mask, and it may mute keys, even all of a head's."""
    problem = attention(batch=2, heads=3, queries=20, keys=45)
    problem.key_bias = normal(*shape)
    problem.key_bias[..., ::7] = -math.inf
    problem.key_bias[-1, -1] = -math.inf
    if mask is not None:
        problem.attn_mask = normal(1, 3, 20, 45) > 0 if mask == torch.bool else normal(2, 1, 20, 45)
    problem.check()
    problem.check_key_mass()


def test_key_bias_beside_the_causal_border():
    problem = attention(queries=40, keys=70)
    problem.is_causal, problem.key_bias = True, normal(1, 2, 70)
    problem.check()
    problem.check_key_mass()


@pytest.mark.parametrize("statistics", [(), ALL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_key_scale(statistics: tuple[str, ...], dtype: torch.dtype):
    """It multiplies after the softmax: the statistics don't see it."""
    problem = attention(batch=2, heads=3, queries=20, keys=45, dtype=dtype)
    problem.key_scale = normal(2, 1, 45)
    problem.check(statistics)


def test_every_edit_at_once():
    problem = attention(batch=2, heads=2, queries=40, keys=45, dim=24, dim_v=12, dtype=torch.float16)
    problem.gate = torch.tensor([[0.5, 1.0], [0.0, -1.5]], device=DEVICE)
    problem.fill = normal(1, 2, 40, 12, dtype=torch.float16)
    problem.temperature, problem.key_bias, problem.key_scale = positive(1, 2), normal(2, 1, 45), normal(1, 2, 45)
    problem.attn_mask = normal(2, 1, 1, 45) > -1
    problem.check(ALL)
    problem.check_key_mass()


@pytest.mark.parametrize("mask", [None, torch.bool, torch.float32])
def test_rows_for_the_backward(mask: torch.dtype | None):
    """The probabilities come back out of row_max and log2_sum; `attention` has no gate in it, and skips no head."""
    problem = attention(queries=40, keys=77)
    problem.gate = torch.tensor([[0.0, 0.5]], device=DEVICE)
    problem.temperature = positive(1, 2)
    if mask is not None:
        problem.attn_mask = normal(1, 1, 40, 77) > -1
        problem.attn_mask[..., 7, :] = False
        if mask != torch.bool:
            problem.attn_mask = torch.zeros(1, 1, 40, 77, device=DEVICE).masked_fill(~problem.attn_mask, -math.inf)
            problem.attn_mask[..., 9, :] = FINFO_MIN
    rows = {name: torch.full(problem.rows, math.nan, device=DEVICE) for name in ("row_max", "log2_sum")}
    inner = torch.full((*problem.rows, 16), math.nan, device=DEVICE)
    output, _ = problem.run((), attention=inner, **rows)
    problem.check_output(output)
    torch.testing.assert_close(inner.double(), problem.attention(), rtol=0, atol=1e-5)
    exponents = (problem.logits() - rows["row_max"].double()[..., None]) / math.log(2)
    weights = torch.exp2(exponents - rows["log2_sum"].double()[..., None])
    torch.testing.assert_close(weights, problem.weights(), rtol=0, atol=2e-6)
    if mask is not None:
        assert (rows["row_max"][:, :, 7] == 0).all()
        assert (rows["log2_sum"][:, :, 7] == math.inf).all()


def test_statistics_without_an_output():
    problem = attention(queries=40, keys=77)
    # nobody may read these
    problem.gate = torch.full((1, 2), math.nan, device=DEVICE)
    problem.value = torch.full_like(problem.value, math.nan)
    statistics = ("entropy", "group_mass")
    values = problem.call([problem.bound(name) for name in statistics], None)
    for name, value in zip(statistics, values, strict=True):
        problem.check_statistic(name, value)


@pytest.mark.parametrize("dim", [16, 40])
def test_tensor_descriptors(dim: int):
    """Keys and values through descriptors: the same bits, in one chunk or two, at borders, with tokens before heads."""
    problem = attention(batch=2, heads=2, kv_heads=1, queries=20, keys=45, dim=dim, dtype=torch.float16)
    problem.key = problem.key.transpose(1, 2).contiguous().transpose(1, 2)
    outputs = [
        problem.run(("entropy",), ForwardConfiguration(32, 32, descriptors=descriptors))
        for descriptors in (False, True)
    ]
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1]["entropy"], outputs[1][1]["entropy"])


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("attn_mask", (1, 1, 5, 7)),
        ("gate", (3, 2)),
        ("fill", (5, 16)),
        ("temperature", (3, 2)),
        ("key_bias", (1, 2, 5)),
        ("key_scale", (1, 3, 4)),
    ],
)
def test_shapes_that_do_not_broadcast(name: str, shape: tuple[int, ...]):
    problem = attention(queries=4, keys=4)
    if name == "fill":
        problem.gate = normal(1, 2)
    setattr(problem, name, normal(*shape))
    with pytest.raises(ValueError, match=f"{name} must broadcast"):
        problem.run()


def test_rows_come_together():
    problem = attention(queries=4, keys=4)
    with pytest.raises(ValueError, match="come together"):
        problem.run(row_max=torch.zeros(problem.rows, device=DEVICE))
