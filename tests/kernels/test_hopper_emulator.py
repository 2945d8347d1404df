"""The emulator of Hopper's asynchrony: right kernels come out right in any order, and planted faults are found."""

import importlib.util
import itertools
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hopper import MODES, EmulationError, Statistics, run

SUBJECT = Path(__file__).with_name("small_attention.py")
HEADS, N, BM, BN, DIM = 2, 64, 16, 16, 32
B: Any = gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0])


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def subject() -> ModuleType:
    return load(SUBJECT)


def descriptor(memory: Tensor, block: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return TensorDescriptor.from_tensor(memory, block, layout)


def attend(module: ModuleType, *, programs: int = 2, stages: int = 2, **order: Any) -> tuple[Statistics, dict]:
    """The subject's outputs, over memory that held other values before."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(HEADS * N, DIM).bfloat16() for _ in range(3))
    gate = torch.rand(HEADS)
    out, entropy = torch.full_like(q, 7.0), torch.full((HEADS * N,), -9.0)
    arguments = {
        "q_in": descriptor(q, [BM, DIM]),
        "k_in": descriptor(k, [BN, DIM]),
        "v_in": descriptor(v, [BN, DIM]),
        "out": descriptor(out, [BM, DIM]),
        "entropy": entropy,
        "gate": gate,
        "tiles": HEADS * N // (2 * BM),
        "N": N,
        "scale": DIM**-0.5 / math.log(2),
    }
    arguments |= {"BM": BM, "BN": BN, "D": DIM, "STAGES": stages}
    statistics = run(module.attention, (programs,), arguments, **order)
    return statistics, {"q": q, "k": k, "v": v, "gate": gate, "out": out, "entropy": entropy}


def check(tensors: dict[str, Tensor]) -> None:
    q, k, v = (tensors[name].double().view(HEADS, N, DIM) for name in "qkv")
    p = (q @ k.transpose(1, 2) * DIM**-0.5).softmax(-1)
    gate = tensors["gate"].double().view(HEADS, 1, 1)
    truth, bound = p @ v * gate, (p @ v.abs()) * gate
    # P and the output are rounded to 8 bits of mantissa; float32's errors are far below the last 10 %
    error = (tensors["out"].double().view_as(truth) - truth).abs()
    assert (error <= 1.1 * 2**-9 * (bound + truth.abs())).all()
    entropy = -(p * p.log()).sum(-1)
    torch.testing.assert_close(tensors["entropy"].double().view_as(entropy), entropy, rtol=0, atol=3e-6)


@pytest.mark.parametrize("mode", MODES)
def test_attention_is_right_in_every_order(subject: ModuleType, mode: str) -> None:
    for seed in range(10):
        check(attend(subject, mode=mode, seed=seed)[1])


@pytest.mark.parametrize("starve", ["producer", "consumer 0", "consumer 1"])
def test_attention_is_right_when_one_partition_is_held_back(subject: ModuleType, starve: str) -> None:
    for seed, stages in itertools.product(range(2), (1, 3)):
        check(attend(subject, starve=starve, seed=seed, stages=stages, programs=1)[1])


def test_an_order_is_repeatable(subject: ModuleType) -> None:
    events = [attend(subject, seed=seed)[0].events for seed in (3, 3, 4)]
    assert events[0] == events[1]
    assert events[0] != events[2]


def test_the_schedule_can_be_asserted(subject: ModuleType, tmp_path: Path) -> None:
    """P V of a tile is in flight during the softmax of the next; in a kernel that waits too early it isn't."""

    def overlapped(module: ModuleType) -> list[bool]:
        softmaxes = attend(module)[0].of("exp2", "consumer")
        assert {event.partition for event in softmaxes} == {"consumer 0", "consumer 1"}
        return [any("@ v_s" in name for name in event.in_flight) for event in softmaxes]

    # the first softmax of a tile of queries has no P yet
    tiles, keys = HEADS * N // (2 * BM), N // BN
    assert sum(overlapped(subject)) == 2 * tiles * (keys - 1)
    early = mutant(tmp_path, ("warpgroup_mma_wait(1, deps=[S_next])", "warpgroup_mma_wait(0, deps=[S_next])"))
    assert not any(overlapped(early))


def mutant(folder: Path, *edits: tuple[str, str]) -> ModuleType:
    """The subject with pieces of its source, which must occur once, replaced by others."""
    source = SUBJECT.read_text()
    for old, new in edits:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    path = folder / "mutant.py"
    path.write_text(source)
    return load(path)


K_WAIT = "            mbarrier.wait(k_full.index(s), phase)\n            S_next"
V_ARRIVE = "            mbarrier.arrive(v_free.index(before))\n"
V_WAIT = "            acc, P = warpgroup_mma_wait(0, deps=[acc_next, P_next])\n"
S_WAIT = "        S = warpgroup_mma_wait(0, deps=[S])\n"
K_ARRIVE = "        mbarrier.arrive(k_free.index(s))\n        m,"
END = "    tma.store_wait(0)\n"
Q_ARRIVE = "        mbarrier.arrive(q_free)\n"
# what is changed, and the errors that this may be found by
FAULTS = {
    "K isn't waited for": ((K_WAIT, "            S_next"), "race: .*k_s|k_s.*, which holds nothing"),
    "V isn't waited for": (
        ("            mbarrier.wait(v_full.index(before), parity)\n", ""),
        "race: .*v_s|v_s.*, which holds nothing",
    ),
    "Q isn't waited for": (("        mbarrier.wait(q_full, turn)\n", ""), "race: .*q_s|q_s.*, which holds nothing"),
    "a consumer waits for the other phase": (
        (K_WAIT, K_WAIT.replace("phase", "phase ^ 1")),
        "race: .*k_s|k_s.*, which holds nothing|deadlock: .*parity 1 of k_full",
    ),
    "the producer waits for the other phase": (
        ("k_free.index(s), phase ^ 1", "k_free.index(s), phase"),
        r"deadlock: .*producer 2 waits for parity 0 of k_free\[0\].*k_free\[0\] \(0 phases completed; in the current "
        "one 0 of 2 arrivals",
    ),
    "a phase never flips": (
        ("return count % STAGES, (count // STAGES) & 1", "return count % STAGES, 0"),
        "race: |parity can't tell|more than its count",
    ),
    "the producer doesn't wait": (
        ("            mbarrier.wait(v_free.index(s), phase ^ 1)\n", ""),
        "race: producer 2's TMA load of v_in",
    ),
    "V isn't freed": ((V_ARRIVE, ""), "deadlock: .*producer 2 waits for parity 0 of v_free"),
    "Q isn't freed": ((Q_ARRIVE, ""), "deadlock: .*producer 2 waits for parity 0 of q_free"),
    "V is freed twice": ((V_ARRIVE, 2 * V_ARRIVE), "race: .*v_s|parity can't tell|more than its count"),
    "an arrival too few": (
        ("mbarrier.init(q_free, count=2)", "mbarrier.init(q_free, count=3)"),
        "deadlock: .*q_free .*2 of 3 arrivals",
    ),
    "an arrival too many": (
        ("mbarrier.init(q_free, count=2)", "mbarrier.init(q_free, count=1)"),
        "race: .*q_s|parity can't tell|more than its count",
    ),
    "V is freed while P V reads it": ((V_WAIT + V_ARRIVE, V_ARRIVE + V_WAIT), "race: .*v_s"),
    "K is freed while Q K reads it": (
        (S_WAIT + K_ARRIVE, K_ARRIVE.replace("m,", S_WAIT.lstrip() + "        m,")),
        "race: .*k_s",
    ),
    "Q is freed before its last use": (
        ("        mbarrier.wait(q_full, turn)\n", "        mbarrier.wait(q_full, turn)\n" + Q_ARRIVE),
        "race: .*q_s|parity can't tell|more than its count",
    ),
    "no fence after a store": (("        fence_async_shared()\n        tma", "        tma"), "no fence_async_shared"),
    "the last TMA store isn't waited for": (("    tma.store_wait(0)\n\n", "\n"), "ended without a store_wait"),
    "a TMA store's memory is overwritten": (
        ("        tma.store_wait(0)\n        o_s", "        o_s"),
        "race: .*store of o_s.* while .*TMA store to out is in flight",
    ),
    "a token is used as a tensor": ((S_WAIT, ""), "used before warpgroup_mma_wait"),
    "a wait lets its wgmma go on": ((V_WAIT, V_WAIT.replace("(0,", "(1,")), "still in flight"),
    "a wgmma is left in flight": (
        ("    tma.store_wait(0)\n\n", END + "    warpgroup_mma(q, q.permute((1, 0)), zero, is_async=True)\n\n"),
        "consumer . ended with q_s.* in flight",
    ),
    "an operand in the accumulator's layout": (
        ("P_next = gl.convert_layout(p.to(gl.bfloat16), LP)", "P_next = gl.convert_layout(p.to(gl.bfloat16), LO)"),
        "expected of the operand in registers",
    ),
    "three arrivals where two are left": ((Q_ARRIVE, Q_ARRIVE.replace(")", ", count=3)")), "3 arrivals are more than"),
    "bytes too few": (
        ("mbarrier.expect(k_full.index(s), BN * D * 2)", "mbarrier.expect(k_full.index(s), BN * D)"),
        r"no expect\(\) has counted",
    ),
    "bytes too many": (
        ("mbarrier.expect(q_full, 2 * BM", "mbarrier.expect(q_full, 4 * BM"),
        "deadlock: .*q_full .*1 of 1 arrivals, 2048 bytes still expected",
    ),
    "unlike layouts": (("gl.convert_layout(a, RO)[:, None]", "a[:, None]"), "blocks of one layout were expected"),
    "a slice of another axis": (('m = gl.full([BM], float("-inf"), gl.float32, RS)', "m = zero[:, None]"), "slice"),
    "K isn't transposed": (
        (".permute((1, 0)), zero, use_acc=False, is_async=True)\n        S =", ", zero, is_async=True)\n        S ="),
        "don't go together",
    ),
    "rows that aren't there": (("entropy + rows,", "entropy + rows + N,"), "entropy: element .* isn't the tensor's"),
    "an offset of over 31 bits": (("gate + row // N", "gate + (row + 4) * 2**30"), "-2147483648 and 2147483647"),
    "a constexpr known at run time only": (
        (
            "ring(count, STAGES)\n            mbarrier.wait(k_free",
            "ring(count, tiles)\n            mbarrier.wait(k_free",
        ),
        "STAGES is a constexpr",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_in_every_order(name: str, tmp_path: Path) -> None:
    edit, message = FAULTS[name]
    module = mutant(tmp_path, edit)
    for mode in MODES:
        with pytest.raises((EmulationError, OverflowError), match=message):
            attend(module, mode=mode, programs=1)


@gluon.jit
def laps(reached, rounds, S: gl.constexpr):
    for _ in range(rounds):
        mbarrier.arrive(reached)


@gluon.jit
def spectator(reached, rounds, S: gl.constexpr):
    for i in range(rounds):
        mbarrier.wait(reached, i & 1)


@gluon.jit
def race_of_laps(rounds, S: gl.constexpr):
    reached = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(reached, count=1)
    gl.warp_specialize([(spectator, (reached, rounds, S)), (laps, (reached, rounds, S))], [1], [24])


def test_a_waiter_may_not_lag_two_phases_behind() -> None:
    """Nobody waits for the spectator: at the third lap, the parity it waits for could be the first's."""
    run(race_of_laps, (1,), {"rounds": 1, "S": 0}, starve="spectator")
    with pytest.raises(EmulationError, match=r"spectator 0 waits for a phase .* 0 completed phases; parity can't tell"):
        run(race_of_laps, (1,), {"rounds": 2, "S": 0}, starve="spectator")


@gluon.jit
def runner(reached, told, rounds):
    for _ in range(rounds):
        mbarrier.arrive(reached)
    mbarrier.arrive(told)


@gluon.jit
def latecomer(reached, told, rounds):
    mbarrier.wait(told, 0)
    mbarrier.wait(reached, (rounds - 1) & 1)


@gluon.jit
def told_of_laps(rounds):
    reached = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    told = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(reached, count=1)
    mbarrier.init(told, count=1)
    gl.warp_specialize([(latecomer, (reached, told, rounds)), (runner, (reached, told, rounds))], [1], [24])


def test_who_was_told_of_phases_may_wait_for_the_last_only() -> None:
    for mode in MODES:
        run(told_of_laps, (1,), {"rounds": 5}, mode=mode)


@gluon.jit
def move(source, target, flat, rows, first, COLUMNS: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    tile = gl.allocate_shared_memory(gl.bfloat16, [2, 1, 1, ROWS, COLUMNS], source.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    mbarrier.expect(ready, source.block_type.nbytes)
    tma.async_copy_global_to_shared(source, [gl.program_id(0), 1, first, 8], ready, tile.index(1))
    mbarrier.wait(ready, 0)
    part = tile.index(1).reshape([ROWS, COLUMNS]).slice(ROWS // 2, ROWS // 2, 0)
    x = part.load(LAYOUT)
    row = gl.program_id(0) * (ROWS // 2) + gl.arange(0, ROWS // 2, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT))
    gl.store(flat + row[:, None] * COLUMNS + column[None, :], x.to(gl.float32) / 3, mask=row[:, None] < rows)
    part.store(x + x)
    fence_async_shared()
    tma.async_copy_shared_to_global(target, [gl.program_id(0), 1, first, 8], tile.index(1))
    tma.store_wait(0)


@pytest.mark.parametrize("first", [-3, 2, 6])
def test_tma_fills_with_zeros_and_drops_what_is_outside(first: int) -> None:
    """Blocks of 8 x 16 at (first, 8) of 9 x 20 of a larger tensor; the lower half of each is doubled."""
    torch.manual_seed(0)
    source, target = (torch.randn(2, 3, 9, 24).bfloat16()[..., :20] for _ in range(2))
    flat = torch.zeros(7, 16)
    before, expected = source.clone(), target.clone()
    block = torch.zeros(2, 8, 16)
    rows = slice(max(first, 0), min(first + 8, 9))
    block[:, rows.start - first : rows.stop - first, :12] = source[:, 1, rows, 8:].float()
    arguments = {"flat": flat, "rows": 7, "first": first, "COLUMNS": 16, "ROWS": 8, "LAYOUT": B}
    for name, memory in (("source", source), ("target", target)):
        arguments[name] = descriptor(memory, [1, 1, 8, 16])
    run(move, (2,), arguments, mode="lazy")
    assert torch.equal(source, before)
    # rows 0..3 of the first program, 0..2 of the second
    torch.testing.assert_close(flat, (block[:, 4:] / 3).reshape(8, 16)[:7], rtol=0, atol=0)
    block[:, 4:] *= 2
    expected[:, 1, rows, 8:] = block[:, rows.start - first : rows.stop - first, :12].bfloat16()
    assert torch.equal(target, expected)


@gluon.jit
def load_only(source, flat, WAIT: gl.constexpr):
    tile = gl.allocate_shared_memory(gl.bfloat16, [8, 16], source.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    mbarrier.expect(ready, source.block_type.nbytes)
    tma.async_copy_global_to_shared(source, [0, 0], ready, tile)
    mbarrier.wait(ready, 0, pred=WAIT)
    gl.store(flat, 1.0)


@pytest.mark.parametrize("mode", MODES)
def test_a_load_must_be_waited_for(mode: str) -> None:
    arguments = {"source": descriptor(torch.ones(8, 16).bfloat16(), [8, 16]), "flat": torch.zeros(1)}
    run(load_only, (1,), {**arguments, "WAIT": True}, mode=mode)
    with pytest.raises(EmulationError, match="ended without waiting for main's TMA load of source"):
        run(load_only, (1,), {**arguments, "WAIT": False}, mode=mode)


@gluon.jit
def arithmetic(x, y, out, n, half, LAYOUT: gl.constexpr):
    at = gl.arange(0, 8, LAYOUT)
    a, b = gl.load(x + at), gl.load(y + at)
    gl.store(out + at, a * b + 0.1)
    gl.store(out + 8 + at, (at - 4) // 3 * 10 + (at - 4) % n)
    gl.store(out + 16 + at, gl.where(at < n, a.to(gl.float32) * half, gl.cdiv(n, 2)))


def test_arithmetic_is_tritons() -> None:
    """bfloat16 is rounded at every step, division of integers truncates, a Python number takes the tensor's dtype."""
    torch.manual_seed(0)
    x, y, out = torch.randn(8).bfloat16(), torch.randn(8).bfloat16(), torch.zeros(24)
    layout = gl.BlockedLayout([1], [32], [4], [0])
    run(arithmetic, (1,), {"x": x, "y": y, "out": out, "n": 3, "half": 0.5, "LAYOUT": layout})
    assert torch.equal(out[:8], (x * y + 0.1).float())
    assert out[8:16].tolist() == [-11.0, -10.0, -2.0, -1.0, 0.0, 1.0, 2.0, 10.0]
    with pytest.raises(EmulationError, match="out: element 1 isn't the tensor's"):
        run(arithmetic, (1,), {"x": x, "y": y, "out": out[::2], "n": 3, "half": 0.5, "LAYOUT": layout})
    assert torch.equal(out[16:], torch.where(torch.arange(8) < 3, x.float() * 0.5, 2.0))


def test_two_partitions_may_not_touch_the_same_memory_unordered() -> None:
    out = torch.zeros(8)
    arguments = {"out": out, "LAYOUT": gl.BlockedLayout([1], [32], [4], [0])}
    for starve in ("giver", "taker"):
        run(handed_over, (1,), {**arguments, "TOLD": True}, starve=starve)
        assert out.tolist() == list(range(8))
        out.zero_()
    with pytest.raises(EmulationError, match=r"race: .*load of box isn't ordered after giver 0's store"):
        run(handed_over, (1,), {**arguments, "TOLD": False}, starve="taker")
    with pytest.raises(EmulationError, match="taker 1's load of box, which holds nothing yet"):
        run(handed_over, (1,), {**arguments, "TOLD": False}, starve="giver")


@gluon.jit
def giver(box, full, out, TOLD: gl.constexpr, LAYOUT: gl.constexpr):
    box.store(gl.arange(0, 8, LAYOUT).to(gl.float32))
    mbarrier.arrive(full)


@gluon.jit
def taker(box, full, out, TOLD: gl.constexpr, LAYOUT: gl.constexpr):
    if TOLD:
        mbarrier.wait(full, 0)
    gl.store(out + gl.arange(0, 8, LAYOUT), box.load(LAYOUT))


@gluon.jit
def handed_over(out, TOLD: gl.constexpr, LAYOUT: gl.constexpr):
    box = gl.allocate_shared_memory(gl.float32, [8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    gl.warp_specialize([(giver, (box, full, out, TOLD, LAYOUT)), (taker, (box, full, out, TOLD, LAYOUT))], [4], [24])


def test_errors_say_how_to_see_them_again() -> None:
    with pytest.raises(EmulationError) as raised:
        run(race_of_laps, (3,), {"rounds": 2, "S": 0}, starve="spectator", seed=5)
    assert raised.value.__notes__ == ["program (0, 0, 0), seed 5, mode 'random', starve 'spectator'"]
    with pytest.raises(ValueError, match=r"mode: one of .* was expected, got 'fast'"):
        run(race_of_laps, (1,), {"rounds": 1, "S": 0}, mode="fast")
