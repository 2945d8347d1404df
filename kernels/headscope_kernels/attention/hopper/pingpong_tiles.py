"""Gluon helpers of the kernel in pingpong.py: buffers, barriers, asynchronous products, and a step of the softmax."""

# gl.static_range exists for the compiler only
# ruff: noqa: RUF005 (the kernel language joins tuples with + only)
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

# rows of queries of one warp group: what one matrix instruction takes
GROUP_ROWS = gl.constexpr(64)
LOWEST_EXPONENT = gl.constexpr(-1.0e4)


@gluon.constexpr_function
def chunk_start(widths, index):
    """The column at which chunk `index` begins."""
    return sum(widths[:index])


@gluon.constexpr_function
def entry(values, index):
    """values[index] as a constexpr."""
    return values[index]


@gluon.constexpr_function
def tile_bytes(rows, widths):
    """Of one 16-bit tile [rows, sum of widths]."""
    return 2 * rows * sum(widths)


@gluon.constexpr_function
def product_layout(columns):
    """How the registers of one warp group hold a product [64, columns]."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, min(columns, 256), 16])


@gluon.jit
def place(tile, query_tiles, heads, ROWS: gl.constexpr):
    """Batch, head and first query of a query tile."""
    batch_head = tile // query_tiles
    return batch_head // heads, batch_head % heads, tile % query_tiles * ROWS


@gluon.jit
def chunks(descriptor, tail):
    """The descriptors of a tensor's chunks; `tail` is None where there is one."""
    if tail is None:
        described = (descriptor,)
    else:
        described = (descriptor, tail)
    return described


@gluon.jit
def ring(descriptors, COUNT: gl.constexpr, ROWS: gl.constexpr):
    """For every chunk COUNT tiles [ROWS, width] in shared memory."""
    tiles = ()
    for index in gl.static_range(len(descriptors)):
        tiles = tiles + (
            gl.allocate_shared_memory(
                descriptors[index].dtype,
                [COUNT, 1, 1, ROWS, descriptors[index].block_shape[3]],
                descriptors[index].layout,
            ),
        )
    return tiles


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers that expect ARRIVALS each."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(COUNT):
        mbarrier.init(made.index(index), count=ARRIVALS)
    return made


@gluon.jit
def load(descriptors, tiles, slot, barrier, batch, head, row, WIDTHS: gl.constexpr):
    """Starts the copy of every chunk of a tile from `row` on, 0 outside of the tensor."""
    for index in gl.static_range(len(WIDTHS)):
        tma.async_copy_global_to_shared(
            descriptors[index], [batch, head, row, chunk_start(WIDTHS, index)], barrier, tiles[index].index(slot)
        )


@gluon.jit
def matrix(tiles, index: gl.constexpr, slot):
    """Chunk `index` of one tile of a ring as [rows, width]."""
    tile = tiles[index].index(slot)
    return tile.reshape([tile.shape[2], tile.shape[3]])


@gluon.jit
def issue_logits(query, key, query_slot, slot, zeros, WIDTHS: gl.constexpr):
    """Starts query . key of two tiles of these rings: [queries, keys], one commit group a chunk."""
    products = warpgroup_mma(
        matrix(query, 0, query_slot), matrix(key, 0, slot).permute((1, 0)), zeros, use_acc=False, is_async=True
    )
    for index in gl.static_range(1, len(WIDTHS)):
        products = warpgroup_mma(
            matrix(query, index, query_slot), matrix(key, index, slot).permute((1, 0)), products, is_async=True
        )
    return products


@gluon.jit
def issue_outputs(weights, value, slot, result, WIDTHS: gl.constexpr):
    """Starts result + weights . value, one commit group a chunk."""
    sums = ()
    for index in gl.static_range(len(WIDTHS)):
        operand = gl.convert_layout(weights, gl.DotOperandLayout(0, product_layout(entry(WIDTHS, index)), 2))
        sums = sums + (warpgroup_mma(operand, matrix(value, index, slot), result[index], is_async=True),)
    return sums


@gluon.jit
def await_outputs(sums, weights):
    """The finished sums, and the weights that nobody may overwrite before."""
    if len(sums) == 1:
        first, weights = warpgroup_mma_wait(0, deps=[sums[0], weights])
        finished = (first,)
    else:
        first, second, weights = warpgroup_mma_wait(0, deps=[sums[0], sums[1], weights])
        finished = (first, second)
    return finished, weights


@gluon.jit
def zero_chunk(WIDTH: gl.constexpr):
    """float32 zeros [64, WIDTH]."""
    return gl.full([GROUP_ROWS, WIDTH], 0.0, gl.float32, product_layout(WIDTH))


@gluon.jit
def zero_chunks(WIDTHS: gl.constexpr):
    """A tuple of float32 zeros [64, width]."""
    tiles = ()
    for index in gl.static_range(len(WIDTHS)):
        tiles = tiles + (zero_chunk(entry(WIDTHS, index)),)
    return tiles


@gluon.jit
def beside(rows, WIDTH: gl.constexpr):
    """[64] as the column of a product [64, WIDTH]."""
    return gl.convert_layout(rows, gl.SliceLayout(1, product_layout(WIDTH)))[:, None]


@gluon.jit
def scaled(result, factor, WIDTHS: gl.constexpr):
    """Every chunk's rows times factor."""
    products = ()
    for index in gl.static_range(len(WIDTHS)):
        products = products + (result[index] * beside(factor, entry(WIDTHS, index)),)
    return products


@gluon.jit
def lane_sums(tile):
    """[queries, keys] summed by each thread over its own columns: [queries, 4], as four threads hold a row."""
    tile = tile.reshape([tile.shape[0], tile.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(tile, 1), 2)


@gluon.jit
def of_lanes(rows, sums):
    """[queries] as the column of lane_sums."""
    return gl.convert_layout(rows, gl.SliceLayout(1, sums.type.layout))[:, None]


@gluon.jit
def whole(sums, LAYOUT: gl.constexpr):
    """[queries] of lane_sums."""
    return gl.convert_layout(gl.sum(sums, 1), LAYOUT)


@gluon.jit
def weigh(logits, running_max, exponent_scale):
    """The new maximum and offset of a tile of logits [queries, keys], the exponents and the weights."""
    running_max = gl.maximum(running_max, gl.max(logits, 1))  # [queries]
    offset = gl.where(gl.abs(running_max) != float("inf"), running_max * exponent_scale, 0.0)  # [queries]
    exponents = gl.fma(logits, exponent_scale, gl.zeros_like(logits) - offset[:, None])  # [queries, keys]
    return running_max, offset, exponents, gl.exp2(exponents)
