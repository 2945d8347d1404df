"""The numeric contract at the sizes where this kernel's blocks, tiles and vectors end, for every instruction set."""

import math

import pytest
import torch

from contract import CASES, FINFO_MIN, Case, assert_close, make_inputs, truth

# the types differ only where blocks are packed and results stored, so not every case is needed with every type
LOW_PRECISION = (
    "odd",
    "cross_77",
    "dim_17",
    "dim_160",
    "grouped",
    "causal",
    "additive_mask",
    "gates_and_fill",
    "strided",
)


def _ragged(batch, heads, queries, keys):
    """Some rows see nothing, some nothing but the first block of 512 keys, some nothing but the last key."""
    mask = torch.rand(batch, heads, queries, keys) > 0.5
    mask[:, :, 0] = False
    mask[:, :, 1, 512:] = False
    mask[:, :, 2] = False
    mask[:, :, 2, -1] = True
    return mask


def _over_heads(batch, heads, queries, keys):
    return torch.rand(1, heads, 1, 1) > 0.4


def _over_keys(batch, heads, queries, keys):
    return torch.randn(batch, 1, queries, 1).masked_fill(torch.rand(batch, 1, queries, 1) > 0.7, -math.inf)


def _low_rows(batch, heads, queries, keys):
    """Rows of finfo.min (uniform), of -inf (dead), and of both (uniform over what is left)."""
    mask = torch.zeros(batch, 1, queries, keys)
    mask[:, :, 0] = FINFO_MIN
    mask[:, :, 1] = -math.inf
    mask[:, :, 2] = FINFO_MIN
    mask[:, :, 2, ::2] = -math.inf
    return mask


def _half_mask(batch, heads, queries, keys):
    return torch.randn(1, heads, queries, keys).bfloat16()


def _double_mask(batch, heads, queries, keys):
    return torch.randn(queries, keys).double()[None, None]


def _transposed_mask(batch, heads, queries, keys):
    return torch.randn(1, 1, keys, queries).mT


def _gate(batch, heads):
    gate = torch.rand(batch, heads)
    gate[:, 0], gate[:, -1] = 0.0, 1.0
    return gate


def _fill(batch, heads, queries, dim_v):
    return torch.randn(1, heads, 1, dim_v)


def _columns(tensor):
    """Every second channel of a tensor with the tokens innermost: no stride is 1."""
    wide = torch.empty(*tensor.shape[:2], 2 * tensor.shape[3], tensor.shape[2], dtype=tensor.dtype).mT
    wide[..., ::2] = tensor
    return wide[..., ::2]


def _all_nan(query, key, value):
    query[:] = math.nan


def _late_nan(query, key, value):
    query[0, 0, 3, 0] = math.nan
    query[..., -1, :] = 0.0


# The bound on outputs is torch's own worst error in the same call, so a case needs enough rows to show it.
CASES = [
    # fills given by name are resolved above the backends
    *(case for case in CASES if not isinstance(case.fill, str)),
    *(Case(f"tokens_{n}", (1, 2, 2, n, n, 16, 16)) for n in (1, 63, 64, 65, 77, 111)),
    *(Case(f"keys_{n}", (1, 2, 2, 70, n, 16, 16)) for n in (8, 15, 17, 31, 33, 511, 512, 513, 1025)),
    *(Case(f"dim_{n}", (1, 2, 2, 11, 77, n, n)) for n in (1, 8, 12, 17, 33, 40, 48, 64, 65, 80, 96, 128, 160, 200)),
    Case("dim_wider", (1, 2, 2, 11, 600, 300, 500)),
    Case("dim_v_only", (1, 2, 2, 11, 77, 40, 24)),
    Case("no_dim", (1, 2, 2, 11, 77, 0, 24), scale=1.0),
    Case("grouped_blocks", (2, 6, 2, 70, 530, 24, 40)),
    Case("ragged", (1, 2, 2, 21, 1100, 16, 16), mask=_ragged),
    Case("over_heads", (1, 5, 5, 21, 60, 16, 16), mask=_over_heads),
    Case("over_keys", (2, 2, 2, 21, 60, 16, 16), mask=_over_keys),
    Case("low_rows", (2, 2, 2, 9, 555, 16, 16), mask=_low_rows),
    Case("half_mask", (2, 2, 2, 21, 60, 16, 16), mask=_half_mask),
    Case("double_mask", (2, 2, 2, 21, 60, 16, 16), mask=_double_mask),
    Case("transposed_mask", (2, 2, 2, 21, 60, 16, 16), mask=_transposed_mask),
    Case("causal_blocks", (1, 2, 2, 700, 700, 16, 16), is_causal=True),
    Case("causal_unequal", (1, 2, 2, 130, 600, 16, 16), is_causal=True),
    # many rows: only few have two keys close enough for an error to show
    Case("extreme_blocks", (1, 2, 2, 400, 1100, 40, 40), magnitude=2500.0),
    Case("extreme_wide", (1, 4, 4, 800, 111, 160, 160), magnitude=2500.0),
    Case("gates_and_fill", (2, 4, 2, 21, 60, 16, 24), gate=_gate, fill=_fill),
    Case("strided", (2, 3, 3, 31, 77, 24, 24), layout=_columns),
    Case("all_nan", (1, 2, 2, 9, 40, 16, 16), poison=_all_nan),
    Case("late_nan", (1, 2, 2, 9, 1030, 16, 16), poison=_late_nan),
]


# float32 has no dot products of its own
@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"], indirect=True)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32(case, instruction_set, attend):
    check(case, torch.float32, attend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.name in LOW_PRECISION], ids=lambda case: case.name)
def test_low_precision(case, dtype, instruction_set, attend):
    check(case, dtype, attend)


def check(case, dtype, attend):
    inputs = make_inputs(case, dtype)
    expected = truth(inputs)
    output, statistics = attend(inputs)
    assert_close("output", output, expected.output, expected.output_tolerance)
    # sums in pieces: four units in the last place of the largest logit, less than the contract allows
    tolerance = 1e-5 + 4 * 2.0**-24 * expected.largest_logit
    for name, values in statistics.items():
        assert_close(name, values, expected.statistics[name], tolerance)
    # a removed head is only skipped where nothing is asked of it; entropy has a loop of its own
    without, _ = attend(inputs, statistics=())
    assert torch.equal(without.nan_to_num(), output.nan_to_num())
    assert torch.equal(attend(inputs, statistics=("logsumexp",))[0].nan_to_num(), output.nan_to_num())
