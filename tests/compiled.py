"""What tests of compiled kernels share: targets, and Python without Triton's interpreter, in which nothing compiles."""

import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
KERNELS = TESTS.parent / "kernels"

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


def run_python(source: str, *arguments: str, text: str = "") -> str:
    """What a script prints in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(KERNELS), str(TESTS), environment.get("PYTHONPATH")]))
    process = subprocess.run(
        [sys.executable, "-c", source, *arguments],
        input=text,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout


def answers(script: str, problems: list[dict]) -> list:
    """A script's answers to all problems, in one process: a line of JSON to each."""
    lines = run_python(script, text="".join(json.dumps(problem) + "\n" for problem in problems)).splitlines()
    assert len(lines) == len(problems)
    return [json.loads(line) for line in lines]


def reports(script: str, problems: list[dict]) -> list[dict]:
    """As `answers`; no program may have more shared memory than its target."""
    results = answers(script, problems)
    for problem, result in zip(problems, results, strict=True):
        assert result["shared_bytes"] <= SHARED_LIMITS[problem["target"]], (problem, result)
    return results
