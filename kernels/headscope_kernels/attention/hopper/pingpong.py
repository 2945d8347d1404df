"""The forward for Hopper: one warp loads, two or three warp groups compute, softmax runs under matrix products.

Written in Gluon, Triton's lower level, because the order of asynchronous work is the point. It serves 16-bit calls
without a mask (schedules.py says which); forward/kernel.py has all the rest, and the formulas.

    one warp            K(0) Q K(1) V(0) K(2) V(1) ...  by the tensor memory accelerator (TMA), as buffers become free
    each warp group     issues S(i) = Q K(i)^T and O += P(i-1) V(i-1), waits for S(i), takes its softmax while P V
                        runs, waits for P V, rescales O

Key tiles are taken from the last to the first, so that the one that may be ragged is the first, which stands before the
loop. A program works through query tiles until none is left, and its loads run ahead into the next.

Barriers. A buffer has two: `full`, on which the bytes of its load arrive (count 1, the load's own announcement), and
`free`, on which every warp group arrives when it has read it (count CONSUMERS). Load n of a ring of STAGES buffers goes
to buffer n % STAGES and is that buffer's use u = n // STAGES. Phase u of a barrier ends with the arrivals of use u, and
a wait for parity p returns once the phase before the current one has parity p.

    a reader in use u       waits for phase u of `full`: parity u & 1.
    the loader before u     waits for phase u - 1 of `free`, the reads of the use before: parity (u & 1) ^ 1, which a
                            fresh barrier grants to use 0.

Nobody is overtaken by two phases: `full` of use u + 1 is announced after `free` of use u, hence after every reader has
passed `full` of use u; and `free` of use u + 1 needs `full` of use u + 1, which the loader announces after it has seen
`free` of use u. The loader never waits for what only a later load would bring: in step i a group needs K(i), V(i - 1),
and V(i) before it frees V(i - 1), so STAGES is at least 2. A query tile is one load for all groups together, in a ring
of QUERY_STAGES of its own, and its buffer is free when the output, which leaves through it, has been stored.

With TURNS the groups take turns at issuing, so that one's products run while another is in its softmax: group g waits
on its barrier (count 1), issues, and arrives on that of group g + 1, the last on that of group 0. Turn n of group 0
follows n arrivals (parity (n & 1) ^ 1: the first is granted), turn n of another n + 1 (parity n & 1). A group arrives
once between two waits of its own, so no barrier is more than one phase ahead of who waits on it.
"""

# gl.static_range exists for the compiler only
# ruff: noqa: SIM113 (the kernel language has no enumerate)
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportOperatorIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from headscope_kernels.attention.hopper.pingpong_tiles import (
    GROUP_ROWS,
    LOWEST_EXPONENT,
    await_outputs,
    barriers,
    beside,
    chunk_start,
    chunks,
    entry,
    issue_logits,
    issue_outputs,
    lane_sums,
    load,
    matrix,
    of_lanes,
    place,
    product_layout,
    ring,
    scaled,
    tile_bytes,
    weigh,
    whole,
    zero_chunk,
    zero_chunks,
)

OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def produce(
    tensors,
    descriptors,
    WIDTHS: gl.constexpr,
    BLOCK_KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    QUERY_STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
):
    """The warp that loads."""
    query, key, value, _turns, work = tensors
    query_ring, query_full, query_free = query
    key_ring, key_full, key_free = key
    value_ring, value_full, value_free = value
    query_descriptors, key_descriptors, value_descriptors = descriptors
    tiles, query_tiles, heads, heads_per_group, key_tiles = work
    QUERY_ROWS: gl.constexpr = GROUP_ROWS * CONSUMERS
    key_use = 0
    value_use = 0
    query_use = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        batch, head, first_query = place(tile, query_tiles, heads, QUERY_ROWS)
        kv_head = head // heads_per_group
        # keys are needed first, and are free again first: they go one tile ahead of the values
        for number in range(key_tiles + 1):
            if number < key_tiles:
                slot = key_use % STAGES
                full = key_full.index(slot)
                mbarrier.wait(key_free.index(slot), (key_use // STAGES & 1) ^ 1)
                mbarrier.expect(full, tile_bytes(BLOCK_KEYS, WIDTHS))
                row = (key_tiles - 1 - number) * BLOCK_KEYS
                load(key_descriptors, key_ring, slot, full, batch, kv_head, row, WIDTHS)
                key_use += 1
            if number == 0:
                slot = query_use % QUERY_STAGES
                full = query_full.index(slot)
                mbarrier.wait(query_free.index(slot), (query_use // QUERY_STAGES & 1) ^ 1)
                mbarrier.expect(full, tile_bytes(QUERY_ROWS, WIDTHS))
                for group in gl.static_range(CONSUMERS):
                    row = first_query + group * GROUP_ROWS
                    load(query_descriptors, query_ring, slot * CONSUMERS + group, full, batch, head, row, WIDTHS)
            else:
                slot = value_use % STAGES
                full = value_full.index(slot)
                mbarrier.wait(value_free.index(slot), (value_use // STAGES & 1) ^ 1)
                mbarrier.expect(full, tile_bytes(BLOCK_KEYS, WIDTHS))
                row = (key_tiles - number) * BLOCK_KEYS
                load(value_descriptors, value_ring, slot, full, batch, kv_head, row, WIDTHS)
                value_use += 1
        query_use += 1


@gluon.jit
def consume(
    tensors,
    results,
    GROUP: gl.constexpr,
    WIDTHS: gl.constexpr,
    BLOCK_KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    QUERY_STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    TURNS: gl.constexpr,
):
    """Warp group GROUP: 64 queries of every query tile against all keys."""
    query, key, value, turns, work = tensors
    output_descriptors, statistic_ptrs, gate_ptr, gate_strides, exponent_scale, queries, keys = results
    query_ring, query_full, query_free = query
    key_ring, key_full, key_free = key
    value_ring, value_full, value_free = value
    tiles, query_tiles, heads, _heads_per_group, key_tiles = work
    ENTROPY: gl.constexpr = len(statistic_ptrs) > 0
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
        query_slot = query_use % QUERY_STAGES
        own = query_slot * CONSUMERS + GROUP
        mbarrier.wait(query_full.index(query_slot), query_use // QUERY_STAGES & 1)
        mbarrier.wait(key_full.index(slot), phase)
        issued = issue_logits(query_ring, key_ring, own, slot, zeros, WIDTHS)
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
            issued = issue_logits(query_ring, key_ring, own, slot, zeros, WIDTHS)
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
            gl.store(statistic_ptrs[0] + offsets, entropy, mask=rows < queries)
        share = 1.0 / normaliser
        if gate_ptr is not None:
            gate = gl.load(gate_ptr + batch * gate_strides[0] + head * gate_strides[1])
        for index in gl.static_range(len(WIDTHS)):
            chunk = result[index] * beside(share, entry(WIDTHS, index))
            if gate_ptr is not None:
                # what a removed head drops may be NaN
                chunk = gl.where(gate == 0.0, 0.0, chunk * gate)
            matrix(query_ring, index, own).store(chunk.to(DTYPE))
        fence_async_shared()
        for index in gl.static_range(len(WIDTHS)):
            corner = [batch, head, first_query, chunk_start(WIDTHS, index)]
            tma.async_copy_shared_to_global(output_descriptors[index], corner, query_ring[index].index(own))
        tma.store_wait(0)
        mbarrier.arrive(query_free.index(query_slot))
        query_use += 1


# numbers that differ from call to call, and of which no better code could be made
@gluon.jit(do_not_specialize=["tiles", "query_tiles", "heads", "heads_per_group", "queries"])
def attention_pingpong_kernel(
    query_descriptor,
    query_tail_descriptor,
    key_descriptor,
    key_tail_descriptor,
    value_descriptor,
    value_tail_descriptor,
    output_descriptor,
    output_tail_descriptor,
    statistic_ptrs,
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
    QUERY_STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    TURNS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """One program a multiprocessor; each takes every num_programs-th of `tiles` query tiles.

    `statistic_ptrs` holds the entropy's pointer or nothing; the gate's pointer is None where there is none, as are the
    tails of tensors whose WIDTHS are one chunk. CONSUMERS is 2 or 3, STAGES at least 2.
    """
    query_descriptors = chunks(query_descriptor, query_tail_descriptor)
    key_descriptors = chunks(key_descriptor, key_tail_descriptor)
    value_descriptors = chunks(value_descriptor, value_tail_descriptor)
    output_descriptors = chunks(output_descriptor, output_tail_descriptor)
    query_ring = ring(query_descriptors, QUERY_STAGES * CONSUMERS, GROUP_ROWS)
    key_ring = ring(key_descriptors, STAGES, BLOCK_KEYS)
    value_ring = ring(value_descriptors, STAGES, BLOCK_KEYS)
    # (tiles, full, free)
    query = (query_ring, barriers(QUERY_STAGES, 1), barriers(QUERY_STAGES, CONSUMERS))
    key = (key_ring, barriers(STAGES, 1), barriers(STAGES, CONSUMERS))
    value = (value_ring, barriers(STAGES, 1), barriers(STAGES, CONSUMERS))
    turns = barriers(CONSUMERS, 1)
    fence_async_shared()
    work = (tiles, query_tiles, heads, heads_per_group, gl.cdiv(keys, BLOCK_KEYS))
    tensors = (query, key, value, turns, work)
    descriptors = (query_descriptors, key_descriptors, value_descriptors)
    results = (output_descriptors, statistic_ptrs, gate_ptr, gate_strides, exponent_scale, queries, keys)
    # the compiler wants these lists here, as they are
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (tensors, results, 0, WIDTHS, BLOCK_KEYS, STAGES, QUERY_STAGES, CONSUMERS, TURNS)),
                (consume, (tensors, results, 1, WIDTHS, BLOCK_KEYS, STAGES, QUERY_STAGES, CONSUMERS, TURNS)),
                (produce, (tensors, descriptors, WIDTHS, BLOCK_KEYS, STAGES, QUERY_STAGES, CONSUMERS)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (tensors, results, 0, WIDTHS, BLOCK_KEYS, STAGES, QUERY_STAGES, CONSUMERS, TURNS)),
                (consume, (tensors, results, 1, WIDTHS, BLOCK_KEYS, STAGES, QUERY_STAGES, CONSUMERS, TURNS)),
                (consume, (tensors, results, 2, WIDTHS, BLOCK_KEYS, STAGES, QUERY_STAGES, CONSUMERS, TURNS)),
                (produce, (tensors, descriptors, WIDTHS, BLOCK_KEYS, STAGES, QUERY_STAGES, CONSUMERS)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )
