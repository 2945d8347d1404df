"""The terms of every row that the other backward kernels read, and the gate's gradient.

With G_i the output's gradient, A_i the output before gate and fill, F_i the fill, g the gate, c_i the row's constant:

    delta_i  = g * (G_i . A_i) + c_i
    offset_i = row_max_i * log2(e) + log2_sum_i, without row_max_i where something is added to the logits
    d gate   = sum_i G_i . (A_i - F_i)
"""

# tl.static_range exists for the compiler only
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from headscope_kernels.attention.backward.tiles import EMPTY_ROW, load_head_scalar
from headscope_kernels.attention.loads import advance, chunk_start, entry, head_base, indices, scaled_strides
from headscope_kernels.attention.tiles import LOG2_E


@triton.jit
def row_terms_kernel(
    grad_output_ptr,
    attention_ptr,
    fill_ptr,
    gate_ptr,
    row_max_ptr,
    log2_sum_ptr,
    row_constants_ptr,
    delta_ptr,
    offset_ptr,
    gate_grad_ptr,
    grad_output_strides,
    attention_strides,
    fill_strides,
    gate_strides,
    heads,
    queries,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTHS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    ADDITIVE: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_FILL: tl.constexpr,
    HAS_ROW_CONSTANTS: tl.constexpr,
    NEED_DELTA: tl.constexpr,
    NEED_GATE: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """BLOCK_ROWS queries of one head: delta, the exponents' offset, and the gate's gradient of this tile.

    The offset is row_max * log2(e) + log2_sum: without anything to add to the logits, p_ij = 2^(x_ij - offset).
    """
    row_tiles = tl.cdiv(queries, BLOCK_ROWS)
    batch_head = tl.program_id(0) // row_tiles
    first_row = tl.program_id(0) % row_tiles * BLOCK_ROWS
    batch = batch_head // heads
    head = batch_head % heads
    limit = queries - first_row
    grad_output_strides = scaled_strides(grad_output_strides, STRIDE_UNIT)
    attention_strides = scaled_strides(attention_strides, STRIDE_UNIT)

    rows = indices(0, BLOCK_ROWS, WIDE)  # [rows]
    inside_rows = rows < limit
    gate = load_head_scalar(gate_ptr, batch, head, gate_strides, HAS_GATE)
    along_attention = tl.zeros([BLOCK_ROWS], tl.float32)  # [rows], grad_output . attention
    along_fill = tl.zeros([BLOCK_ROWS], tl.float32)  # [rows], grad_output . fill
    if HAS_OUTPUT:
        grad_base = head_base(grad_output_ptr, batch, head, grad_output_strides)
        grad_base = advance(grad_base, first_row, grad_output_strides[2])
        attention_base = head_base(attention_ptr, batch, head, attention_strides)
        attention_base = advance(attention_base, first_row, attention_strides[2])
        fill_base = fill_ptr
        if HAS_FILL:
            fill_base = advance(head_base(fill_ptr, batch, head, fill_strides), first_row, fill_strides[2])
        for index in tl.static_range(len(VALUE_WIDTHS)):
            columns = indices(chunk_start(VALUE_WIDTHS, index), entry(VALUE_WIDTHS, index), WIDE)  # [width]
            inside = inside_rows[:, None] & (columns < VALUE_DIM)[None, :]  # [rows, width]
            pointers = grad_base + rows[:, None] * grad_output_strides[2] + columns[None, :] * grad_output_strides[3]
            grad = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)  # [rows, width]
            pointers = attention_base + rows[:, None] * attention_strides[2] + columns[None, :] * attention_strides[3]
            attention = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)  # [rows, width]
            along_attention += tl.sum(grad * attention, 1)
            if HAS_FILL:
                pointers = fill_base + rows[:, None] * fill_strides[2] + columns[None, :] * fill_strides[3]
                fill = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)  # [rows, width]
                along_fill += tl.sum(grad * fill, 1)

    row_base = advance(first_row, batch_head, queries)
    if NEED_DELTA:
        log2_sum = tl.load(log2_sum_ptr + row_base + rows, mask=inside_rows, other=0.0)  # [rows]
        empty = log2_sum == float("inf")  # [rows]
        delta = along_attention
        if HAS_GATE:
            # what a gate of 0 drops may be NaN
            delta = tl.where(gate == 0.0, 0.0, gate * along_attention)
        if HAS_ROW_CONSTANTS:
            delta += tl.load(row_constants_ptr + row_base + rows, mask=inside_rows, other=0.0)
        tl.store(delta_ptr + row_base + rows, tl.where(empty, 0.0, delta), mask=inside_rows)
        offset = log2_sum
        if not ADDITIVE:
            row_max = tl.load(row_max_ptr + row_base + rows, mask=inside_rows, other=0.0)  # [rows]
            offset = row_max * LOG2_E + log2_sum
        tl.store(offset_ptr + row_base + rows, tl.where(empty, EMPTY_ROW, offset), mask=inside_rows)
    if NEED_GATE:
        tl.store(gate_grad_ptr + tl.program_id(0), tl.sum(along_attention - along_fill, 0))
