"""The code on the task pages runs as it stands, on a tiny pipeline and with fewer steps."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("record", "remove-a-head", "prompt-token-maps", "patch-a-head", "compare-models")


@pytest.mark.parametrize("page", PAGES)
def test_the_code_on_the_page_runs(page, diffusion_directory, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.S)
    assert len(blocks) >= 3
    (tmp_path / "path" / "to").mkdir(parents=True)
    for name in ("stable-diffusion", "fine-tuned"):
        (tmp_path / "path" / "to" / name).symlink_to(diffusion_directory)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        # a step more than one, so that steps differ
        exec(compile(block.replace("num_inference_steps=20", "num_inference_steps=2"), f"{page}.md", "exec"), names)
