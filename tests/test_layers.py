"""The layers that pyproject.toml draws: `lint-imports` keeps them, and says in a sentence what is wrong where one is
broken."""

import os
from pathlib import Path

import grimp
import pytest

from source import PACKAGES, PROJECT, copied, run_from_source

LINT = """
from importlinter.cli import lint_imports
sys.exit(lint_imports(no_cache=True, no_logo=True))
"""


def lint(project: Path) -> tuple[int, str]:
    """The exit code and output of `lint-imports` on a project laid out as this one."""
    done = run_from_source(LINT, project, env={**os.environ, "COLUMNS": "200"}, capture_output=True)
    return done.returncode, done.stdout + done.stderr


def test_layers_are_kept():
    code, output = lint(PROJECT)
    assert code == 0, output


@pytest.mark.parametrize(
    ("module", "line", "sentence"),
    [
        ("src/headscope/ops/edits.py", "import headscope.models.scope", "What both need belongs into the lower"),
        ("src/headscope/models/structure/sites.py", "import headscope.models.scope", "a smaller class in the lower"),
        ("src/headscope/sweep/plan/config.py", "import headscope.sweep.store.run", "A plan says what to do"),
        (
            "src/headscope/sweep/compute/kinds/images.py",
            "import headscope.sweep.compute.kinds.ablations",
            "What two kinds share stands beside",
        ),
        ("src/headscope/report/naming.py", "import headscope.report.page", "into a third one below them"),
        ("kernels/headscope_kernels/__init__.py", "import headscope.ops", "The kernels serve people who"),
        ("kernels/headscope_kernels/__init__.py", "import numpy", "The kernels serve people who"),
        ("src/headscope/new_module.py", "", "new_module"),
    ],
)
def test_a_broken_layer_is_an_error_with_a_sentence(tmp_path: Path, module: str, line: str, sentence: str):
    copied(("pyproject.toml", *PACKAGES), tmp_path, "*.so", "weights")
    changed = tmp_path / module
    before = changed.read_text() if changed.exists() else ""
    # imports for types alone count as well
    changed.write_text(f"{before}\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {line or 'pass'}\n")
    code, output = lint(tmp_path)
    assert code != 0
    assert sentence in " ".join(output.split())


def test_no_module_imports_the_front_of_its_own_package():
    graph = grimp.build_graph(*(Path(folder).name for folder in PACKAGES))
    # other packages' fronts are there to be imported from; its own is imported before it is complete
    found = [
        f"{module} imports {front}"
        for module in graph.modules
        for front in graph.find_modules_directly_imported_by(module)
        if module.startswith(f"{front}.") and not module.endswith(".__main__")
    ]
    assert found == []
