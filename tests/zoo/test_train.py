"""Training: exact resuming, refusal of another recipe, equal presentations, export and its card."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from headscope import zoo
from headscope.zoo import train as training
from headscope.zoo.card import export
from headscope.zoo.train import TrainConfig, train

TINY = TrainConfig(
    out="unset",
    model="unet",
    steps=4,
    batch=2,
    groups=("lfw",),
    checkpoint_every=2,
    log_every=1,
    evaluate_every=0,
    progress=False,
)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    result = train(replace(TINY, out=out))
    assert (result.step, result.finished) == (4, True)
    return out


def test_a_killed_run_continues_with_the_same_numbers(finished, tmp_path, monkeypatch):
    advance = training._State.advance

    def killed_in_step_4(self, step, *batch):
        if step == 3:
            raise KeyboardInterrupt
        return advance(self, step, *batch)

    monkeypatch.setattr(training._State, "advance", killed_in_step_4)
    with pytest.raises(KeyboardInterrupt):
        train(replace(TINY, out=tmp_path))
    monkeypatch.undo()
    # what a kill in the middle of writing leaves behind
    (tmp_path / "checkpoint.safetensors.part").write_bytes(b"half")
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 4, "lo')
    # other random numbers drawn in between must not matter
    torch.manual_seed(123)
    assert train(replace(TINY, out=tmp_path)).finished
    whole, resumed = weights(finished), weights(tmp_path)
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    assert losses(tmp_path) == losses(finished)


def losses(folder: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def test_training_changes_the_weights_and_their_average(finished):
    stored = weights(finished)
    moved = [name for name in stored if name.startswith("model.") and stored[name].abs().sum() > 0]
    assert moved
    assert any(not torch.equal(stored[name], stored[name.replace("model.", "average.", 1)]) for name in moved)
    assert all(torch.isfinite(tensor).all() for tensor in stored.values())
    assert {float(tensor) for name, tensor in stored.items() if name.startswith("step.")} == {4.0}


def test_another_recipe_is_refused(finished):
    with pytest.raises(ValueError, match=r"holds a run of another configuration \(seed: recorded 0, now 1\)"):
        train(replace(TINY, out=finished, seed=1))
    # limits are no part of the recipe, and a finished run stays as it is
    before = (finished / "checkpoint.safetensors").read_bytes()
    assert train(replace(TINY, out=finished, checkpoint_every=1)).step == 4
    assert (finished / "checkpoint.safetensors").read_bytes() == before


def test_a_time_limit_stops_at_a_step(tmp_path):
    result = train(replace(TINY, out=tmp_path, minutes=0.0))
    assert (result.step, result.finished) == (1, False)
    assert (tmp_path / "checkpoint.safetensors").exists()


def test_the_record_holds_no_path_and_no_pickle(finished):
    for file in finished.iterdir():
        assert str(finished).encode() not in file.read_bytes()
    source = "".join(file.read_text() for file in Path(training.__file__).parent.glob("*.py"))
    assert not re.search(r"torch\.(save|load)\b|import pickle", source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 3, "groups": ("lfw", "faces")}, "batch: got 3, expected a multiple of 2"),
        ({"model": "vit"}, "model: got 'vit', expected one of pixeldit, unet"),
        ({"groups": ("cats",)}, r"groups: got \('cats',\)"),
        ({"dtype": "float16"}, "dtype: got 'float16'"),
        ({"steps": 0}, "steps: got 0"),
        ({"steps": True}, "steps: got True, expected a whole number"),
        ({"batch": 16.0}, "batch: got 16.0, expected a whole number"),
        ({"shift": -1}, "shift: got -1, expected at least 0"),
        ({"learning_rate": float("nan")}, "learning_rate: got nan, expected a finite number"),
    ],
)
def test_wrong_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_groups_and_images_are_presented_equally_often():
    config = replace(TINY, groups=("lfw", "photographs"), batch=20, shift=0)
    data = training._TrainingImages(config)
    assert [images.shape for images in data.images] == [(60, 32, 32, 3)] * 2
    whole, mirrored = Counter(), {}
    for number, image in enumerate(np.concatenate(data.images)):
        mirrored[image.tobytes()] = mirrored[image[:, ::-1].tobytes()] = number
    # 12 steps with 10 images of each group: twice through the 60
    for step in range(12):
        images, noise, timesteps = data.batch(step)
        assert images.shape == noise.shape == (20, 3, 32, 32)
        assert noise.dtype == torch.float32
        assert sorted((timesteps // 50).tolist()) == list(range(20))
        for image in ((images.permute(0, 2, 3, 1) + 1) * 127.5).round().to(torch.uint8).numpy():
            whole[mirrored[image.tobytes()]] += 1
    assert whole == Counter(dict.fromkeys(range(120), 2))


def test_tied_images_are_shown_as_they_are():
    data = training._TrainingImages(replace(TINY, groups=("twins", "lfw"), batch=4))
    assert [len(images) for images in data.images] == [1200, 60]
    shown = ((data.batch(0)[0][:2].permute(0, 2, 3, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    known = {image.tobytes() for image in data.images[0]}
    assert all(image.tobytes() in known for image in shown)


@pytest.mark.full
def test_the_transformer_is_trained_and_exported(tmp_path):
    config = replace(TINY, out=tmp_path / "run", model="pixeldit", groups=("twins", "lfw"), batch=2, steps=2)
    assert train(config).finished
    folder = export(tmp_path / "run", tmp_path / "weights", samples=2, sampling_steps=2, items=2, timesteps=(300, 700))
    pipeline = zoo.load_pipeline(folder)
    average = weights(tmp_path / "run")
    for name, parameter in pipeline.transformer.named_parameters():
        assert torch.equal(parameter, average[f"average.{name}"].half().float())
    card = (folder / "MODEL_CARD.md").read_text()
    assert "DiTTransformer2DModel" in card
    assert "| twins | held out |" in card
    assert "model=" not in card.partition("```python\nfrom headscope.zoo.card")[2].partition("```")[0]
    # the recipe of the one is not the other's
    with pytest.raises(ValueError, match="model: recorded 'pixeldit', now 'unet'"):
        train(replace(config, model="unet", batch=2))


def test_augmentation_flips_and_shifts():
    image = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3).astype(np.uint8)
    np.testing.assert_array_equal(training._augment(image, False, np.array([2, 2]), 2), image)
    np.testing.assert_array_equal(training._augment(image, True, np.array([2, 2]), 2), image[:, ::-1])
    np.testing.assert_array_equal(training._augment(image, False, np.array([0, 3]), 2)[2:, :-1], image[:-2, 1:])


def test_the_progress_bar_reports(tmp_path, capsys):
    train(replace(TINY, out=tmp_path, steps=1, progress=True))
    assert "1/1" in capsys.readouterr().out


def test_export(finished, tmp_path):
    folder = export(finished, tmp_path / "weights", samples=2, sampling_steps=2, items=2, timesteps=(300, 700))
    stored = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    average = weights(finished)
    pipeline = zoo.load_pipeline(folder)
    for name, parameter in pipeline.unet.named_parameters():
        assert torch.equal(parameter, average[f"average.{name}"].half().float())
    card = (folder / "MODEL_CARD.md").read_text()
    assert "demonstration model" in card
    assert str(tmp_path) not in card
    assert "| 300 |" in card
    assert "groups=('lfw',)" in card
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["step"] == 4
    for picture in ("samples.png", "items.png", "losses.png"):
        assert f"({picture})" in card
        assert (folder / picture).stat().st_size < 300_000


def test_export_needs_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run_dir: '.*' lacks recipe.json, expected a folder that train\(\)"):
        export(tmp_path, tmp_path / "weights")
