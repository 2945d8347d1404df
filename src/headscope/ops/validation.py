"""Checks of the operator's arguments. Each error names the argument, what came and what was expected."""

import torch
from torch import Tensor

from headscope._shapes import Bool, Float, Shaped
from headscope.ops.edits import HeadEdit

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shape_of(tensor: Tensor) -> str:
    return f"[{', '.join(str(size) for size in tensor.shape)}]"


def require_tensor(name: str, value: object) -> None:
    """Raises TypeError unless it is a dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    if value.layout is not torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else value.layout
        raise TypeError(f"{name}: got a {kind} tensor, expected a dense one")


def check_inputs(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys dim_v"],
    enable_gqa: bool,
) -> None:
    """Check query, key and value against each other.

    Raises:
        TypeError: not a tensor, or a dtype that isn't floating or differs from query's.
        ValueError: shapes or devices that don't fit.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_tensor(name, tensor)
        if tensor.ndim != 4:
            raise ValueError(
                f"{name}: got shape {shape_of(tensor)}, expected 4 dimensions [batch, heads, tokens, dim]"
                " (headscope.scaled_dot_product_attention takes any number of leading ones)"
            )
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, expected float32, bfloat16, float16 or float64")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, expected query's {query.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected query's {query.device}")
    batch, heads, _, dim = query.shape
    kv_heads = key.shape[1]
    if key.shape[0] != batch or key.shape[3] != dim:
        raise ValueError(f"key: got shape {shape_of(key)}, expected [{batch}, kv_heads, keys, {dim}] as query's")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value: got shape {shape_of(value)}, expected [{batch}, {kv_heads}, {key.shape[2]}, dim_v] as key's"
        )
    if kv_heads != heads and not enable_gqa:
        raise ValueError(f"key: got {kv_heads} heads, expected query's {heads} (enable_gqa=True shares key heads)")
    if heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"key: got {kv_heads} heads, expected a divisor of query's {heads}")


def check_mask(
    attn_mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | None,
    is_causal: bool,
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
) -> None:
    """Each of the mask's dimensions is 1 or that of [batch, heads, queries, keys], leading ones may be missing.

    Raises:
        TypeError: not a tensor, or neither bool nor floating.
        ValueError: a shape that doesn't broadcast, another device, or a mask together with is_causal.
    """
    if attn_mask is None:
        return
    require_tensor("attn_mask", attn_mask)
    if is_causal:
        raise ValueError("attn_mask: got a mask together with is_causal=True, expected one of them")
    if attn_mask.dtype != torch.bool and attn_mask.dtype not in FLOATING:
        raise TypeError(f"attn_mask: got dtype {attn_mask.dtype}, expected bool or a floating dtype")
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask: got device {attn_mask.device}, expected query's {query.device}")
    full = (*query.shape[:3], key.shape[2])
    padded = four_dimensional(attn_mask)
    if padded.ndim != 4 or any(size not in (1, whole) for size, whole in zip(padded.shape, full, strict=True)):
        raise ValueError(
            f"attn_mask: got shape {shape_of(attn_mask)}, expected one broadcastable to"
            f" [batch, heads, queries, keys] = {list(full)}"
        )


def four_dimensional(tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """The tensor, with leading dimensions of 1 where it has fewer than four."""
    return tensor[(None,) * (4 - tensor.ndim)] if tensor.ndim < 4 else tensor


def check_scale(scale: float | None, default: float) -> float:
    if scale is None:
        return default
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: got {type(scale).__name__}, expected a float or None (1 / sqrt(dim))")
    return float(scale)


def check_edit(
    edit: HeadEdit | None,
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys dim_v"],
) -> None:
    """Check an edit's tensors against query, key and value.

    Raises:
        TypeError: an edit, or a tensor of it, of another type, or not floating.
        ValueError: a tensor of another shape or device, a fill without a gate, or "identity" where keys aren't queries.
    """
    if edit is None:
        return
    if not isinstance(edit, HeadEdit):
        raise TypeError(f"edit: got {type(edit).__name__}, expected a headscope.HeadEdit or None")
    batch, heads, queries = query.shape[:3]
    keys = key.shape[2]
    for name in ("gate", "temperature"):
        tensor = getattr(edit, name)
        if tensor is not None:
            _check_part(f"edit.{name}", tensor, (batch, heads), (0,), query)
    for name in ("key_bias", "key_scale"):
        tensor = getattr(edit, name)
        if tensor is not None:
            _check_part(f"edit.{name}", tensor, (batch, heads, keys), (0, 1), query)
    fill = edit.fill
    if fill is None:
        return
    if edit.gate is None:
        raise ValueError("edit.fill: got a fill without a gate, expected edit.gate to say which heads it fills")
    if isinstance(fill, str):
        if fill not in ("uniform", "identity"):
            raise ValueError(f'edit.fill: got {fill!r}, expected None, "uniform", "identity" or a tensor')
        if fill == "identity" and keys != queries:
            raise ValueError(
                f'edit.fill: got "identity" with {queries} queries and {keys} keys, expected as many (self-attention)'
            )
        return
    if not isinstance(fill, Tensor):
        raise TypeError(f'edit.fill: got {type(fill).__name__}, expected None, "uniform", "identity" or a torch.Tensor')
    full = (batch, heads, queries, value.shape[3])
    if fill.ndim > 4:
        raise ValueError(f"edit.fill: got shape {shape_of(fill)}, expected at most 4 dimensions")
    _check_part("edit.fill", four_dimensional(fill), full, (0, 1, 2, 3), query, shown=fill)


def _check_part(
    name: str,
    tensor: object,
    full: tuple[int, ...],
    repeating: tuple[int, ...],
    query: Tensor,
    *,
    shown: Tensor | None = None,
) -> None:
    """A floating tensor of the full shape, on query's device; dimensions in `repeating` may be 1 instead."""
    require_tensor(name, tensor)
    assert isinstance(tensor, Tensor)
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected float32, bfloat16, float16 or float64")
    sizes = list(tensor.shape)
    fits = len(sizes) == len(full) and all(
        size == whole or (size == 1 and index in repeating)
        for index, (size, whole) in enumerate(zip(sizes, full, strict=True))
    )
    if not fits:
        expected = ", ".join(f"{whole} or 1" if index in repeating else str(whole) for index, whole in enumerate(full))
        raise ValueError(f"{name}: got shape {shape_of(tensor if shown is None else shown)}, expected [{expected}]")
    if tensor.device != query.device:
        raise ValueError(f"{name}: got device {tensor.device}, expected query's {query.device}")
