"""Launches the backward kernels: which of them a set of gradients needs, their arguments, and the last sums."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from headscope_kernels.attention.backward_configs import (
    BackwardConfiguration,
    BackwardConfigurations,
    backward_configurations,
    query_splits,
)
from headscope_kernels.attention.backward_kernels import (
    key_value_gradient_kernel,
    query_gradient_kernel,
    row_terms_kernel,
)
from headscope_kernels.attention.configs import chunk_widths, covering_block
from headscope_kernels.attention.host import (
    broadcast_strides,
    device_target,
    dot_dtype,
    float32_precision,
    in_units,
    launch_context,
    stride_unit,
)
from headscope_kernels.attention.mask_gradient import mask_gradient_kernel
from headscope_kernels.attention.statistics import BoundStatistic, functions_key

DIFFERENTIABLE = ("query", "key", "value", "attn_mask", "gate", "fill", "temperature", "key_bias", "key_scale")
MAXIMUM_DIM = 512
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
        attention: [batch, heads, queries, dim_v], the forward's output before gate and fill. None only if grad_output is.
        row_max: [batch, heads, queries] float32, contiguous: every row's largest logit, 0 for a row without a valid key.
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
    with launch_context(query):
        if configurations is None:
            configurations = backward_configurations(
                query.dtype,
                query.shape[3],
                value.shape[3],
                query.shape[2],
                key.shape[2],
                device_target(query),
                exact=float32_precision() == "ieee",
                masked=attn_mask is not None and attn_mask.shape[2] > 1,
            )
        arguments = shared_arguments(
            grad_output,
            query,
            key,
            value,
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=scale,
            gate=gate,
            fill=fill,
            temperature=temperature,
            key_bias=key_bias,
            key_scale=key_scale,
            attention=attention,
            row_max=row_max,
            log2_sum=log2_sum,
            row_constants=row_constants,
            statistics=statistics,
            statistic_grads=statistic_grads,
            configurations=configurations,
        )
        return _Pass(arguments, configurations, tensors, wanted).gradients()


class _Pass:
    """One backward pass: from the shared arguments to the gradients."""

    def __init__(
        self,
        arguments: dict[str, Any],
        configurations: BackwardConfigurations,
        tensors: dict[str, Tensor | None],
        wanted: set[str],
    ):
        self.arguments = arguments
        self.configurations = configurations
        self.tensors = tensors
        self.wanted = wanted
        query = arguments["query_ptr"]
        self.batch, self.heads, self.queries, _ = query.shape
        self.kv_heads, self.keys = arguments["key_ptr"].shape[1:3]
        self.statistics_shape = (self.batch, self.heads, self.queries)
        mask = tensors["attn_mask"]
        self.mask_sums = None
        if "attn_mask" in wanted and mask is not None:
            self.mask_sums = "rows" if mask.shape[3] == 1 else "columns" if mask.shape[2] == 1 else "none"

    def empty(self, *shape: int) -> Tensor:
        """float32 on the query's device."""
        return torch.empty(shape, dtype=torch.float32, device=self.arguments["query_ptr"].device)

    def gradients(self) -> dict[str, Tensor]:
        gradients: dict[str, Tensor] = {}
        key_side = self.wanted & {"key", "value", "key_bias", "key_scale"} or self.mask_sums == "columns"
        query_side = self.wanted & {"query", "temperature"} or self.mask_sums == "rows"
        scores = bool(key_side or query_side or self.mask_sums)
        if scores or "gate" in self.wanted:
            gradients |= self.row_terms(scores)
        if key_side:
            gradients |= self.key_value()
        if query_side:
            gradients |= self.query()
        if self.mask_sums == "none":
            gradients["attn_mask"] = self.mask()
        if "fill" in self.wanted:
            gradients["fill"] = fill_gradient(
                self.arguments["grad_output_ptr"] if self.arguments["HAS_OUTPUT"] else None,
                self.tensors["gate"],
                self.tensors["fill"],
            )
        return {name: gradients[name] for name in DIFFERENTIABLE if name in self.wanted}

    def reduced(self, name: str, total: Tensor) -> Tensor:
        """A float32 sum in the shape and dtype of the argument it belongs to."""
        tensor = self.tensors[name]
        return total.sum_to_size(tensor.shape).to(tensor.dtype)

    def launch(self, kernel: Any, programs: int, configuration: BackwardConfiguration | None, **own: Any) -> None:
        if programs == 0:
            return
        options: dict[str, Any] = {"num_warps": 4}
        if configuration is not None:
            options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
        kernel[(programs,)](**kernel_arguments(kernel, self.arguments, configuration, own), **options, enable_fp_fusion=True)

    def row_terms(self, scores: bool) -> dict[str, Tensor]:
        """What the other kernels read for every row, and the gate's gradient."""
        tiles = triton.cdiv(self.queries, self.configurations.block_rows)
        gate_parts = self.empty(self.batch, self.heads, tiles) if "gate" in self.wanted else unused(self.arguments)
        if scores:
            self.arguments["delta_ptr"] = self.empty(*self.statistics_shape)
            self.arguments["offset_ptr"] = self.empty(*self.statistics_shape)
        self.launch(
            row_terms_kernel,
            self.batch * self.heads * tiles,
            None,
            gate_grad_ptr=gate_parts,
            NEED_DELTA=scores,
            NEED_GATE="gate" in self.wanted,
        )
        return {"gate": self.reduced("gate", gate_parts.sum(-1))} if "gate" in self.wanted else {}

    def key_value(self) -> dict[str, Tensor]:
        """The kernel that owns keys: dk, dv, and sums over queries."""
        configuration = self.configurations.key_value
        key, value = self.arguments["key_ptr"], self.arguments["value_ptr"]
        key_tiles = self.batch * self.kv_heads * triton.cdiv(self.keys, configuration.block_keys)
        splits = self.configurations.splits or query_splits(key_tiles, self.queries, configuration.block_queries)
        split_queries = triton.cdiv(triton.cdiv(self.queries, configuration.block_queries), splits)

        def buffer(tensor: Tensor) -> Tensor:
            """What a program writes: the gradient itself, or its share."""
            if splits == 1:
                return torch.empty_like(tensor)
            return self.empty(splits * self.batch, *tensor.shape[1:])

        key_grad, value_grad = buffer(key), buffer(value)
        unit = stride_unit((key_grad, value_grad))
        sums_shape = (splits, self.batch, self.heads, self.keys)
        columns = "key_bias" in self.wanted or self.mask_sums == "columns"
        column_sums = self.empty(*sums_shape) if columns else unused(self.arguments)
        scale_sums = self.empty(*sums_shape) if "key_scale" in self.wanted else unused(self.arguments)
        own = {
            "key_grad_ptr": key_grad,
            "value_grad_ptr": value_grad,
            "column_sums_ptr": column_sums,
            "key_scale_grad_ptr": scale_sums,
            "key_grad_strides": in_units(key_grad, unit),
            "value_grad_strides": in_units(value_grad, unit),
            "GRAD_UNIT": unit,
            "batches": self.batch,
            "splits": splits,
            "split_queries": split_queries * configuration.block_queries,
        }
        flags = {
            "NEED_KEY": "key" in self.wanted,
            "NEED_VALUE": "value" in self.wanted and self.arguments["HAS_OUTPUT"],
            "NEED_COLUMN_SUMS": columns,
            "NEED_KEY_SCALE": "key_scale" in self.wanted and self.arguments["HAS_OUTPUT"],
        }
        launches = [flags]
        if self.configurations.separate and flags["NEED_VALUE"] and any(flags[name] for name in flags if name != "NEED_VALUE"):
            launches = [{**flags, "NEED_VALUE": False}, {name: name == "NEED_VALUE" for name in flags}]
        for launch in launches:
            if any(launch.values()):
                self.launch(key_value_gradient_kernel, key_tiles * splits, configuration, **own, **launch)

        def total(buffer: Tensor, tensor: Tensor, computed: bool) -> Tensor:
            if not computed:
                return torch.zeros_like(tensor)
            if splits == 1:
                return buffer
            return buffer.unflatten(0, (splits, self.batch)).sum(0).to(tensor.dtype)

        gradients = {}
        if "key" in self.wanted:
            gradients["key"] = total(key_grad, key, True)
        if "value" in self.wanted:
            gradients["value"] = total(value_grad, value, flags["NEED_VALUE"])
        if "key_bias" in self.wanted:
            gradients["key_bias"] = self.reduced("key_bias", column_sums.sum(0))
        if self.mask_sums == "columns":
            gradients["attn_mask"] = self.reduced("attn_mask", column_sums.sum(0)[:, :, None])
        if "key_scale" in self.wanted:
            sums = scale_sums.sum(0) if flags["NEED_KEY_SCALE"] else scale_sums.new_zeros(sums_shape[1:])
            gradients["key_scale"] = self.reduced("key_scale", sums)
        return gradients

    def query(self) -> dict[str, Tensor]:
        """The kernel that owns queries: dq, and sums over keys."""
        configuration = self.configurations.query
        query = self.arguments["query_ptr"]
        tiles = triton.cdiv(self.queries, configuration.block_queries)
        query_grad = torch.empty_like(query) if "query" in self.wanted else query
        unit = stride_unit((query_grad,))
        rows = self.mask_sums == "rows"
        row_sums = self.empty(*self.statistics_shape) if rows else unused(self.arguments)
        parts = self.empty(self.batch, self.heads, tiles) if "temperature" in self.wanted else unused(self.arguments)
        self.launch(
            query_gradient_kernel,
            self.batch * self.heads * tiles,
            configuration,
            query_grad_ptr=query_grad,
            row_sums_ptr=row_sums,
            temperature_grad_ptr=parts,
            query_grad_strides=in_units(query_grad, unit),
            GRAD_UNIT=unit,
            NEED_QUERY="query" in self.wanted,
            NEED_ROW_SUMS=rows,
            NEED_TEMPERATURE="temperature" in self.wanted,
        )
        gradients = {}
        if "query" in self.wanted:
            gradients["query"] = query_grad
        if rows:
            gradients["attn_mask"] = self.reduced("attn_mask", row_sums[..., None])
        if "temperature" in self.wanted:
            gradients["temperature"] = self.reduced("temperature", parts.sum(-1))
        return gradients

    def mask(self) -> Tensor:
        """The kernel that owns tiles of the mask."""
        configuration = self.configurations.mask
        mask = self.tensors["attn_mask"]
        gradient = torch.empty(mask.shape, dtype=mask.dtype, device=mask.device)
        mask_batch, mask_heads = mask.shape[:2]
        tiles = triton.cdiv(self.queries, configuration.block_queries) * triton.cdiv(self.keys, configuration.block_keys)
        self.launch(
            mask_gradient_kernel,
            mask_batch * mask_heads * tiles,
            configuration,
            mask_grad_ptr=gradient,
            mask_grad_strides=gradient.stride(),
            mask_heads=mask_heads,
            batch_repeats=self.batch if mask_batch == 1 else 1,
            head_repeats=self.heads if mask_heads == 1 else 1,
        )
        return gradient


def unused(arguments: dict[str, Any]) -> Tensor:
    """Some float32 tensor for a pointer that the kernel doesn't follow."""
    return arguments["log2_sum_ptr"]


def fill_gradient(grad_output: Tensor | None, gate: Tensor | None, fill: Tensor) -> Tensor:
    """(1 - gate) * grad_output, summed to the fill's shape; what a gate of 1 drops may be NaN."""
    if grad_output is None or gate is None:
        return torch.zeros_like(fill)
    shape = (1,) * (4 - fill.dim()) + tuple(fill.shape)
    # the gate is the same for a whole head: queries and channels are summed first
    inner = [dimension for dimension in (2, 3) if shape[dimension] == 1]
    total = grad_output.sum(inner, keepdim=True, dtype=torch.float32) if inner else grad_output
    gate = gate[..., None, None].float()
    total = torch.where(gate == 1, 0.0, (1 - gate) * total)
    return total.sum_to_size(fill.shape).to(fill.dtype)


def kernel_arguments(
    kernel: Any, shared: dict[str, Any], configuration: BackwardConfiguration | None, own: dict[str, Any]
) -> dict[str, Any]:
    """One kernel's arguments by name."""
    arguments = {**shared, **own}
    if configuration is not None:
        arguments["BLOCK_QUERIES"] = configuration.block_queries
        arguments["BLOCK_KEYS"] = configuration.block_keys
    return {name: arguments[name] for name in kernel.arg_names}


def shared_arguments(
    grad_output: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    gate: Tensor | None,
    fill: Tensor | None,
    temperature: Tensor | None,
    key_bias: Tensor | None,
    key_scale: Tensor | None,
    attention: Tensor | None,
    row_max: Tensor,
    log2_sum: Tensor,
    row_constants: Tensor | None,
    statistics: Sequence[BoundStatistic],
    statistic_grads: Sequence[Tensor],
    configurations: BackwardConfigurations,
) -> dict[str, Any]:
    """What the kernels' arguments have in common, by name. Reads shapes, strides and dtypes only.

    Raises:
        ValueError: a dtype, shape, statistic or combination that the kernels have no code for.
    """
    batch, heads, queries, dim = query.shape
    kv_heads, keys, dim_v = key.shape[1], key.shape[2], value.shape[3]
    if query.dtype not in DTYPES or not query.dtype == key.dtype == value.dtype:
        dtypes = [tensor.dtype for tensor in (query, key, value)]
        raise ValueError(f"query, key and value must share one of {DTYPES}, got {dtypes}")
    if not (1 <= dim <= MAXIMUM_DIM and 1 <= dim_v <= MAXIMUM_DIM):
        raise ValueError(f"head dimensions must be 1 to {MAXIMUM_DIM}, got query and key {dim}, value {dim_v}")
    if kv_heads and heads % kv_heads:
        raise ValueError(f"query's heads ({heads}) must be a multiple of key's ({kv_heads})")
    for name, tensor in (("grad_output", grad_output), ("attention", attention)):
        if tensor is not None and tensor.shape != (batch, heads, queries, dim_v):
            raise ValueError(f"{name} must be {(batch, heads, queries, dim_v)}, got {tuple(tensor.shape)}")
    if grad_output is not None and attention is None:
        raise ValueError("the output's gradient needs the attention that the forward saved")
    for name, tensor in (("row_max", row_max), ("log2_sum", log2_sum), ("row_constants", row_constants)):
        if tensor is not None:
            require_rows(name, tensor, (batch, heads, queries))
    if len(statistics) != len(statistic_grads):
        raise ValueError(f"{len(statistics)} statistics need as many gradients, got {len(statistic_grads)}")
    for bound, grad in zip(statistics, statistic_grads, strict=True):
        if bound.statistic.gradient is None:
            raise ValueError(f"{bound.statistic} has no gradient")
        width = (bound.statistic.width,) if bound.statistic.width else ()
        require_rows("a statistic's gradient", grad, (batch, heads, queries, *width))
    chosen = [bound.statistic for bound in statistics]
    gradients = tuple(statistic.gradient for statistic in chosen)

    mask, mask_strides, mask_kind = query, (0, 0, 0, 0), "none"
    if attn_mask is not None:
        mask_strides = broadcast_strides("attn_mask", attn_mask, (batch, heads, queries, keys))
        mask_kind = "bool" if attn_mask.dtype == torch.bool else "additive"
        mask = attn_mask.view(torch.uint8) if mask_kind == "bool" else attn_mask
    mask_rows = mask_strides[2] != 0
    fill_strides = (0, 0, 0, 0)
    if fill is not None:
        fill_strides = broadcast_strides("fill", fill, (batch, heads, queries, dim_v))

    def head_strides(name: str, tensor: Tensor | None, *shape: int) -> tuple[int, ...]:
        expected = (batch, heads, *shape)
        return (0,) * len(expected) if tensor is None else broadcast_strides(name, tensor, expected)

    output_like = grad_output if grad_output is not None else value
    attention_like = attention if grad_output is not None else value
    aligned = (query, key, value, output_like, attention_like)
    key_value, by_query, by_mask = configurations.key_value, configurations.query, configurations.mask
    block_queries = max(key_value.block_queries, by_query.block_queries, by_mask.block_queries, configurations.block_rows)
    block_keys = max(key_value.block_keys, by_query.block_keys, by_mask.block_keys)
    key_bias_strides = head_strides("key_bias", key_bias, keys)
    key_scale_strides = head_strides("key_scale", key_scale, keys)
    reach = max(
        strides[2] * block + strides[3] * columns
        for strides, block, columns in (
            (query.stride(), block_queries, dim),
            (key.stride(), block_keys, dim),
            (value.stride(), block_keys, dim_v),
            (output_like.stride(), block_queries, dim_v),
            (attention_like.stride(), block_queries, dim_v),
            (fill_strides, block_queries, dim_v),
            (mask_strides, block_queries, block_keys),
            ((0, 0, key_bias_strides[2], 0), block_keys, 0),
            ((0, 0, key_scale_strides[2], 0), block_keys, 0),
        )
    )
    # a mask's gradient is contiguous: keys elements from row to row
    reach = max(reach, keys * by_mask.block_queries)
    unit = stride_unit(aligned)
    output = grad_output is not None
    edited = output and gate is not None
    return {
        "query_ptr": query,
        "key_ptr": key,
        "value_ptr": value,
        "mask_ptr": mask,
        "gate_ptr": query if gate is None else gate,
        "fill_ptr": query if fill is None else fill,
        "temperature_ptr": query if temperature is None else temperature,
        "key_bias_ptr": query if key_bias is None else key_bias,
        "key_scale_ptr": query if key_scale is None else key_scale,
        "grad_output_ptr": output_like,
        "attention_ptr": attention_like,
        "row_max_ptr": row_max,
        "log2_sum_ptr": log2_sum,
        "row_constants_ptr": log2_sum if row_constants is None else row_constants,
        # placeholders until the first kernel has run
        "delta_ptr": log2_sum,
        "offset_ptr": log2_sum,
        "grad_ptrs": tuple(statistic_grads),
        "data_ptrs": tuple(bound.tensors for bound in statistics),
        "query_strides": in_units(query, unit),
        "key_strides": in_units(key, unit),
        "value_strides": in_units(value, unit),
        "mask_strides": mask_strides,
        "gate_strides": head_strides("gate", gate),
        "fill_strides": fill_strides,
        "temperature_strides": head_strides("temperature", temperature),
        "key_bias_strides": key_bias_strides,
        "key_scale_strides": key_scale_strides,
        "grad_output_strides": in_units(output_like, unit),
        "attention_strides": in_units(attention_like, unit),
        "data_strides": tuple(
            tuple(tensor.expand(batch, heads, -1).stride()[:2] for tensor in bound.tensors) for bound in statistics
        ),
        "scale": float(scale),
        "heads": heads,
        "heads_per_group": heads // max(kv_heads, 1),
        "queries": queries,
        "keys": keys,
        "DIM": dim,
        "DIM_WIDTHS": configurations.dim_widths or chunk_widths(dim),
        "VALUE_DIM": dim_v,
        "VALUE_WIDTHS": configurations.value_widths or chunk_widths(dim_v),
        "BLOCK_ROWS": configurations.block_rows,
        "CAUSAL": is_causal,
        "MASK": mask_kind if mask_rows else "none",
        "KEY_MASK": "none" if mask_rows else mask_kind,
        "ADDITIVE": mask_kind == "additive" or key_bias is not None,
        "HAS_OUTPUT": output,
        "HAS_GATE": edited,
        "HAS_FILL": edited and fill is not None,
        "HAS_TEMPERATURE": temperature is not None,
        "HAS_KEY_BIAS": key_bias is not None,
        "HAS_KEY_SCALE": output and key_scale is not None,
        "HAS_ROW_CONSTANTS": row_constants is not None,
        "GROUPED": heads > kv_heads,
        "SKIP_REMOVED": edited and row_constants is None and not statistics,
        "GRADIENTS": gradients,
        "CONSTANTS": tuple(tuple(statistic.constants) for statistic in chosen),
        "GRAD_WIDTHS": tuple(statistic.width for statistic in chosen),
        "PADDED_WIDTHS": tuple(covering_block(statistic.width) for statistic in chosen),
        "GRADIENTS_KEY": functions_key(gradients),
        "DOT_DTYPE": dot_dtype(query.dtype),
        "INPUT_PRECISION": float32_precision() if query.dtype == torch.float32 else "tf32",
        "STRIDE_UNIT": unit,
        "WIDE": reach >= 2**31,
    }


def require_rows(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises a ValueError unless `tensor` is contiguous float32 of this shape."""
    if tensor.dtype != torch.float32 or tensor.shape != shape or not tensor.is_contiguous():
        came = f"{tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}"
        raise ValueError(f"{name} must be contiguous float32 {shape}, got {came}")
