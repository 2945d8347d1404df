"""The forward for Hopper: executed by the emulator in every order, with planted faults, and compiled without a card."""

import importlib.util
import json
import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compiled import SHARED_LIMITS, answers, run_python
from headscope_kernels.attention.configuration import ForwardConfiguration
from headscope_kernels.attention.forward.candidates import candidates
from headscope_kernels.attention.hopper import pingpong
from headscope_kernels.attention.hopper.pingpong_arguments import pingpong_arguments
from headscope_kernels.attention.hopper.schedules import GLUON_SCHEDULES, HOPPER, unserved
from hopper import MODES, EmulationError, Statistics, run

HALF, BRAIN = torch.float16, torch.bfloat16
# small key tiles: the emulator's time goes by elements
SMALL = ForwardConfiguration(128, 32, num_warps=4, num_stages=2, descriptors=True, schedule="pingpong")


@dataclass(frozen=True)
class Call:
    """One call: [batch, heads, queries, dim] against [batch, kv_heads, keys, dim], laid out as models have them."""

    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    queries: int = 150
    keys: int = 77
    dim: int = 64
    dtype: torch.dtype = BRAIN
    entropy: bool = True
    gate: bool = True
    programs: int = 2
    configuration: ForwardConfiguration = SMALL


def tensors(call: Call) -> dict[str, Tensor]:
    torch.manual_seed(0)

    def normal(tokens: int, heads: int) -> Tensor:
        return torch.randn(call.batch, tokens, heads, call.dim).to(call.dtype).transpose(1, 2)

    query, key, value = normal(call.queries, call.heads), *(normal(call.keys, call.kv_heads) for _ in range(2))
    gate = torch.rand(call.batch, call.heads)
    gate[0, 0] = 0
    # what isn't written shows
    return {
        "query": query,
        "key": key,
        "value": value,
        "gate": gate,
        "output": torch.full_like(query, 7.0),
        "entropy": torch.full(query.shape[:3], -9.0),
    }


def emulate(
    call: Call, own: dict[str, Tensor] | None = None, module: ModuleType = pingpong, **order: Any
) -> tuple[dict[str, Tensor], Statistics]:
    own = own or tensors(call)
    arguments = pingpong_arguments(
        *(own[name] for name in ("query", "key", "value", "output")),
        scale=call.dim**-0.5,
        gate=own["gate"] if call.gate else None,
        statistic_outputs=[own["entropy"]] if call.entropy else [],
        configuration=call.configuration,
    )
    return own, run(module.attention_pingpong_kernel, (call.programs,), arguments, **order)


def check(call: Call, own: dict[str, Tensor]) -> None:
    query, key, value, gate = (own[name].double() for name in ("query", "key", "value", "gate"))
    key, value = (tensor.repeat_interleave(call.heads // call.kv_heads, 1) for tensor in (key, value))
    p = (query @ key.mT * call.dim**-0.5).softmax(-1)
    gate = gate[:, :, None, None] if call.gate else torch.ones(1, 1, 1, 1)
    truth, size = p @ value * gate, p @ value.abs() * gate
    # the weights and the output are rounded to 16 bits; float32's errors are far below the last tenth
    half = torch.finfo(call.dtype).eps / 2
    assert ((own["output"].double() - truth).abs() <= 1.1 * half * (size + truth.abs()) + 2**-24).all()
    if call.entropy:
        # 1e-5 + 2^-23 (2 + sqrt(dim)) L, the contract of docs/statistics.md
        largest = float((query.norm(dim=-1).amax() * key.norm(dim=-1).amax()) * call.dim**-0.5)
        bound = 1e-5 + 2**-23 * (2 + math.sqrt(call.dim)) * largest
        entropy = -torch.special.xlogy(p, p).sum(-1)
        torch.testing.assert_close(own["entropy"].double(), entropy, rtol=0, atol=bound)
    else:
        assert (own["entropy"] == -9.0).all()


CALLS = {
    "ragged": Call(),
    "one key tile": Call(keys=20),
    "a full key tile": Call(keys=64),
    "one key": Call(keys=1, heads=1),
    "three groups": Call(configuration=replace(SMALL, block_queries=192, num_stages=3), queries=200),
    "no turns": Call(configuration=replace(SMALL, schedule="overlapped"), keys=128),
    "two chunks, 40": Call(dim=40, keys=70),
    "two chunks, 80": Call(dim=80, dtype=HALF),
    "padded": Call(dim=24, dtype=HALF),
    "wide": Call(dim=128, queries=70, keys=50),
    "many tiles, few programs": Call(batch=2, kv_heads=2, queries=300, keys=40, programs=1),
    "programs without work": Call(queries=10, programs=5),
    "output only": Call(entropy=False, gate=False),
}


@pytest.mark.parametrize("name", CALLS)
def test_output_and_entropy_equal_float64(name: str):
    for seed in range(2):
        check(CALLS[name], emulate(CALLS[name], seed=seed)[0])


@pytest.mark.parametrize("starve", ["produce", "consume 0", "consume 1"])
@pytest.mark.parametrize("schedule", ["overlapped", "pingpong"])
def test_right_when_one_of_them_is_held_back(schedule: Any, starve: str):
    call = Call(queries=260, keys=70, heads=1, programs=1, configuration=replace(SMALL, schedule=schedule))
    check(call, emulate(call, starve=starve)[0])


@pytest.mark.parametrize("mode", MODES)
def test_right_in_every_order(mode: str):
    call = Call(queries=260, keys=70, heads=1, programs=1)
    for seed in range(3):
        check(call, emulate(call, mode=mode, seed=seed)[0])


@pytest.mark.full
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_right_for_any_call_in_any_order(data: st.DataObject):
    groups, stages = data.draw(st.sampled_from([2, 3])), data.draw(st.integers(2, 4))
    schedule: Any = data.draw(st.sampled_from(["overlapped", "pingpong"]))
    heads = data.draw(st.sampled_from([1, 2, 4]))
    call = Call(
        batch=data.draw(st.integers(1, 2)),
        heads=heads,
        kv_heads=data.draw(st.sampled_from([count for count in (1, 2, 4) if heads % count == 0])),
        queries=data.draw(st.integers(1, 400)),
        keys=data.draw(st.integers(1, 130)),
        dim=data.draw(st.sampled_from([8, 16, 40, 64, 80, 128])),
        dtype=data.draw(st.sampled_from([HALF, BRAIN])),
        entropy=data.draw(st.booleans()),
        gate=data.draw(st.booleans()),
        programs=data.draw(st.integers(1, 4)),
        configuration=replace(SMALL, block_queries=64 * groups, num_stages=stages, schedule=schedule),
    )
    mode, seed = data.draw(st.sampled_from(list(MODES))), data.draw(st.integers(0, 10**6))
    check(call, emulate(call, mode=mode, seed=seed)[0])


def test_the_softmax_runs_under_the_product_of_the_tile_before():
    call = Call(heads=1, queries=128, keys=160, programs=1)
    statistics = emulate(call)[1]
    softmaxes = statistics.of("exp2", "consume")
    under = [event for event in softmaxes if any("value_ring" in name for name in event.in_flight)]
    # of each of two groups, all tiles but the first
    assert len(under) == 2 * (160 // 32 - 1)
    assert len(softmaxes) == len(under) + 2


def test_what_is_not_a_number_stays_in_its_row():
    call = Call(heads=1, queries=130, keys=70, gate=False)
    own = tensors(call)
    own["query"][0, 0, 5] = float("nan")
    own["query"][0, 0, 90, 3] = float("inf")
    emulate(call, own)
    rest = [row for row in range(130) if row not in (5, 90)]
    assert own["output"][0, 0, [5, 90]].isnan().all()
    assert own["entropy"][0, 0, [5, 90]].isnan().all()
    assert own["output"][0, 0, rest].isfinite().all()
    assert own["entropy"][0, 0, rest].isfinite().all()


def test_logits_far_apart():
    """A maximum that moves by thousands from tile to tile, both ways."""
    call = Call(heads=1, queries=64, keys=96, dim=16, dtype=HALF, gate=False)
    own = tensors(call)
    own["query"][:] = 100.0
    own["key"][:] = torch.linspace(-60, 60, 96).to(HALF)[None, None, :, None]
    emulate(call, own)
    check(call, own)
    own["key"] = own["key"].flip(2)
    own["query"][:, :, ::2] = -100.0
    emulate(call, own)
    check(call, own)


KEYS_FREED = "            mbarrier.arrive(key_free.index(slot))\n"
VALUES_FREED = "            mbarrier.arrive(value_free.index(before))\n"
LOGITS = "            logits = warpgroup_mma_wait(len(WIDTHS), deps=[issued])\n"
OUTPUTS = "            result, fresh = await_outputs(sums, fresh)\n"
KEYS_AWAITED = "            mbarrier.wait(key_full.index(slot), phase)\n            if TURNS"
VALUES_AWAITED = "            mbarrier.wait(value_full.index(slot), phase)\n            result"
QUERY_AWAITED = "        mbarrier.wait(query_full.index(query_slot), query_use // QUERY_STAGES & 1)\n"
# what is changed in the kernel, which must be found
FAULTS = {
    "keys aren't waited for": (KEYS_AWAITED, "            if TURNS"),
    "values aren't waited for": (VALUES_AWAITED, "            result"),
    "the first values aren't waited for": ("        mbarrier.wait(value_full.index(slot), phase)\n\n", "\n"),
    "the query isn't waited for": (QUERY_AWAITED, ""),
    "the loader doesn't wait for keys": (
        "                mbarrier.wait(key_free.index(slot), (key_use // STAGES & 1) ^ 1)\n",
        "",
    ),
    "the loader doesn't wait for values": (
        "                mbarrier.wait(value_free.index(slot), (value_use // STAGES & 1) ^ 1)\n",
        "",
    ),
    "the loader waits for the other phase": ("(key_use // STAGES & 1) ^ 1", "key_use // STAGES & 1"),
    "the loader doesn't wait for queries": (
        "                mbarrier.wait(query_free.index(slot), (query_use // QUERY_STAGES & 1) ^ 1)\n",
        "",
    ),
    "keys aren't freed": (LOGITS + KEYS_FREED, LOGITS),
    "values aren't freed": (VALUES_FREED, ""),
    "the last values aren't freed": (
        "        mbarrier.arrive(value_free.index(slot))\n        key_use",
        "        key_use",
    ),
    "the query isn't freed": ("        mbarrier.arrive(query_free.index(query_slot))\n", ""),
    "values are freed under the product": (OUTPUTS, VALUES_FREED + OUTPUTS),
    "keys are freed under the product": (LOGITS + KEYS_FREED, KEYS_FREED + LOGITS),
    "a wait for too few products": ("warpgroup_mma_wait(len(WIDTHS), deps", "warpgroup_mma_wait(len(WIDTHS) + 1, deps"),
    "no fence before the output leaves": ("        fence_async_shared()\n        for index", "        for index"),
    "the output isn't awaited": ("        tma.store_wait(0)\n", ""),
    "a turn isn't given on": ("                mbarrier.arrive(turns.index((GROUP + 1) % CONSUMERS))\n", ""),
    "nobody begins": ("(turn & 1) ^ (GROUP == 0)", "turn & 1"),
    "everybody begins": ("(turn & 1) ^ (GROUP == 0)", "(turn & 1) ^ 1"),
}


def emulate_all(calls: list[Call], module: ModuleType) -> None:
    for call in calls:
        for seed in range(3):
            emulate(call, module=module, seed=seed)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, tmp_path: Path):
    old, new = FAULTS[name]
    source = Path(pingpong.__file__).read_text()
    assert source.count(old) == 1
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutant", path)
    assert spec is not None
    assert spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    # many key tiles, and many query tiles of one
    many = Call(heads=1, queries=140, keys=128, dim=16, programs=1)
    short = replace(many, queries=500, keys=32, configuration=replace(SMALL, num_stages=4))
    with pytest.raises(EmulationError):
        emulate_all([many, short], mutant)


COMPILED = """
import json, sys
from headscope_kernels.attention.configuration import ForwardConfiguration
from headscope_kernels.attention.inspection.forward import Problem, report
for line in sys.stdin:
    entry = json.loads(line)
    own = ForwardConfiguration(**entry.pop("configuration"))
    result = report(Problem(statistics=tuple(entry.pop("statistics")), configuration=own, **entry), "sm_90")
    print(json.dumps({
        "spilled": result.loop.get("spill", 0),
        "shared_bytes": result.shared_bytes,
        "per_score": result.instructions_per_score,
        "misplaced": result.misplaced,
        "overlapped": result.overlapped,
    }), flush=True)
"""


def shape_of(dim: int, keys: int = 4096) -> list[dict[str, Any]]:
    """The candidates of this kernel for a head dimension, as fields."""
    found = candidates(BRAIN, dim, dim, 4096, keys, HOPPER)
    return [asdict(value) for value in found.values() if value.schedule in GLUON_SCHEDULES]


def compiled_as(problems: list[dict[str, Any]]) -> list[dict[str, Any]]:
    results = answers(COMPILED, problems)
    for problem, result in zip(problems, results, strict=True):
        assert result["spilled"] == 0, problem
        assert result["shared_bytes"] <= SHARED_LIMITS["sm_90"], problem
        assert result["misplaced"] == [], problem
        # what all this is for, which the assembler may undo: it moves waits
        assert result["overlapped"] == 1.0, problem
    return results


def test_compiled_the_softmax_stays_under_products():
    problems = [{"dim": dim, "statistics": ["entropy"], "configuration": shape_of(dim)[0]} for dim in (64, 128)]
    counts = [result["per_score"] for result in compiled_as(problems)]
    # issued instructions; one more a score is worth 0.008 cycles of a multiprocessor, both products of 64 channels 0.06
    assert counts[0] <= 7.8
    assert counts[1] <= 8.4


@pytest.mark.full
@pytest.mark.parametrize("dim", [64, 128])
def test_the_entropy_costs_an_instruction_a_score(dim: int):
    problems = [{"dim": dim, "statistics": names, "configuration": shape_of(dim)[0]} for names in (["entropy"], [])]
    with_entropy, without = (result["per_score"] for result in compiled_as(problems))
    assert with_entropy - without <= 1.25


@pytest.mark.full
@pytest.mark.parametrize("dim", [40, 64, 128, 160])
def test_every_candidate_compiles(dim: int):
    problems = [
        {"dim": dim, "keys": keys, "gate": gate, "statistics": ["entropy"], "configuration": configuration}
        for keys, gate in ((4096, True), (77, False))
        for configuration in shape_of(dim, keys)[: None if gate else 1]
    ]
    for problem, result in zip(problems, compiled_as(problems), strict=True):
        assert result["per_score"] <= 9.5, problem


LAUNCHED = """
import json, sys, torch, stand_in
from headscope_kernels.attention import STATISTICS, BoundStatistic, attention_forward
from headscope_kernels.attention.forward import launch as forward
from headscope_kernels.attention.hopper.schedules import GLUON_SCHEDULES, HOPPER, unserved
from headscope_kernels.attention.configuration import ForwardConfiguration
from headscope_kernels.attention.forward.candidates import candidates
stand_in.install()
forward.device_target = lambda tensor: ("cuda", 90)
configuration = ForwardConfiguration(128, 128, descriptors=True, schedule="pingpong")

def call(batch):
    shapes = {"query": (batch, 4, 200, 64), "key": (batch, 2, 77, 64), "value": (batch, 2, 77, 64)}
    own = {name: torch.zeros(*shape, dtype=torch.float16) for name, shape in shapes.items()}
    own |= {"output": torch.zeros_like(own["query"]), "gate": torch.ones(batch, 4)}
    own["entropy"] = torch.zeros(batch, 4, 200)
    attention_forward(
        own["query"], own["key"], own["value"], attn_mask=None, is_causal=False, scale=0.125, gate=own["gate"],
        statistics=[BoundStatistic(STATISTICS["entropy"](()))], statistic_outputs=[own["entropy"]],
        output=own["output"], configuration=configuration,
    )
    binary, programs, arguments = stand_in.launched[-1]
    names = {tensor.data_ptr(): name for name, tensor in own.items()}

    def readable(value):
        if hasattr(value, "block_shape"):
            return [names[value.base.data_ptr()], list(value.shape), list(value.strides), list(value.block_shape)]
        if isinstance(value, torch.Tensor):
            return names[value.data_ptr()]
        return [readable(each) for each in value] if isinstance(value, tuple) else str(value)

    return [hash(binary), programs, [readable(value) for value in arguments]]

print(json.dumps([call(batch) for batch in (2, 2, 40)]))
"""


def test_later_launches_are_the_first_on_other_tensors():
    first, again, larger = json.loads(run_python(LAUNCHED))
    assert first == again
    binary, programs, arguments = first
    assert programs == 2 * 4 * 2
    described = [value for value in arguments if isinstance(value, list) and value[:1] in (["query"], ["output"])]
    assert described == [
        [name, [2, 4, 200, 64], [4 * 200 * 64, 200 * 64, 64, 1], [1, 1, 64, 64]] for name in ("query", "output")
    ]
    assert ["entropy"] in arguments
    # no more programs than an H100 has multiprocessors, which go on to further tiles
    assert larger[:2] == [binary, 132]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": {"fill", "gate"}}, r"fill \(not tried\)"),
        ({"features": {"mask"}}, r"mask \(the warps that compute"),
        ({"features": {"unaligned output"}}, r"unaligned output \(descriptors need"),
        ({"dtype": torch.float32}, "torch.float32, expected float16 or bfloat16"),
        ({"dim": 161, "dim_v": 161}, "head dimensions 161 and 161, expected 1 to 160"),
        ({"dim_v": 32}, "head dimensions 64 and 32, expected them to be equal"),
        ({"keys": 0}, "0 keys"),
        ({"target": None}, "target None, expected"),
        ({"target": ("cuda", 100)}, r"target \('cuda', 100\), expected"),
        ({"configuration": replace(SMALL, block_queries=64)}, "a tile of 64 x 32, 4 warps"),
        ({"configuration": replace(SMALL, num_warps=8)}, "a tile of 128 x 32, 8 warps"),
        ({"configuration": replace(SMALL, num_stages=1)}, "1 stages, expected at least 2"),
        ({"configuration": replace(SMALL, block_keys=256, num_stages=4)}, "bytes of shared memory"),
    ],
)
def test_what_it_refuses(change: dict[str, Any], message: str):
    call = {"configuration": SMALL, "dtype": HALF, "dim": 64, "dim_v": 64, "keys": 77, "target": HOPPER}
    assert unserved(**call, features={"gate", "entropy"}) is None
    refusal = unserved(**{**call, **change})
    assert refusal is not None
    assert re.search(message, refusal), refusal


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": torch.zeros(1, 2, 150, 64, dtype=HALF)}, "must share one of"),
        ({"key": torch.zeros(1, 1, 77, 64, dtype=HALF)}, "must share one of"),
        ({"key": torch.zeros(1, 1, 77, 32, dtype=BRAIN)}, "don't go together"),
        ({"value": torch.zeros(1, 1, 76, 64, dtype=BRAIN)}, "don't go together"),
        ({"output": torch.zeros(1, 2, 149, 64, dtype=BRAIN)}, "don't go together"),
        ({"key": torch.zeros(1, 3, 77, 64, dtype=BRAIN)}, r"heads \(2\) must be a multiple of key's \(3\)"),
        ({"entropy": torch.zeros(1, 150, 2).transpose(1, 2)}, "must be contiguous float32"),
    ],
)
def test_tensors_that_do_not_go_together(change: dict[str, Tensor], message: str):
    call = Call()
    with pytest.raises(ValueError, match=message):
        emulate(call, {**tensors(call), **change})


def test_chunks_that_hold_no_head():
    call = Call(configuration=replace(SMALL, dim_widths=(32, 16)))
    with pytest.raises(ValueError, match=r"chunks \(32, 16\) don't go together"):
        emulate(call)
