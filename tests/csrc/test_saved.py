"""What the C++ kernel's forward saves for the backward: the attention before gate and fill, and each row's softmax."""

import math

import pytest
import torch
from torch import Tensor

import definitions
from contract import assert_close
from headscope.ops import cpu_library

POISON = 777.0
SCALE = 0.4


def run(query: Tensor, key: Tensor, value: Tensor, saved: dict[str, Tensor], **options) -> Tensor:
    """The output, from poisoned memory."""
    output = torch.full((*query.shape[:3], value.shape[3]), POISON, dtype=query.dtype)
    options = {"attn_mask": None, "is_causal": False, "scale": SCALE} | options
    cpu_library.attention_forward(query, key, value, **options, output=output, **saved)
    return output


def empty(shape: tuple[int, ...], dtype: torch.dtype, order: tuple[int, ...]) -> Tensor:
    """Poisoned, its dimensions in this order in memory."""
    whole = torch.full([shape[dimension] for dimension in order], POISON, dtype=dtype)
    return whole.permute([order.index(dimension) for dimension in range(4)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("keys", "dim_v"), [(70, 16), (600, 21)])
def test_values(keys, dim_v, dtype, instruction_set, library):
    """Heads that are kept, removed and in between; dead rows; whole tiles and parts of one, of rows and of channels."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 72, 12).to(dtype), torch.randn(2, 2, keys, 12).to(dtype)
    value = torch.randn(2, 2, keys, dim_v).to(dtype)
    mask = torch.rand(2, 1, 72, keys) > 0.3
    mask[:, :, 5] = False
    edits = {"gate": torch.tensor([[0.0, 1.0, 0.5, 1.0]]), "fill": torch.randn(1, 4, 1, dim_v)}
    names = ("temperature", "key_bias", "attn_mask", "is_causal")
    for options in ({}, {"is_causal": True}, {"attn_mask": mask}):
        asked = {"is_causal": False, **dict.fromkeys(names[:3])} | options
        found = definitions.scores(query, key, scale=SCALE, **asked)
        expected = found.probabilities @ definitions.for_every_head(value, 4)
        largest = found.logits.amax(-1)
        dead = largest == -math.inf
        log2_sum = (torch.logsumexp(found.logits, -1) - largest) / math.log(2)
        # a logit errs by four units in its last place; weights are rounded to the dtype of the values they meet
        error = 1e-5 + 4 * 2.0**-24 * float(found.logits[found.logits.isfinite()].abs().max())
        unit = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 2 * error
        # contiguous, heads behind rows, and channels that aren't side by side
        for order in ((0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2)):
            attention = empty(tuple(expected.shape), dtype, order)
            saved = {"row_max": torch.full(dead.shape, POISON), "log2_sum": torch.full(dead.shape, POISON)}
            output = run(query, key, value, {**saved, "attention": attention}, **options, **edits)
            assert torch.equal(output, run(query, key, value, {}, **options, **edits))
            assert torch.equal(output[:, [1, 3]], attention[:, [1, 3]])
            assert_close("attention", attention, expected, unit * float(value.abs().max()))
            assert_close("row_max", saved["row_max"], torch.where(dead, 0.0, largest), error)
            assert_close("log2_sum", saved["log2_sum"], torch.where(dead, math.inf, log2_sum), 4 * error)


def test_nan_rows_and_nothing_to_multiply(instruction_set, library):
    """A NaN row has a NaN log2_sum. Without a gate, or without channels, the two numbers of a row are saved alone."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 20, 8), torch.randn(1, 2, 9, 8)
    query[0, 1, 3, 2] = math.nan
    for dim_v in (4, 0):
        saved = {"row_max": torch.full((1, 2, 20), POISON), "log2_sum": torch.full((1, 2, 20), POISON)}
        run(query, key, torch.randn(1, 2, 9, dim_v), saved)
        assert saved["log2_sum"].isnan().nonzero().tolist() == [[0, 1, 3]]
        assert not (saved["log2_sum"] == POISON).any()
        assert not (saved["row_max"] == POISON).any()


@pytest.mark.parametrize("keys", [300, 512])
def test_passes_of_groups_leave_it_alone(keys, instruction_set, library):
    """Group statistics that come in passes of their own work their logits out in other blocks of keys, so that these
    aren't bit for bit what the output was made of: the backward wants those."""
    torch.manual_seed(0)
    query, key, value = (30.0 * torch.randn(1, 1, size, 300) for size in (40, keys, keys))
    ids = torch.randint(0, 65536, (8, 1, 1, keys), dtype=torch.int32)
    found = []
    for count in (0, 8):
        saved = {name: torch.full((1, 1, 40), POISON) for name in ("row_max", "log2_sum")}
        masses = [torch.empty(1, 1, 40, 65536) for _ in range(count)]
        statistics = [("group_entropy", (65536,), (ids[i],)) for i in range(count)]
        run(query, key, value, {**saved, "statistics": statistics, "statistic_outputs": masses})
        found.append(saved)
    for name in ("row_max", "log2_sum"):
        assert torch.equal(found[0][name], found[1][name]), name
