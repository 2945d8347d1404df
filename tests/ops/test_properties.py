"""Any shapes, strides, masks and edits: every backend says what the reference says, forward and backward."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headscope.ops import Distance, GroupEntropy, GroupMass, HeadEdit, attention
from ops.backends import require_backend

# an interpreted kernel takes about 50 ms a call
EXAMPLES = {"portable": 60, "cpu": 100, "triton": 12}


def _strided(draw, *shape: int) -> Tensor:
    """Normal numbers [batch, heads, tokens, channels] in some memory layout."""
    layout = draw(st.sampled_from(["contiguous", "heads last", "sliced", "expanded", "transposed"]), label="layout")
    if layout == "heads last":
        return torch.randn(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)
    if layout == "sliced":
        return torch.randn(shape[0], shape[1], 2 * shape[2], shape[3] + 3)[:, :, ::2, 1 : shape[3] + 1]
    if layout == "expanded":
        return torch.randn(shape[0], 1, shape[2], shape[3]).expand(shape)
    if layout == "transposed":
        return torch.randn(*shape[:2], shape[3], shape[2]).transpose(2, 3)
    return torch.randn(shape)


def _maybe(draw, name: str, make):
    return make() if draw(st.booleans(), label=name) else None


def _part(draw, name: str, *full: int) -> Tensor:
    """Normal numbers of a shape that broadcasts to `full`."""
    return torch.randn([draw(st.sampled_from([1, size]), label=name) for size in full])


@st.composite
def calls(draw):
    """Tensors that gradients flow into, and how to call the operator with them."""
    batch, kv_heads, groups = (draw(st.integers(1, 2), label=name) for name in ("batch", "kv_heads", "groups"))
    queries, keys = draw(st.integers(1, 40), label="queries"), draw(st.integers(1, 40), label="keys")
    dim, dim_v = draw(st.integers(1, 40), label="dim"), draw(st.integers(1, 40), label="dim_v")
    torch.manual_seed(draw(st.integers(0, 999), label="seed"))
    heads = kv_heads * groups
    tensors: dict[str, Tensor | None] = {
        "query": _strided(draw, batch, heads, queries, dim),
        "key": _strided(draw, batch, kv_heads, keys, dim),
        "value": _strided(draw, batch, kv_heads, keys, dim_v),
        "gate": _maybe(draw, "gate", lambda: torch.randint(0, 3, (batch, heads)) / 2),
        "temperature": _maybe(draw, "temperature", lambda: torch.rand(1, heads) + 0.5),
        "key_bias": _maybe(draw, "key_bias", lambda: _part(draw, "bias", batch, heads, 1).expand(-1, -1, keys)),
        "key_scale": _maybe(draw, "key_scale", lambda: torch.randn(batch, 1, keys)),
    }
    kind = draw(st.sampled_from(["none", "causal", "bool", "additive"]), label="mask")
    options: dict = {"is_causal": kind == "causal", "enable_gqa": groups > 1}
    if kind in ("bool", "additive"):
        mask = _part(draw, "mask", batch, heads, queries, keys)
        if kind == "bool":
            options["attn_mask"] = mask > -0.7
        else:
            tensors["attn_mask"] = torch.where(mask > 1.5, -math.inf, mask)
    fill = None
    if tensors["gate"] is not None:
        kinds = [None, "uniform", "tensor", *(["identity"] if queries == keys else [])]
        fill = draw(st.sampled_from(kinds), label="fill")
        if fill == "tensor":
            tensors["fill"] = _part(draw, "fill", batch, heads, queries, dim_v)
    ids = torch.randint(-1, 3, (batch, keys))
    statistics = ["entropy", "logsumexp", "max_logit", "max_prob", "collision_entropy", "key_mass"]
    statistics += [Distance((1, queries), (1, keys)), GroupMass(ids, 3), GroupEntropy(ids, 3)]
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}, options, fill, statistics


def _run(backend: str, tensors: dict[str, Tensor], options: dict, fill, statistics) -> dict[str, Tensor]:
    """The output, the statistics and every gradient."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    edit = HeadEdit(
        leaves.get("gate"),
        leaves.get("fill", fill),  # type: ignore[arg-type]
        leaves.get("temperature"),
        leaves.get("key_bias"),
        leaves.get("key_scale"),
    )
    if "attn_mask" in leaves:
        options = {**options, "attn_mask": leaves["attn_mask"]}
    result = attention(
        leaves["query"], leaves["key"], leaves["value"], edit=edit, statistics=statistics, backend=backend, **options
    )
    found = {"output": result.output, **result.statistics}
    torch.manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for name in ("output", "entropy", "logsumexp", "group_mass"):
        values = found[name].double()
        weights = torch.randn(values.shape, dtype=torch.float64)
        finite = values.isfinite()
        total = total + (torch.where(finite, weights, 0) * torch.where(finite, values, 0)).sum()
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    gradients = {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
    return {**{name: value.detach() for name, value in found.items()}, **gradients}


@pytest.mark.parametrize("backend", EXAMPLES)
def test_any_call_equals_the_reference(backend: str):
    require_backend(backend)

    @settings(max_examples=EXAMPLES[backend], deadline=None)
    @given(call=calls())
    def check(call):
        expected, got = _run("reference", *call), _run(backend, *call)
        assert set(got) == set(expected)
        for name, value in expected.items():
            size = value[value.isfinite()].abs()
            # float32's rounding of sums over up to 40 keys and channels, relative to the largest entry
            bound = 1e-5 + 2e-5 * (float(size.max()) if size.numel() else 0.0)
            torch.testing.assert_close(
                got[name], value, rtol=0, atol=bound, msg=lambda text, name=name: f"{name}: {text}"
            )

    check()
