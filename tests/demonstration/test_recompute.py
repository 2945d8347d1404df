"""bench/recompute_study.py finds what a study's tables say, and notices where they say something else."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from headscope.demonstration import StudyConfig, run_study

pytestmark = pytest.mark.full

SCRIPT = Path(__file__).parents[2] / "bench" / "recompute_study.py"
COMPARED = (
    *("ablation_ranking", "ablation_timesteps", "effects", "effects_timesteps", "joint", "curves", "doses"),
    *("entropy_heads", "entropy_groups", "contrast_heads", "contrast_sites", "contrast_pooled", "contrast_controls"),
    *("contrast_divergences", "roles_excess", "roles_ties", "circuits_faithfulness", "circuits_minimality"),
    *("circuits_completeness", "circuits_edges"),
)


def recomputed(study):
    return subprocess.run([sys.executable, SCRIPT, study], capture_output=True, text=True, check=False)


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("model", ["planted:pairs", "pixeldit"])
def test_a_study_is_recomputed(model, tmp_path):
    small = {"items": 3, "discover_items": 3, "confirm_items": 3, "heads_per_group": 2, "draws": 2, "drawn_images": 0}
    bands = {"observe_bands": 2, "ablate_bands": 2 if model != "pixeldit" else 1, "reference_items": 8}
    run_study(StudyConfig(model=model, full=True, **small, **bands), tmp_path / "study", progress=False)
    done = recomputed(tmp_path / "study")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(re.findall(r"^(\w+) +\d+ numbers", done.stdout, re.MULTILINE)) == set(COMPARED)
    # a number that is off by a millionth, and a row that is gone
    path = tmp_path / "study" / "tables" / "effects.csv"
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    place = lines[0].split(",").index("value")
    fields = lines[1].split(",")
    fields[place] = str(float(fields[place]) + 1e-6)
    for damaged in ([lines[0], ",".join(fields), *lines[2:]], [lines[0], *lines[2:]]):
        path.write_text("\n".join(damaged) + "\n", encoding="utf-8")
        done = recomputed(tmp_path / "study")
        assert done.returncode == 1
        assert re.search(r"^effects .*(1\.0e-06|1 rows that nothing)", done.stdout, re.MULTILINE), done.stdout
