"""The triton backend: the fused GPU kernels of headscope_kernels, forward and backward."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headscope._shapes import StatisticValue
from headscope.ops.call import DIFFERENTIABLE, Call, Cotangents, Results, row_constants
from headscope.ops.statistics import Statistic
from headscope_kernels.attention import BoundStatistic, attention_backward, attention_forward, attention_key_mass


def forward(call: Call) -> Results:
    statistics = call.restored_statistics()
    output, values, saved = call.empty_output(), call.empty_statistics(statistics), call.empty_saved()
    entries = list(zip(statistics, values, strict=True))
    second_pass = [value for statistic, value in entries if statistic.sums_over_queries]
    row_max, log2_sum = saved[:2] if saved else (None, None)
    if second_pass and row_max is None:
        row_max, log2_sum = call.empty_rows(), call.empty_rows()
    common = {
        "attn_mask": call.attn_mask,
        "is_causal": call.is_causal,
        "scale": call.scale,
        "temperature": call.temperature,
        "key_bias": call.key_bias,
    }
    first, later = _passes([entry for entry in entries if not entry[0].sums_over_queries])
    attention_forward(
        call.query,
        call.key,
        call.value,
        **common,
        gate=call.gate,
        fill=call.fill,
        key_scale=call.key_scale,
        statistics=[job.bound for job in first],
        statistic_outputs=[job.buffer for job in first],
        output=output,
        attention=saved[2] if len(saved) > 2 else None,
        row_max=row_max,
        log2_sum=log2_sum,
    )
    for job in later:
        attention_forward(
            call.query,
            call.key,
            call.value,
            **common,
            statistics=[job.bound],
            statistic_outputs=[job.buffer],
            output=None,
        )
    for job in (*first, *later):
        if job.part is not None:
            job.part.copy_(job.buffer)
    for value in second_pass:
        attention_key_mass(call.query, call.key, **common, row_max=row_max, log2_sum=log2_sum, output=value)
    return output, values, saved


class _Job(NamedTuple):
    """A statistic of one pass, the buffer that the pass writes, and the part of a result (None: all) to copy it to."""

    bound: BoundStatistic
    buffer: StatisticValue
    part: StatisticValue | None


def _passes(entries: Sequence[tuple[Statistic, StatisticValue]]) -> tuple[list[_Job], list[_Job]]:
    """The jobs of the pass that makes the output, and those of further passes, one each."""
    first, later = [], []
    for statistic, value in entries:
        pieces = statistic.kernel_pieces()
        for index, (kernel, columns) in enumerate(pieces):
            part = None
            buffer = value
            if len(pieces) > 1:
                part = value[..., columns]
                buffer = torch.empty_like(part, memory_format=torch.contiguous_format)
            (later if index else first).append(_Job(BoundStatistic(kernel, statistic.tensors), buffer, part))
    return first, later


def backward(call: Call, cotangents: Cotangents) -> dict[str, Tensor]:
    """Gradients of those of DIFFERENTIABLE that are needed."""
    row_max, log2_sum = cotangents.saved
    statistics, grads = [], []
    entries = cotangents.of_differentiable(call.restored_statistics())
    for statistic, grad, _ in entries:
        for kernel, columns in statistic.kernel_pieces():
            if kernel.gradient is not None:
                statistics.append(BoundStatistic(kernel, statistic.tensors))
                grads.append(grad[..., columns].contiguous())
    return attention_backward(
        cotangents.output,
        call.query,
        call.key,
        call.value,
        attn_mask=call.attn_mask,
        is_causal=call.is_causal,
        scale=call.scale,
        gate=call.gate,
        fill=call.fill,
        temperature=call.temperature,
        key_bias=call.key_bias,
        key_scale=call.key_scale,
        attention=cotangents.attention,
        row_max=row_max,
        log2_sum=log2_sum,
        row_constants=row_constants(entries),
        statistics=statistics,
        statistic_grads=grads,
        needed=dict(zip(DIFFERENTIABLE, cotangents.needed, strict=True)),
    )
