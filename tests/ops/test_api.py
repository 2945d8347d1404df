"""The call itself: errors that name the argument, torch's semantics, registration, memory."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import headscope
from headscope.ops import Distance, GroupMass, HeadEdit, attention, scaled_dot_product_attention
from ops.backends import require_backend


def _qkv(*shape, dtype=torch.float32):
    return [torch.randn(*shape, dtype=dtype) for _ in range(3)]


QUERY, KEY, VALUE = _qkv(2, 3, 5, 8)

BAD_CALLS = {
    "not a tensor": (lambda: attention([1], KEY, VALUE), TypeError, "query: got list"),
    "three dimensions": (lambda: attention(QUERY[0], KEY, VALUE), ValueError, r"query: got shape \[3, 5, 8\]"),
    "integers": (lambda: attention(QUERY.int(), KEY, VALUE), TypeError, "query: got dtype torch.int32"),
    "mixed dtypes": (lambda: attention(QUERY, KEY.half(), VALUE), TypeError, "key: got dtype torch.float16"),
    "mixed devices": (lambda: attention(QUERY, KEY.to("meta"), VALUE), ValueError, "key: got device meta"),
    "dims differ": (lambda: attention(QUERY, KEY[..., :4], VALUE), ValueError, r"key: got shape \[2, 3, 5, 4\]"),
    "batches differ": (lambda: attention(QUERY, KEY[:1], VALUE[:1]), ValueError, "key: got shape"),
    "keys differ": (lambda: attention(QUERY, KEY, VALUE[:, :, :4]), ValueError, r"value: got shape \[2, 3, 4, 8\]"),
    "heads differ": (lambda: attention(QUERY, KEY[:, :1], VALUE[:, :1]), ValueError, "key: got 1 heads"),
    "not a divisor": (
        lambda: attention(QUERY, KEY[:, :2], VALUE[:, :2], enable_gqa=True),
        ValueError,
        "key: got 2 heads, expected a divisor",
    ),
    "mask shape": (
        lambda: attention(QUERY, KEY, VALUE, attn_mask=torch.ones(4, 5)),
        ValueError,
        r"attn_mask: got shape \[4, 5\], expected one broadcastable",
    ),
    "mask dtype": (
        lambda: attention(QUERY, KEY, VALUE, attn_mask=torch.ones(5, 5).int()),
        TypeError,
        "attn_mask: got dtype torch.int32",
    ),
    "mask and causal": (
        lambda: attention(QUERY, KEY, VALUE, attn_mask=torch.ones(5, 5), is_causal=True),
        ValueError,
        "attn_mask: got a mask together with is_causal",
    ),
    "scale": (lambda: attention(QUERY, KEY, VALUE, scale="1"), TypeError, "scale: got str"),
    "unknown statistic": (
        lambda: attention(QUERY, KEY, VALUE, statistics=["entropi"]),
        ValueError,
        r"statistics: got 'entropi', expected some of collision_entropy, entropy, .*, Distance\(...\), GroupEntropy",
    ),
    "statistic twice": (
        lambda: attention(QUERY, KEY, VALUE, statistics=["entropy"] * 2),
        ValueError,
        "asked for twice",
    ),
    "edit type": (lambda: attention(QUERY, KEY, VALUE, edit=torch.ones(1, 3)), TypeError, "edit: got Tensor"),
    "gate shape": (
        lambda: attention(QUERY, KEY, VALUE, edit=HeadEdit(torch.ones(3))),
        ValueError,
        r"edit.gate: got shape \[3\], expected \[2 or 1, 3\]",
    ),
    "gate dtype": (
        lambda: attention(QUERY, KEY, VALUE, edit=HeadEdit(torch.ones(1, 3, dtype=torch.bool))),
        TypeError,
        "edit.gate: got dtype torch.bool",
    ),
    "fill without gate": (lambda: attention(QUERY, KEY, VALUE, edit=HeadEdit(fill="uniform")), ValueError, "edit.fill"),
    "temperature shape": (
        lambda: attention(QUERY, KEY, VALUE, edit=HeadEdit(temperature=torch.ones(3))),
        ValueError,
        r"edit.temperature: got shape \[3\], expected \[2 or 1, 3\]",
    ),
    "key bias shape": (
        lambda: attention(QUERY, KEY, VALUE, edit=HeadEdit(key_bias=torch.ones(2, 5))),
        ValueError,
        r"edit.key_bias: got shape \[2, 5\], expected \[2 or 1, 3 or 1, 5\]",
    ),
    "key scale type": (
        lambda: attention(QUERY, KEY, VALUE, edit=HeadEdit(key_scale=[1.0])),  # type: ignore[arg-type]
        TypeError,
        "edit.key_scale: got list",
    ),
    "identity of a cross-attention": (
        lambda: attention(QUERY, KEY[:, :, :4], VALUE[:, :, :4], edit=HeadEdit(torch.ones(1, 3), "identity")),
        ValueError,
        'edit.fill: got "identity" with 5 queries and 4 keys',
    ),
    "statistic without its arguments": (
        lambda: attention(QUERY, KEY, VALUE, statistics="distance"),
        ValueError,
        r"statistics: 'distance' needs arguments, expected a Distance\(...\)",
    ),
    "statistic type": (
        lambda: attention(QUERY, KEY, VALUE, statistics=[3]),  # type: ignore[list-item]
        TypeError,
        "statistics: got an entry of type int",
    ),
    "no statistics": (
        lambda: attention(QUERY, KEY, VALUE, statistics=None),  # type: ignore[arg-type]
        TypeError,
        r"statistics: got None, expected names or Statistics; \(\) for none",
    ),
    "sparse query": (
        lambda: attention(QUERY.to_sparse(), KEY, VALUE),
        TypeError,
        "query: got a torch.sparse_coo tensor, expected a dense one",
    ),
    "sparse value": (
        lambda: scaled_dot_product_attention(QUERY[0], KEY[0], VALUE[0].to_sparse()),
        TypeError,
        "value: got a torch.sparse_coo tensor, expected a dense one",
    ),
    "nothing for a key": (
        lambda: scaled_dot_product_attention(QUERY, None, VALUE),  # type: ignore[arg-type]
        TypeError,
        "key: got NoneType, expected a torch.Tensor",
    ),
    "sparse mask": (
        lambda: attention(QUERY, KEY, VALUE, attn_mask=torch.ones(5, 5).to_sparse()),
        TypeError,
        "attn_mask: got a torch.sparse_coo tensor, expected a dense one",
    ),
    "sparse gate": (
        lambda: attention(QUERY, KEY, VALUE, edit=HeadEdit(torch.ones(1, 3).to_sparse())),
        TypeError,
        "edit.gate: got a torch.sparse_coo tensor, expected a dense one",
    ),
    "sparse groups": (
        lambda: GroupMass(torch.ones(5).int().to_sparse(), 2),
        TypeError,
        "groups: got a torch.sparse_coo tensor, expected a dense one",
    ),
    "complex groups": (
        lambda: GroupMass(torch.ones(5, dtype=torch.complex64), 2),
        TypeError,
        "groups: got torch.complex64, expected an integer tensor",
    ),
    "meta tensors in a kernel": (
        lambda: attention(*(tensor.to("meta") for tensor in (QUERY, KEY, VALUE)), backend="cpu"),
        RuntimeError,
        "the tensors are on meta, it needs CPU tensors",
    ),
    "a mask without numbers": (
        lambda: attention(QUERY, KEY, VALUE, attn_mask=torch.ones(5, 5, device="meta")),
        ValueError,
        "attn_mask: got device meta, expected query's cpu",
    ),
    "grid": (lambda: Distance((0, 5)), ValueError, r"grid: got \(0, 5\), expected \(height, width\)"),
    "grid of another size": (
        lambda: attention(QUERY, KEY, VALUE, statistics=Distance((2, 3))),
        ValueError,
        r"distance: grid \(2, 3\) has 6 tokens, the call has 5",
    ),
    "groups type": (lambda: GroupMass(torch.ones(5), 2), TypeError, "groups: got torch.float32, expected an integer"),
    "groups shape": (lambda: GroupMass(torch.ones(1, 1, 5).int(), 2), ValueError, r"groups: got shape \[1, 1, 5\]"),
    "group count": (lambda: GroupMass(torch.ones(5).int(), 0), ValueError, "count: got 0, expected the number"),
    "groups of other keys": (
        lambda: attention(QUERY, KEY, VALUE, statistics=GroupMass(torch.zeros(4).int(), 2)),
        ValueError,
        "'group_mass' has groups for 4 keys, expected 5",
    ),
    "groups of another batch": (
        lambda: attention(QUERY, KEY, VALUE, statistics=GroupMass(torch.zeros(3, 5).int(), 2)),
        ValueError,
        r"'group_mass' has a tensor of shape \[3, 1, 5\], expected \[2 or 1, 3 or 1, length\]",
    ),
    "fill name": (
        lambda: attention(QUERY, KEY, VALUE, edit=HeadEdit(torch.ones(1, 3), "average")),
        ValueError,
        "edit.fill: got 'average'",
    ),
    "fill shape": (
        lambda: attention(QUERY, KEY, VALUE, edit=HeadEdit(torch.ones(1, 3), torch.ones(7))),
        ValueError,
        r"edit.fill: got shape \[7\]",
    ),
    "unknown backend": (lambda: attention(QUERY, KEY, VALUE, backend="cuda"), ValueError, "backend: got 'cuda'"),
    "float64 in a fused kernel": (
        lambda: attention(*_qkv(1, 1, 2, 8, dtype=torch.float64), backend="triton"),
        RuntimeError,
        "float64",
    ),
    "dropout": (
        lambda: scaled_dot_product_attention(QUERY, KEY, VALUE, dropout_p=0.1),
        ValueError,
        "dropout_p: got 0.1, expected 0",
    ),
    "head out of range": (lambda: HeadEdit.remove([3], of=3), ValueError, "heads: got 3, expected indices from 0 to 2"),
}


@pytest.mark.parametrize("call", BAD_CALLS, ids=str)
def test_bad_input_gets_one_clear_error(call):
    run, error, message = BAD_CALLS[call]
    with pytest.raises(error, match=message):
        run()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_same_semantics_as_torch(data):
    """Leading dimensions, masks, causal with unequal lengths, scale and grouped heads, side by side."""
    draw = data.draw
    lead = tuple(draw(st.lists(st.integers(1, 3), max_size=3), label="lead"))
    queries, keys = draw(st.integers(1, 9), label="queries"), draw(st.integers(1, 9), label="keys")
    dim, dim_v = draw(st.integers(1, 9), label="dim"), draw(st.integers(1, 9), label="dim_v")
    groups = draw(st.integers(1, 3), label="groups") if lead else 1
    torch.manual_seed(draw(st.integers(0, 999), label="seed"))
    heads = (*lead[:-1], lead[-1] * groups) if lead else ()
    query, key = torch.randn(*heads, queries, dim), torch.randn(*lead, keys, dim)
    value = torch.randn(*lead, keys, dim_v)
    kind = draw(st.sampled_from(["none", "causal", "bool", "additive"]), label="mask")
    options: dict = {"scale": draw(st.sampled_from([None, 0.3]), label="scale"), "enable_gqa": groups > 1}
    if kind == "causal":
        options["is_causal"] = True
    elif kind != "none":
        mask_lead = draw(st.sampled_from([(), heads]), label="mask lead")
        mask = torch.randn(*mask_lead, queries, keys)
        options["attn_mask"] = mask > -0.5 if kind == "bool" else mask
    expected = functional.scaled_dot_product_attention(query, key, value, **options)
    for backend in (None, "portable", "reference"):
        got = scaled_dot_product_attention(query, key, value, backend=backend, **options)
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_no_key_rows_are_zero_as_in_torch():
    mask = torch.zeros(5, 5, dtype=torch.bool)
    assert torch.equal(attention(QUERY, KEY, VALUE, attn_mask=mask).output, torch.zeros_like(QUERY))


@pytest.mark.parametrize("backend", ["portable", "cpu", "triton"])
def test_opcheck(backend):
    require_backend(backend)
    operator = getattr(torch.ops.headscope, f"{backend}_attention").default
    gate, fill = torch.tensor([[0.0, 1.0, 0.5]]), torch.randn(1, 3, 5, 8)
    groups = torch.tensor([[[0, 1, -1, 1, 0]]], dtype=torch.int32)
    temperature, key_bias, key_scale = torch.rand(2, 3) + 0.5, torch.randn(1, 1, 5), torch.randn(2, 3, 5)
    layout = QUERY.transpose(1, 2).contiguous().transpose(1, 2)
    edited = (gate, fill, temperature, key_bias, key_scale)
    for query in (QUERY, layout):
        asked = (["entropy", "max_prob", "key_mass", "group_mass(2,)"], [groups])
        torch.library.opcheck(operator, (query, KEY, VALUE, None, False, 0.3, *edited, *asked, False))
    leaves = [tensor.clone().requires_grad_() for tensor in (QUERY, KEY, VALUE)]
    for edit in (edited, (None,) * 5):
        arguments = (*leaves, None, True, 0.3, *edit, ["entropy", "max_prob"], [], True)
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("backend", ["reference", "portable", "cpu", "triton"])
def test_compiles_without_graph_breaks(backend):
    """Forward and backward, every kind of argument, one graph."""
    require_backend(backend)
    groups = torch.tensor([0, 1, -1, 1, 0])

    def run(query, key, value, gate, temperature):
        result = attention(
            query,
            key,
            value,
            edit=HeadEdit(gate, "uniform", temperature),
            statistics=["entropy", Distance((1, 5)), GroupMass(groups, 2)],
            backend=backend,
        )
        return result.output, *result.statistics.values()

    tensors = [tensor.clone().requires_grad_() for tensor in (QUERY, KEY, VALUE)]
    tensors += [torch.tensor([[1.0, 0.0, 0.5]], requires_grad=True), torch.rand(2, 3, requires_grad=True)]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, expected = compiled(*tensors), run(*tensors)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
    flowing = (0, 1, 3)
    grads = [torch.autograd.grad(sum(x[i].sum() for i in flowing), tensors) for x in (got, expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["portable", "cpu", "triton"])
def test_compiled_once_for_all_lengths(backend):
    require_backend(backend)
    counter = CompileCounterWithBackend("aot_eager")

    def run(query):
        result = attention(query, query, query, statistics=["entropy", "key_mass"], backend=backend)
        return result.output, result.statistics["entropy"], result.statistics["key_mass"]

    compiled = torch.compile(run, fullgraph=True, backend=counter, dynamic=True)
    for length in (5, 9, 33, 40):
        query = torch.randn(2, 3, length, 8)
        for got, expected in zip(compiled(query), run(query), strict=True):
            torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["reference", "portable", "cpu", "triton"])
def test_exports(backend):
    require_backend(backend)

    class Module(torch.nn.Module):
        def forward(self, query):
            result = attention(query, query, query, statistics=["entropy"], backend=backend)
            return result.output, result.statistics["entropy"]

    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(Module(), (QUERY,), dynamic_shapes={"query": {2: tokens}})
    longer = torch.randn(2, 3, 17, 8)
    for got, expected in zip(program.module()(longer), Module()(longer), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", ["portable", "cpu", "triton"])
def test_vmap_is_an_error_that_says_what_to_do(backend):
    require_backend(backend)
    with pytest.raises(RuntimeError, match="vmap isn't supported; put the mapped dimension into the batch"):
        torch.vmap(lambda query: attention(query, KEY, VALUE, backend=backend).output)(QUERY.expand(3, 2, 3, 5, 8))


def test_autocast_casts_query_key_and_value():
    with torch.autocast("cpu", torch.bfloat16):
        result = attention(QUERY, KEY, VALUE, statistics=["entropy"])
    assert result.output.dtype == torch.bfloat16
    assert result.statistics["entropy"].dtype == torch.float32


def test_import_is_light():
    """`import headscope` brings neither torch, Triton nor diffusers."""
    code = "import sys, headscope; print([m for m in ('torch', 'triton', 'diffusers', 'scipy') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


MEMORY = """
import resource, sys, torch, headscope
query, key, value = (torch.randn(1, 8, 4096, 40) for _ in range(3))
small = [tensor[:, :, :64] for tensor in (query, key, value)]
options = {"statistics": ["entropy", "logsumexp", "max_logit", "max_prob"], "backend": sys.argv[1]}
headscope.attention(*small, **options)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = headscope.attention(query, key, value, **options)
outputs = sum(tensor.nbytes for tensor in (result.output, *result.statistics.values()))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 - outputs)
"""


@pytest.mark.parametrize("backend", ["portable", "cpu"])
def test_peak_memory_at_4096_tokens(backend):
    """Under 64 MiB beyond inputs and outputs, where the matrix would be 512 MiB; in a process of its own."""
    if headscope.backend_status()[backend]:
        pytest.skip(headscope.backend_status()[backend] or "")
    run = subprocess.run([sys.executable, "-c", MEMORY, backend], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 64 * 2**20


@pytest.mark.parametrize("threads", [1, 2])
def test_no_queries_of_grouped_heads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        key = torch.randn(2, 8, 5, 64)
        output = scaled_dot_product_attention(torch.randn(2, 32, 0, 64), key, key, enable_gqa=True)
    finally:
        torch.set_num_threads(before)
    assert output.shape == (2, 32, 0, 64)


def test_what_the_cpu_kernel_has_no_room_for_is_served_all_the_same():
    """Without a choice of backend the fastest one that serves all of it."""
    from headscope.ops.statistics import Entropy, KeyMass

    def entropies(count):
        return [Entropy(name=f"entropy_{index}") for index in range(count)]

    assert len(attention(QUERY, KEY, VALUE, statistics=entropies(33)).statistics) == 33
    masses = attention(QUERY, KEY, VALUE, statistics=["key_mass", KeyMass(name="again")]).statistics
    assert torch.equal(masses["key_mass"], masses["again"])
    with pytest.raises(RuntimeError, match="33 statistics are asked for, it takes 32"):
        attention(QUERY, KEY, VALUE, statistics=entropies(33), backend="cpu")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_group_ids(dtype):
    ids = torch.tensor([0, 1, 1, 3, 2])
    found, expected = (
        attention(QUERY, KEY, VALUE, statistics=GroupMass(groups, 4)).statistics["group_mass"]
        for groups in (ids.to(dtype), ids)
    )
    assert torch.equal(found, expected)
    largest = torch.full((5,), -1).to(dtype)
    assert not attention(QUERY, KEY, VALUE, statistics=GroupMass(largest, 4)).statistics["group_mass"].any()


def test_meta_tensors_give_shapes():
    query, key, value = (tensor.to("meta") for tensor in (QUERY, KEY, VALUE))
    groups = GroupMass(torch.zeros(5, dtype=torch.int64, device="meta"), 3)
    found = attention(query, key, value, statistics=("entropy", groups))
    assert found.output.is_meta
    assert found.output.shape == (2, 3, 5, 8)
    assert {name: tensor.shape for name, tensor in found.statistics.items()} == {
        "entropy": (2, 3, 5),
        "group_mass": (2, 3, 5, 3),
    }


def test_group_ids_that_no_int32_holds_are_in_no_group():
    groups = torch.full((5,), 2**32)
    assert not attention(QUERY, KEY, VALUE, statistics=GroupMass(groups, 2)).statistics["group_mass"].any()


@pytest.mark.parametrize("backend", ["reference", "portable", "cpu", "triton"])
def test_rows_of_the_lowest_float64_are_uniform(backend):
    require_backend(backend)
    mask = torch.full((5, 5), torch.finfo(torch.float64).min, dtype=torch.float64)
    entropy = attention(QUERY, KEY, VALUE, attn_mask=mask, statistics="entropy", backend=backend).statistics["entropy"]
    torch.testing.assert_close(entropy, torch.full((2, 3, 5), 5.0).log())


@pytest.mark.parametrize("backend", ["portable", "cpu", "triton"])
def test_a_scale_of_nan_is_nan_everywhere(backend):
    require_backend(backend)
    assert attention(QUERY, KEY, VALUE, scale=float("nan"), backend=backend).output.isnan().all()
