"""`headscope compare` as a user meets it: two checkpoints of one model, what they share, and what is refused."""

import re
import shutil

import polars as pl
import pytest
import torch
from typer.testing import CliRunner

from headscope.cli import app
from headscope.demonstration import compare_runs
from headscope.sweep import HeadSet, SweepConfig, run_sweep
from study import simulated


def call(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture(scope="module")
def tuned_directory(tmp_path_factory):
    """Another checkpoint of the model of ddpm_directory."""
    import tiny

    pipeline = tiny.ddpm(size=32)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("tuned")
    pipeline.save_pretrained(path)
    return str(path)


def swept(model, out, **fields):
    asked = {"groups": ("lfw",), "items": 3, "timesteps": (60, 500), "fills": ("zero",), "attribute": True}
    sets = (HeadSet("middle", sites=("mid_block.*",)),)
    run_sweep(SweepConfig(model=model, **(asked | {"sets": sets, "cotangents": 1} | fields)), out, progress=False)
    return out


@pytest.fixture(scope="module")
def runs(ddpm_directory, tuned_directory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return swept(ddpm_directory, folder / "base"), swept(tuned_directory, folder / "tuned")


@pytest.fixture(autouse=True)
def quick():
    with simulated.fewer_draws(99):
        yield


def section(page, name):
    start = page.index(f'<section id="{name}">')
    return page[start : page.index("</section>", start)]


def test_two_checkpoints_are_compared(runs, tmp_path):
    out = tmp_path / "new" / "page.html"
    result = call("compare", *runs, "--out", out)
    assert result.exit_code == 0, result.output
    # the terminal may break its lines anywhere
    assert "page.html" in result.output.replace("\n", "")
    page = out.read_text(encoding="utf-8")
    assert "base and tuned, compared" in page
    for name in (
        "findings",
        "compared",
        "compared_clean",
        "compared_entropy",
        "compared_ablation",
        "method",
        "caveats",
    ):
        assert section(page, name)
    assert 'data-figure="importances"' in section(page, "compared_ablation")
    assert 'data-figure="entropies"' in section(page, "compared_entropy")
    assert 'data-figure="attributions"' in section(page, "compared_attribution")
    assert "middle" in section(page, "compared_ablation")
    assert "are not replicates" in page
    assert "nothing was left out" in section(page, "compared")
    # three of each of two splits are too few to test
    assert "was not tested: 6 sources" in section(page, "findings")
    without_scripts = re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    assert not re.search(r"(src|href)=\"(?!#|data:)", without_scripts)


def test_the_numbers_are_those_of_the_tables(runs, tmp_path):
    """The ratio of the clean losses, second over first, of the mean over timesteps."""
    page = compare_runs(*runs, tmp_path / "page.html").read_text(encoding="utf-8")
    clean = [
        pl.read_parquet(run / "ablations" / "*.parquet").group_by("timestep").agg(pl.col("clean").mean())
        for run in runs
    ]
    pairs = clean[0].join(clean[1], on="timestep", suffix="_2").sort("timestep")
    found = re.findall(r"<td>(60|500|overall)</td>(?:<td[^>]*>[^<]*</td>){2}<td[^>]*>([0-9.]+)</td>", page)
    ratios = [*(pairs["clean_2"] / pairs["clean"]), (pairs["clean_2"] / pairs["clean"]).mean()]
    assert [label for label, _ in found] == ["60", "500", "overall"]
    assert [float(text) for _, text in found] == pytest.approx(ratios, abs=6e-4)


def test_what_one_lacks_stands_on_the_page(runs, tuned_directory, tmp_path):
    other = swept(tuned_directory, tmp_path / "other", timesteps=(500, 900), fills=("zero", "uniform"), attribute=False,
                  cotangents=4, sets=())  # fmt: skip
    page = compare_runs(runs[0], other, tmp_path / "page.html").read_text(encoding="utf-8")
    listed = section(page, "compared")
    for what in ("compared at 500", "fills of ablations that the other lacks", "set middle", "table of attributions"):
        assert what in listed, what
    assert 'id="compared_attribution"' not in page


def test_runs_with_nothing_in_common_are_refused(runs, tuned_directory, tmp_path):
    out = tmp_path / "page.html"
    other = swept(tuned_directory, tmp_path / "other", timesteps=(900,))
    result = call("compare", runs[0], other, "--out", out)
    assert result.exit_code == 2
    assert "second: the runs have no timestep in common: 60, 500 against 900" in result.output
    elsewhere = swept(tuned_directory, tmp_path / "elsewhere", seed=5)
    result = call("compare", runs[0], elsewhere, "--out", out)
    assert result.exit_code == 2
    assert "nothing in common to compare" in result.output
    assert "noise draws (replicates)" in result.output
    assert not out.exists()


def test_unfinished_runs_and_no_runs_are_refused(runs, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(runs[1], half)
    next((half / "ablations").glob("*.parquet")).unlink()
    result = call("compare", runs[0], half)
    assert result.exit_code == 2
    assert re.search(r"second: .* isn't finished \(units: ablations \d of \d\)", result.output)
    result = call("compare", tmp_path / "nowhere", runs[1])
    assert result.exit_code == 2
    assert "first: " in result.output
    assert "expected a directory with a headscope run" in result.output


def test_a_study_stands_for_its_stages(runs, tmp_path):
    """Stages of one name are compared; a run by itself goes with every stage."""
    studies = []
    for name, run in zip(("one", "two"), runs, strict=True):
        for stage in ("discover", "observe"):
            shutil.copytree(run, tmp_path / name / stage)
        (tmp_path / name / "study.json").write_text("{}")
        studies.append(tmp_path / name)
    page = compare_runs(*studies, tmp_path / "page.html").read_text(encoding="utf-8")
    assert '<th scope="col">stage</th>' in page
    assert "lfw (discover, zero fill)" in page
    assert "lfw (observe, zero fill)" in page
    page = compare_runs(runs[0], studies[1], tmp_path / "mixed.html").read_text(encoding="utf-8")
    assert "lfw (observe, zero fill)" in page
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "study.json").write_text("{}")
    with pytest.raises(ValueError, match=r"second: the study .* has no stage yet"):
        compare_runs(runs[0], tmp_path / "empty", tmp_path / "page.html")
