"""Jit helpers of the attention kernels: addresses, loads, and one step of the online softmax.

A head dimension is a tuple of chunks, each a power of two wide (Triton's tiles are), so that 80 can be (128,) or
(64, 16): WIDTHS are the chunks, `columns` their masked total.
"""

# ruff: noqa: RUF005 (the kernel language joins tuples with + only)
# tl.static_range exists for the compiler only
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

# 2^x is 0 far above this, and a product of 0 with it is 0, where 0 * -inf would be NaN
LOWEST_EXPONENT = tl.constexpr(-1.0e4)
LOG2_E = tl.constexpr(1.4426950408889634)
SMALLEST_SCALE = tl.constexpr(1.0e-30)


@triton.jit
def indices(start, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """start + [0, SIZE), in 64 bits where the offsets within one tile need them."""
    result = start + tl.arange(0, SIZE)  # [SIZE]
    if WIDE:
        result = result.to(tl.int64)
    return result


@triton.jit
def advance(base, count, stride):
    """base + count * stride, in 64 bits."""
    return base + tl.cast(count, tl.int64) * stride


@triton.jit
def scaled_strides(strides, UNIT: tl.constexpr):
    """Strides in elements of one passed in units, the last one as it is: shows the compiler how aligned rows are."""
    return (strides[0] * UNIT, strides[1] * UNIT, strides[2] * UNIT, strides[3])


@triton.jit
def head_base(pointer, batch, head, strides):
    """The address of one head's [rows, columns]."""
    return advance(advance(pointer, batch, strides[0]), head, strides[1])


@triton.constexpr_function
def entry(values, index):
    """values[index] as a constexpr; the bare subscript of a constexpr tuple is a Python number."""
    return values[index]


@triton.constexpr_function
def chunk_start(widths, index):
    """The column at which chunk `index` begins."""
    return sum(widths[:index])


@triton.constexpr_function
def data_place(counts, index, number):
    """Where tensor `number` of statistic `index` stands in the row of all statistics' tensors."""
    return sum(counts[:index]) + number


@triton.jit
def load_tile(
    base,
    rows,
    row_limit,
    row_stride,
    column_stride,
    FIRST_COLUMN: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """[rows, WIDTH] from FIRST_COLUMN on, 0 outside of row_limit (if checked) and COLUMNS."""
    columns = indices(FIRST_COLUMN, WIDTH, WIDE)  # [width]
    pointers = base + rows[:, None] * row_stride + columns[None, :] * column_stride  # [rows, width]
    inside_rows = (rows < row_limit)[:, None]  # [rows, 1]
    inside_columns = (columns < COLUMNS)[None, :]  # [1, width]
    if CHECK_ROWS and FIRST_COLUMN + WIDTH > COLUMNS:
        tile = tl.load(pointers, mask=inside_rows & inside_columns, other=0.0)
    elif CHECK_ROWS:
        tile = tl.load(pointers, mask=inside_rows, other=0.0)
    elif FIRST_COLUMN + WIDTH > COLUMNS:
        tile = tl.load(pointers, mask=inside_columns, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_chunks(
    base,
    rows,
    row_limit,
    row_stride,
    column_stride,
    COLUMNS: tl.constexpr,
    WIDTHS: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A tuple of tiles [rows, width], 0 outside of row_limit (if checked) and COLUMNS."""
    tiles = ()
    for index in tl.static_range(len(WIDTHS)):
        tile = load_tile(
            base,
            rows,
            row_limit,
            row_stride,
            column_stride,
            chunk_start(WIDTHS, index),
            entry(WIDTHS, index),
            COLUMNS,
            CHECK_ROWS,
            WIDE,
        )
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def load_row(base, stride, first, columns, size, CHECK: tl.constexpr):
    """float32 [keys] from `first` on, 0 past `size` (if checked)."""
    pointers = advance(base, first, stride) + columns * stride  # [keys]
    if CHECK:
        row = tl.load(pointers, mask=columns < size - first, other=0.0)
    else:
        row = tl.load(pointers)
    return row.to(tl.float32)


@triton.jit
def store_tile(base, rows, columns, strides, tile, inside):
    """Writes tile [rows, columns] where `inside`, in the pointer's type."""
    pointers = base + rows[:, None] * strides[2] + columns[None, :] * strides[3]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def zero_chunks(ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    """A tuple of float32 zeros [ROWS, width]."""
    tiles = ()
    for index in tl.static_range(len(WIDTHS)):
        tiles = tiles + (tl.full([ROWS, entry(WIDTHS, index)], 0.0, tl.float32),)
    return tiles


@triton.jit
def cast_chunks(tiles, SIGN: tl.constexpr, DTYPE: tl.constexpr):
    """SIGN * tile for every tile, in DTYPE; exact, as SIGN is 1, 0 or -1 and DTYPE no narrower."""
    result = ()
    for index in tl.static_range(len(tiles)):
        tile = tiles[index]
        if SIGN != 1:
            tile = tile.to(tl.float32) * SIGN
        result = result + (tile.to(DTYPE),)
    return result


@triton.jit
def dot_chunks(query, key, DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """query . key over all chunks: [queries, keys], float32."""
    products = tl.dot(query[0], tl.trans(key[0].to(DTYPE)), input_precision=INPUT_PRECISION)
    for index in tl.static_range(1, len(query)):
        products = tl.dot(query[index], tl.trans(key[index].to(DTYPE)), products, input_precision=INPUT_PRECISION)
    return products


@triton.jit
def add_products(result, weights, value, rescale, DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """result * rescale + weights . value for every chunk; the weights are rounded to the value's type."""
    rounded = weights.to(value[0].dtype).to(DTYPE)  # [queries, keys]
    sums = ()
    for index in tl.static_range(len(value)):
        chunk = result[index] * rescale[:, None]  # [queries, width]
        sums = sums + (tl.dot(rounded, value[index].to(DTYPE), chunk, input_precision=INPUT_PRECISION),)
    return sums


@triton.jit
def load_described(descriptor, tail, batch, head, first_row, ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    """A tuple of tiles [ROWS, width] through tensor descriptors of [batch, heads, rows, columns], 0 outside.

    `tail` describes the second chunk; None where there is one chunk only.
    """
    tiles = (tl.reshape(descriptor.load([batch, head, first_row, 0]), (ROWS, entry(WIDTHS, 0))),)
    if len(WIDTHS) > 1:
        second = tail.load([batch, head, first_row, entry(WIDTHS, 0)])
        tiles = tiles + (tl.reshape(second, (ROWS, entry(WIDTHS, 1))),)
    return tiles


@triton.jit
def load_describing(
    base, first_row, row_count, row_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTHS: tl.constexpr
):
    """As `load_described`, from one head's [row_count, COLUMNS] at base, through descriptors that are made here.

    Where Triton divides a tile between two groups of warps it divides the load, too, which a launcher's descriptor
    doesn't follow: it would still fetch ROWS rows into half as much shared memory.
    """
    tiles = ()
    for index in tl.static_range(len(WIDTHS)):
        descriptor = tl.make_tensor_descriptor(
            base, [row_count, COLUMNS], [row_stride, 1], [ROWS, entry(WIDTHS, index)]
        )
        tiles = tiles + (descriptor.load([first_row, chunk_start(WIDTHS, index)]),)
    return tiles


@triton.jit
def biased_logits(products, scale, bias):
    """scale * products [queries, keys] + bias [keys]."""
    return tl.fma(products, scale, tl.broadcast_to(bias[None, :], products.shape))


@triton.jit
def tempered(scale, temperature):
    """scale / temperature; never 0, which would turn a masked key's infinity into NaN."""
    quotient = tl.div_rn(scale, temperature)
    return tl.where(quotient < SMALLEST_SCALE, SMALLEST_SCALE, quotient)


@triton.jit
def statistic_tensors(pointers, strides, COUNTS: tl.constexpr, batch, head):
    """For every statistic a tuple of the pointers to its tensors, at this batch and head.

    `pointers` are all statistics' in a row, COUNTS of them each; `strides` has two for each, of batch and head.
    """
    tensors = ()
    for index in tl.static_range(len(COUNTS)):
        own = ()
        for number in tl.static_range(entry(COUNTS, index)):
            base = advance(
                pointers[data_place(COUNTS, index, number)], batch, strides[2 * data_place(COUNTS, index, number)]
            )
            own = own + (advance(base, head, strides[2 * data_place(COUNTS, index, number) + 1]),)
        tensors = tensors + (own,)
    return tensors


@triton.jit
def initial_accumulators(ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    """For every statistic a tuple of its accumulators, zeros [ROWS] (width 0) or [ROWS, width]."""
    accumulators = ()
    for index in tl.static_range(len(WIDTHS)):
        own = ()
        for number in tl.static_range(len(entry(WIDTHS, index))):
            if entry(entry(WIDTHS, index), number) == 0:
                own = own + (tl.zeros([ROWS], tl.float32),)
            else:
                own = own + (tl.zeros([ROWS, entry(entry(WIDTHS, index), number)], tl.float32),)
        accumulators = accumulators + (own,)
    return accumulators


@triton.jit
def update_accumulators(
    UPDATES: tl.constexpr,
    accumulators,
    rescale,
    shift,
    normaliser,
    weights,
    exponents,
    rows,
    columns,
    keys,
    tensors,
    CONSTANTS: tl.constexpr,
):
    """Every statistic's accumulators after one more tile."""
    updated = ()
    for index in tl.static_range(len(UPDATES)):
        own = UPDATES[index](
            accumulators[index],
            rescale,
            shift,
            normaliser,
            weights,
            exponents,
            rows,
            columns,
            keys,
            tensors[index],
            entry(CONSTANTS, index),
        )
        updated = updated + (own,)
    return updated


@triton.jit
def store_statistic(pointer, statistic, empty, row_offsets, inside_rows, EMPTY: tl.constexpr, WIDTH: tl.constexpr):
    """Writes one statistic, [queries] or [queries, at least WIDTH], and EMPTY where a row is."""
    if WIDTH == 0:
        tl.store(pointer + row_offsets, tl.where(empty, EMPTY, statistic), mask=inside_rows)
    else:
        columns = tl.arange(0, statistic.shape[1])  # [padded width]
        pointers = pointer + row_offsets[:, None] * WIDTH + columns[None, :]  # [queries, padded width]
        inside = inside_rows[:, None] & (columns < WIDTH)[None, :]
        tl.store(pointers, tl.where(empty[:, None], EMPTY, statistic), mask=inside)


@triton.jit
def masked_logits(
    products,
    mask_base,
    mask_strides,
    scale,
    rows,
    columns,
    first_query,
    first_key,
    queries,
    keys,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    BORDER: tl.constexpr,
):
    """What the softmax runs over: products [queries, keys], or logits where there is a mask to add; -inf if masked."""
    if MASK != "none":
        tile_base = advance(advance(mask_base, first_query, mask_strides[2]), first_key, mask_strides[3])
        if MASK_ROWS:
            pointers = tile_base + rows[:, None] * mask_strides[2] + columns[None, :] * mask_strides[3]
            if BORDER:
                inside = (rows < queries - first_query)[:, None] & (columns < keys - first_key)[None, :]
            else:
                inside = (rows < queries - first_query)[:, None]
        else:
            # the same for every query: one row
            pointers = tile_base + columns[None, :] * mask_strides[3]
            inside = (columns < keys - first_key)[None, :]
        # the hole-filling 0 of a bool mask is "masked"
        mask = tl.load(pointers, mask=inside, other=0)  # [queries or 1, keys]
        if MASK == "bool":
            products = tl.where(mask != 0, products, float("-inf"))
        else:
            products = tl.fma(products, scale, tl.broadcast_to(mask.to(tl.float32), products.shape))
    if BORDER:
        valid = (columns < keys - first_key)[None, :]
        if CAUSAL:
            valid = valid & (first_key + columns[None, :] <= first_query + rows[:, None])
        products = tl.where(valid, products, float("-inf"))
    return products


@triton.jit
def offset_of(running_max, exponent_scale, ADDITIVE: tl.constexpr):
    """What is subtracted to keep the exponents <= 0: the maximum, rounded once, or 0 where the maximum isn't finite.

    With an additive mask it stays in natural units (the mask may hold the lowest float), else it is in base 2.
    """
    finite = tl.abs(running_max) != float("inf")
    if ADDITIVE:
        offset = tl.where(finite, running_max, 0.0)
    else:
        offset = tl.where(finite, running_max * exponent_scale, 0.0)
    return offset


@triton.jit
def exponents_of(logits, offset, exponent_scale, ADDITIVE: tl.constexpr):
    """x with 2^x the weight of a key. One FMA, or a difference in natural units first where there is a mask to add."""
    if ADDITIVE:
        exponents = (logits - offset) * LOG2_E
    else:
        exponents = tl.fma(logits, exponent_scale, -offset)
    return exponents


@triton.jit
def softmax_step(logits, running_max, offset, exponent_scale, ADDITIVE: tl.constexpr, MASKED: tl.constexpr):
    """One tile of the online softmax.

    Returns the new maximum and offset, how far the offset moved (base 2, <= 0), the weights, and the exponents.
    """
    new_max = tl.maximum(running_max, tl.max(logits, 1))  # [queries]
    new_offset = offset_of(new_max, exponent_scale, ADDITIVE)  # [queries]
    shift = offset - new_offset  # [queries]
    if ADDITIVE:
        shift = shift * LOG2_E
    # above 0 only while there is nothing to rescale yet; far below, 2^shift is 0 and must meet no infinity
    shift = tl.clamp(shift, LOWEST_EXPONENT, 0.0)
    exponents = exponents_of(logits, new_offset[:, None], exponent_scale, ADDITIVE)  # [queries, keys]
    weights = tl.exp2(exponents)  # [queries, keys]
    if MASKED:
        exponents = tl.maximum(exponents, LOWEST_EXPONENT)
    return new_max, new_offset, shift, weights, exponents


@triton.jit
def gated(result, fill, gate):
    """gate * result + (1 - gate) * fill. Gates of exactly 0 and 1 select: what they drop may be NaN."""
    mixed = gate * result + (1.0 - gate) * fill
    return tl.where(gate == 1.0, result, tl.where(gate == 0.0, fill, mixed))
