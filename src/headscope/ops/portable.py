"""The portable backend: the formula over chunks of rows, on any device, with its gradients.

At most 32 MiB of score-sized tensors live at a time, whatever the length. Inside, everything is float32 (float64
for float64 inputs). The backward recomputes each chunk, so training needs no more memory than that either.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from headscope.ops.attend import attend
from headscope.ops.schema import allocate, statistic_dtype

# attend() holds about four score-sized tensors at once: 4 x 8 MiB
CHUNK_BYTES = 8 * 2**20


def _chunks(query: Tensor, key: Tensor, element_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Slices of (batch, queries) whose scores fit in CHUNK_BYTES; one sample and one query row at the least."""
    batch, heads, queries, _ = query.shape
    row_bytes = max(1, heads * key.shape[2] * element_bytes)
    rows = max(1, CHUNK_BYTES // row_bytes)
    samples = max(1, rows // max(1, queries))
    for first in range(0, batch, samples):
        for start in range(0, queries, rows):
            yield slice(first, min(first + samples, batch)), slice(start, min(start + rows, queries))


def _part(tensor: Tensor | None, samples: slice, rows: slice | None = None) -> Tensor | None:
    """The chunk's part of a tensor whose dimensions may be 1 where it broadcasts."""
    if tensor is None:
        return None
    tensor = tensor[samples] if tensor.shape[0] > 1 else tensor
    if rows is not None and tensor.ndim == 4 and tensor.shape[2] > 1:
        tensor = tensor[:, :, rows]
    return tensor


def _inside(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == torch.bool else tensor.to(dtype)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    gate: Tensor | None,
    fill: Tensor | None,
    statistics: Sequence[str],
) -> tuple[Tensor, list[Tensor]]:
    output, values = allocate(query, value, statistics)
    dtype = statistic_dtype(query)
    key, value = key.to(dtype), value.to(dtype)
    for samples, rows in _chunks(query, key, dtype.itemsize):
        chunk_output, chunk_values = attend(
            query[samples, :, rows].to(dtype),
            key[samples],
            value[samples],
            _part(attn_mask, samples, rows),
            rows.start if is_causal else None,
            scale,
            _part(gate, samples),
            _part(fill, samples, rows),
            statistics,
        )
        output[samples, :, rows] = chunk_output
        for whole, chunk in zip(values, chunk_values, strict=True):
            whole[samples, :, rows] = chunk
    return output, values


def backward(
    grad_output: Tensor,
    grad_statistics: Sequence[Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    gate: Tensor | None,
    fill: Tensor | None,
    statistics: Sequence[str],
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of those of (query, key, value, attn_mask, gate, fill) that are `needed`, in that order."""
    dtype = statistic_dtype(query)
    tensors = (query, key, value, attn_mask, gate, fill)
    totals = [
        torch.zeros_like(tensor, dtype=dtype) if need and tensor is not None else None
        for tensor, need in zip(tensors, needed, strict=True)
    ]
    for samples, rows in _chunks(query, key, dtype.itemsize):
        parts = [
            _part(query, samples, rows),
            _part(key, samples),
            _part(value, samples),
            _part(attn_mask, samples, rows),
            _part(gate, samples),
            _part(fill, samples, rows),
        ]
        leaves = [_inside(part, dtype) for part in parts]
        leaves = [
            leaf if total is None or leaf is None else leaf.detach().requires_grad_()
            for leaf, total in zip(leaves, totals, strict=True)
        ]
        with torch.enable_grad():
            q, k, v, mask, chunk_gate, chunk_fill = leaves
            first_row = rows.start if is_causal else None
            outputs = attend(q, k, v, mask, first_row, scale, chunk_gate, chunk_fill, statistics)
            flat = [outputs[0], *outputs[1]]
            grads = [grad[samples, :, rows].to(dtype) for grad in (grad_output, *grad_statistics)]
            used = [(o, g) for o, g in zip(flat, grads, strict=True) if o.requires_grad]
            wanted = [leaf for leaf, total in zip(leaves, totals, strict=True) if total is not None]
            chunk_grads = iter(
                torch.autograd.grad([o for o, _ in used], wanted, [g for _, g in used], allow_unused=True)
            )
        for index, total in enumerate(totals):
            if total is None:
                continue
            chunk_grad = next(chunk_grads)
            if chunk_grad is not None:
                # only the query, and masks and fills of full length, are cut along the rows
                target = _part(total, samples, rows if index in (0, 3, 5) else None)
                assert target is not None
                target += chunk_grad
    return [
        total.to(tensor.dtype)
        for total, tensor in zip(totals, tensors, strict=True)
        if total is not None and tensor is not None
    ]
