"""headscope.attention, and the drop-in for torch's scaled_dot_product_attention."""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from headscope._shapes import Bool, FillTensor, Float, Mask, StatisticValue
from headscope.ops.attend import for_every_head
from headscope.ops.backends import Problem, select
from headscope.ops.call import DIFFERENTIABLE, Call, autocasts
from headscope.ops.edits import HeadEdit
from headscope.ops.ordinary import looks, unobserved
from headscope.ops.schema import BACKWARDS, compute, default_scale, dispatched
from headscope.ops.statistics import Statistic, requested_statistics
from headscope.ops.validation import (
    check_edit,
    check_inputs,
    check_mask,
    check_scale,
    four_dimensional,
    require_tensor,
    shape_of,
)

_NO_EDIT = HeadEdit()


class AttentionResult(NamedTuple):
    """The result of `attention`.

    Attributes:
        output: in query's dtype and stride order.
        statistics: one float32 (float64 for float64 inputs) tensor for each statistic asked for, by name: [batch,
            heads, queries], or with a last dimension for the groups, or [batch, heads, keys] for key_mass.
    """

    output: Float[Tensor, "batch heads queries dim_v"]
    statistics: dict[str, StatisticValue]


def attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys dim_v"],
    *,
    attn_mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    edit: HeadEdit | None = None,
    statistics: Sequence[str | Statistic] | str | Statistic = (),
    backend: str | None = None,
) -> AttentionResult:
    """Attention, statistics of its probabilities and edits of its heads, in one pass.

    logits = (scale / temperature) * query . key + key_bias + mask;  p = softmax(logits);
    attention = (p * key_scale) . value;  output = gate * attention + (1 - gate) * fill.
    [queries, keys] is never materialised by the fused backends.

    Statistics describe p: gate, fill and key_scale don't change them. A row with no valid key has logsumexp and
    max_logit -inf and all else 0; NaN in gives NaN out, row by row. Gradients flow through output, entropy, logsumexp
    and group mass into query, key, value, an additive mask and every tensor of the edit.

    Args:
        query, key, value: float32, bfloat16, float16 or float64, all of one.
        attn_mask: bool (True: attend) or additive, broadcastable to [batch, heads, queries, keys]. Keys that it hides
            must hold finite values: 0 times NaN is NaN to some backends, as to torch.
        is_causal: row i sees keys 0..i (top left), as in torch's SDPA.
        scale: 1 / sqrt(dim) if None.
        enable_gqa: kv_heads may be a divisor of heads.
        edit: which heads to remove, fill, sharpen or bias, per sample.
        statistics: names (entropy, logsumexp, max_logit, collision_entropy in nats, max_prob in 0..1, key_mass in
            queries), Distance(...), GroupMass(...), GroupEntropy(...), or statistics of your own.
        backend: "triton", "cpu", "portable" or "reference"; None picks the fastest that serves the whole call.

    Returns:
        AttentionResult(output, statistics).

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it, what came and what was expected.
        RuntimeError: the backend asked for can't serve the call; the message says why.
    """
    requested = requested_statistics(statistics)
    query, key, value = _autocast(query, key, value)
    options = (is_causal, scale, enable_gqa, backend)
    seen = _seen(query, key, value, attn_mask, edit, requested, options)
    checked = None if seen is None else _CHECKED.get(seen)
    if checked is None:
        checked = _check(query, key, value, attn_mask, edit, requested, *options)
        if seen is not None:
            if len(_CHECKED) >= _CAPACITY:
                _CHECKED.clear()
            _CHECKED[seen] = checked
    else:
        # a class's own check may look at anything
        for statistic in requested:
            statistic.check(query, key)
    edit = edit or _NO_EDIT
    precise = torch.float64 if query.dtype == torch.float64 else torch.float32
    call = Call(
        query=query,
        key=key,
        value=value,
        attn_mask=None if attn_mask is None else _finite_mask(four_dimensional(attn_mask), query),
        is_causal=is_causal,
        scale=checked.scale,
        gate=_in(precise, edit.gate),
        fill=four_dimensional(edit.fill) if isinstance(edit.fill, Tensor) else None,
        temperature=_in(precise, edit.temperature),
        key_bias=_in(precise, edit.key_bias),
        key_scale=_in(precise, edit.key_scale),
        statistics=[statistic.spec for statistic in requested],
        statistic_tensors=[tensor for statistic in requested for tensor in statistic.tensors],
        training=checked.needs_gradient,
    )
    directly = seen is not None and checked.backend in BACKWARDS
    run = partial(compute if directly else dispatched, checked.backend)
    if not directly and checked.backend != "reference":
        _refuse_transforms(call)
    if edit.fill == "identity":
        call = call._replace(fill=for_every_head(value, call))
    elif edit.fill == "uniform":
        call = call._replace(fill=_uniform_fill(run, call))
    output, values = run(call)
    return AttentionResult(output, {statistic.name: value for statistic, value in zip(requested, values, strict=True)})


class _Checked(NamedTuple):
    """The result of checking a call."""

    scale: float
    needs_gradient: bool
    backend: str


# by what calls look like; a model has some tens of looks, varying lengths may make more without end
_CHECKED: dict[Hashable, _Checked] = {}
_CAPACITY = 1024


def _seen(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    edit: Any,
    requested: tuple[Statistic, ...],
    options: tuple[bool, float | None, bool, str | None],
) -> Hashable | None:
    """All that `_check` depends on; None where not all arguments are of the usual types, or torch is observed."""
    if not unobserved():
        return None
    edit = _NO_EDIT if edit is None else edit
    if type(edit) is not HeadEdit or tuple(map(type, options)) not in _USUAL:
        return None
    named = isinstance(edit.fill, str)
    tensors = looks(
        (
            query,
            key,
            value,
            attn_mask,
            edit.gate,
            None if named else edit.fill,
            edit.temperature,
            edit.key_bias,
            edit.key_scale,
            *[tensor for statistic in requested for tensor in statistic.tensors],
        )
    )
    if tensors is None:
        return None
    kinds = tuple([(type(statistic), statistic.spec, statistic.name) for statistic in requested])
    return tensors, edit.fill if named else None, kinds, options, torch.is_grad_enabled()


_USUAL = frozenset(product([bool], [float, int, type(None)], [bool], [str, type(None)]))


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    edit: HeadEdit | None,
    requested: tuple[Statistic, ...],
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    backend: str | None,
) -> _Checked:
    """Checks `attention`'s arguments against each other, and chooses who computes.

    Raises:
        TypeError, ValueError, RuntimeError: as `attention`.
    """
    check_inputs(query, key, value, enable_gqa)
    check_mask(attn_mask, is_causal, query, key)
    check_edit(edit, query, key, value)
    for statistic in requested:
        statistic.check(query, key)
    scale = check_scale(scale, default_scale(query.shape[-1]))
    edit = edit or _NO_EDIT
    inputs = (query, key, value, attn_mask, edit.gate, edit.fill, edit.temperature, edit.key_bias, edit.key_scale)
    needs_gradient = torch.is_grad_enabled() and any(
        isinstance(tensor, Tensor) and tensor.requires_grad for tensor in inputs
    )
    problem = Problem(query.device, query.dtype, query.shape[-1], value.shape[-1], needs_gradient, requested)
    return _Checked(scale, needs_gradient, select(backend, problem))


def _finite_mask(mask: Mask, query: Float[Tensor, "batch heads queries dim"]) -> Mask:
    """A float64 mask's finite values, for inputs of less precision, as finite ones of float32."""
    if mask.dtype != torch.float64 or query.dtype == torch.float64:
        return mask
    limits = torch.finfo(torch.float32)
    return torch.where(mask.isinf(), mask, mask.clamp(limits.min, limits.max)).float()


def _in(dtype: torch.dtype, tensor: Float[Tensor, "*shape"] | None) -> Float[Tensor, "*shape"] | None:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def _refuse_transforms(call: Call) -> None:
    """Derivatives that only plain torch has raise, where they would come out as 0.

    Raises:
        RuntimeError: inside torch.func's transforms (vmap raises on its own), or on a tensor with a forward gradient.
    """
    if torch.compiler.is_compiling():
        return
    transform = torch._C._functorch.peek_interpreter_stack()
    forward = forward_ad._current_level >= 0 and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None
        for tensor in (getattr(call, name) for name in DIFFERENTIABLE)
    )
    if forward or (transform is not None and transform.key() != torch._C._functorch.TransformType.Vmap):
        raise RuntimeError(
            "headscope.attention: this backend has gradients by torch.autograd only, no forward-mode ones and no"
            ' torch.func transforms; backend="reference" has'
        )


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under torch.autocast, query, key and value in its dtype, as torch's SDPA casts them; nothing else."""
    tensors = (query, key, value)
    if isinstance(query, Tensor) and autocasts(query.device):
        dtype = torch.get_autocast_dtype(query.device.type)
        castable = (torch.float32, torch.bfloat16, torch.float16)
        return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in castable else t for t in tensors)  # type: ignore[return-value]
    return tensors


def _uniform_fill(run: Callable[[Call], tuple[Tensor, Sequence[Tensor]]], call: Call) -> FillTensor:
    """Attention's output with q . k set to zero and all else as it is."""
    if call.attn_mask is None and not call.is_causal and call.key_bias is None and call.key_scale is None:
        keys = max(1, call.value.shape[2])
        mean = call.value.sum(2, keepdim=True, dtype=call.statistic_dtype) / keys
        return for_every_head(mean, call)
    assert call.gate is not None
    # heads whose gate is 1 need no fill, and a gate of 0 lets the backend skip them; but a gate's gradient is
    # (attention - fill) wherever it stands
    removed = None if call.training and call.gate.requires_grad else (call.gate.detach() != 1).to(call.gate.dtype)
    # zeros, not a scale of 0: infinite queries and keys stay out of it
    query, key = (tensor.new_zeros(()).expand_as(tensor) for tensor in (call.query, call.key))
    plain = call._replace(
        query=query, key=key, scale=1.0, gate=removed, temperature=None, statistics=[], statistic_tensors=[]
    )
    return run(plain)[0]


def scaled_dot_product_attention(
    query: Float[Tensor, "... queries dim"],
    key: Float[Tensor, "... keys dim"],
    value: Float[Tensor, "... keys dim_v"],
    attn_mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    edit: HeadEdit | None = None,
    backend: str | None = None,
) -> Float[Tensor, "... queries dim_v"]:
    """torch.nn.functional.scaled_dot_product_attention with head edits; same arguments, same semantics.

    Args:
        query: [..., heads, queries, dim] with any leading dimensions that broadcast with key's and value's;
            [queries, dim] is one head.
        key: [..., kv_heads, keys, dim].
        value: [..., kv_heads, keys, dim_v].
        attn_mask: bool or additive, broadcastable to [..., heads, queries, keys].
        dropout_p: must be 0: dropped probabilities would not be the ones that statistics describe.
        is_causal, scale, enable_gqa: as in torch.
        edit: gate [batch or 1, heads], where batch is the product of the leading dimensions.
        backend: as in `attention`.

    Returns:
        [..., heads, queries, dim_v].

    Raises:
        TypeError, ValueError, RuntimeError: as `attention`; ValueError for dropout_p > 0.
    """
    if dropout_p:
        raise ValueError(
            f"dropout_p: got {dropout_p}, expected 0; headscope describes and edits the probabilities themselves,"
            " and dropout would replace them with random ones"
        )
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_tensor(name, tensor)
        if tensor.ndim < 2:
            raise ValueError(f"{name}: got shape {shape_of(tensor)}, expected at least [tokens, dim]")
    lead, query, key, value = _four_dimensions(query, key, value, enable_gqa)
    if attn_mask is not None and isinstance(attn_mask, Tensor) and attn_mask.ndim > 2 and len(lead) != 2:
        tail = attn_mask.shape[-2:]
        attn_mask = attn_mask.expand(*lead, *tail).reshape(*query.shape[:2], *tail)
    output = attention(
        query,
        key,
        value,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        edit=edit,
        backend=backend,
    ).output
    return output if len(lead) == 2 else output.reshape(*lead, *output.shape[2:])


def _four_dimensions(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[tuple[int, ...], Tensor, Tensor, Tensor]:
    """The broadcast leading dimensions, and the tensors as [batch, heads, tokens, dim]."""
    tensors = (query, key, value)
    if enable_gqa and all(tensor.ndim >= 3 for tensor in tensors):
        batches = torch.broadcast_shapes(*(tensor.shape[:-3] for tensor in tensors))
        leads = [(*batches, tensor.shape[-3]) for tensor in tensors]
    else:
        leads = [torch.broadcast_shapes(*(tensor.shape[:-2] for tensor in tensors))] * 3
    if len(leads[0]) == 2 and all(tensor.ndim == 4 for tensor in tensors):
        pairs = zip(tensors, leads, strict=True)
        expanded = [t if t.shape[:2] == lead else t.expand(*lead, *t.shape[2:]) for t, lead in pairs]
        return tuple(leads[0]), *expanded  # type: ignore[return-value]
    flat = []
    for tensor, lead in zip(tensors, leads, strict=True):
        heads = lead[-1] if lead else 1
        samples = 1
        for size in lead[:-1]:
            samples *= size
        flat.append(tensor.expand(*lead, *tensor.shape[-2:]).reshape(samples, heads, *tensor.shape[-2:]))
    return tuple(leads[0]), *flat  # type: ignore[return-value]
