"""What only a GPU can show: determinism, memory, graphs, compiled code, many heads, large tensors."""

import pytest
import torch

from headscope.ops import GroupMass, HeadEdit, attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DEVICE = "cuda"


def _normal(*shape: int, dtype: torch.dtype = torch.bfloat16, count: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(*shape, device=DEVICE, dtype=dtype) for _ in range(count)]


def _train_step(query, key, value, gate):
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value, gate)]
    result = attention(*leaves[:3], statistics=["entropy"], edit=HeadEdit(leaves[3]), backend="triton")
    total = result.output.float().square().sum() + result.statistics["entropy"].sum()
    return [result.output, result.statistics["entropy"], *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("dim", [40, 64, 128])
def test_twenty_runs_are_bitwise_equal(dim):
    query, key, value = _normal(2, 8, 1000, dim)
    gate = torch.rand(2, 8, device=DEVICE)
    first = _train_step(query, key, value, gate)
    for _ in range(20):
        for again, before in zip(_train_step(query, key, value, gate), first, strict=True):
            assert torch.equal(again, before)


def test_memory_is_linear_in_tokens():
    """At 16k tokens and 8 heads the matrix would be 4 GiB in 16 bits; forward and backward."""
    query, key, value = _normal(1, 8, 16384, 64)
    gate = torch.ones(1, 8, device=DEVICE)
    _train_step(query, key, value, gate)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = attention(query, key, value, statistics=["entropy"])
    outputs = result.output.nbytes + result.statistics["entropy"].nbytes
    assert torch.cuda.max_memory_allocated() - before <= outputs + 2**20
    del result
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _train_step(query, key, value, gate)
    # output, its float copy and square, attention, cotangents, three gradients, rows
    assert torch.cuda.max_memory_allocated() - before <= 24 * query.nbytes


def test_more_heads_than_a_grid_dimension_holds():
    query, key, value = _normal(70_000, 1, 4, 16, dtype=torch.float16)
    got = attention(query, key, value, backend="triton").output
    expected = attention(query, key, value, backend="portable").output
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


def test_addresses_past_two_to_the_31():
    """The last head of a tensor of 2^31 elements and more."""
    heads = 2**31 // (4096 * 64) + 2
    query = torch.zeros(1, heads, 4096, 64, device=DEVICE, dtype=torch.float16)
    query[:, -1] = torch.randn(4096, 64, device=DEVICE, dtype=torch.float16)
    gate = torch.zeros(1, heads, device=DEVICE)
    gate[:, -1] = 1
    last = attention(query, query, query, edit=HeadEdit(gate), backend="triton").output[:, -1:]
    alone = attention(*[query[:, -1:].contiguous()] * 3, backend="triton").output
    assert torch.equal(last, alone)


@pytest.mark.parametrize("dim", [40, 64])
def test_captured_in_a_graph(dim):
    """Replayed with other data: inputs, a gate and groups are read anew."""
    query, key, value = _normal(2, 8, 300, dim, dtype=torch.float16)
    gate = torch.ones(1, 8, device=DEVICE)
    groups = torch.randint(-1, 4, (300,), device=DEVICE)
    statistics = ["entropy", "key_mass", GroupMass(groups, 4)]
    attention(query, key, value, statistics=statistics, edit=HeadEdit(gate), backend="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention(query, key, value, statistics=statistics, edit=HeadEdit(gate), backend="triton")
    query.normal_()
    gate[0, 3] = 0
    graph.replay()
    expected = attention(query, key, value, statistics=statistics, edit=HeadEdit(gate), backend="triton")
    assert torch.equal(captured.output, expected.output)
    assert torch.equal(captured.output[:, 3], torch.zeros_like(captured.output[:, 3]))
    for name, value_ in expected.statistics.items():
        assert torch.equal(captured.statistics[name], value_), name


def test_backward_captured_in_a_graph():
    query, key, value = _normal(1, 8, 300, 64, dtype=torch.float16)
    gate = torch.ones(1, 8, device=DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _train_step(query, key, value, gate)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _train_step(query, key, value, gate)
    query.normal_()
    graph.replay()
    for got, expected in zip(captured, _train_step(query, key, value, gate), strict=True):
        assert torch.equal(got, expected)


def test_compiled_equals_eager():
    query, key, value = _normal(1, 10, 517, 64, dtype=torch.float16)
    gate = torch.rand(1, 10, device=DEVICE)
    compiled = torch.compile(_train_step)
    for got, expected in zip(compiled(query, key, value, gate), _train_step(query, key, value, gate), strict=True):
        torch.testing.assert_close(got, expected)


def test_nothing_waits_for_the_device():
    """No device value is read back on the way, forward or backward."""
    query, key, value = _normal(1, 8, 256, 64)
    gate = torch.rand(1, 8, device=DEVICE)
    _train_step(query, key, value, gate)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _train_step(query, key, value, gate)
    finally:
        torch.cuda.set_sync_debug_mode("default")
