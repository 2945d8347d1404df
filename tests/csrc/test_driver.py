"""The C++ driver under the address, undefined-behaviour and thread sanitizers, every warning an error."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "csrc"


def _run(*command: str | Path) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=280, check=False)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    return output


@pytest.mark.full
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_driver_under_sanitizers(sanitizers, tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not shutil.which("cmake") or not compiler or not shutil.which(compiler):
        pytest.skip("needs cmake and a C++ compiler")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    options = ["-DHEADSCOPE_STRICT=ON", "-DHEADSCOPE_DRIVER=ON", f"-DHEADSCOPE_SANITIZE={sanitizers}"]
    _run("cmake", "-S", SOURCE, "-B", tmp_path, *generator, *options, "-DCMAKE_BUILD_TYPE=RelWithDebInfo")
    _run("cmake", "--build", tmp_path, "--target", "driver", "--parallel", "4")
    assert "baseline: passed" in _run(tmp_path / "driver")


@pytest.mark.full
def test_sources_are_formatted():
    formatter = shutil.which("clang-format")
    if not formatter:
        pytest.skip("needs clang-format")
    sources = [path for suffix in ("h", "cpp") for path in SOURCE.rglob(f"*.{suffix}")]
    _run(formatter, "--dry-run", "--Werror", *sources)
