"""The backward kernels compiled for GPUs that are not here: they build, don't spill, and issue what they did before.

Each compilation runs in a process without the interpreter, since nothing compiles in one with it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"

SCRIPT = """
import json, sys
from headscope_kernels.attention.static_backward import BackwardProblem, backward_report
from headscope_kernels.attention.static_report import DTYPES
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

# what one program may have, bytes
SHARED_LIMITS = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
}
# both 16-bit types have the same tiles: bfloat16 once a vendor
VARIANTS = [
    (target, dtype)
    for target in SHARED_LIMITS
    for dtype in ("float16", "bfloat16", "float32")
    if dtype != "bfloat16" or target in ("sm_90", "gfx942")
]
MAIN_KERNELS = ("key_value", "query")


def reports(problems: list[dict]) -> list[dict]:
    """Compiles all problems in one process; what comes back fits the GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(KERNELS), environment.get("PYTHONPATH")]))
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input="".join(json.dumps(problem) + "\n" for problem in problems),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    results = [json.loads(line) for line in process.stdout.splitlines()]
    for problem, result in zip(problems, results, strict=True):
        assert result["shared_bytes"] <= SHARED_LIMITS[problem["target"]], (problem, result)
    return results


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
@pytest.mark.parametrize(("target", "dtype"), VARIANTS)
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
