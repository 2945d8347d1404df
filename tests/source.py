"""Programs that run from a folder's own source, whatever is installed.

An editable install is found before PYTHONPATH, so the programs leave out all that finds modules but Python itself.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[1]
PACKAGES = ("src/headscope", "kernels/headscope_kernels")
_FIRST = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
sys.meta_path[:] = [BuiltinImporter, FrozenImporter, PathFinder]
sys.path[:0] = ["src", "kernels"]
"""


def run_from_source(program: str, project: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program in a folder laid out as this project, with its packages."""
    return subprocess.run([sys.executable, "-c", _FIRST + program, *arguments], cwd=project, text=True, **options)


def copied(names: tuple[str, ...], target: Path, *ignored: str) -> Path:
    """Copies of some of the project's files and folders, in the same places below `target`."""
    ignore = shutil.ignore_patterns("__pycache__", *ignored)
    for name in names:
        if (PROJECT / name).is_dir():
            shutil.copytree(PROJECT / name, target / name, ignore=ignore)
        else:
            shutil.copy(PROJECT / name, target / name)
    return target
