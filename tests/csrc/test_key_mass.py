"""key_mass of the C++ kernel, from one pass up to 512 keys and from two beyond: values, threads and turns."""

import math

import pytest
import torch
from torch import Tensor

import definitions
from contract import assert_close
from headscope.ops import cpu_library

POISON = 777.0
SCALE = 0.4


def random_tensors(heads: int, kv_heads: int, queries: int, keys: int, dim: int, dtype=torch.float32, batch=1, dim_v=5):
    """query, key and value."""
    torch.manual_seed(0)
    query = torch.randn(batch, heads, queries, dim)
    key, value = torch.randn(batch, kv_heads, keys, dim), torch.randn(batch, kv_heads, keys, dim_v)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def key_mass(query: Tensor, key: Tensor, value: Tensor, threads: int = 1, others=(), **options) -> Tensor:
    """[batch, heads, keys], from poisoned memory, beside row statistics."""
    batch, heads, queries = query.shape[:3]
    masses = torch.full((batch, heads, key.shape[2]), POISON)
    options = {"attn_mask": None, "is_causal": False, "scale": SCALE} | options
    cpu_library.attention_forward(
        query,
        key,
        value,
        **options,
        statistics=(*others, "key_mass"),
        output=query.new_empty(batch, heads, queries, value.shape[3]),
        statistic_outputs=(*(torch.empty(batch, heads, queries) for _ in others), masses),
        threads=threads,
    )
    return masses


def truth(query: Tensor, key: Tensor, repeated: int = 1, **options) -> tuple[Tensor, float]:
    """The masses in float64, where every row comes `repeated` times, and what they may err by."""
    names = ("temperature", "key_bias", "attn_mask", "is_causal")
    found = definitions.scores(query, key, scale=SCALE, **{"is_causal": False, **dict.fromkeys(names[:3])} | options)
    expected = repeated * definitions.key_mass(found.probabilities)
    largest = float(found.logits[found.logits.isfinite()].abs().max())
    # a logit errs by four units in its last place, every probability by as much, and a mass by that of its rows
    return expected, (1e-5 + 4 * 2.0**-24 * largest) * (1.0 + float(expected.amax()))


def edits(queries: int, keys: int) -> dict[str, dict]:
    """Options of calls with two samples of four heads."""
    mask = torch.rand(2, 1, queries, keys) > 0.3
    mask[:, :, queries // 2] = False
    bias = torch.where(torch.rand(2, 1, keys) > 0.8, -math.inf, torch.randn(2, 1, keys))
    # what key_mass doesn't look at
    apart = {"key_scale": torch.randn(2, 4, keys), "gate": torch.tensor([[0.0, 1.0, 0.5, 0.0]])}
    return {
        "nothing": {},
        "causal": {"is_causal": True},
        "mask": {"attn_mask": mask},
        "edits": {**apart, "key_bias": bias, "temperature": torch.tensor([[0.5, 1.0, 2.0, -1.0]])},
    }


@pytest.mark.parametrize("keys", [1, 7, 64, 77, 256, 512, 513])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_threads(keys, dtype, instruction_set, library):
    """Several blocks of rows and a part of one; more keys than the rows see. Other statistics take other loops."""
    tensors = random_tensors(4, 2, 150, keys, 12, dtype, batch=2)
    for name, options in edits(150, keys).items():
        compared = {name: options[name] for name in options if name not in ("key_scale", "gate")}
        expected, tolerance = truth(*tensors[:2], **compared)
        for others in ((), ("entropy",), ("entropy", "collision_entropy")):
            masses = key_mass(*tensors, others=others, **options)
            assert_close(f"{name}, {others}", masses, expected, tolerance)
            assert torch.equal(masses, key_mass(*tensors, 3, others, **options))


@pytest.mark.parametrize(("queries", "keys"), [(1, 20), (5, 600), (65, 20)])
def test_many_heads_of_few_rows(queries, keys, instruction_set, library):
    """Heads that share keys are worked on together."""
    tensors = random_tensors(260, 1, queries, keys, 4)
    masses = key_mass(*tensors)
    assert_close("key_mass", masses, *truth(*tensors[:2]))
    assert torch.equal(masses, key_mass(*tensors, threads=3))


@pytest.mark.parametrize(
    ("queries", "keys", "dim", "dim_v"),
    [(130, 7, 8192, 8192), (130, 70, 8192, 8192), (130, 7, 8192, 5), (1100, 20, 1000, 5)],
)
def test_large_dims(queries, keys, dim, dim_v, instruction_set, library):
    """An item has room for few rows: fewer than a block of them, or no whole number of blocks."""
    tensors = random_tensors(1, 1, queries, keys, dim, dim_v=dim_v)
    tensors[0].mul_(dim**-0.5)
    masses = key_mass(*tensors)
    assert_close("key_mass", masses, *truth(*tensors[:2]))
    for threads in (2, 4):
        assert torch.equal(masses, key_mass(*tensors, threads=threads))


@pytest.mark.parametrize("keys", [60, 150, 512])
def test_nan_rows_reach_all_keys_of_their_head(keys, instruction_set, library):
    """Those that a causal row doesn't see, too, whichever rows are worked on together."""
    query, key, value = random_tensors(2, 2, 400, keys, 12)
    query[0, 1, 3, 2] = math.nan
    for is_causal in (False, True):
        masses = key_mass(query, key, value, is_causal=is_causal)
        assert masses[0, 1].isnan().all()
        assert not masses[0, 0].isnan().any()
        for threads in (2, 3):
            again = key_mass(query, key, value, threads, is_causal=is_causal)
            assert torch.equal(masses.nan_to_num(POISON), again.nan_to_num(POISON))


@pytest.mark.parametrize(
    ("heads", "rows", "repeated", "keys", "threads"),
    [
        # more rows than are saved at a time, of one head (1,024 blocks of 64 rows, or 262,144 rows) and of many; so
        # many threads that an item is cut, and a turn ends, elsewhere
        pytest.param(1, 1100, 61, 512, 20, id="one head, one pass"),
        pytest.param(1, 1100, 240, 513, 80, id="one head, two passes"),
        pytest.param(130, 70, 8, 512, 3, id="many heads, one pass"),
        pytest.param(130, 70, 32, 513, 3, id="many heads, two passes"),
    ],
)
def test_turns(heads, rows, repeated, keys, threads, library):
    query, key, value = random_tensors(heads, heads, rows, keys, 2)
    long = query.repeat(1, 1, repeated, 1)
    masses = key_mass(long, key, value)
    assert_close("key_mass", masses, *truth(query, key, repeated))
    assert torch.equal(masses, key_mass(long, key, value, threads=threads))
