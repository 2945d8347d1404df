"""One backward pass: which kernels run, what they write, and what becomes of it."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from headscope_kernels.attention.arguments import DESCRIBED, NO_STRIDES, kernel_arguments
from headscope_kernels.attention.backward.configs import BackwardConfiguration, BackwardConfigurations, query_splits
from headscope_kernels.attention.backward.key_value_gradient import key_value_gradient_kernel
from headscope_kernels.attention.backward.mask_gradient import mask_gradient_kernel
from headscope_kernels.attention.backward.query_gradient import query_gradient_kernel
from headscope_kernels.attention.backward.row_terms import row_terms_kernel
from headscope_kernels.attention.host import cdiv, in_units, stride_unit
from headscope_kernels.attention.launches import Launches, layouts

DIFFERENTIABLE = ("query", "key", "value", "attn_mask", "gate", "fill", "temperature", "key_bias", "key_scale")


class Kind:
    """Passes that look alike to the kernels; one that has been seen fits them. Compares by identity."""

    def __init__(self, configurations: BackwardConfigurations) -> None:
        self.configurations = configurations


class Pass:
    """One backward pass: from the tensors to the gradients.

    Args:
        pointers: the tensors by the kernels' parameters.
        arguments: gives the kernels' shared arguments.
        kind: what it looks like.
        tensors: by the names of DIFFERENTIABLE.
        wanted: those of them whose gradients are.
    """

    def __init__(
        self,
        pointers: dict[str, Any],
        arguments: Callable[[], dict[str, Any]],
        kind: Kind,
        tensors: dict[str, Any],
        wanted: set[str],
    ):
        self.pointers = pointers
        self._arguments = arguments
        self.kind = kind
        self.configurations = kind.configurations
        self.tensors = tensors
        self.wanted = wanted
        # what the first kernel writes for the others
        self.rows: dict[str, Tensor] = {}
        self.has_output = pointers["grad_output_ptr"] is not None
        query = tensors["query"]
        self.batch, self.heads, self.queries, _ = query.shape
        self.kv_heads, self.keys = tensors["key"].shape[1:3]
        self.statistics_shape = (self.batch, self.heads, self.queries)
        mask = tensors["attn_mask"]
        self.mask_sums = None
        if "attn_mask" in wanted and mask is not None:
            self.mask_sums = "rows" if mask.shape[3] == 1 else "columns" if mask.shape[2] == 1 else "none"

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The kernels' shared arguments, which only launches of a new kind need."""
        return self._arguments()

    def empty(self, *shape: int) -> Tensor:
        """float32 on the query's device."""
        return torch.empty(shape, dtype=torch.float32, device=self.tensors["query"].device)

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
                self.pointers["grad_output_ptr"],
                self.tensors["gate"],
                self.tensors["fill"],
            )
        return {name: gradients[name] for name in DIFFERENTIABLE if name in self.wanted}

    def reduced(self, name: str, total: Tensor) -> Tensor:
        """A float32 sum in the shape and dtype of the argument it belongs to."""
        tensor = self.tensors[name]
        return total.sum_to_size(tensor.shape).to(tensor.dtype)

    def launch(
        self,
        launches: Launches,
        programs: int,
        configuration: BackwardConfiguration | None,
        written: dict[str, Tensor | None],
        **own: Any,
    ) -> None:
        """Starts a kernel.

        Args:
            configuration: None where the kernel has no tiles of scores.
            written: the tensors that it has beside the pass's, by parameter.
            own: its other arguments, which the pass's kind doesn't say.
        """
        if programs == 0:
            return
        written = {**self.rows, **written}
        key = (self.kind, layouts(written), tuple(own.values()))
        pointers = {**self.pointers, **written}
        if launches.repeat(key, pointers):
            return
        options = {"num_warps": 4, "enable_fp_fusion": True} if configuration is None else configuration.options
        arguments = kernel_arguments(launches.kernel, {**self.arguments, **written, **own}, configuration)
        launches.first(key, pointers, programs, arguments, options)

    def row_terms(self, scores: bool) -> dict[str, Tensor]:
        """The kernel that owns rows: what the others read of every row, and the gate's gradient."""
        tiles = cdiv(self.queries, self.configurations.block_rows)
        gate_parts = self.empty(self.batch, self.heads, tiles) if "gate" in self.wanted else None
        if scores:
            self.rows = {name: self.empty(*self.statistics_shape) for name in ("delta_ptr", "offset_ptr")}
        self.launch(
            ROW_TERMS,
            self.batch * self.heads * tiles,
            None,
            {"gate_grad_ptr": gate_parts},
            NEED_DELTA=scores,
            NEED_GATE="gate" in self.wanted,
        )
        return {} if gate_parts is None else {"gate": self.reduced("gate", gate_parts.sum(-1))}

    def key_value(self) -> dict[str, Tensor]:
        """The kernel that owns keys: dk, dv, and sums over queries."""
        configuration = self.configurations.key_value
        key, value = self.tensors["key"], self.tensors["value"]
        key_tiles = self.batch * self.kv_heads * cdiv(self.keys, configuration.block_keys)
        splits = self.configurations.splits or query_splits(key_tiles, self.queries, configuration.block_queries)
        split_queries = cdiv(cdiv(self.queries, configuration.block_queries), splits)

        def buffer(tensor: Tensor) -> Tensor:
            """The tensor that programs write: the gradient itself, or a share of it for each split."""
            if splits == 1:
                return torch.empty_like(tensor)
            return self.empty(splits * self.batch, *tensor.shape[1:])

        key_grad = buffer(key) if "key" in self.wanted else None
        value_grad = buffer(value) if "value" in self.wanted and self.has_output else None
        written = [tensor for tensor in (key_grad, value_grad) if tensor is not None]
        unit = stride_unit(written) if written else 1
        sums_shape = (splits, self.batch, self.heads, self.keys)
        columns = "key_bias" in self.wanted or self.mask_sums == "columns"
        column_sums = self.empty(*sums_shape) if columns else None
        scale_sums = self.empty(*sums_shape) if "key_scale" in self.wanted else None
        outputs = {
            "key_grad_ptr": key_grad,
            "value_grad_ptr": value_grad,
            "column_sums_ptr": column_sums,
            "key_scale_grad_ptr": scale_sums,
        }
        own = {
            "key_grad_strides": NO_STRIDES if key_grad is None else in_units(key_grad, unit),
            "value_grad_strides": NO_STRIDES if value_grad is None else in_units(value_grad, unit),
            "GRAD_UNIT": unit,
            "batches": self.batch,
            "splits": splits,
            "split_queries": split_queries * configuration.block_queries,
        }
        flags = {
            "NEED_KEY": "key" in self.wanted,
            "NEED_VALUE": value_grad is not None,
            "NEED_COLUMN_SUMS": columns,
            "NEED_KEY_SCALE": "key_scale" in self.wanted and self.has_output,
        }
        launches = [flags]
        if (
            self.configurations.separate
            and flags["NEED_VALUE"]
            and any(flags[name] for name in flags if name != "NEED_VALUE")
        ):
            launches = [{**flags, "NEED_VALUE": False}, {name: name == "NEED_VALUE" for name in flags}]
        for launch in launches:
            if any(launch.values()):
                self.launch(KEY_VALUE, key_tiles * splits, configuration, outputs, **own, **launch)

        def total(buffer: Tensor | None, tensor: Tensor) -> Tensor:
            if buffer is None:
                return torch.zeros_like(tensor)
            if splits == 1:
                return buffer
            return buffer.unflatten(0, (splits, self.batch)).sum(0).to(tensor.dtype)

        gradients = {}
        if "key" in self.wanted:
            gradients["key"] = total(key_grad, key)
        if "value" in self.wanted:
            gradients["value"] = total(value_grad, value)
        if column_sums is not None and "key_bias" in self.wanted:
            gradients["key_bias"] = self.reduced("key_bias", column_sums.sum(0))
        if column_sums is not None and self.mask_sums == "columns":
            gradients["attn_mask"] = self.reduced("attn_mask", column_sums.sum(0)[:, :, None])
        if scale_sums is not None:
            sums = scale_sums.sum(0) if flags["NEED_KEY_SCALE"] else scale_sums.new_zeros(sums_shape[1:])
            gradients["key_scale"] = self.reduced("key_scale", sums)
        return gradients

    def query(self) -> dict[str, Tensor]:
        """The kernel that owns queries: dq, and sums over keys."""
        configuration = self.configurations.query
        query = self.tensors["query"]
        tiles = cdiv(self.queries, configuration.block_queries)
        query_grad = torch.empty_like(query) if "query" in self.wanted else None
        unit = 1 if query_grad is None else stride_unit((query_grad,))
        rows = self.mask_sums == "rows"
        row_sums = self.empty(*self.statistics_shape) if rows else None
        parts = self.empty(*self.statistics_shape) if "temperature" in self.wanted else None
        self.launch(
            QUERY,
            self.batch * self.heads * tiles,
            configuration,
            {"query_grad_ptr": query_grad, "row_sums_ptr": row_sums, "temperature_grad_ptr": parts},
            query_grad_strides=NO_STRIDES if query_grad is None else in_units(query_grad, unit),
            GRAD_UNIT=unit,
            NEED_QUERY="query" in self.wanted,
            NEED_ROW_SUMS=rows,
            NEED_TEMPERATURE="temperature" in self.wanted,
        )
        gradients = {}
        if query_grad is not None:
            gradients["query"] = query_grad
        if row_sums is not None:
            gradients["attn_mask"] = self.reduced("attn_mask", row_sums[..., None])
        if parts is not None:
            gradients["temperature"] = self.reduced("temperature", parts.sum(-1))
        return gradients

    def mask(self) -> Tensor:
        """The kernel that owns tiles of the mask."""
        configuration = self.configurations.mask
        mask = self.tensors["attn_mask"]
        gradient = torch.empty(mask.shape, dtype=mask.dtype, device=mask.device)
        mask_batch, mask_heads = mask.shape[:2]
        tiles = cdiv(self.queries, configuration.block_queries) * cdiv(self.keys, configuration.block_keys)
        self.launch(
            MASK,
            mask_batch * mask_heads * tiles,
            configuration,
            {"mask_grad_ptr": gradient},
            mask_grad_strides=gradient.stride(),
            mask_heads=mask_heads,
            batch_repeats=self.batch if mask_batch == 1 else 1,
            head_repeats=self.heads if mask_heads == 1 else 1,
        )
        return gradient


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


ROW_TERMS, KEY_VALUE, QUERY, MASK = (
    Launches(kernel, DESCRIBED)
    for kernel in (row_terms_kernel, key_value_gradient_kernel, query_gradient_kernel, mask_gradient_kernel)
)
