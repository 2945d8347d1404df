"""Attention for Hopper in Gluon, the emulator's subject: a partition that loads by TMA, two that compute by wgmma.

Queries, keys and values are [heads * N, D] bfloat16. A program takes every `num_programs`-th tile of 2 x BM queries. A
consumer issues Q K of the next tile of keys and P V of the last one before the softmax, and waits for P V after it.
"""

# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false
# what only a Gluon compiler understands

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def ring(count, STAGES: gl.constexpr):
    """The place of the count-th tile in a ring, and the parity of its phase."""
    return count % STAGES, (count // STAGES) & 1


@gluon.jit
def producer(
    inputs, shared, barriers, tiles, N, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    q_in, k_in, v_in = inputs
    q_s, k_s, v_s, _ = shared
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
    turn, count = 0, 0  # turn: the parity of q_full's phase
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row = tile * 2 * BM
        first = row // N * N
        mbarrier.wait(q_free, turn ^ 1)
        mbarrier.expect(q_full, 2 * BM * D * 2)
        tma.async_copy_global_to_shared(q_in, [row, 0], q_full, q_s.index(0))
        tma.async_copy_global_to_shared(q_in, [row + BM, 0], q_full, q_s.index(1))
        for i in range(0, N, BN):
            s, phase = ring(count, STAGES)
            mbarrier.wait(k_free.index(s), phase ^ 1)
            mbarrier.expect(k_full.index(s), BN * D * 2)
            tma.async_copy_global_to_shared(k_in, [first + i, 0], k_full.index(s), k_s.index(s))
            mbarrier.wait(v_free.index(s), phase ^ 1)
            mbarrier.expect(v_full.index(s), BN * D * 2)
            tma.async_copy_global_to_shared(v_in, [first + i, 0], v_full.index(s), v_s.index(s))
            count += 1
        turn ^= 1


@gluon.jit
def softmax(S, m, total, t, scale):
    """exp2 of the scaled scores, the running row statistics (t: of the entropy), and what the old ones shrink by."""
    new = gl.maximum(m, gl.max(S, 1))
    x = gl.fma(S, scale, gl.zeros_like(S) - (new * scale)[:, None])
    p = gl.exp2(x)
    d = gl.where(m == float("-inf"), 0.0, (m - new) * scale)
    a = gl.exp2(d)
    t = a * (t + total * d) + gl.sum(p * x, 1)
    total = a * total + gl.sum(p, 1)
    return new, total, t, p, a


@gluon.jit
def consumer(
    shared, barriers, out, entropy, gate, tiles, N, scale,
    WG: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    q_s, k_s, v_s, o_s = shared
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
    LS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    LO: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LP: gl.constexpr = gl.DotOperandLayout(0, LO, 2)
    RS: gl.constexpr = gl.SliceLayout(1, LS)
    RO: gl.constexpr = gl.SliceLayout(1, LO)
    zero = gl.full([BM, BN], 0.0, gl.float32, LS)
    q = q_s.index(WG)
    turn, count = 0, 0  # turn: the parity of q_full's phase
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row = tile * 2 * BM + WG * BM
        m = gl.full([BM], float("-inf"), gl.float32, RS)
        total = gl.full([BM], 0.0, gl.float32, RS)
        t = gl.full([BM], 0.0, gl.float32, RS)
        acc = gl.full([BM, D], 0.0, gl.float32, LO)
        mbarrier.wait(q_full, turn)
        s, phase = ring(count, STAGES)
        mbarrier.wait(k_full.index(s), phase)
        S = warpgroup_mma(q, k_s.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
        S = warpgroup_mma_wait(0, deps=[S])
        mbarrier.arrive(k_free.index(s))
        m, total, t, p, a = softmax(S, m, total, t, scale)
        P = gl.convert_layout(p.to(gl.bfloat16), LP)
        for _ in range(BN, N, BN):
            before, parity = ring(count, STAGES)
            count += 1
            s, phase = ring(count, STAGES)
            mbarrier.wait(k_full.index(s), phase)
            S_next = warpgroup_mma(q, k_s.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(before), parity)
            acc_next = warpgroup_mma(P, v_s.index(before), acc, is_async=True)
            S = warpgroup_mma_wait(1, deps=[S_next])
            mbarrier.arrive(k_free.index(s))
            m, total, t, p, a = softmax(S, m, total, t, scale)
            P_next = gl.convert_layout(p.to(gl.bfloat16), LP)
            acc, P = warpgroup_mma_wait(0, deps=[acc_next, P_next])
            mbarrier.arrive(v_free.index(before))
            acc = acc * gl.convert_layout(a, RO)[:, None]
        mbarrier.arrive(q_free)
        s, phase = ring(count, STAGES)
        mbarrier.wait(v_full.index(s), phase)
        acc = warpgroup_mma(P, v_s.index(s), acc)
        mbarrier.arrive(v_free.index(s))
        acc = acc / gl.convert_layout(total, RO)[:, None] * gl.load(gate + row // N)
        tma.store_wait(0)
        o_s.index(WG).store(acc.to(gl.bfloat16))
        fence_async_shared()
        tma.async_copy_shared_to_global(out, [row, 0], o_s.index(WG))
        rows = row + gl.arange(0, BM, RS)
        gl.store(entropy + rows, (gl.log2(total) - t / total) * 0.6931471805599453, mask=rows < tiles * 2 * BM)
        count += 1
        turn ^= 1
    tma.store_wait(0)


@gluon.jit
def attention(
    q_in, k_in, v_in, out, entropy, gate, tiles, N, scale,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    L: gl.constexpr = mbarrier.MBarrierLayout()
    q_s = gl.allocate_shared_memory(gl.bfloat16, [2, BM, D], q_in.layout)
    k_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, D], k_in.layout)
    v_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, D], v_in.layout)
    o_s = gl.allocate_shared_memory(gl.bfloat16, [2, BM, D], out.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], L)
    q_free = gl.allocate_shared_memory(gl.int64, [1], L)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], L)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], L)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], L)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], L)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_free, count=2)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(k_free.index(s), count=2)
        mbarrier.init(v_full.index(s), count=1)
        mbarrier.init(v_free.index(s), count=2)
    fence_async_shared()
    barriers = (q_full, q_free, k_full, k_free, v_full, v_free)
    shared = (q_s, k_s, v_s, o_s)
    gl.warp_specialize(
        [
            (consumer, (shared, barriers, out, entropy, gate, tiles, N, scale, 0, BM, BN, D, STAGES)),
            (consumer, (shared, barriers, out, entropy, gate, tiles, N, scale, 1, BM, BN, D, STAGES)),
            (producer, ((q_in, k_in, v_in), shared, barriers, tiles, N, BM, BN, D, STAGES)),
        ],
        [4, 1],
        [232, 24],
    )
