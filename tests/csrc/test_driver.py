"""The C++ driver, and calls from Python, under sanitizers; every warning an error."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "csrc"


# a build takes a minute of a processor, and others may be at work on it
MINUTES = 20


def _run(*command: str | Path, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=MINUTES * 60,
        check=False,
        env={**os.environ, **environment},
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    return output


def _compiler() -> str:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not shutil.which("cmake") or not compiler or not shutil.which(compiler):
        pytest.skip("needs cmake and a C++ compiler")
    return compiler


def _build(sanitizers: str, folder: Path, *options: str) -> Path:
    _compiler()
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    options = ("-DHEADSCOPE_STRICT=ON", "-DHEADSCOPE_DRIVER=ON", f"-DHEADSCOPE_SANITIZE={sanitizers}", *options)
    # with -O2 the build takes three times as long, and the driver gains less than that
    _run("cmake", "-S", SOURCE, "-B", folder, *generator, *options, "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1")
    _run("cmake", "--build", folder, "--parallel", "4")
    return folder


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build with the address and undefined-behaviour sanitizers."""
    return _build("address,undefined", tmp_path_factory.mktemp("checked"))


@pytest.mark.full
@pytest.mark.timeout(MINUTES * 60)
def test_driver_under_sanitizers(checked: Path):
    assert "baseline: passed" in _run(checked / "driver")


@pytest.mark.full
@pytest.mark.timeout(MINUTES * 60)
def test_driver_under_the_thread_sanitizer(tmp_path: Path):
    """With one instruction set: how threads wait for each other and share sums is the same code in all of them."""
    assert "baseline: passed" in _run(_build("thread", tmp_path, "-DHEADSCOPE_BASELINE_ONLY=ON") / "driver")


@pytest.mark.full
@pytest.mark.timeout(MINUTES * 60)
@pytest.mark.parametrize("instruction_set", ["baseline", "best"])
def test_random_calls_under_sanitizers(instruction_set: str, checked: Path):
    """Masks, layouts and addresses as torch hands them over."""
    runtimes = [_run(_compiler(), f"-print-file-name={name}").strip() for name in ("libasan.so", "libubsan.so")]
    if not all(Path(path).is_absolute() for path in runtimes):
        pytest.skip("needs the compiler's sanitizers as shared libraries")
    command = [sys.executable, "-m", "ops.fuzz", "--backend", "cpu", "--library", checked / "libheadscope_cpu.so"]
    _run(
        *command,
        "--calls",
        "200",
        HEADSCOPE_CPU_INSTRUCTIONS=instruction_set,
        LD_PRELOAD=" ".join(runtimes),
        PYTHONPATH=str(SOURCE.parent / "tests"),
        # what the interpreter and torch keep until the end isn't lost
        ASAN_OPTIONS="detect_leaks=0",
        OMP_NUM_THREADS="2",
    )


@pytest.mark.full
def test_sources_are_formatted():
    formatter = shutil.which("clang-format")
    if not formatter:
        pytest.skip("needs clang-format")
    sources = [path for suffix in ("h", "cpp") for path in SOURCE.rglob(f"*.{suffix}")]
    _run(formatter, "--dry-run", "--Werror", *sources)
