"""The patches of docs/extending.md: each still applies, is two files of code beside its tests, and passes them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from headscope.ops import cpu_library
from source import PROJECT, copied, run_from_source

PATCHES = sorted((PROJECT / "docs" / "extending").glob("*.patch"))
# what a patched copy needs to run its tests
COPIED = ("src", "kernels", "tests", "docs", "pyproject.toml", "README.md")
PYTEST = """
import headscope, pytest
assert headscope.__file__.startswith(sys.argv[1]), headscope.__file__
sys.exit(pytest.main(["-q", "-n", "0", "-p", "no:cacheprovider", "-m", "", *sys.argv[2:]]))
"""


def copy_of_the_project(folder: Path) -> Path:
    """A copy of what is needed, with the C++ library where there is one."""
    copied(COPIED, folder)
    library = cpu_library.library_path()
    if library is not None:
        native = folder / "src" / "headscope" / "_native"
        native.mkdir(exist_ok=True)
        if not (native / Path(library).name).exists():
            shutil.copy(library, native)
    return folder


def test_there_is_a_patch_of_each():
    assert [patch.stem for patch in PATCHES] == ["family", "statistic", "unit_kind"]
    page = (PROJECT / "docs" / "extending.md").read_text()
    assert all(f"(extending/{patch.name})" in page for patch in PATCHES)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_patch_applies_and_is_two_files_of_code(patch: Path, tmp_path: Path):
    copy = copy_of_the_project(tmp_path)
    subprocess.run(["git", "apply", "--check", str(patch)], cwd=copy, check=True)
    changed = re.findall(r"^\+\+\+ b/(.*)$", patch.read_text(), re.M)
    code = [name for name in changed if name.startswith(("src/", "kernels/", "csrc/"))]
    assert 1 <= len(code) <= 2
    assert all(name.startswith(("tests/", "docs/")) for name in set(changed) - set(code))


@pytest.mark.full
@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_patch_passes_the_tests_that_it_brings(patch: Path, tmp_path: Path):
    copy = copy_of_the_project(tmp_path)
    subprocess.run(["git", "apply", str(patch)], cwd=copy, check=True)
    tests = list(re.findall(r"^\+\+\+ b/(tests/.*test_\w+\.py)$", patch.read_text(), re.M))
    assert tests
    run_from_source(PYTEST, copy, str(copy), *tests, check=True)
