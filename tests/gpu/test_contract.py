"""The numeric contract on a GPU, and what only a GPU can show. Run with `pytest -m gpu`."""

import dataclasses

import pytest
import torch

from contract import CASES, Inputs, assert_close, make_inputs, output_tolerance, statistic_tolerance, truth
from headscope.ops import STATISTICS, HeadEdit, attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DEVICE = "cuda"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# tiles of the real configurations have to be filled, and overrun
LARGE = [
    dataclasses.replace(CASES[0], name="self_attention_1000_40", shape=(2, 8, 8, 1000, 1000, 40, 40)),
    dataclasses.replace(CASES[0], name="self_attention_517_64", shape=(1, 10, 10, 517, 517, 64, 64)),
    dataclasses.replace(CASES[0], name="self_attention_333_80", shape=(2, 8, 8, 333, 333, 80, 80)),
    dataclasses.replace(CASES[0], name="self_attention_300_128", shape=(1, 24, 24, 300, 300, 128, 128)),
    dataclasses.replace(CASES[0], name="self_attention_257_160", shape=(1, 8, 8, 257, 257, 160, 160)),
    dataclasses.replace(CASES[0], name="cross_attention_1000_77", shape=(2, 10, 10, 1000, 77, 64, 64)),
    dataclasses.replace(CASES[0], name="causal_700", shape=(1, 4, 4, 700, 700, 64, 64), is_causal=True),
]


def on_device(inputs: Inputs) -> tuple[tuple[torch.Tensor, ...], dict, HeadEdit | None]:
    options = {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in inputs.options.items()
    }
    edit = None
    if inputs.gate is not None:
        fill = inputs.fill.to(DEVICE) if isinstance(inputs.fill, torch.Tensor) else inputs.fill
        edit = HeadEdit(inputs.gate.to(DEVICE), fill)
    return tuple(tensor.to(DEVICE) for tensor in (inputs.query, inputs.key, inputs.value)), options, edit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=lambda case: case.name)
@pytest.mark.parametrize("backend", ["triton", "portable"])
def test_contract(backend, case, dtype):
    inputs = make_inputs(case, DTYPES[dtype])
    expected = truth(inputs)
    tensors, options, edit = on_device(inputs)
    result = attention(*tensors, edit=edit, statistics=list(STATISTICS), backend=backend, **options)
    assert_close("output", result.output.cpu(), expected.output, output_tolerance(inputs, expected))
    for name, rows in result.statistics.items():
        assert_close(name, rows.cpu(), expected.statistics[name], statistic_tolerance(expected))


def test_twenty_runs_are_bitwise_equal():
    tensors, options, _ = on_device(make_inputs(LARGE[0], torch.bfloat16))
    first = attention(*tensors, statistics=["entropy"], backend="triton", **options)
    for _ in range(20):
        again = attention(*tensors, statistics=["entropy"], backend="triton", **options)
        assert torch.equal(again.output, first.output)
        assert torch.equal(again.statistics["entropy"], first.statistics["entropy"])


def test_memory_is_linear_in_tokens():
    """At 16k tokens and 8 heads the matrix would be 4 GiB in 16 bits."""
    query, key, value = (torch.randn(1, 8, 16384, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    attention(query, key, value, statistics=["entropy"])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = attention(query, key, value, statistics=["entropy"])
    outputs = result.output.nbytes + result.statistics["entropy"].nbytes
    assert torch.cuda.max_memory_allocated() - before <= outputs + 2**20


def test_more_heads_than_a_grid_dimension_holds():
    query, key, value = (torch.randn(70_000, 1, 4, 16, device=DEVICE, dtype=torch.float16) for _ in range(3))
    got = attention(query, key, value, backend="triton").output
    expected = attention(query, key, value, backend="portable").output
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


def test_captured_in_a_graph():
    tensors, options, _ = on_device(make_inputs(LARGE[0], torch.float16))
    gate = torch.ones(1, 8, device=DEVICE)
    expected = attention(*tensors, statistics=["entropy"], edit=HeadEdit(gate), **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention(*tensors, statistics=["entropy"], edit=HeadEdit(gate), **options)
    graph.replay()
    assert torch.equal(captured.output, expected.output)
    gate[0, 3] = 0
    graph.replay()
    assert torch.equal(captured.output[:, 3], torch.zeros_like(captured.output[:, 3]))


def test_compiled_equals_eager():
    tensors, _, _ = on_device(make_inputs(LARGE[1], torch.float16))
    compiled = torch.compile(lambda *qkv: attention(*qkv, statistics=["entropy"]), fullgraph=True)
    got, expected = compiled(*tensors), attention(*tensors, statistics=["entropy"])
    assert torch.equal(got.output, expected.output)
    assert torch.equal(got.statistics["entropy"], expected.statistics["entropy"])
