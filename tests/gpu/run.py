"""Everything that needs a GPU, in one command: python tests/gpu/run.py [--out FILE.json]

Runs the GPU tests file by file and the kernels' own tests compiled, then small calls of every kernel under
compute-sanitizer's memcheck and racecheck (where the CUDA toolkit has it), and prints a table. It exits with 0 only if
nothing failed.
"""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from headscope._machine import device_name, versions

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def environment() -> dict[str, str]:
    paths = [str(ROOT / "src"), str(ROOT / "kernels"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run_tests(file: Path, marker: str) -> dict:
    """One file of tests: how many passed and failed, and which."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", marker, f"--junitxml={report}", str(file)]
        started = time.perf_counter()
        run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - started
        if not report.exists():
            return _row(file.name, 0, [run.stdout[-2000:]], 0, seconds)
        failures, skipped, total = [], 0, 0
        for case in xml.parse(report).getroot().iter("testcase"):
            total += 1
            skipped += case.find("skipped") is not None
            for problem in (*case.findall("failure"), *case.findall("error")):
                failures.append(f"{case.get('name')}: {(problem.get('message') or '')[:300]}")
        return _row(file.name, total - skipped - len(failures), failures, skipped, seconds)


def _row(what: str, passed: int, failures: list[str], skipped: int, seconds: float) -> dict:
    counts = {"passed": passed, "failed": len(failures), "skipped": skipped}
    return {"what": what, **counts, "seconds": seconds, "failures": failures}


def run_sanitizer(tool: str) -> dict:
    """Small calls of every kernel under one tool of compute-sanitizer."""
    program = shutil.which("compute-sanitizer")
    what = f"compute-sanitizer {tool}"
    if program is None:
        return _row(what, 0, [], 1, 0.0)
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, str(HERE / "sanitized.py")]
    # the caching allocator would hide accesses past the end of a tensor
    settings = {**environment(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    started = time.perf_counter()
    run = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False)
    failures = [(run.stdout + run.stderr)[-2000:]] if run.returncode else []
    return _row(what, 1 - len(failures), failures, 0, time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the table here, as JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: torch.cuda.is_available() is False")
    rows = [run_tests(file, "gpu") for file in sorted(HERE.glob("test_*.py"))]
    rows += [run_tests(ROOT / "tests" / "kernels", "not gpu and not full")]
    rows += [run_sanitizer(tool) for tool in ("memcheck", "racecheck")]
    table = Table("what", "passed", "failed", "skipped", "seconds", title=device_name("cuda"))
    for row in rows:
        table.add_row(row["what"], str(row["passed"]), str(row["failed"]), str(row["skipped"]), f"{row['seconds']:.0f}")
    Console(width=110).print(table)
    for row in rows:
        for failure in row["failures"]:
            print(f"{row['what']}: {failure}")
    if options.out:
        date = datetime.date.today().isoformat()
        record = {
            "what": "GPU tests",
            "device": device_name("cuda"),
            "date": date,
            "versions": versions(),
            "rows": rows,
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    raise SystemExit(any(row["failed"] for row in rows))


if __name__ == "__main__":
    main()
