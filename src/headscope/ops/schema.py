"""Registration with torch.library: one schema for every backend, fakes that agree on strides, gradients.

Operators are named headscope::{backend}_attention. Implementations are imported when first called, so that
registering costs nothing and Triton is only touched by whoever uses it.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from headscope._shapes import Float, StatisticValue
from headscope.ops.batching import is_mapped, older_rule, rule
from headscope.ops.call import DIFFERENTIABLE, Call, Cotangents, Results, autocasts
from headscope.ops.ordinary import looks, unobserved

_CALL = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, float scale, Tensor? gate,"
    " Tensor? fill, Tensor? temperature, Tensor? key_bias, Tensor? key_scale, str[] statistics,"
    " Tensor[] statistic_tensors, bool training"
)
# the output, the statistics, and what this backend saves for its backward
SCHEMA = f"({_CALL}) -> (Tensor, Tensor[], Tensor[])"
BACKWARD_SCHEMA = (
    "(Tensor? grad_output, Tensor?[] grad_statistics, SymInt? several, Tensor? attention, Tensor[] values,"
    f" Tensor[] saved, bool[] needed, {_CALL}) -> Tensor[]"
)
# the backends with a backward of their own; reference is differentiated by torch
BACKWARDS = ("portable", "cpu", "triton")
# those that start from the forward's results, where portable starts from the inputs again
_SAVING = ("cpu", "triton")
# those that give the gradients of several cotangents in one call
_TOGETHER = ("cpu",)


def default_scale(dim: int) -> float:
    """1 / sqrt(dim), torch's default."""
    return 1.0 / math.sqrt(dim) if dim else 1.0


def _fake_of(backend: str) -> Callable[..., Results]:
    def fake(*arguments: Any) -> Results:
        call = Call(*arguments)
        return call.empty_output(), call.empty_statistics(), call.empty_saved() if backend in _SAVING else []

    return fake


def _backward_fake(*arguments: Any) -> list[Tensor]:
    cotangents, call = _split(arguments)
    tensors = [getattr(call, name) for name in cotangents.wanted()]
    if cotangents.several is None:
        return [torch.empty_like(tensor) for tensor in tensors]
    return [tensor.new_empty((cotangents.several, *tensor.shape)) for tensor in tensors]


def _split(arguments: Sequence[Any]) -> tuple[Cotangents, Call]:
    count = len(Cotangents._fields)
    return Cotangents(*arguments[:count]), Call(*arguments[count:])


@cache
def _module(backend: str) -> Any:
    return importlib.import_module(f"headscope.ops.{backend}")


def _as_written(call: Call) -> AbstractContextManager:
    """Inside, torch.autocast doesn't round the operands of matrix products: query, key and value had their turn."""
    device = call.query.device
    return torch.autocast(device.type, enabled=False) if autocasts(device) else _NOTHING


_NOTHING = nullcontext()


def _laid_out_like(tensor: Float[Tensor, "*shape"], gradient: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The gradient with the strides that the fake promises."""
    if tensor.is_contiguous() and gradient.stride() == tensor.stride():
        return gradient
    like = torch.empty_like(tensor, device="meta")
    if gradient.stride() == like.stride():
        return gradient
    return torch.empty_like(tensor).copy_(gradient)


def _forward(backend: str, call: Call) -> Results:
    """The results of the schema, by a backend."""
    with _as_written(call):
        return _module(backend).forward(call)


def _forward_of(backend: str) -> Callable[..., Any]:
    return lambda *arguments: _forward(backend, Call(*arguments))


@cache
def _backward_of(backend: str) -> Callable[..., Any]:
    def backward(*arguments: Any) -> Any:
        cotangents, call = _split(arguments)
        wanted = cotangents.wanted()
        with _as_written(call):
            if cotangents.several is None:
                found = _module(backend).backward(call, cotangents)
                return [_laid_out_like(getattr(call, name), found[name]) for name in wanted]
            if backend in _TOGETHER:
                found = _module(backend).backward(call, cotangents)
                return [found[name].contiguous() for name in wanted]
            each = [_module(backend).backward(call, one) for one in cotangents.apart()]
            return [torch.stack([found[name] for found in each]) for name in wanted]

    return backward


def _save(
    ctx: Any,
    call: Call,
    output: Float[Tensor, "batch heads queries dim_v"],
    values: Sequence[StatisticValue],
    saved: Sequence[Tensor],
) -> None:
    """Save a call and the forward's results for the backward: `_gradients` reads them."""
    ctx.set_materialize_grads(False)
    statistics = call.restored_statistics()
    fixed = [value for statistic, value in zip(statistics, values, strict=True) if not statistic.differentiable]
    ctx.mark_non_differentiable(*fixed, *saved)
    # a backend that saves nothing starts from the inputs again
    results = []
    if saved:
        attention = saved[2] if len(saved) > 2 else output
        results = [attention, *values, *saved[:2]]
    ctx.save_for_backward(*(getattr(call, name) for name in DIFFERENTIABLE), *call.statistic_tensors, *results)
    ctx.layout = (call.is_causal, call.scale, list(call.statistics), len(call.statistic_tensors), bool(saved))


def _gradients(
    ctx: Any,
    backend: str,
    needs: Sequence[Any],
    grad_output: Float[Tensor, "batch heads queries dim_v"] | None,
    grad_values: Sequence[StatisticValue | None],
) -> dict[str, Any]:
    """The gradients of those of DIFFERENTIABLE that are needed, by name, None for the others.

    Args:
        ctx: the context that `_save` filled.
        backend: the forward's.
        needs: True where a gradient is needed, in the order of Call.
        grad_output, grad_values: the cotangents.
    """
    is_causal, scale, specs, tensor_count, has_results = ctx.layout
    saved = list(ctx.saved_tensors)
    inputs = dict(zip(DIFFERENTIABLE, saved, strict=False))
    tensors = saved[len(DIFFERENTIABLE) : len(DIFFERENTIABLE) + tensor_count]
    results = saved[len(DIFFERENTIABLE) + tensor_count :]
    call = Call(
        **inputs,
        is_causal=is_causal,
        scale=scale,
        statistics=specs,
        statistic_tensors=tensors,
        training=True,
    )
    by_name = dict(zip(Call._fields, needs, strict=True))
    needed = [bool(by_name[name]) for name in DIFFERENTIABLE]
    cotangents = Cotangents(
        output=grad_output,
        statistics=list(grad_values) if grad_values else [None] * len(specs),
        several=None,
        attention=results[0] if has_results else None,
        values=results[1:-2] if has_results else [],
        saved=results[-2:] if has_results else [],
        needed=needed,
    )
    with torch.no_grad():
        found = _backward(backend, cotangents, call, saved)
    if torch.is_grad_enabled():
        # create_graph=True: nothing may quietly come out as a constant
        if any(map(is_mapped, found)):
            raise RuntimeError(_NOT_AGAIN)
        found = _OnlyOnce.apply(len(found), *found, *(tensor for tensor in inputs.values() if tensor is not None))
    each = iter(found)
    return {name: next(each) if need else None for name, need in zip(DIFFERENTIABLE, needed, strict=True)}


def _backward(backend: str, cotangents: Cotangents, call: Call, saved: Sequence[Tensor | None]) -> list[Tensor]:
    given = (*saved, cotangents.output, *cotangents.statistics)
    if unobserved() and looks(given) is not None:
        return _backward_of(backend)(*cotangents, *call)
    return getattr(torch.ops.headscope, f"{backend}_attention_backward").default(*cotangents, *call)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    _save(ctx, Call(*inputs), *output)


def _autograd_of(backend: str) -> Callable[..., Any]:
    def backward(ctx: Any, grad_output: Tensor | None, grad_values: Sequence[Tensor | None] | None, _: Any) -> tuple:
        grads = _gradients(ctx, backend, ctx.needs_input_grad, grad_output, grad_values or ())
        # torch wants the structure of lists back, and takes an empty str[] for an empty Tensor[]
        specs, tensor_count = ctx.layout[2:4]
        grads["statistics"] = None if specs else []
        grads["statistic_tensors"] = [None] * tensor_count
        return tuple(grads.get(name) for name in Call._fields)

    return backward


def dispatched(backend: str, call: Call) -> tuple[Float[Tensor, "batch heads queries dim_v"], Sequence[StatisticValue]]:
    """The output and the statistics that a backend's operator gives."""
    return getattr(torch.ops.headscope, f"{backend}_attention").default(*call)[:2]


def compute(backend: str, call: Call) -> tuple[Float[Tensor, "batch heads queries dim_v"], Sequence[StatisticValue]]:
    """The same of one of BACKWARDS, without torch's dispatcher.

    Only where nobody listens (`ordinary.unobserved`) and the tensors are ordinary ones (`ordinary.looks`).
    """
    if call.training:
        output, *values = _Operator.apply(backend, *call)
        return output, values
    with torch.no_grad() if torch.is_grad_enabled() else _NOTHING:
        output, values, _ = _forward(backend, call)
    return output, values


class _Operator(torch.autograd.Function):
    """An operator and its gradients as they are registered below."""

    @staticmethod
    def forward(ctx: Any, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
        call = Call(*arguments)
        output, values, saved = _forward(backend, call)
        _save(ctx, call, output, values, saved)
        ctx.backend = backend
        return output, *values

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *grad_values: Tensor | None) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        grads = _gradients(ctx, ctx.backend, ctx.needs_input_grad[1:], grad_output, grad_values)
        return (None, *(grads.get(name) for name in Call._fields))


class _OnlyOnce(torch.autograd.Function):
    """Passes gradients on; differentiating them again is an error that says what can do that."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(_NOT_AGAIN)


_NOT_AGAIN = (
    "headscope.attention: the gradients of this backend can't be differentiated again;"
    ' backend="reference" can be, any number of times'
)


def _no_vmap(info: Any, in_dims: Any, *arguments: Any) -> None:
    raise RuntimeError(
        "headscope.attention: vmap isn't supported; put the mapped dimension into the batch"
        " (headscope.scaled_dot_product_attention takes any leading dimensions)"
    )


LIBRARY = torch.library.Library("headscope", "DEF")

# plain torch throughout: autograd, fakes and compilation see through it
LIBRARY.define(f"reference_attention{SCHEMA}")
LIBRARY.impl("reference_attention", _forward_of("reference"), "CompositeImplicitAutograd")

for _backend in BACKWARDS:
    _name = f"{_backend}_attention"
    LIBRARY.define(f"{_name}{SCHEMA}")
    LIBRARY.impl(_name, _forward_of(_backend), "CompositeExplicitAutograd")
    torch.library.register_fake(f"headscope::{_name}", _fake_of(_backend), lib=LIBRARY)
    torch.library.register_autograd(
        f"headscope::{_name}", _autograd_of(_backend), setup_context=_setup_context, lib=LIBRARY
    )
    torch.library.register_vmap(f"headscope::{_name}", _no_vmap, lib=LIBRARY)

    _name = f"{_backend}_attention_backward"
    LIBRARY.define(f"{_name}{BACKWARD_SCHEMA}")
    LIBRARY.impl(_name, _backward_of(_backend), "CompositeExplicitAutograd")
    torch.library.register_fake(f"headscope::{_name}", _backward_fake, lib=LIBRARY)
    _operator = getattr(torch.ops.headscope, _name).default
    torch.library.register_vmap(f"headscope::{_name}", rule(_operator), lib=LIBRARY)
    LIBRARY.impl(_name, older_rule(_operator), "Batched")
