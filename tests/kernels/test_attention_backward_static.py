"""The backward kernels compiled for GPUs that are not here: they build, don't spill, and issue what they did before.

Each compilation runs in a process without the interpreter, since nothing compiles in one with it.
"""

import pytest

import compiled

SCRIPT = """
import json, sys
from headscope_kernels.attention.inspection.backward import BackwardProblem, backward_report
from headscope_kernels.attention.inspection.compiling import DTYPES
for line in sys.stdin:
    entry = json.loads(line)
    target = entry.pop("target")
    entry["dtype"] = DTYPES[entry.get("dtype", "bfloat16")]
    entry["statistics"] = tuple(entry.get("statistics", ("entropy",)))
    result = backward_report(BackwardProblem(**entry), target)
    print(json.dumps({
        "registers": result.registers,
        "spill_bytes": result.spill_bytes,
        "shared_bytes": result.shared_bytes,
        "loop": result.loop,
        "opcodes": result.opcodes,
        "per_score": result.instructions_per_score if result.loop else None,
    }), flush=True)
"""

MAIN_KERNELS = ("key_value", "query")


def reports(problems: list[dict]) -> list[dict]:
    return compiled.reports(SCRIPT, problems)


def test_main_loops():
    """The four loops that matter most: nothing spills, and no probability goes through shared memory."""
    bounds = {
        ("key_value", 64, "plain"): 10.2,
        ("key_value", 64, "entropy"): 13.4,
        ("query", 64, "plain"): 6.8,
        ("query", 64, "entropy"): 9.0,
    }
    problems = [
        {"target": "sm_90", "kernel": kernel, "dim": dim, "statistics": [] if statistics == "plain" else [statistics]}
        for kernel, dim, statistics in bounds
    ]
    for problem, result, bound in zip(problems, reports(problems), bounds.values(), strict=True):
        assert result["spill_bytes"] == 0, (problem, result)
        assert result["per_score"] <= bound, (problem, result)
        assert not any(opcode.startswith(("STS", "STSM")) for opcode in result["opcodes"]), (problem, result)


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_other_targets(target: str):
    problems = [{"target": target, "kernel": kernel, "dim": 128, "statistics": []} for kernel in MAIN_KERNELS]
    for problem, result in zip(problems, reports(problems), strict=True):
        assert result["spill_bytes"] == 0, (problem, result)


@pytest.mark.full
def test_split_and_wide_heads():
    """A head of 128 channels spills in one kernel only, a little: see its configuration."""
    problems = [
        {"target": "sm_90", "kernel": kernel, "dim": dim} for dim in (40, 80, 128, 256) for kernel in MAIN_KERNELS
    ]
    for problem, result in zip(problems, reports(problems), strict=True):
        if (problem["kernel"], problem["dim"]) == ("key_value", 128):
            assert result["spill_bytes"] <= 184  # 176 with Triton 3.7.1, 184 with 3.6.0
            assert result["loop"]["spill"] <= 40
        elif problem["dim"] <= 128:
            assert result["spill_bytes"] == 0, (problem, result)
        assert result["loop"].get("spill", 0) <= 0.06 * sum(result["loop"].values()), (problem, result)


@pytest.mark.full
@pytest.mark.parametrize(("target", "dtype"), compiled.VARIANTS)
def test_every_variant(target: str, dtype: str):
    everything = {"target": target, "dtype": dtype, "edits": True, "statistics": ["entropy", "group_mass"]}
    problems = [
        {**everything, **variant, "kernel": kernel, "dim": dim}
        for dim in (40, 128)
        for variant in ({"mask": "additive"}, {"causal": True, "kv_heads": 2})
        for kernel in ("key_value", "query", "mask", "rows")
        if kernel != "mask" or "mask" in variant
    ]
    problems += [
        {"target": target, "dtype": dtype, "kernel": kernel, **shape}
        for kernel in MAIN_KERNELS
        for shape in ({"dim": 512}, {"dim": 64, "keys": 77}, {"dim": 160, "dim_v": 40, "queries": 64, "keys": 64})
    ]
    reports(problems)
