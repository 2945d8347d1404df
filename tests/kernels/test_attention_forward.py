"""The forward kernel against plain float64 torch, under Triton's interpreter or on a GPU."""

import math

import pytest
import torch
import triton

from forward_problem import ALL, DEVICE, FINFO_MIN, attention, group_ids, normal
from headscope_kernels.attention.configuration import ForwardConfiguration


def test_interpreter_or_gpu():
    """Everything below needs one; without this check it would fail with an error about devices."""
    assert DEVICE == "cuda" or triton.knobs.runtime.interpret, "without a GPU these tests need TRITON_INTERPRET=1"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (63, 77), (77, 63), (1, 111), (64, 64)])
def test_sizes(queries: int, keys: int, dtype: torch.dtype):
    attention(queries=queries, keys=keys, dtype=dtype).check(ALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 12, 40, 80, 96, 160, 320, 512])
def test_head_dimensions(dim: int, dtype: torch.dtype):
    attention(heads=1, queries=17, keys=40, dim=dim, dtype=dtype).check(("entropy",))


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


@pytest.mark.parametrize("shape", [(2, 3, 20, 45), (1, 3, 1, 45), (1, 1, 20, 1)])
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
    problem.check(ALL)
    output, values = problem.run()
    assert (output[:, :, ::3] == 0).all()
    for name in ALL:
        expected = -math.inf if name in ("logsumexp", "max_logit") else 0
        assert (values[name][:, :, ::3] == expected).all(), name
    problem.check_key_mass()


def test_rows_of_the_lowest_float_are_uniform():
    problem = attention(queries=20, keys=77)
    problem.attn_mask = torch.zeros(1, 1, 20, 77, device=DEVICE)
    problem.attn_mask[..., 3, :] = FINFO_MIN
    # the lowest float first, ordinary logits in a later tile; and the other way around
    problem.attn_mask[..., 5, :70] = FINFO_MIN
    problem.attn_mask[..., 7, 7:] = FINFO_MIN
    problem.check(ALL)
    problem.check_key_mass()
    _, values = problem.run(("entropy",))
    torch.testing.assert_close(values["entropy"][..., 3], torch.full((1, 2), math.log(77), device=DEVICE))


def test_nan_stays_in_its_row():
    problem = attention(queries=40, keys=77)
    problem.query[0, 1, 5] = math.nan
    problem.query[0, 0, 33, 2] = math.nan
    problem.check(ALL)
    assert problem.key_mass().isnan().all()


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
    others = torch.arange(20) != 4
    assert output[:, :, 4].isnan().all()
    assert output[:, :, others].isfinite().all()
    for name in ALL:
        row = values[name][:, :, 4]
        assert ((row == math.inf) if name in ("logsumexp", "max_logit") else row.isnan()).all(), name
        assert values[name][:, :, others].isfinite().all(), name
    assert problem.key_mass().isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e2, 1e4])
@pytest.mark.parametrize("masked", [False, True])
def test_extreme_logits(magnitude: float, dtype: torch.dtype, masked: bool):
    problem = attention(queries=40, keys=77, dtype=dtype)
    problem.scale = magnitude / problem.logits().abs().max().item() * 0.25
    if masked:
        problem.attn_mask = torch.zeros(1, 1, 1, 77, device=DEVICE)
    problem.check(ALL)


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


@pytest.mark.parametrize("is_causal", [False, True])
def test_no_keys(is_causal: bool):
    problem = attention(queries=20, keys=0)
    problem.is_causal = is_causal
    problem.gate, problem.fill = torch.tensor([[0.5, 1.0]], device=DEVICE), normal(1, 2, 20, 16)
    problem.check(ALL)


@pytest.mark.parametrize("shape", [{"batch": 0}, {"queries": 0}, {"batch": 0, "keys": 0}])
def test_nothing_to_do(shape: dict[str, int]):
    problem = attention(**shape)
    problem.run()
    problem.key_mass()


def test_strides():
    """Tokens before heads, transposed channels, an expanded key, an output that is a view."""
    problem = attention(batch=2, heads=3, queries=17, keys=45, dim=12, dtype=torch.float16)
    problem.query = problem.query.transpose(1, 2).contiguous().transpose(1, 2)
    problem.key = problem.key[:, :1].expand(2, 3, 45, 12)
    problem.value = problem.value.mT.contiguous().mT
    problem.fill = normal(12, 17, dtype=torch.float16).mT
    problem.gate = normal(3, 2).mT
    problem.attn_mask = normal(45, 17).mT[None, None]
    problem.groups = group_ids(1, 3, 45).expand(2, 3, 45)
    problem.key_bias = normal(2, 1, 90)[..., ::2]
    problem.check()
    problem.check_key_mass()
    wide = torch.zeros(2, 17, 3, 24, dtype=torch.float16, device=DEVICE)
    view = wide[..., ::2].transpose(1, 2)
    problem.run((), output=view)
    assert torch.equal(view, problem.run(())[0])
    assert (wide[..., 1::2] == 0).all()


def test_far_apart():
    """Rows, or channels, whose distance within a tile takes 64 bits."""
    problem = attention(queries=1, keys=20)
    reference = problem.run()
    problem.query = problem.query.as_strided((1, 2, 1, 16), (32, 16, 2**31, 1))
    output, values = problem.run()
    assert torch.equal(output, reference[0])
    assert torch.equal(values["entropy"], reference[1]["entropy"])


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
        ({"dim": 513}, "head dimensions"),
        ({"dtype": torch.float64}, "must share one of"),
        ({"kv_heads": 3}, "multiple of key's"),
    ],
)
def test_unsupported_inputs(change: dict, message: str):
    problem = attention(queries=4, keys=4, **change)
    with pytest.raises(ValueError, match=message):
        problem.run()


def test_causal_and_mask_exclude_each_other():
    problem = attention(queries=4, keys=4)
    problem.is_causal, problem.attn_mask = True, normal(1, 1, 4, 4)
    with pytest.raises(ValueError, match="exclude"):
        problem.run()
