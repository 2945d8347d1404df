"""The call itself: errors that name the argument, torch's semantics, registration, memory."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st

import headscope
from headscope.ops import HeadEdit, attention, scaled_dot_product_attention


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
        "statistics: got 'entropi', expected some of entropy, logsumexp",
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
    if headscope.backend_status()[backend]:
        pytest.skip(headscope.backend_status()[backend] or "")
    operator = getattr(torch.ops.headscope, f"{backend}_attention").default
    gate, fill = torch.tensor([[0.0, 1.0, 0.5]]), torch.randn(1, 3, 5, 8)
    layout = QUERY.transpose(1, 2).contiguous().transpose(1, 2)
    for query in (QUERY, layout):
        args = (query, KEY, VALUE, None, False, 0.3, gate, fill, ["entropy", "max_prob"])
        torch.library.opcheck(operator, args)
    if backend == "portable":
        leaves = [tensor.clone().requires_grad_() for tensor in (QUERY, KEY, VALUE)]
        torch.library.opcheck(operator, (*leaves, None, True, 0.3, gate, fill, ["entropy", "max_prob"]))


def test_compiles_without_graph_breaks():
    def run(query, key, value, gate):
        result = attention(query, key, value, edit=HeadEdit(gate), statistics=["entropy"])
        return result.output, result.statistics["entropy"]

    gate = torch.tensor([[1.0, 0.0, 0.5]])
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(QUERY, KEY, VALUE, gate), run(QUERY, KEY, VALUE, gate), strict=True):
        torch.testing.assert_close(got, expected)


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
