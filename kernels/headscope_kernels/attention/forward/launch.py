"""The launch of the forward: which kernel with which tiles, and again for calls that look like an earlier one."""

from collections.abc import Sequence

import triton
from torch import Tensor

from headscope_kernels.attention.arguments import DESCRIBED
from headscope_kernels.attention.configuration import ForwardConfiguration
from headscope_kernels.attention.forward.arguments import forward_arguments, forward_features
from headscope_kernels.attention.forward.configs import forward_configuration
from headscope_kernels.attention.forward.kernel import attention_forward_kernel
from headscope_kernels.attention.hopper.schedules import GLUON_SCHEDULES, unserved
from headscope_kernels.attention.hopper.specialised import SpecialisedKernel
from headscope_kernels.attention.host import device_target, float32_precision, launch_context, multiprocessors
from headscope_kernels.attention.launches import Launches, call_key
from headscope_kernels.attention.statistics import BoundStatistic


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    gate: Tensor | None = None,
    fill: Tensor | None = None,
    temperature: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_scale: Tensor | None = None,
    statistics: Sequence[BoundStatistic],
    statistic_outputs: Sequence[Tensor],
    output: Tensor | None,
    attention: Tensor | None = None,
    row_max: Tensor | None = None,
    log2_sum: Tensor | None = None,
    configuration: ForwardConfiguration | None = None,
) -> None:
    """Writes gate * attention + (1 - gate) * fill into output, and the statistics of attention's rows.

    A head whose gate is 0 is skipped when there are no statistics, no `attention` and no `row_max`.

    Args:
        query: [batch, heads, queries, dim], float32, bfloat16 or float16, any strides.
        key: [batch, kv_heads, keys, dim]; query head h reads head h // (heads // kv_heads).
        value: [batch, kv_heads, keys, dim_v].
        attn_mask: broadcastable to [batch, heads, queries, keys]: bool (True attends) or floating (added to the
            logits), or None.
        is_causal: query i attends to keys 0..i.
        scale: multiplies query . key; any sign.
        gate: float32, broadcastable to [batch, heads]; None keeps every head.
        fill: floating, broadcastable to [batch, heads, queries, dim_v]; None: zeros.
        temperature: float32, broadcastable to [batch, heads], positive: divides the scale.
        key_bias: float32, broadcastable to [batch, heads, keys]: added to the logits.
        key_scale: float32, broadcastable to [batch, heads, keys]: multiplies the probabilities, which aren't
            normalised again; the statistics don't see it.
        statistics: what to compute of the rows.
        statistic_outputs: one contiguous float32 [batch, heads, queries], or [batch, heads, queries, width], for each
            statistic; overwritten.
        output: [batch, heads, queries, dim_v], query's dtype, any strides; overwritten. None: statistics only.
        attention: like output; overwritten with the output before gate and fill.
        row_max: contiguous float32 [batch, heads, queries]; overwritten with every row's largest logit, 0 for a row
            without valid keys.
        log2_sum: like row_max, and together with it: log2 sum_j exp(logit_j - row_max), +inf for a row without valid
            keys, so that p_ij = 2^((logit_ij - row_max_i) * log2(e) - log2_sum_i).
        configuration: tile shapes and schedule; None: chosen for the problem.

    Raises:
        ValueError: a dtype, head dimension, statistic or combination that the kernel, or the configuration's schedule,
            has no code for.
        RuntimeError: Triton compiled the kernel wrongly (operands.py), or not as the schedule says
            (hopper/specialised.py).
    """
    pointers = {
        "query_ptr": query,
        "key_ptr": key,
        "value_ptr": value,
        "mask_ptr": attn_mask,
        "gate_ptr": gate,
        "fill_ptr": fill,
        "temperature_ptr": temperature,
        "key_bias_ptr": key_bias,
        "key_scale_ptr": key_scale,
        "output_ptr": output,
        "attention_ptr": attention,
        "row_max_ptr": row_max,
        "log2_sum_ptr": log2_sum,
        "statistic_ptrs": tuple(statistic_outputs),
        "statistic_data": tuple(tensor for bound in statistics for tensor in bound.tensors),
    }
    with launch_context(query):
        launch_key = call_key(pointers, query, statistics, is_causal, scale, configuration)
        if _LAUNCHES.repeat(launch_key, pointers):
            return
        batch, heads, queries, dim = query.shape
        keys, dim_v = value.shape[2:]
        features = forward_features(pointers, is_causal, scale, statistics)
        if configuration is None:
            configuration = forward_configuration(
                query.dtype,
                dim,
                dim_v,
                queries,
                keys,
                device_target(query),
                exact=float32_precision() == "ieee",
                masked=attn_mask is not None,
                accumulated=sum(sum(bound.statistic.accumulators) for bound in statistics),
                features=features,
            )
        elif configuration.schedule != "plain":
            refusal = unserved(configuration, query.dtype, dim, dim_v, keys, device_target(query), features)
            if refusal:
                raise ValueError(refusal)
        if configuration.schedule in GLUON_SCHEDULES:
            # Gluon is for some targets only
            from headscope_kernels.attention.hopper.pingpong import OPTIONS, attention_pingpong_kernel
            from headscope_kernels.attention.hopper.pingpong_arguments import pingpong_arguments

            assert output is not None
            arguments = pingpong_arguments(
                query,
                key,
                value,
                output,
                scale=scale,
                gate=gate,
                statistic_outputs=statistic_outputs,
                configuration=configuration,
            )
            programs = min(arguments["tiles"], multiprocessors(query.device))
            if programs > 0:
                _LAUNCHES.first(launch_key, pointers, programs, arguments, OPTIONS, attention_pingpong_kernel)
            return
        arguments = forward_arguments(
            pointers, is_causal=is_causal, scale=scale, statistics=statistics, configuration=configuration
        )
        programs = batch * heads * triton.cdiv(queries, configuration.block_queries)
        if programs == 0:
            return
        kernel = SpecialisedKernel(attention_forward_kernel) if configuration.schedule == "specialised" else None
        _LAUNCHES.first(launch_key, pointers, programs, arguments, configuration.options, kernel)


_LAUNCHES = Launches(attention_forward_kernel, DESCRIBED)
