"""The edges of the contract: the reach of NaN and infinity, strides, threads, processes, and refusals."""

import contextlib
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from contract import Inputs, assert_close, truth
from headscope.ops import cpu_library, cpu_structs

FULL = ("entropy", "logsumexp", "max_logit", "max_prob")


def make(queries=21, keys=60, heads=2, dim=16, dim_v=None, dtype=torch.float32, gate=None, fill=None, **options):
    torch.manual_seed(0)
    options = {"attn_mask": None, "is_causal": False, "scale": None, "enable_gqa": False, **options}
    query, key = torch.randn(1, heads, queries, dim), torch.randn(1, heads, keys, dim)
    value = torch.randn(1, heads, keys, dim_v or dim)
    return Inputs(query.to(dtype), key.to(dtype), value.to(dtype), options, gate, fill)


def bad_rows(tensor):
    """The rows of head 0 with a NaN in them."""
    tensor = tensor[0, 0]
    return tensor.isnan().any(-1) if tensor.ndim == 2 else tensor.isnan()


@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["bool", "additive", "causal"])
def test_what_a_row_does_not_see_does_not_reach_it(kind, special, where, instruction_set, attend):
    position = 30
    if kind == "causal":
        inputs = make(queries=60, is_causal=True)
        seen = torch.arange(60) >= position
    else:
        seen = torch.rand(21, generator=torch.Generator().manual_seed(1)) > 0.5
        mask = torch.ones(1, 1, 21, 60, dtype=torch.bool)
        mask[0, 0, :, position] = seen
        inputs = make(attn_mask=mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, -math.inf))
    clean = truth(inputs)
    getattr(inputs, where)[0, 0, position, 3] = special
    output, statistics = attend(inputs)
    assert_close("clean rows", output[0, 0, ~seen], clean.output[0, 0, ~seen], 2e-6)
    assert_close("other head", output[0, 1], clean.output[0, 1], 2e-6)
    for name, values in statistics.items():
        assert_close(name, values[0, 0, ~seen], clean.statistics[name][0, 0, ~seen], 2e-5)
    if math.isnan(special):
        assert torch.equal(bad_rows(output), seen)
        if where == "key":
            assert all(torch.equal(bad_rows(values), seen) for values in statistics.values())
    elif where == "value":
        assert torch.equal(output[0, 0, :, 3] == special, seen)


def test_nan_in_a_query_row_stays_there(instruction_set, attend):
    inputs = make(keys=1100)
    inputs.query[0, 0, 7, 2] = math.nan
    output, statistics = attend(inputs)
    row = torch.arange(21) == 7
    assert output[0, 0, 7].isnan().all()
    assert torch.equal(bad_rows(output), row)
    assert all(torch.equal(bad_rows(values), row) for values in statistics.values())
    assert not output[0, 1].isnan().any()


@pytest.mark.parametrize("keys", [60, 1100])
def test_infinite_logits(keys, instruction_set, attend):
    """+inf is a known maximum and logsumexp, as in torch; the probabilities are NaN. -inf is a key not seen."""
    inputs = make(keys=keys, dim=4)
    inputs.query[..., 0] = 1.0
    inputs.key[0, 0, 50, 0] = math.inf
    inputs.key[0, 1, 50, 0] = -math.inf
    output, statistics = attend(inputs)
    assert output[0, 0].isnan().all()
    assert statistics["entropy"][0, 0].isnan().all()
    assert statistics["max_prob"][0, 0].isnan().all()
    assert (statistics["max_logit"][0, 0] == math.inf).all()
    assert (statistics["logsumexp"][0, 0] == math.inf).all()
    kept = torch.arange(keys) != 50
    without = Inputs(inputs.query, inputs.key[:, :, kept], inputs.value[:, :, kept], inputs.options, None, None)
    expected = truth(without)
    assert_close("output", output[:, 1], expected.output[:, 1], 2e-6)
    for name, values in statistics.items():
        assert_close(name, values[:, 1], expected.statistics[name][:, 1], 2e-5)
    # a NaN beside the infinity, in the same block or an earlier one
    for position in {55, 3, keys - 1}:
        inputs.key[0, 0, position, 1] = math.nan
        assert attend(inputs)[1]["max_logit"][0, 0].isnan().all()
        inputs.key[0, 0, position, 1] = 0.0


def test_a_gate_of_one_or_zero_keeps_nan_out(instruction_set, attend):
    gate = torch.tensor([[0.0, 1.0]])
    fill = torch.ones(1, 2, 1, 16)
    fill[0, 1] = math.nan
    inputs = make(gate=gate, fill=fill)
    inputs.query[0, 0] = math.nan
    for statistics in ((), FULL):
        output, values = attend(inputs, statistics)
        assert (output[0, 0] == 1.0).all()
        assert not output[0, 1].isnan().any()
    assert values["entropy"][0, 0].isnan().all()


def test_subnormal_bfloat16(instruction_set, attend):
    """They count, except that bfloat16 dot products take them for 0."""
    torch.manual_seed(0)
    tiny = torch.randint(1, 128, (3, 1, 2, 21, 16), dtype=torch.int16).view(torch.bfloat16)
    signs = torch.randint(0, 2, tiny.shape).mul(2).sub(1).bfloat16()
    small, _, value = (tiny * signs).unbind()
    assert ((small.float().abs() < 2.0**-126) & (small != 0)).all()
    # 2^-133..2^-126 times 2^126: logits that differ from 0
    key = torch.randn(1, 2, 21, 16).mul(2.0**126).bfloat16()
    dots = instruction_set == "avx512_bf16"
    options = {"attn_mask": None, "is_causal": False, "scale": 1.0}
    for query, keys in ((small, key), (key, small)):
        output, values = attend(Inputs(query, keys, key.sign(), options, None, None), FULL)
        counted = Inputs(0 * query, keys, key.sign(), options, None, None) if dots else None
        expected = truth(counted or Inputs(query, keys, key.sign(), options, None, None))
        largest = float(expected.statistics["max_logit"].abs().max())
        assert dots or largest > 0.5
        assert_close("output", output, expected.output, 2.0**-7)
        for name in FULL:
            assert_close(name, values[name], expected.statistics[name], 1e-5 + 4 * 2.0**-24 * 2 * largest)
    plain = Inputs(key.sign(), key.sign(), value, options, None, None)
    output, _ = attend(plain, ())
    expected = truth(plain).output
    assert_close("output", output.double(), 0 * expected if dots else expected, 2.0**-133)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_fills_of_any_floating_type(dtype, attend):
    fill = torch.randn(1, 1, 21, 16).to(dtype)
    output, _ = attend(make(gate=torch.zeros(1, 2), fill=fill), ())
    assert torch.equal(output, fill.float().expand(1, 2, 21, 16))


def test_unusual_strides(attend):
    """Strides as torch can make them: repeated rows, a batch of one with any stride, an output inside a larger one."""
    inputs = make()
    repeated = Inputs(inputs.query[:, :1].expand(1, 2, 21, 16), *_parts(inputs))
    expected = truth(repeated)
    whole = torch.full((1, 21, 5, 40), 3.0)
    output, _ = attend(repeated, output=whole[:, :, 1:5:2, 4:36:2].transpose(1, 2))
    assert_close("output", output, expected.output, 2e-6)
    assert (whole[:, :, ::2] == 3.0).all()
    assert (whole[..., :4] == 3.0).all()
    assert (whole[..., 5::2] == 3.0).all()


def _parts(inputs):
    return inputs.key, inputs.value, inputs.options, inputs.gate, inputs.fill


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"gate": torch.tensor([[0.5, 0.0]])}, {"attn_mask": torch.rand(1, 1, 700, 700) > 0.3}],
    ids=["plain", "causal", "gate", "mask"],
)
def test_threads_do_not_change_a_bit(options, instruction_set, attend):
    inputs = make(queries=700, keys=700, **options)
    one, one_statistics = attend(inputs, threads=1)
    for threads in (2, 3):
        many, many_statistics = attend(inputs, threads=threads)
        assert torch.equal(one, many)
        assert all(torch.equal(one_statistics[name], many_statistics[name]) for name in FULL)


def forget_peak():
    """Earlier tests' largest memory no longer counts, where the system can do that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def test_memory_is_bounded(library, attend):
    """One thread works in less than 16 MiB, at any length and head dimension."""
    resource = pytest.importorskip("resource")
    for queries, keys, dim in ((4000, 9000, 40), (600, 600, 2000), (70, 70, cpu_structs.MAX_DIM)):
        inputs = make(queries=queries, keys=keys, heads=1, dim=dim)
        output = torch.zeros_like(inputs.query)
        forget_peak()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        attend(inputs, (), 1, output)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 16 * 1024, (queries, keys, dim)


def test_the_memory_of_groups_is_bounded(library):
    """Many statistics of many groups come in several passes, and are what each gives alone."""
    resource = pytest.importorskip("resource")
    torch.manual_seed(0)
    count, rows, keys = cpu_structs.MAX_GROUPS, 3, 40
    query, key, value = torch.randn(1, 1, rows, 8), torch.randn(1, 1, keys, 8), torch.randn(1, 1, keys, 8)
    ids = torch.randint(-1, count, (12, 1, 1, keys), dtype=torch.int32)
    specs = [("group_entropy" if i % 2 else "group_mass", (count,), (ids[i],)) for i in range(12)]
    specs[3:3] = ["entropy", "key_mass"]

    def call(statistics, threads=1):
        output = torch.full_like(query, math.nan)
        shapes = {"entropy": (1, 1, rows), "key_mass": (1, 1, keys)}
        values = [torch.full(shapes.get(str(spec), (1, 1, rows, count)), math.nan) for spec in statistics]
        forget_peak()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        cpu_library.attention_forward(
            query,
            key,
            value,
            attn_mask=None,
            is_causal=False,
            scale=1.0,
            statistics=statistics,
            output=output,
            statistic_outputs=values,
            threads=threads,
        )
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < threads * 16 * 1024
        return [output, *values]

    together = call(specs)
    assert all(torch.equal(a, b) for a, b in zip(together, call(specs, threads=2), strict=True))
    for i, spec in enumerate(specs):
        output, alone = call([spec])
        assert torch.equal(output, together[0])
        assert torch.equal(alone, together[1 + i])


FORK = """
import os, torch
from headscope.ops import cpu_library

def call():
    query = torch.ones(1, 4, 300, 16)
    output = torch.empty_like(query)
    cpu_library.attention_forward(
        query, query, query, attn_mask=None, is_causal=False, scale=1.0, gate=None, fill=None, statistics=(),
        output=output, statistic_outputs=[], threads=4)
    return output

torch.set_num_threads(4)
expected = call()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(call(), expected) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_runs(library):
    result = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stderr


def test_runs_while_others_do(attend):
    """The interpreter lock is released, and calls share nothing."""
    inputs = make(queries=300, keys=300)
    expected, _ = attend(inputs)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: attend(inputs)[0], range(16)))
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.ones(1, 2, 3, 16, dtype=torch.float64)}, "query: got dtype torch.float64"),
        ({"query": torch.ones(2, 3, 16)}, "query: got shape"),
        ({"query": torch.ones(1, 2, 21, 16, device="meta")}, "query: got a torch.strided tensor on meta"),
        ({"key": torch.ones(1, 2, 60, 15)}, "key: got shape"),
        ({"key": torch.ones(1, 2, 60, 16).half()}, "key: got dtype"),
        ({"value": torch.ones(1, 2, 59, 16)}, "value: got shape"),
        ({"query": torch.ones(1, 3, 21, 16)}, "key: got 2 heads"),
        ({"gate": torch.ones(1, 3)}, "gate: got shape"),
        ({"gate": torch.ones(1, 2).double()}, "gate: got dtype"),
        ({"fill": torch.ones(1, 2, 5, 16)}, "fill: got shape"),
        ({"fill": torch.ones(1, 2, 1, 16).int()}, "fill: got dtype"),
        ({"options": {"attn_mask": torch.ones(1, 1, 21, 61)}}, "attn_mask: got shape"),
        ({"options": {"attn_mask": torch.ones(1, 1, 21, 60).int()}}, "attn_mask: got dtype"),
        ({"query": torch.ones(1, 2, 3, 9000), "key": torch.ones(1, 2, 3, 9000)}, "head dims"),
    ],
)
def test_refuses_what_it_can_not_take(changes, message, attend):
    inputs = make()
    if changes.get("key") is not None and changes["key"].shape[2] == 3:
        changes = {**changes, "value": torch.ones(1, 2, 3, 16)}
    parts = {name: changes.get(name, getattr(inputs, name)) for name in ("query", "key", "value", "options")}
    parts |= {name: changes.get(name) for name in ("gate", "fill")}
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        attend(Inputs(**parts))


def test_refuses_unknown_statistics(attend):
    with pytest.raises(ValueError, match="got 'mean'"):
        attend(make(), ("mean",))
    with pytest.raises(ValueError, match="key_mass more than once"):
        attend(make(queries=60), ("key_mass", "key_mass"))
