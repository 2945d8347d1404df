"""The backward of attention with statistics and edits: the gradients of everything that the forward takes.

Row i, key j, with p the probabilities, g a head's gate, c_j its key scales, G_i the output's gradient:

    p_ij  = 2^((logit_ij - row_max_i) * log2(e) - log2_sum_i)
    dP_ij = c_j * g * (G_i . v_j) + the statistics' gradients
    dS_ij = p_ij * (dP_ij - delta_i),   delta_i = sum_j p_ij * dP_ij
    dq = (scale / T) dS k,   dk = (scale / T) dS^T q,   dv_j = sum_i p_ij * c_j * g * G_i

The scores are computed again, twice: one kernel owns a tile of keys and goes over the queries (of every head that
shares them), one owns a tile of queries and goes over the keys. Nothing is added up by atomics, so results are
reproducible. A small kernel before both knows what concerns whole rows; a mask with a number for every score takes one
more. What isn't needed isn't compiled in, or isn't launched.
"""

from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headscope_kernels.attention.backward.arguments import has_extra_terms, shared_arguments
from headscope_kernels.attention.backward.configs import BackwardConfigurations, backward_configurations
from headscope_kernels.attention.backward.passes import DIFFERENTIABLE, Kind, Pass
from headscope_kernels.attention.host import device_target, float32_precision, launch_context
from headscope_kernels.attention.launches import call_key, remember
from headscope_kernels.attention.statistics import BoundStatistic


def attention_backward(
    grad_output: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float,
    gate: Tensor | None = None,
    fill: Tensor | None = None,
    temperature: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_scale: Tensor | None = None,
    attention: Tensor | None,
    row_max: Tensor,
    log2_sum: Tensor,
    row_constants: Tensor | None = None,
    statistics: Sequence[BoundStatistic] = (),
    statistic_grads: Sequence[Tensor] = (),
    needed: Mapping[str, bool] | Sequence[bool],
    configurations: BackwardConfigurations | None = None,
) -> dict[str, Tensor]:
    """The gradients of everything the forward took, from the output's and the statistics' at once.

    logits = scale / temperature * query . key + key_bias + mask, p = softmax(logits),
    attention = sum_j p_ij * key_scale_j * value_j, output = gate * attention + (1 - gate) * fill. Deterministic, and
    its memory grows with tokens only, not with queries * keys, but for a mask's own gradient.

    Args:
        grad_output: [batch, heads, queries, dim_v], any strides; None is zeros.
        query, key, value, attn_mask, is_causal, scale, gate, fill, temperature, key_bias, key_scale: as the forward
            got them. attn_mask has 4 dimensions, each 1 or full.
        attention: [batch, heads, queries, dim_v], the forward's output before gate and fill; None only if
            grad_output is.
        row_max: [batch, heads, queries] float32, contiguous: every row's largest logit, 0 for a row without a valid
            key.
        log2_sum: likewise, log2 sum_j exp(logit_j - row_max), +inf for a row without a valid key.
        row_constants: likewise, the sum over statistics of sum_j p_j * gradient_j, logsumexp counting as minus its
            cotangent; None is zeros.
        statistics: those with a `gradient` and a cotangent.
        statistic_grads: their cotangents, contiguous float32 [batch, heads, queries] or [batch, heads, queries, width].
        needed: which of DIFFERENTIABLE, in this order or by name.
        configurations: tile shapes; None: chosen for the problem.

    Returns:
        The needed gradients by name, each with its argument's shape and dtype; rows without a valid key contribute 0.

    Raises:
        ValueError: a dtype, shape, statistic or combination that the kernels have no code for.
    """
    tensors = dict(
        zip(
            DIFFERENTIABLE,
            (query, key, value, attn_mask, gate, fill, temperature, key_bias, key_scale),
            strict=True,
        )
    )
    if not isinstance(needed, Mapping):
        needed = dict(zip(DIFFERENTIABLE, needed, strict=True))
    wanted = {name for name in DIFFERENTIABLE if needed.get(name)}
    for name in wanted:
        if tensors[name] is None:
            raise ValueError(f"{name} is None and has no gradient")
    if "attn_mask" in wanted and attn_mask is not None and attn_mask.dtype == torch.bool:
        raise ValueError("a bool attn_mask has no gradient")
    pointers: dict[str, Any] = {
        "query_ptr": query,
        "key_ptr": key,
        "value_ptr": value,
        "mask_ptr": attn_mask,
        "gate_ptr": gate,
        "fill_ptr": fill,
        "temperature_ptr": temperature,
        "key_bias_ptr": key_bias,
        "key_scale_ptr": key_scale,
        "grad_output_ptr": grad_output,
        "attention_ptr": attention,
        "row_max_ptr": row_max,
        "log2_sum_ptr": log2_sum,
        "row_constants_ptr": row_constants,
        "grad_ptrs": tuple(statistic_grads),
        "statistic_data": tuple(tensor for bound in statistics for tensor in bound.tensors),
    }
    with launch_context(query):
        key_of_pass = call_key(pointers, query, statistics, is_causal, scale, configurations)
        kind = _KINDS.get(key_of_pass)
        if kind is None and configurations is None:
            configurations = backward_configurations(
                query.dtype,
                query.shape[3],
                value.shape[3],
                query.shape[2],
                key.shape[2],
                device_target(query),
                exact=float32_precision() == "ieee",
                extra_terms=has_extra_terms(attn_mask, key_bias, key_scale, statistics),
            )
        arguments = partial(
            shared_arguments,
            pointers,
            is_causal=is_causal,
            scale=scale,
            statistics=statistics,
            configurations=kind.configurations if kind else configurations,
        )
        if kind is None:
            # raises where anything doesn't fit, also where no kernel will run
            arguments()
            kind = Kind(configurations)
            remember(_KINDS, key_of_pass, kind)
        return Pass(pointers, arguments, kind, tensors, wanted).gradients()


_KINDS: dict[Hashable, Kind] = {}
