"""A unit kind is one class: defining it is all that plans, run directories, status and estimates need to know of it."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from headscope.cli import app
from headscope.demonstration import report_sweep
from headscope.report.page import SECTIONS
from headscope.sweep import Execution, Run, SweepConfig, SweepFailed, run_sweep
from headscope.sweep.compute.estimate import estimate_sweep
from headscope.sweep.compute.opened import Opened
from headscope.sweep.plan.units import KINDS, TABLE, TENSORS, Planned, UnitKind
from headscope.sweep.store.rows import labels
from headscope.sweep.store.store import Results


@pytest.fixture
def predictions():
    """A kind whose table has the size of every clean prediction, defined as long as the test runs."""

    class Predictions(UnitKind):
        name = "predictions"
        reads = ("images",)

        def plan(self, asked, group):
            for timestep in asked.timesteps:
                yield Planned(range(len(group.swept)), len(group.swept), timestep)

        def compute(self, unit, context, advance):
            items = context.items(unit)
            inputs = context.noisy_inputs(context.task.prepare(items), unit.timestep)
            sizes = context.task.predict(inputs).square().flatten(1).mean(1)
            advance(len(items))
            columns = labels(items, np.arange(len(items)), context.config.seed)
            return Results(pa.table({**columns, "size": sizes.double().numpy()}))

    yield Predictions
    del KINDS["predictions"]


def test_a_kind_that_is_defined_is_swept(predictions, ddpm_directory, tmp_path):
    config = SweepConfig(model=ddpm_directory, groups=("faces",), items=2, timesteps=(60, 500), fills=())
    estimate = estimate_sweep(config, Execution(rows=4))
    run = run_sweep(config, tmp_path / "run", progress=False, batch=4)
    assert estimate.units == {"observations": (1, 8), "predictions": (2, 8)}
    assert run.status().units == {"observations": (1, 1), "predictions": (2, 2)}
    assert run.tables == ("observations", "predictions")
    assert run.kinds == ("observations",)
    table = run.table("predictions").collect()
    assert len(table) == 8
    assert (table["size"] > 0).all()
    found = run.verify()
    assert found.sound
    assert found.rows["predictions"] == 8
    assert "predictions" in CliRunner().invoke(app, ["sweep", "status", str(run.path)]).output
    victim = next((run.path / "predictions").glob("*.parquet"))
    victim.unlink()
    assert not Run.open(run.path).complete
    assert run_sweep(config, tmp_path / "run", progress=False, batch=4).complete


def test_an_optional_kind_runs_where_it_is_named(predictions, ddpm_directory, tmp_path):
    """Sweeps that don't name it have the units and ids of before."""
    config = SweepConfig(model=ddpm_directory, groups=("faces",), items=1, timesteps=(60,), fills=())
    del KINDS["predictions"]
    before = Opened(config, Execution()).plan
    type("Predictions", (predictions,), {"name": "predictions", "optional": True, "__module__": predictions.__module__})
    assert Opened(config, Execution()).plan.units == before.units
    named = replace(config, kinds=("predictions",), observe=False)
    run = run_sweep(named, tmp_path / "run", progress=False)
    assert run.tables == ("predictions",)
    assert SweepConfig.from_json(run.manifest["config"]).kinds == ("predictions",)
    # the page says that it says nothing of it
    text = report_sweep(run.path).read_text()
    assert "Tables of the run that this page doesn&#39;t show: predictions." in text
    optional = ", ".join(kind for kind, found in KINDS.items() if found.optional)
    assert optional.endswith("predictions")
    with pytest.raises(ValueError, match=f"kinds: got 'observations', expected some of {optional}$"):
        Opened(replace(config, kinds=("observations",)), Execution())
    with pytest.raises(ValueError, match="kinds: got predictions, predictions, expected each once"):
        replace(config, kinds=("predictions", "predictions"))


def test_a_kind_that_can_t_be_is_refused(predictions):
    with pytest.raises(ValueError, match=r"Latest\.reads: got 'missing', expected kinds that run earlier: images"):
        type("Latest", (UnitKind,), {"name": "latest", "reads": ("missing",)})
    with pytest.raises(ValueError, match=r"Up\.name: got '\.\./up', expected lower-case letters"):
        type("Up", (UnitKind,), {"name": "../up"})
    with pytest.raises(ValueError, match=r"Mine\.name: 'ablations' is another kind's"):
        type("Mine", (UnitKind,), {"name": "ablations"})
    with pytest.raises(ValueError, match=r"Jobs\.name: 'jobs' is a folder of the run's own"):
        type("Jobs", (UnitKind,), {"name": "jobs"})
    assert list(KINDS)[-1] == "predictions"
    # a notebook's cell that runs again
    again = type("Predictions", (predictions,), {"name": "predictions", "__module__": predictions.__module__})
    assert type(KINDS["predictions"]) is again


def test_a_run_with_a_kind_that_is_gone_is_left_alone(predictions, ddpm_directory, tmp_path):
    """Its manifest is whole: neither is it said to be damaged, nor written anew without the kind's units."""
    config = SweepConfig(model=ddpm_directory, groups=("faces",), items=1, timesteps=(60,), fills=())
    run = run_sweep(config, tmp_path / "run", progress=False)
    before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    gone = KINDS.pop("predictions")
    for attempt in (lambda: Run.open(run.path), lambda: run_sweep(config, tmp_path / "run", progress=False)):
        with pytest.raises(ValueError, match="has units of the kind 'predictions', expected those that this headscope"):
            attempt()
    KINDS["predictions"] = gone
    assert {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()} == before
    assert Run.open(run.path).complete


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"reads": ()}, "predictions.reads: no unit of 'images' for 'prompts' to read, expected one"),
        ({"files": (TABLE, TENSORS)}, r"predictions: compute gave nothing for its \.safetensors file"),
    ],
)
def test_a_kind_that_forgets_something_is_told(predictions, diffusion_directory, tmp_path, wrong, message):
    type("Predictions", (predictions,), {"name": "predictions", "__module__": predictions.__module__, **wrong})
    (tmp_path / "prompts.txt").write_text("a red fox\na house\n")
    config = SweepConfig(
        model=diffusion_directory, prompts=str(tmp_path / "prompts.txt"), splits=("confirm",), items=1,
        timesteps=(100,), fills=(), generate_steps=1,
    )  # fmt: skip
    with pytest.raises(SweepFailed, match=message):
        run_sweep(config, tmp_path / "run", progress=False)


OWN_TASK = """
import sys
from headscope.models import PixelTask
from headscope.sweep import SweepConfig, Workers, run_sweep

class Mine(PixelTask):
    expects = "mine"

    @classmethod
    def fits(cls, pipeline):
        return PixelTask.fits(pipeline)

if __name__ == "__main__":
    config = SweepConfig(model=sys.argv[1], groups=("faces",), items=1, timesteps=(60,), fills=())
    run = run_sweep(config, sys.argv[2], progress=False, workers=Workers("processes", 2))
    print([name for name in run.manifest["identity"] if name.startswith("code of")], run.complete)
"""


@pytest.mark.full
def test_a_task_of_a_script_is_the_same_in_the_processes_it_starts(ddpm_directory, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(OWN_TASK)
    command = [sys.executable, str(script), ddpm_directory, str(tmp_path / "run")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "['code of __main__.Mine'] True"


def test_reported_kinds_are_the_report_s_sections():
    assert {name for name, kind in KINDS.items() if kind.reported} == set(SECTIONS)
