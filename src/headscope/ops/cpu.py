"""The cpu backend: the fused C++ kernels of csrc/, forward and backward, float32 inside."""

import torch
from torch import Tensor

from headscope.ops import cpu_library
from headscope.ops.call import Call, Cotangents, Results, row_constants
from headscope.ops.gradients import fill_gradient

_INPUTS = ("query", "key", "value")


def forward(call: Call) -> Results:
    output, statistics = call.empty_output(), call.restored_statistics()
    values, saved = call.empty_statistics(statistics), call.empty_saved()
    row_max, log2_sum = saved[:2] if saved else (None, None)
    cpu_library.attention_forward(
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
        statistics=[(entry.key, entry.constants, entry.tensors) for entry in statistics],
        output=output,
        statistic_outputs=values,
        attention=saved[2] if len(saved) > 2 else None,
        row_max=row_max,
        log2_sum=log2_sum,
    )
    return output, values, saved


def backward(call: Call, cotangents: Cotangents) -> dict[str, Tensor]:
    """Gradients of those of DIFFERENTIABLE that are needed."""
    if cotangents.several is not None:
        return _backward(call, cotangents, cotangents.several)
    one = cotangents._replace(
        output=None if cotangents.output is None else cotangents.output[None],
        statistics=[None if grad is None else grad[None] for grad in cotangents.statistics],
    )
    return {name: gradient[0] for name, gradient in _backward(call, one, 1).items()}


def _backward(call: Call, cotangents: Cotangents, count: int) -> dict[str, Tensor]:
    """The gradients for `count` cotangents, in a dimension in front, as the cotangents have one."""
    row_max, log2_sum = cotangents.saved
    grad_output = cotangents.output
    entries = cotangents.of_differentiable(call.restored_statistics())
    entropies = [grad for statistic, grad, _ in entries if statistic.key == "entropy"]
    wanted = cotangents.wanted()
    # the kernel finds the temperature's gradient along the query's
    needed = {*wanted, "query"} if "temperature" in wanted else wanted
    found = {name: _empty(call, name, count) for name in needed if name != "fill"}
    cpu_library.attention_backward(
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
        grad_output=grad_output,
        row_constants=row_constants(entries),
        grad_entropy=sum(entropies[1:], entropies[0]) if entropies else None,
        group_cotangents=[(entry.constants, entry.tensors, grad) for entry, grad, _ in entries if entry.tensor_count],
        gradients=found,
    )
    for name in wanted:
        if name in _INPUTS:
            continue
        tensor = getattr(call, name)
        shape = (count, *tensor.shape)
        if name != "fill":
            found[name] = found[name].sum_to_size(shape).to(tensor.dtype)
        elif grad_output is None or call.gate is None:
            found[name] = tensor.new_zeros(shape)
        else:
            found[name] = fill_gradient(grad_output, call.gate, tensor.shape).to(tensor.dtype)
    return found


def _empty(call: Call, name: str, count: int) -> Tensor:
    """What the kernel writes a gradient into: like its tensor, but in float32 for each sample and head if an edit's."""
    tensor = getattr(call, name)
    if name in _INPUTS:
        return torch.empty_like(tensor)[None] if count == 1 else tensor.new_empty((count, *tensor.shape))
    sizes = tensor.shape if name == "attn_mask" else (*call.row_shape[:2], *tensor.shape[2:])
    return tensor.new_empty((count, *sizes), dtype=torch.float32)
