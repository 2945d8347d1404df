"""Registration with torch.library: one schema for every backend, fakes that agree on strides, gradients.

Operators are named headscope::{backend}_attention. Implementations are imported when first called, so that
registering costs nothing and Triton is only touched by whoever uses it.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, float scale,"
    " Tensor? gate, Tensor? fill, str[] statistics) -> (Tensor, Tensor[])"
)
BACKWARD_SCHEMA = (
    "(Tensor grad_output, Tensor[] grad_statistics, Tensor query, Tensor key, Tensor value, Tensor? attn_mask,"
    " bool is_causal, float scale, Tensor? gate, Tensor? fill, str[] statistics, bool[] needed) -> Tensor[]"
)


def statistic_dtype(query: Tensor) -> torch.dtype:
    """Statistics are float32, and float64 for float64 inputs."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def empty_output(query: Tensor, value: Tensor) -> Tensor:
    """An empty [batch, heads, queries, dim_v] in query's dtype and stride order, as torch's SDPA gives it.

    The order keeps `transpose(1, 2).reshape(...)` a view where the query came from the inverse of it.
    """
    order = sorted(range(4), key=lambda dimension: query.stride(dimension), reverse=True)
    return torch.empty_permuted((*query.shape[:3], value.shape[3]), order, dtype=query.dtype, device=query.device)


def allocate(query: Tensor, value: Tensor, statistics: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
    """Uninitialised output [batch, heads, queries, dim_v] and one [batch, heads, queries] tensor per statistic."""
    rows = [query.new_empty(query.shape[:3], dtype=statistic_dtype(query)) for _ in statistics]
    return empty_output(query, value), rows


def _fake(query, key, value, attn_mask, is_causal, scale, gate, fill, statistics):
    return allocate(query, value, statistics)


def _backward_fake(
    grad_output, grad_statistics, query, key, value, attn_mask, is_causal, scale, gate, fill, statistics, needed
):
    tensors = (query, key, value, attn_mask, gate, fill)
    return [
        torch.empty_like(tensor) for tensor, need in zip(tensors, needed, strict=True) if need and tensor is not None
    ]


def _implementation(backend: str, function: str) -> Callable[..., Any]:
    def call(*args):
        return getattr(importlib.import_module(f"headscope.ops.{backend}"), function)(*args)

    return call


def _setup_context(ctx, inputs, output) -> None:
    from headscope.ops.statistics import STATISTICS

    query, key, value, attn_mask, is_causal, scale, gate, fill, statistics = inputs
    ctx.save_for_backward(query, key, value, attn_mask, gate, fill)
    ctx.options = (is_causal, scale, statistics)
    fixed = [rows for name, rows in zip(statistics, output[1], strict=True) if not STATISTICS[name].differentiable]
    ctx.mark_non_differentiable(*fixed)
    ctx.row_shape = query.shape[:3]


def _portable_backward(ctx, grad_output: Tensor, grad_statistics: Sequence[Tensor | None]):
    query, key, value, attn_mask, gate, fill = ctx.saved_tensors
    is_causal, scale, statistics = ctx.options
    grads = [
        query.new_zeros(ctx.row_shape, dtype=statistic_dtype(query)) if grad is None else grad
        for grad in grad_statistics
    ]
    needs = ctx.needs_input_grad
    needed = [bool(needs[index]) for index in (0, 1, 2, 3, 6, 7)]
    found = iter(
        torch.ops.headscope.portable_attention_backward(
            grad_output, grads, query, key, value, attn_mask, is_causal, scale, gate, fill, statistics, needed
        )
    )
    query_grad, key_grad, value_grad, mask_grad, gate_grad, fill_grad = (
        next(found) if need else None for need in needed
    )
    # torch takes an empty str[] for an empty Tensor[], and wants its structure back
    names_grad = None if statistics else []
    return query_grad, key_grad, value_grad, mask_grad, None, None, gate_grad, fill_grad, names_grad


LIBRARY = torch.library.Library("headscope", "DEF")

# plain torch throughout: autograd, fakes and compilation see through it
LIBRARY.define(f"reference_attention{SCHEMA}")
LIBRARY.impl("reference_attention", _implementation("reference", "forward"), "CompositeImplicitAutograd")

for _backend in ("portable", "cpu", "triton"):
    LIBRARY.define(f"{_backend}_attention{SCHEMA}")
    LIBRARY.impl(f"{_backend}_attention", _implementation(_backend, "forward"), "CompositeExplicitAutograd")
    torch.library.register_fake(f"headscope::{_backend}_attention", _fake, lib=LIBRARY)

LIBRARY.define(f"portable_attention_backward{BACKWARD_SCHEMA}")
LIBRARY.impl("portable_attention_backward", _implementation("portable", "backward"), "CompositeExplicitAutograd")
torch.library.register_fake("headscope::portable_attention_backward", _backward_fake, lib=LIBRARY)
torch.library.register_autograd(
    "headscope::portable_attention", _portable_backward, setup_context=_setup_context, lib=LIBRARY
)


def default_scale(dim: int) -> float:
    """1 / sqrt(dim), torch's default."""
    return 1.0 / math.sqrt(dim) if dim else 1.0
