"""The arguments of the forward's kernel. Reads shapes, strides and dtypes only, so tensors without data do."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from headscope_kernels.attention.arguments import (
    call_arguments,
    check_operands,
    check_rows,
    check_statistic_outputs,
    data_arguments,
    kernel_arguments,
    scale_arguments,
)
from headscope_kernels.attention.configuration import ForwardConfiguration
from headscope_kernels.attention.forward.kernel import attention_forward_kernel
from headscope_kernels.attention.host import addressable
from headscope_kernels.attention.statistics import STATISTICS, BoundStatistic, statistic_set


def forward_arguments(
    pointers: Mapping[str, Any],
    *,
    is_causal: bool,
    scale: float,
    statistics: Sequence[BoundStatistic],
    configuration: ForwardConfiguration,
) -> dict[str, Any]:
    """The kernel's arguments by name.

    Args:
        pointers: the call's tensors by the kernel's parameters.
        is_causal, scale, statistics, configuration: as `attention_forward`'s.

    Raises:
        ValueError: dtype, head dimension, statistic or combination that the kernel has no code for.
    """
    query, key, value, output, attention, row_max, log2_sum = (
        pointers[f"{name}_ptr"] for name in ("query", "key", "value", "output", "attention", "row_max", "log2_sum")
    )
    check_operands(query, key, value, (output, attention))
    if (row_max is None) != (log2_sum is None):
        raise ValueError("row_max and log2_sum come together")
    check_rows(pointers, query.shape[:3])
    edits = {}
    if output is None:
        # without an output there is nothing to gate
        edits = {"gate_ptr": None, "fill_ptr": None}
    elif pointers["gate_ptr"] is None:
        edits = {"fill_ptr": None}
    arguments = call_arguments(
        {**pointers, **edits}, is_causal, configuration, configuration.dim_widths, configuration.value_widths
    )
    if output is None and attention is None:
        arguments |= {"value_ptr": None, "key_scale_ptr": None}
    arguments |= scale_arguments(scale) | statistic_arguments(statistics, pointers["statistic_ptrs"], query.shape[:3])
    arguments["SPECIALISED"] = configuration.schedule == "specialised"
    return kernel_arguments(attention_forward_kernel, arguments, configuration)


def statistic_arguments(
    statistics: Sequence[BoundStatistic], outputs: Sequence[Tensor], shape: tuple[int, ...]
) -> dict[str, Any]:
    """The forward's arguments for these statistics of rows [batch, heads, queries].

    Raises:
        ValueError: outputs or data of a shape or dtype that the statistic doesn't have.
    """
    chosen = statistic_set(tuple(bound.statistic for bound in statistics))
    check_statistic_outputs(chosen.widths, outputs, shape)
    return {
        **data_arguments(statistics, shape),
        "statistic_ptrs": tuple(outputs),
        "ACCUMULATORS": chosen.accumulators,
        "UPDATES": chosen.updates,
        "FINISHES": chosen.finishes,
        "EMPTIES": chosen.empties,
        "RESULT_WIDTHS": chosen.widths,
        "STATISTICS_KEY": chosen.cache_key,
    }


def forward_features(
    pointers: Mapping[str, Any], is_causal: bool, scale: float, statistics: Sequence[BoundStatistic]
) -> frozenset[str]:
    """The features of a call beside attention's output, and what of it some schedules can't serve.

    Args:
        pointers: the call's tensors by the kernel's parameters.
        is_causal, scale, statistics: as `attention_forward`'s.
    """
    tensors = {name.removesuffix("_ptr"): value for name, value in pointers.items() if isinstance(value, Tensor)}
    operands = tensors.keys() & {"query", "key", "value"}
    return frozenset(
        [*(tensors.keys() - operands - {"output"})]
        + [_NAMES.get(bound.statistic, "another statistic") for bound in statistics]
        + [f"unaligned {name}" for name in tensors.keys() & _DESCRIBED if not addressable(tensors[name])]
        + ["is_causal"] * is_causal
        + ["no output"] * tensors.keys().isdisjoint(("output", "attention"))
        + ["scale <= 0"] * (scale <= 0)
    )


_DESCRIBED = {"query", "key", "value", "output"}
# statistics without constants or data
_NAMES = {STATISTICS[name](()): name for name in ("entropy", "logsumexp", "max_logit", "max_prob", "collision_entropy")}
