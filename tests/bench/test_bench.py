"""The benchmark runs the same work in every way, counts what it says it counts, and keeps earlier numbers."""

import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from headscope.bench import DENOISERS, Settings, run_bench
from headscope.bench.measure import step_counts, step_seconds
from headscope.bench.ways import MATERIALISING, RECORDING, REMOVING, STOCK, ways_of
from headscope.cli import app
from headscope.models import Scope


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def flux():
    torch.manual_seed(0)
    return DENOISERS["flux"](False, "cpu", torch.float32)


def test_every_way_does_the_same_work(flux):
    outputs = {}
    for name, way in ways_of(flux).items():
        with way.around():
            outputs[name] = (way.step or flux.step)()[0]
    for name in (RECORDING, MATERIALISING):
        assert float((outputs[name] - outputs[STOCK]).abs().max()) <= 1e-5
    with Scope(flux.model).edit({site.name: [0] for site in Scope(flux.model).sites}):
        assert torch.equal(outputs[REMOVING], flux.step()[0])
    assert float((outputs[REMOVING] - outputs[STOCK]).abs().max()) > 1e-4


def test_recording_reads_nothing_back_and_materialises_nothing(flux):
    counts = {name: step_counts(flux, way, "cpu") for name, way in ways_of(flux).items() if not way.step}
    sites = len(Scope(flux.model).sites)
    assert counts[STOCK].of_headscope == 0
    assert counts[RECORDING].of_headscope >= sites
    assert all(entry.synchronisations == 0 for entry in counts.values())
    # [images, heads, tokens, tokens] of one call, in float32
    matrix = 2 * 4 * (256 + 64) ** 2 * 4
    assert counts[RECORDING].peak_bytes - counts[STOCK].peak_bytes < matrix / 4
    assert counts[MATERIALISING].peak_bytes - counts[STOCK].peak_bytes > matrix / 2


def test_a_value_read_back_is_counted(flux):
    def reading():
        output = flux.step()
        float(output[0].sum())
        return output

    way = ways_of(flux)[STOCK]
    assert step_counts(flux, type(way)(way.around, reading), "cpu").synchronisations == 1


def test_rounds_are_interleaved(flux):
    order = []
    ways = {name: way for name, way in ways_of(flux).items() if name in (STOCK, REMOVING)}
    noted = {name: type(way)(way.around, lambda name=name: order.append(name)) for name, way in ways.items()}
    seconds = step_seconds(flux, noted, 3, "cpu")
    # one round more to warm up, and each way goes first in turn
    assert order == [STOCK, REMOVING, REMOVING, STOCK] * 2
    assert {name: len(values) for name, values in seconds.items()} == {STOCK: 3, REMOVING: 3}


def test_a_run_writes_numbers_and_a_plot_and_keeps_those_of_other_models(tmp_path):
    console = Console(quiet=True)
    path = run_bench(Settings(("flux",), rounds=1), tmp_path, console)
    record = json.loads(path.read_text())
    record["models"]["sd15"] = record["models"]["flux"] | {"description": "earlier"}
    path.write_text(json.dumps(record))
    again = json.loads(run_bench(Settings(("flux",), rounds=1), tmp_path, console).read_text())
    assert list(again["models"]) == ["sd15", "flux"]
    assert again["models"]["sd15"]["description"] == "earlier"
    stock = again["models"]["flux"]["ways"][STOCK]
    assert stock["step"]["over_stock"] == [1.0, 1.0, 1.0]
    assert stock["step"]["images_per_second"][1] == pytest.approx(2 / stock["step"]["seconds"][1])
    assert "call" in again["models"]["flux"]["ways"][RECORDING]
    page = path.with_suffix(".html").read_text()
    assert all(text in page for text in ("flux: one denoising step", "flux: a whole pipeline call", RECORDING))


@pytest.mark.full
# NumPy's, of what diffusers' Euler scheduler does
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", ["bundled", "sd15", "sdxl"])
def test_the_other_denoisers_run(name):
    denoiser = DENOISERS[name](False, "cpu", torch.float32)
    assert torch.isfinite(denoiser.step()[0]).all()
    images = denoiser.sample().images
    assert len(images) == denoiser.images
    assert len(Scope(denoiser.pipeline).sites) >= 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "sd9"], "models: got ['sd9'], expected names out of bundled, sd15, sdxl, flux"),
        (["--dtype", "int8"], "dtype: got 'int8'"),
        (["--rounds", "0"], "rounds: got 0"),
    ],
)
def test_bad_settings_are_one_line(arguments, message):
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert message in result.output
