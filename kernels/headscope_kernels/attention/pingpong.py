"""The forward for Hopper: one warp loads, two or three warp groups compute, and softmax runs under matrix products.

Written in Gluon, Triton's lower level, because the order of asynchronous work is the point. It serves 16-bit calls without
a mask (`serves`); forward.py has all the rest, and the formulas.

    one warp            K(0) Q K(1) V(0) K(2) V(1) ...                by the tensor memory accelerator (TMA)
    each warp group     S(i) = Q K(i)^T issued, O += P(i-1) V(i-1) issued, S(i) awaited,
                        softmax of S(i) while P V runs, P V awaited, O rescaled

Key tiles are taken from the last to the first, so that the one tile that may be ragged is the first, which stands before
the loop. A program works through query tiles until none is left, and its loads run ahead into the next.

Barriers. A buffer has two: `full`, on which the bytes of its load arrive (count 1, the load's own announcement), and `free`,
on which every warp group arrives when it has read it (count CONSUMERS). Load n of a ring of STAGES buffers goes to
buffer n % STAGES and is that buffer's use n // STAGES, numbered from 0. A barrier's phase k ends with its arrivals of use
k; waiting for parity p returns once the phase before the current one has parity p.

    reader of use u     waits on `full` for phase u: parity u & 1.
    loader of use u     waits on `free` for phase u - 1, the reads of the use before: parity (u & 1) ^ 1. For use 0 that is
                        parity 1, which a fresh barrier grants.

Nobody can be overtaken by two phases: `full` of use u + 1 needs `free` of use u, which needs every reader to have passed
`full` of use u; and `free` of use u + 1 needs `full` of use u + 1, which the loader arms after it has seen `free` of u.
The query's buffer is a ring of one, its use the number of query tiles before, and is free again when the output, which
leaves through it, has been stored.

`turns` (TURNS) order the warp groups, so that one's matrix products are issued while another is in its softmax: group w
waits for its own barrier, issues, and arrives on that of group w + 1. Turn n of group 0 needs n arrivals (parity
(n & 1) ^ 1: the first is granted), turn n of the others n + 1 (parity n & 1). A group arrives once a turn, hence no
barrier is ahead of its waiter by more than one phase.
"""

# gl.static_range exists for the compiler only
# ruff: noqa: RUF005 (the kernel language joins tuples with + only)
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# rows of queries of one warp group: what one matrix instruction takes
GROUP_ROWS = gl.constexpr(64)
LN2 = gl.constexpr(0.6931471805599453)
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
def produce(
    tensors,
    descriptors,
    WIDTHS: gl.constexpr,
    BLOCK_KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
):
    """The warp that loads."""
    query, key, value, turns, work = tensors
    query_ring, query_full, query_free = query
    key_ring, key_full, key_free = key
    value_ring, value_full, value_free = value
    query_descriptors, key_descriptors, value_descriptors = descriptors
    tiles, query_tiles, heads, heads_per_group, key_tiles = work
    QUERY_ROWS: gl.constexpr = GROUP_ROWS * CONSUMERS
    key_use = 0
    query_use = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        batch, head, first_query = place(tile, query_tiles, heads, QUERY_ROWS)
        kv_head = head // heads_per_group
        for number in range(key_tiles):
            first_key = (key_tiles - 1 - number) * BLOCK_KEYS
            slot = key_use % STAGES
            free = (key_use // STAGES & 1) ^ 1
            mbarrier.wait(key_free.index(slot), free)
            mbarrier.expect(key_full.index(slot), tile_bytes(BLOCK_KEYS, WIDTHS))
            load(key_descriptors, key_ring, slot, key_full.index(slot), batch, kv_head, first_key, WIDTHS)
            if number == 0:
                mbarrier.wait(query_free, (query_use & 1) ^ 1)
                mbarrier.expect(query_full, tile_bytes(QUERY_ROWS, WIDTHS))
                for group in gl.static_range(CONSUMERS):
                    row = first_query + group * GROUP_ROWS
                    load(query_descriptors, query_ring, group, query_full, batch, head, row, WIDTHS)
            mbarrier.wait(value_free.index(slot), free)
            mbarrier.expect(value_full.index(slot), tile_bytes(BLOCK_KEYS, WIDTHS))
            load(value_descriptors, value_ring, slot, value_full.index(slot), batch, kv_head, first_key, WIDTHS)
            key_use += 1
        query_use += 1


@gluon.jit
def issue_logits(query, key, slot, GROUP: gl.constexpr, zeros, WIDTHS: gl.constexpr):
    """Starts query . key of one warp group against a key tile: [queries, keys], one commit group a chunk."""
    products = warpgroup_mma(
        matrix(query, 0, GROUP), matrix(key, 0, slot).permute((1, 0)), zeros, use_acc=False, is_async=True
    )
    for index in gl.static_range(1, len(WIDTHS)):
        products = warpgroup_mma(
            matrix(query, index, GROUP), matrix(key, index, slot).permute((1, 0)), products, is_async=True
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
    """The new maximum and offset of a tile of logits [queries, keys], the exponents, the weights: see forward.py."""
    running_max = gl.maximum(running_max, gl.max(logits, 1))  # [queries]
    offset = gl.where(gl.abs(running_max) != float("inf"), running_max * exponent_scale, 0.0)  # [queries]
    exponents = gl.fma(logits, exponent_scale, gl.zeros_like(logits) - offset[:, None])  # [queries, keys]
    return running_max, offset, exponents, gl.exp2(exponents)


@gluon.jit
def consume(
    tensors,
    results,
    GROUP: gl.constexpr,
    WIDTHS: gl.constexpr,
    BLOCK_KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    TURNS: gl.constexpr,
):
    """Warp group GROUP: 64 queries of every query tile against all keys."""
    query, key, value, turns, work = tensors
    output_descriptors, entropy_ptr, gate_ptr, gate_strides, exponent_scale, queries, keys = results
    query_ring, query_full, query_free = query
    key_ring, key_full, key_free = key
    value_ring, value_full, value_free = value
    tiles, query_tiles, heads, heads_per_group, key_tiles = work
    ENTROPY: gl.constexpr = entropy_ptr is not None
    DTYPE: gl.constexpr = query_ring[0].dtype
    LOGITS: gl.constexpr = product_layout(BLOCK_KEYS)
    ROWS: gl.constexpr = gl.SliceLayout(1, LOGITS)
    zeros = zero_chunk(BLOCK_KEYS)
    key_use = 0
    query_use = 0
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        batch, head, first_query = place(tile, query_tiles, heads, GROUP_ROWS * CONSUMERS)
        first_query += GROUP * GROUP_ROWS
        running_max = gl.full([GROUP_ROWS], float("-inf"), gl.float32, ROWS)
        result = zero_chunks(WIDTHS)

        # the last key tile, the one that may be ragged
        slot = key_use % STAGES
        phase = key_use // STAGES & 1
        mbarrier.wait(query_full, query_use & 1)
        mbarrier.wait(key_full.index(slot), phase)
        issued = issue_logits(query_ring, key_ring, slot, GROUP, zeros, WIDTHS)
        logits = warpgroup_mma_wait(0, deps=[issued])
        mbarrier.arrive(key_free.index(slot))
        columns = (key_tiles - 1) * BLOCK_KEYS + gl.arange(0, BLOCK_KEYS, gl.SliceLayout(0, LOGITS))  # [keys]
        logits = gl.where((columns < keys)[None, :], logits, float("-inf"))  # [queries, keys]
        running_max, offset, exponents, weights = weigh(logits, running_max, exponent_scale)
        # sums stay apart by thread until all keys were seen
        normaliser = lane_sums(weights)  # [queries, 4]
        moment = normaliser
        if ENTROPY:
            moment = lane_sums(weights * gl.maximum(exponents, LOWEST_EXPONENT))  # [queries, 4]
        weights = weights.to(DTYPE)
        mbarrier.wait(value_full.index(slot), phase)

        for _ in range(1, key_tiles):
            before = slot
            key_use += 1
            slot = key_use % STAGES
            phase = key_use // STAGES & 1
            mbarrier.wait(key_full.index(slot), phase)
            if TURNS:
                mbarrier.wait(turns.index(GROUP), (turn & 1) ^ (GROUP == 0))
            issued = issue_logits(query_ring, key_ring, slot, GROUP, zeros, WIDTHS)
            sums = issue_outputs(weights, value_ring, before, result, WIDTHS)
            if TURNS:
                mbarrier.arrive(turns.index((GROUP + 1) % CONSUMERS))
                turn += 1
            logits = warpgroup_mma_wait(len(WIDTHS), deps=[issued])
            mbarrier.arrive(key_free.index(slot))
            before_offset = offset
            running_max, offset, exponents, fresh = weigh(logits, running_max, exponent_scale)
            shift = gl.minimum(gl.maximum(before_offset - offset, LOWEST_EXPONENT), 0.0)  # [queries]
            rescale = gl.exp2(shift)  # [queries]
            if ENTROPY:
                moved = moment + normaliser * of_lanes(shift, moment)
                moment = of_lanes(rescale, moment) * moved + lane_sums(fresh * exponents)
            normaliser = of_lanes(rescale, normaliser) * normaliser + lane_sums(fresh)
            # here, not where the values are needed: the assembler lifts the wait for products above the softmax, but
            # not across the wait for a barrier
            mbarrier.wait(value_full.index(slot), phase)
            result, fresh = await_outputs(sums, fresh)
            weights = fresh.to(DTYPE)
            mbarrier.arrive(value_free.index(before))
            result = scaled(result, rescale, WIDTHS)

        sums = issue_outputs(weights, value_ring, slot, result, WIDTHS)
        result, weights = await_outputs(sums, weights)
        mbarrier.arrive(value_free.index(slot))
        key_use += 1

        normaliser = whole(normaliser, ROWS)  # [queries]
        empty = normaliser == 0.0  # [queries]
        normaliser = gl.where(empty, 1.0, normaliser)
        if ENTROPY:
            rows = first_query + gl.arange(0, GROUP_ROWS, ROWS)  # [queries]
            entropy = gl.where(empty, 0.0, LN2 * (gl.log2(normaliser) - whole(moment, ROWS) / normaliser))
            offsets = (batch * heads + head).to(gl.int64) * queries + rows
            gl.store(entropy_ptr + offsets, entropy, mask=rows < queries)
        share = 1.0 / normaliser
        if gate_ptr is not None:
            gate = gl.load(gate_ptr + batch * gate_strides[0] + head * gate_strides[1])
        for index in gl.static_range(len(WIDTHS)):
            chunk = result[index] * beside(share, entry(WIDTHS, index))
            if gate_ptr is not None:
                # what a removed head drops may be NaN
                chunk = gl.where(gate == 0.0, 0.0, chunk * gate)
            matrix(query_ring, index, GROUP).store(chunk.to(DTYPE))
        fence_async_shared()
        for index in gl.static_range(len(WIDTHS)):
            place_ = [batch, head, first_query, chunk_start(WIDTHS, index)]
            tma.async_copy_shared_to_global(output_descriptors[index], place_, query_ring[index].index(GROUP))
        tma.store_wait(pendings=0)
        mbarrier.arrive(query_free)
        query_use += 1


@gluon.jit
def attention_pingpong_kernel(
    query_descriptor,
    query_tail_descriptor,
    key_descriptor,
    key_tail_descriptor,
    value_descriptor,
    value_tail_descriptor,
    output_descriptor,
    output_tail_descriptor,
    entropy_ptr,
    gate_ptr,
    gate_strides,
    exponent_scale,
    tiles,
    query_tiles,
    heads,
    heads_per_group,
    queries,
    keys,
    WIDTHS: gl.constexpr,
    BLOCK_KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    TURNS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """One program a multiprocessor; each takes every num_programs-th of `tiles` query tiles.

    Pointers of what isn't asked for are None, as are the tails of tensors whose WIDTHS are one chunk.
    """
    query_descriptors = chunks(query_descriptor, query_tail_descriptor)
    key_descriptors = chunks(key_descriptor, key_tail_descriptor)
    value_descriptors = chunks(value_descriptor, value_tail_descriptor)
    output_descriptors = chunks(output_descriptor, output_tail_descriptor)
    query_ring = ring(query_descriptors, CONSUMERS, GROUP_ROWS)
    key_ring = ring(key_descriptors, STAGES, BLOCK_KEYS)
    value_ring = ring(value_descriptors, STAGES, BLOCK_KEYS)
    # (tiles, full, free)
    query = (query_ring, barriers(1, 1).index(0), barriers(1, CONSUMERS).index(0))
    key = (key_ring, barriers(STAGES, 1), barriers(STAGES, CONSUMERS))
    value = (value_ring, barriers(STAGES, 1), barriers(STAGES, CONSUMERS))
    turns = barriers(CONSUMERS, 1)
    fence_async_shared()
    work = (tiles, query_tiles, heads, heads_per_group, gl.cdiv(keys, BLOCK_KEYS))
    tensors = (query, key, value, turns, work)
    descriptors = (query_descriptors, key_descriptors, value_descriptors)
    results = (output_descriptors, entropy_ptr, gate_ptr, gate_strides, exponent_scale, queries, keys)
    # the compiler wants these lists here, as they are
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (tensors, results, 0, WIDTHS, BLOCK_KEYS, STAGES, CONSUMERS, TURNS)),
                (consume, (tensors, results, 1, WIDTHS, BLOCK_KEYS, STAGES, CONSUMERS, TURNS)),
                (produce, (tensors, descriptors, WIDTHS, BLOCK_KEYS, STAGES, CONSUMERS)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (tensors, results, 0, WIDTHS, BLOCK_KEYS, STAGES, CONSUMERS, TURNS)),
                (consume, (tensors, results, 1, WIDTHS, BLOCK_KEYS, STAGES, CONSUMERS, TURNS)),
                (consume, (tensors, results, 2, WIDTHS, BLOCK_KEYS, STAGES, CONSUMERS, TURNS)),
                (produce, (tensors, descriptors, WIDTHS, BLOCK_KEYS, STAGES, CONSUMERS)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )
