"""Jit helpers of the attention kernels: addresses, loads and stores.

A head dimension is a tuple of chunks, each a power of two wide (Triton's tiles are), so that 80 can be (128,) or
(64, 16): WIDTHS are the chunks, COLUMNS their masked total.

Kernels take flat lists of arguments, and group them for their helpers: in tuples with names, which hold what is known
when they run. Triton turns constants in such a tuple into tensors when it is assigned, so flags stay out of them.
Its cache on disk knows a helper by its own source and not by the order of a tuple's fields: whoever changes that order,
here or in tiles.py, changes the helpers that unpack the tuple as well.
"""

# ruff: noqa: RUF005 (the kernel language joins tuples with + only)
# tl.static_range exists for the compiler only
# pyright: reportGeneralTypeIssues=false

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Vector(NamedTuple):
    """One head's [length] in memory: the address of its first number, and the distance between two."""

    base: Any
    stride: Any


class Rows(NamedTuple):
    """One head's [rows, columns] in memory, from some row on."""

    base: Any
    row_stride: Any
    column_stride: Any


class Source(NamedTuple):
    """One head's [rows, columns], and how to load a tile of them.

    Attributes:
        rows: where they lie.
        descriptor, tail: tensor descriptors of [batch, heads, rows, columns], one for each chunk; None where there
            are none.
        batch, head: the head's place in the descriptors.
    """

    rows: Any
    descriptor: Any
    tail: Any
    batch: Any
    head: Any


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


@triton.jit
def head_vector(pointer, batch, head, strides, HAS: tl.constexpr):
    """One head's vector out of [batch, heads, length]; nothing to load if there is none."""
    vector = Vector(0, 0)
    if HAS:
        vector = Vector(head_base(pointer, batch, head, strides), strides[2])
    return vector


@triton.jit
def head_rows(pointer, batch, head, strides, HAS: tl.constexpr = True):
    """One head's rows out of [batch, heads, rows, columns]; nothing to load if there are none."""
    rows = Rows(0, 0, 0)
    if HAS:
        rows = Rows(head_base(pointer, batch, head, strides), strides[2], strides[3])
    return rows


@triton.jit
def from_row(rows, first):
    """The rows from `first` on."""
    return Rows(advance(rows.base, first, rows.row_stride), rows.row_stride, rows.column_stride)


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
    """The position of tensor `number` of statistic `index` in the row of all statistics' tensors."""
    return sum(counts[:index]) + number


@triton.jit
def load_tile(
    source,
    rows,
    row_limit,
    FIRST_COLUMN: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """[rows, WIDTH] from FIRST_COLUMN on, 0 outside of row_limit (if checked) and COLUMNS."""
    columns = indices(FIRST_COLUMN, WIDTH, WIDE)  # [width]
    pointers = source.base + rows[:, None] * source.row_stride + columns[None, :] * source.column_stride
    inside_rows = (rows < row_limit)[:, None]  # [rows, 1]
    inside_columns = (columns < COLUMNS)[None, :]  # [1, width]
    if CHECK_ROWS and FIRST_COLUMN + WIDTH > COLUMNS:
        tile = tl.load(pointers, mask=inside_rows & inside_columns, other=0.0)  # [rows, width]
    elif CHECK_ROWS:
        tile = tl.load(pointers, mask=inside_rows, other=0.0)
    elif FIRST_COLUMN + WIDTH > COLUMNS:
        tile = tl.load(pointers, mask=inside_columns, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_chunks(
    source,
    rows,
    row_limit,
    COLUMNS: tl.constexpr,
    WIDTHS: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A tuple of tiles [rows, width] of these Rows, 0 outside of row_limit (if checked) and COLUMNS."""
    tiles = ()
    for index in tl.static_range(len(WIDTHS)):
        tile = load_tile(
            source, rows, row_limit, chunk_start(WIDTHS, index), entry(WIDTHS, index), COLUMNS, CHECK_ROWS, WIDE
        )
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def load_rows(
    source,
    first_row,
    rows,
    size,
    limit,
    COLUMNS: tl.constexpr,
    WIDTHS: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
    LIMITED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A tuple of tiles [rows, width] of a Source of `size` rows, from `first_row` on; 0 outside.

    If LIMITED, `limit` is either 0, for a tile of zeros, or `size`.
    """
    if source.descriptor is None:
        tiles = load_chunks(
            from_row(source.rows, first_row), rows, limit - first_row, COLUMNS, WIDTHS, CHECK_ROWS or LIMITED, WIDE
        )
    else:
        place = first_row
        if LIMITED:
            # past the end, all is 0
            place = tl.where(limit == 0, size, first_row)
        tiles = load_described(source, place, rows.shape[0], WIDTHS)
    return tiles


@triton.jit
def load_vector(vector, first, positions, size, CHECK: tl.constexpr):
    """float32 [positions] from `first` on, 0 past `size` (if checked)."""
    return load_numbers(advance(vector.base, first, vector.stride), positions, size - first, vector.stride, 0.0, CHECK)


@triton.jit
def load_numbers(base, positions, limit, stride, OTHER: tl.constexpr, CHECK: tl.constexpr):
    """float32 [positions], OTHER outside of limit (if checked)."""
    if CHECK:
        numbers = tl.load(base + positions * stride, mask=positions < limit, other=OTHER)
    else:
        numbers = tl.load(base + positions * stride)
    return numbers.to(tl.float32)


@triton.jit
def store_tile(base, rows, columns, strides, tile, inside):
    """Writes tile [rows, columns] where `inside`, in the pointer's type."""
    pointers = base + rows[:, None] * strides[2] + columns[None, :] * strides[3]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_described(source, first_row, ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    """A tuple of tiles [ROWS, width] of a Source through its tensor descriptors, 0 outside."""
    first = source.descriptor.load([source.batch, source.head, first_row, 0])
    tiles = (tl.reshape(first, (ROWS, entry(WIDTHS, 0))),)
    if len(WIDTHS) > 1:
        second = source.tail.load([source.batch, source.head, first_row, entry(WIDTHS, 0)])
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
def store_statistic(pointer, statistic, empty, row_offsets, inside_rows, EMPTY: tl.constexpr, WIDTH: tl.constexpr):
    """Writes one statistic, [queries] or [queries, at least WIDTH], and EMPTY where a row is."""
    if WIDTH == 0:
        tl.store(pointer + row_offsets, tl.where(empty, EMPTY, statistic), mask=inside_rows)
    else:
        columns = tl.arange(0, statistic.shape[1])  # [padded width]
        pointers = pointer + row_offsets[:, None] * WIDTH + columns[None, :]  # [queries, padded width]
        inside = inside_rows[:, None] & (columns < WIDTH)[None, :]
        tl.store(pointers, tl.where(empty[:, None], EMPTY, statistic), mask=inside)
