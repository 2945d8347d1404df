"""Every way to install headscope ends in a package that works, with the C++ kernel wherever there is a compiler."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]

# prints why the library is missing, or None
CHECK = """
import torch, headscope, headscope_kernels
from headscope.ops import cpu_library
query = torch.randn(2, 3, 33, 16)
result = headscope.attention(query, query, query, statistics=("entropy",))
expected = torch.nn.functional.scaled_dot_product_attention(query, query, query)
assert (result.output - expected).abs().max() < 1e-5
assert headscope.__version__
reason = cpu_library.unavailable_reason()
if reason is None:
    forced = headscope.attention(query, query, query, statistics=("entropy",), backend="cpu")
    assert torch.equal(forced.output, result.output)
    assert cpu_library.build_info()["threading"]
print(reason)
"""


def _run(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the project without build outputs, so that no test finds another one's."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout, to know which files belong to the project")
    listed = _run("git", "ls-files", "-co", "--exclude-standard", "-z", cwd=ROOT).split("\0")
    copy = tmp_path / "headscope"
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def compiler():
    if not (os.environ.get("CXX") or shutil.which("c++")):
        pytest.skip("needs a C++ compiler")


@pytest.fixture
def python(tmp_path) -> Path:
    """The interpreter of a new environment that sees this one's torch, but not its headscope."""
    venv.create(tmp_path / "environment", with_pip=False)
    interpreter = tmp_path / "environment" / "bin" / "python"
    packages = _run(interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(packages, "outer.pth").write_text(sysconfig.get_path("purelib"))
    return interpreter


def _pip(python: Path, *arguments: str | Path, **environment: str) -> None:
    # without isolation where the build tools are at hand: nothing to download
    offline = ["--no-build-isolation"] if importlib.util.find_spec("scikit_build_core") else []
    _run(sys.executable, "-m", "pip", "--python", python, *arguments, "--no-deps", *offline, **environment)


def _install(python: Path, *what: str | Path, **environment: str) -> None:
    # a headscope of the outer environment counts as installed, but isn't to be kept, nor removed
    _pip(python, "install", "--ignore-installed", *what, **environment)


def _check(python: Path) -> str:
    """What CHECK prints, run away from the sources and from PYTHONPATH."""
    return _run(python, "-I", "-W", "error", "-c", CHECK, cwd=python.parent).strip()


def test_wheel(tree, python, tmp_path, compiler):
    table = Path("headscope_kernels", "attention", "choices.json")
    (tree / "kernels" / table).write_text('{"format": 1, "entries": []}')
    _pip(python, "wheel", tree, "--wheel-dir", tmp_path)
    (wheel,) = tmp_path.glob("headscope-*.whl")
    # one wheel serves every Python: the library knows nothing of it
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "headscope/_native/libheadscope_cpu.so" in names
    assert "headscope_kernels/__init__.py" in names
    assert str(table) in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"headscope", "headscope_kernels"}
    _install(python, wheel)
    assert _check(python) == "None"


def test_sdist(tree, python, tmp_path, compiler):
    if not importlib.util.find_spec("scikit_build_core"):
        pytest.skip("needs scikit-build-core")
    build = "import sys; from scikit_build_core.build import build_sdist; print(build_sdist(sys.argv[1]))"
    name = _run(sys.executable, "-c", build, tmp_path, cwd=tree).splitlines()[-1]
    with tarfile.open(tmp_path / name) as archive:
        files = [member.split("/", 1)[-1] for member in archive.getnames()]
    assert "csrc/CMakeLists.txt" in files
    assert not any(file.endswith((".so", ".o")) or file.startswith("build/") for file in files)
    _install(python, tmp_path / name)
    assert _check(python) == "None"


def test_editable(tree, python, compiler):
    _install(python, "--editable", tree)
    assert _check(python) == "None"
    where = _run(python, "-I", "-c", "import headscope; print(headscope.__file__)").strip()
    assert where == str(tree / "src" / "headscope" / "__init__.py")


def test_without_a_compiler(tree, python):
    _install(python, tree, CC="/bin/false", CXX="/bin/false")
    assert "pip install ." in _check(python)
