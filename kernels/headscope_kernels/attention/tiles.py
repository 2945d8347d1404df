"""Jit helpers of the attention kernels: products of tiles, one step of the online softmax, its statistics."""

# ruff: noqa: RUF005 (the kernel language joins tuples with + only)
# tl.static_range exists for the compiler only
# pyright: reportGeneralTypeIssues=false

from typing import Any, NamedTuple

import triton
import triton.language as tl

from headscope_kernels.attention.loads import advance, entry

# 2^x is 0 far above this, and a product of 0 with it is 0, where 0 * -inf would be NaN
LOWEST_EXPONENT = tl.constexpr(-1.0e4)
LOG2_E = tl.constexpr(1.4426950408889634)
SMALLEST_SCALE = tl.constexpr(1.0e-30)


class Place(NamedTuple):
    """The place of a tile of scores among all of them.

    Attributes:
        rows, columns: [queries] and [keys], counted from the tile's first.
        first_query, first_key: the tile's first.
        queries, keys: how many there are in all.
    """

    rows: Any
    columns: Any
    first_query: Any
    first_key: Any
    queries: Any
    keys: Any


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
def biased_logits(products, scale, bias):
    """scale * products [queries, keys] + bias [keys]."""
    return tl.fma(products, scale, tl.broadcast_to(bias[None, :], products.shape))


@triton.jit
def tempered(scale, temperature):
    """scale / temperature; never 0, which would turn a masked key's infinity into NaN."""
    quotient = tl.div_rn(scale, temperature)
    return tl.where(quotient < SMALLEST_SCALE, SMALLEST_SCALE, quotient)


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
def masked_logits(
    products,
    mask,
    scale,
    place,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    BORDER: tl.constexpr,
):
    """The softmax's input: products [queries, keys], or logits where there is a mask to add; -inf if masked."""
    rows, columns, first_query, first_key, queries, keys = place
    if MASK != "none":
        tile_base = advance(advance(mask.base, first_query, mask.row_stride), first_key, mask.column_stride)
        if MASK_ROWS:
            pointers = tile_base + rows[:, None] * mask.row_stride + columns[None, :] * mask.column_stride
            if BORDER:
                inside = (rows < queries - first_query)[:, None] & (columns < keys - first_key)[None, :]
            else:
                inside = (rows < queries - first_query)[:, None]
        else:
            # the same for every query: one row
            pointers = tile_base + columns[None, :] * mask.column_stride
            inside = (columns < keys - first_key)[None, :]
        # the hole-filling 0 of a bool mask is "masked"
        numbers = tl.load(pointers, mask=inside, other=0)  # [queries or 1, keys]
        if MASK == "bool":
            products = tl.where(numbers != 0, products, float("-inf"))
        else:
            products = tl.fma(products, scale, tl.broadcast_to(numbers.to(tl.float32), products.shape))
    if BORDER:
        valid = (columns < keys - first_key)[None, :]
        if CAUSAL:
            valid = valid & (first_key + columns[None, :] <= first_query + rows[:, None])
        products = tl.where(valid, products, float("-inf"))
    return products


@triton.jit
def offset_of(running_max, exponent_scale, ADDITIVE: tl.constexpr):
    """The offset that keeps exponents <= 0: the maximum, rounded once, or 0 where the maximum isn't finite.

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
