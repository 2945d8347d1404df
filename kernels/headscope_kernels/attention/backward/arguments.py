"""The arguments of the backward's kernels. Reads shapes, strides and dtypes only, so tensors without data do."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headscope_kernels.attention.arguments import call_arguments, check_operands, data_arguments
from headscope_kernels.attention.backward.configs import BackwardConfigurations
from headscope_kernels.attention.configuration import Tile, covering_block
from headscope_kernels.attention.statistics import BoundStatistic, functions_key


def has_extra_terms(
    attn_mask: Tensor | None, key_bias: Tensor | None, key_scale: Tensor | None, statistics: Sequence[BoundStatistic]
) -> bool:
    """True if scores take more registers than the plain ones do, which the configurations depend on."""
    edited = any(tensor is not None for tensor in (attn_mask, key_bias, key_scale))
    return edited or any(bound.statistic.width for bound in statistics)


def shared_arguments(
    pointers: Mapping[str, Any],
    *,
    is_causal: bool,
    scale: float,
    statistics: Sequence[BoundStatistic],
    configurations: BackwardConfigurations,
) -> dict[str, Any]:
    """The arguments that the backward's kernels have in common, by name.

    Args:
        pointers: the call's tensors by the kernels' parameters.
        is_causal, scale, statistics, configurations: as `attention_backward`'s.

    Raises:
        ValueError: a dtype, shape, statistic or combination that the kernels have no code for.
    """
    check_tensors(pointers, statistics)
    output = pointers["grad_output_ptr"] is not None
    edited = output and pointers["gate_ptr"] is not None
    mask, key_bias = pointers["mask_ptr"], pointers["key_bias_ptr"]
    tiles = (configurations.key_value, configurations.query, configurations.mask)
    largest = Tile(
        max(*(tile.block_queries for tile in tiles), configurations.block_rows), max(tile.block_keys for tile in tiles)
    )
    additive = mask is not None and mask.dtype != torch.bool
    arguments = call_arguments(
        # without a gradient of the output nothing reads it
        pointers if output else {**pointers, "attention_ptr": None},
        is_causal,
        largest,
        configurations.dim_widths,
        configurations.value_widths,
        # the gradient of a mask is contiguous
        reach=pointers["key_ptr"].shape[2] * configurations.mask.block_queries if additive else 0,
    )
    by_query, mask_kind = arguments["MASK_ROWS"], arguments["MASK"]
    chosen = [bound.statistic for bound in statistics]
    gradients = tuple(statistic.gradient for statistic in chosen)
    return {
        **arguments,
        **data_arguments(statistics, pointers["query_ptr"].shape[:3]),
        "attention_ptr": pointers["attention_ptr"],
        # the first kernel's, if the others need them
        "delta_ptr": None,
        "offset_ptr": None,
        "scale": float(scale),
        "BLOCK_ROWS": configurations.block_rows,
        "MASK": mask_kind if by_query else "none",
        "KEY_MASK": "none" if by_query else mask_kind,
        "ADDITIVE": additive or key_bias is not None,
        "HAS_OUTPUT": output,
        "HAS_GATE": edited,
        "HAS_FILL": edited and pointers["fill_ptr"] is not None,
        "HAS_TEMPERATURE": pointers["temperature_ptr"] is not None,
        "HAS_KEY_BIAS": key_bias is not None,
        "HAS_KEY_SCALE": output and pointers["key_scale_ptr"] is not None,
        "HAS_ROW_CONSTANTS": pointers["row_constants_ptr"] is not None,
        "GROUPED": arguments["heads_per_group"] > 1,
        "SKIP_REMOVED": edited and pointers["row_constants_ptr"] is None and not statistics,
        "GRADIENTS": gradients,
        "GRAD_WIDTHS": tuple(statistic.width for statistic in chosen),
        "PADDED_WIDTHS": tuple(covering_block(statistic.width) for statistic in chosen),
        "GRADIENTS_KEY": functions_key(gradients),
    }


def check_tensors(pointers: Mapping[str, Any], statistics: Sequence[BoundStatistic]) -> None:
    """Check the tensors of a backward pass.

    Raises:
        ValueError: a dtype, shape or statistic that the kernels have no code for.
    """
    query, key, value, grad_output, attention = (
        pointers[f"{name}_ptr"] for name in ("query", "key", "value", "grad_output", "attention")
    )
    check_operands(query, key, value, (grad_output, attention))
    rows = tuple(query.shape[:3])
    shape = (*rows, value.shape[3])
    for name, tensor in (("grad_output", grad_output), ("attention", attention)):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
    if grad_output is not None and attention is None:
        raise ValueError("the output's gradient needs the attention that the forward saved")
    for name in ("row_max", "log2_sum", "row_constants"):
        if pointers[f"{name}_ptr"] is not None:
            require_rows(name, pointers[f"{name}_ptr"], rows)
    grads = pointers["grad_ptrs"]
    if len(statistics) != len(grads):
        raise ValueError(f"{len(statistics)} statistics need as many gradients, got {len(grads)}")
    for bound, grad in zip(statistics, grads, strict=True):
        if bound.statistic.gradient is None:
            raise ValueError(f"{bound.statistic} has no gradient")
        width = (bound.statistic.width,) if bound.statistic.width else ()
        require_rows("a statistic's gradient", grad, (*rows, *width))


def require_rows(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise a ValueError unless `tensor` is contiguous float32 of this shape."""
    if tensor.dtype != torch.float32 or tensor.shape != shape or not tensor.is_contiguous():
        came = f"{tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}"
        raise ValueError(f"{name} must be contiguous float32 {shape}, got {came}")
