"""The command line as a user meets it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import headscope
from headscope.cli import app
from headscope.sweep import Run, SweepConfig, run_sweep
from headscope.sweep.store import store
from headscope.sweep.work import launch
from headscope.zoo import train


def call(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "TERM": "dumb"})


def test_version_and_help():
    assert call("--version").output.strip() == headscope.__version__
    text = call("--help").output
    for command in ("study", "sweep", "report", "compare", "train", "doctor"):
        assert command in text


def test_help_is_quick_to_import():
    """`headscope --help` loads neither torch nor diffusers."""
    code = "import sys, headscope.cli; print([n for n in ('torch', 'diffusers', 'scipy') if n in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_doctor_names_versions_and_every_backend():
    result = call("doctor")
    assert result.exit_code == 0
    for word in ("headscope", "torch", "triton", "cpu", "portable", "reference", headscope.__version__):
        assert word in result.output


def test_sweep_then_report(ddpm_directory, tmp_path):
    out = tmp_path / "run"
    arguments = ("sweep", "--model", ddpm_directory, "--group", "lfw", "--items", 2, "--timesteps", "60,500")
    result = call(*arguments, "--fill", "zero", "--out", out)
    assert result.exit_code == 0, result.output
    run = Run.open(out)
    assert run.kinds == ("observations", "ablations")
    assert run.table("ablations").collect().height == 2 * 2 * 2 * 8
    assert f"{2 * 2 * 2 * 8} rows" in result.output
    again = call(*arguments, "--fill", "uniform", "--out", out)
    assert again.exit_code == 2
    assert "another configuration" in again.output
    result = call("report", out)
    assert result.exit_code == 0, result.output
    page = (out / "report.html").read_text()
    assert "lfw" in page


def test_a_sweep_is_gone_on_with_from_another_directory(ddpm_directory, tmp_path, monkeypatch):
    """Though the model was named by where it lay from the first."""
    model = Path(ddpm_directory)
    monkeypatch.chdir(model.parent)
    out = tmp_path / "run"
    asked = ("--model", model.name, "--group", "lfw", "--items", 1, "--timesteps", 60, "--fill", "zero")
    assert call("sweep", *asked, "--out", out, "--quiet").exit_code == 0
    monkeypatch.chdir(tmp_path)
    next((out / "ablations").glob("*.parquet")).unlink()
    result = call("sweep", "retry", "run", "--quiet")
    assert result.exit_code == 0, result.output
    assert call("sweep", "verify", "run").exit_code == 0


def test_a_sweep_from_a_plan_and_its_commands(ddpm_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = tmp_path / "plan.toml"
    plan.write_text(
        f"model = {ddpm_directory!r}\ngroups = ['lfw']\nsplits = ['confirm']\nitems = 2\ntimesteps = [60]\n"
        "fills = ['zero']\nscores = ['loss', 'generate']\ngenerate_steps = 1\nsites = ['mid_block.*']\n"
        "observe = false\n"
    )
    result = call("sweep", "--plan", plan, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "ablations" in result.output
    assert "rows at once" in result.output
    assert not (tmp_path / "headscope-run").exists()
    result = call("sweep", "--plan", plan, "--out", "run", "--quiet")
    assert result.exit_code == 0, result.output
    result = call("sweep", "status", "run")
    assert result.exit_code == 0
    assert "forwards: 20 of 20" in result.output
    assert call("sweep", "verify", "run").exit_code == 0
    (torn,) = (tmp_path / "run" / "ablations").glob("*.parquet")
    whole = torn.read_bytes()
    torn.write_bytes(whole[:-9])
    result = call("sweep", "verify", "run")
    assert result.exit_code == 1
    assert f"torn: ablations/{torn.name}" in result.output
    # what can't be is refused before anything is forgotten
    for wrong in (("--workers", 0), ("--batch", 0), ("--job", "a=1")):
        assert call("sweep", "retry", "run", *wrong).exit_code == 2
        assert torn.exists()
    result = call("sweep", "retry", "run", "--quiet")
    assert result.exit_code == 0, result.output
    assert torn.read_bytes() == whole
    torn.unlink()
    result = call("sweep", "verify", "run")
    assert result.exit_code == 1
    assert "missing: ablations, 1 unit(s)" in result.output
    assert "goes on where it stopped" in call("sweep", "status", "run").output
    assert call("sweep", "retry", "run", "--quiet").exit_code == 0
    assert torn.read_bytes() == whole
    assert "goes on" not in call("sweep", "status", "run").output
    result = call("sweep", "sheet", "run")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "contact-generations-lfw-zero.png").is_file()
    result = call("sweep", "--plan", plan, "--items", 3)
    assert result.exit_code == 2
    assert "plan: got items beside it" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("sweep", "--out"),
        ("sweep", "--dry-run", "--out"),
        ("sweep", "--model"),
        ("sweep", "--prompts"),
        ("sweep", "--plan"),
        ("sweep", "status"),
        ("sweep", "verify"),
        ("sweep", "retry"),
        ("sweep", "sheet"),
        ("report",),
        ("study", "--out"),
        ("train", "--out"),
        ("train", "--steps", "1", "--export"),
        ("bench", "--out"),
    ],
    ids=" ".join,
)
def test_addresses_are_refused_wherever_a_path_is_expected(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for address in ("s3://bucket/x", "hf://org/name/x"):
        result = call(*arguments, address)
        assert result.exit_code == 2
        assert f"got the address {address!r}, expected a path of the file system" in result.output
        assert len(result.output.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_group_s_address_is_refused():
    result = call("sweep", "--group", "mine=gs://bucket/images/{000..009}.tar")
    assert "groups: got the address 'gs://bucket/images/{000..009}.tar'" in result.output
    for read in (headscope.zoo.FolderGroup, lambda path: headscope.zoo.open_group("mine", path), Run.open):
        with pytest.raises(ValueError, match="got the address 'https://host/x', expected a path"):
            read("https://host/x")


def test_settings_that_are_none_are_one_sentence(tmp_path):
    """Of a study, a training run, and a manifest that was made elsewhere."""
    sealed = store.seals.to_json({"format": 2, "identity": {}, "units": []}, "manifest.json")
    for name, content, arguments, message in (
        ("study.json", b"[]", ("report",), "holds no study's settings"),
        ("study.json", b"{", ("study", "--out"), "can't be read"),
        ("recipe.json", b"[]", ("train", "--out"), "holds no recipe"),
        ("recipe.json", b"{", ("train", "--out"), "can't be read"),
        ("manifest.json", sealed, ("report",), "lacks config, sites"),
        ("manifest.json", sealed, ("sweep", "retry"), "its manifest holds no configuration"),
    ):
        folder = tmp_path / f"{name}-{len(content)}"
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        result = call(*arguments, folder)
        assert result.exit_code == 2
        assert message in result.output
        assert len(result.output.strip().splitlines()) == 1


def test_a_file_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for arguments, name in ((("study", "--out"), "study.json"), (("train", "--out"), "recipe.json")):
        result = call(*arguments, tmp_path / name)
        assert result.exit_code == 2
        assert result.output == f"error {tmp_path / name / name}: No space left on device\n"


def test_a_report_does_without_an_image_that_cannot_be_read(ddpm_directory, tmp_path):
    """The sweep had no use for it, or it came later."""
    for level in range(4):
        Image.new("RGB", (32, 32), (level, 0, 0)).save(tmp_path / f"{level}.png")
    config = SweepConfig(
        model=ddpm_directory, groups=(f"mine={tmp_path}",), items=1, timesteps=(60,), fills=(), scores=()
    )
    run = run_sweep(config, tmp_path / "run", progress=False)
    for level in range(4):
        (tmp_path / f"{level}.png").write_bytes(b"torn")
    result = call("report", run.path)
    assert result.exit_code == 0, result.output
    assert "mine" in (run.path / "report.html").read_text()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_training_and_study_end_on_ctrl_c_and_sigterm(tmp_path, monkeypatch, number, status):
    """With a sentence and the status that shells know."""

    def ended(*_):
        signal.raise_signal(number)

    monkeypatch.setattr(train, "_TrainingImages", ended)
    monkeypatch.setattr(launch, "_run", ended)
    for arguments in (("train", "--steps", 3), ("study", "--items", 1)):
        result = call(*arguments, "--out", tmp_path / arguments[0], "--quiet")
        assert result.exit_code == status
        assert result.output == "stopped; what is finished is kept, and the same command goes on from there\n"
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sweep", "--group", "cats"), "groups: got 'cats'"),
        (("sweep", "--timesteps", "a,b"), "timesteps: got 'a,b', expected integers"),
        (("sweep", "--fill", "median"), "fills: got median"),
        (("sweep", "--model", "nowhere"), "model: got 'nowhere'"),
        (("sweep", "--dtype", "int8"), "dtype: got int8"),
        (("study", "--items", "0"), "items: got 0, expected at least 1"),
        (("report", "nowhere"), "expected a directory with a headscope run"),
        (("sweep", "status", "nowhere"), "expected a directory with a headscope run"),
        (("sweep", "--plan", "nowhere.toml"), "plan: got 'nowhere.toml', expected a TOML file"),
        (("sweep", "--workers", "0"), "workers: got 0, expected at least 1"),
        (("sweep", "--executor", "slurm", "--job", "fast"), "job: got 'fast', expected NAME=VALUE"),
        (("sweep", "--executor", "slurm", "--job", "a=1", "--job", "a=2"), "job: got a twice, expected each once"),
        (("sweep", "--executor", "cloud"), "executor: got 'cloud', expected one of local"),
        (("sweep", "--dry-run", "--workers", "0"), "workers: got 0, expected at least 1"),
        (("sweep", "--address", "head:6379"), "address: got 'head:6379' with the executor local, expected it with ray"),
        (
            ("sweep", "--workers", "2", "--job", "a=1"),
            "job: got a with the executor processes, expected them with slurm",
        ),
        (("sweep", "--no-ablation", "--fill", "zero"), "fill: got some beside --no-ablation"),
        (("sweep", "--no-ablation", "--attribute", "--score", "x0"), "score: got some beside --no-ablation"),
        (("sweep", "--generate-steps", "5"), "generate_steps: got 5 without the score generate and without prompts"),
        (
            ("sweep", "--items", "3", "status", "run"),
            "items: got it before the command status, expected options of status after",
        ),
        (("sweep", "--out", "a", "verify", "b"), "out: got it before the command verify"),
        (("train", "--minutes", "nan"), "minutes: got nan, expected at least 0"),
        (("train", "--minutes", "-1"), "minutes: got -1.0, expected at least 0"),
        (("train", "--steps", "0"), "steps: got 0, expected at least 1"),
        (("sweep", "--seed", "3000000000"), "seed: got 3000000000, expected 0 to 2147483647"),
        (("study", "--seed", "3000000000"), "seed: got 3000000000, expected 0 to 2147483647"),
        (("train", "--seed", "-1"), "seed: got -1, expected 0 to 2147483647"),
        (("study", "--dtype", "int8"), "dtype: got int8"),
        (("study", "--device", "gpu"), "device: got 'gpu', expected one that torch sees"),
        (("train", "--device", "gpu"), "device: got 'gpu', expected one that torch sees"),
        (("bench", "--device", "gpu"), "device: got 'gpu', expected one that torch sees"),
        (("sweep", "--out", "a\udcfe"), r"out: got b'a\xfe', whose name isn't UTF-8, expected another name"),
        (("sweep", "status", "a\udcfe"), r"run: got b'a\xfe', whose name isn't UTF-8"),
    ],
)
def test_mistakes_get_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.output.startswith("error")
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
