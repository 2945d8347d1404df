"""The C++ driver on 64-bit Arm: cross-compiled, every warning an error, and run in an emulator."""

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "csrc"
# a build takes half a minute of a processor, and others may be at work on it
MINUTES = 20


def tool(*names: str) -> str:
    """The first of these programs that is installed."""
    for name in names:
        path = shutil.which(name)
        if path:
            return path
    pytest.skip(f"needs {names[0]}")


def run(*command: str | Path) -> str:
    """What a command prints; it has to succeed."""
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=MINUTES * 60, check=False
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    return output


@pytest.mark.full
@pytest.mark.timeout(MINUTES * 60)
def test_driver_on_arm(tmp_path: Path):
    """On Debian: apt install g++-aarch64-linux-gnu qemu-user."""
    compiler, emulator = tool("aarch64-linux-gnu-g++"), tool("qemu-aarch64", "qemu-aarch64-static")
    # linked statically, so that the emulator needs no Arm libraries
    openmp = run(compiler, "-print-file-name=libgomp.a").strip()
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={compiler}"]
    static = ["-DCMAKE_EXE_LINKER_FLAGS=-static", f"-DOpenMP_gomp_LIBRARY={openmp}"]
    options = ["-DHEADSCOPE_STRICT=ON", "-DHEADSCOPE_DRIVER=ON"]
    run(tool("cmake"), "-S", SOURCE, "-B", tmp_path, *target, *static, *options)
    run(tool("cmake"), "--build", tmp_path, "--target", "driver", "--parallel", "2")
    assert "baseline: passed" in run(emulator, tmp_path / "driver")
