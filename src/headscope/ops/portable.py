"""The portable backend: the formula over chunks of rows, on any device, with its gradients.

At most 32 MiB of score-sized tensors live at a time, whatever the length. Inside, everything is float32 (float64
for float64 inputs). The backward recomputes each chunk, so training needs no more memory than that either.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from headscope._shapes import Shaped
from headscope.ops.attend import attend
from headscope.ops.call import DIFFERENTIABLE, Call, Cotangents, Results
from headscope.ops.gradients import gradients

# attend() holds about four score-sized tensors at once: 4 x 8 MiB
CHUNK_BYTES = 8 * 2**20
# the tensors that have a row for each query (masks and fills may)
_ROWS = ("query", "attn_mask", "fill")


def forward(call: Call) -> Results:
    output, values = call.empty_output(), call.empty_statistics()
    statistics = call.restored_statistics()
    for statistic, value in zip(statistics, values, strict=True):
        if statistic.sums_over_queries:
            value.zero_()
    inside = call._replace(key=call.key.to(call.statistic_dtype), value=call.value.to(call.statistic_dtype))
    for samples, rows in _chunks(call):
        chunk_output, chunk_values = attend(_piece(inside, samples, rows), rows.start)
        output[samples, :, rows] = chunk_output
        for statistic, value, chunk in zip(statistics, values, chunk_values, strict=True):
            if statistic.sums_over_queries:
                value[samples] += chunk
            else:
                value[samples, :, rows] = chunk
    return output, values, []


def backward(call: Call, cotangents: Cotangents) -> dict[str, Tensor]:
    """Gradients of those of DIFFERENTIABLE that are needed."""
    dtype = call.statistic_dtype
    wanted = [name for name, need in zip(DIFFERENTIABLE, cotangents.needed, strict=True) if need]
    totals = {name: torch.zeros_like(getattr(call, name), dtype=dtype) for name in wanted}
    sums = [False, *(statistic.sums_over_queries for statistic in call.restored_statistics())]
    for samples, rows in _chunks(call):
        grads = [
            None if grad is None else (grad[samples] if summed else grad[samples, :, rows]).to(dtype)
            for grad, summed in zip((cotangents.output, *cotangents.statistics), sums, strict=True)
        ]
        found = gradients(_piece(call, samples, rows), rows.start, grads[0], grads[1:], wanted)
        for name, gradient in found.items():
            _part(totals[name], samples, rows if name in _ROWS else None).add_(gradient)
    return {name: total.to(getattr(call, name).dtype) for name, total in totals.items()}


def _chunks(call: Call) -> Iterator[tuple[slice, slice]]:
    """Slices of (batch, queries) whose scores fit in CHUNK_BYTES; one sample and one query row at the least."""
    batch, heads, queries = call.row_shape
    row_bytes = max(1, heads * call.key.shape[2] * call.statistic_dtype.itemsize)
    rows = max(1, CHUNK_BYTES // row_bytes)
    samples = max(1, rows // max(1, queries))
    for first in range(0, batch, samples):
        for start in range(0, queries, rows):
            yield slice(first, min(first + samples, batch)), slice(start, min(start + rows, queries))


def _piece(call: Call, samples: slice, rows: slice) -> Call:
    """The call of one chunk, everything in the dtype of the computation."""

    def cut(name: str) -> Tensor | None:
        tensor = getattr(call, name)
        if tensor is None:
            return None
        part = _part(tensor, samples, rows if name in _ROWS else None)
        return part if part.dtype == torch.bool else part.to(call.statistic_dtype)

    tensors = [_part(tensor, samples) for tensor in call.statistic_tensors]
    return call._replace(**{name: cut(name) for name in DIFFERENTIABLE}, statistic_tensors=tensors)


def _part(
    tensor: Shaped[Tensor, "_batch ..."], samples: slice, rows: slice | None = None
) -> Shaped[Tensor, "_batch ..."]:
    """The chunk's part of a tensor whose dimensions may be 1 where it broadcasts."""
    tensor = tensor[samples] if tensor.shape[0] > 1 else tensor
    return tensor[:, :, rows] if rows is not None and tensor.shape[2] > 1 else tensor
