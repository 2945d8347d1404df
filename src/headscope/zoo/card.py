"""From a training run to the exported model: half-precision weights, and the card that says what they are."""

from __future__ import annotations

import io
import json
import math
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as serialise

from headscope._files import local_path, write_atomic
from headscope.zoo.card_pictures import PALETTE, Series, image_sheet, line_charts
from headscope.zoo.groups import open_group
from headscope.zoo.loading import load_pipeline
from headscope.zoo.model import MODELS, SCHEDULER_CONFIG, BundledModel
from headscope.zoo.train import TrainConfig, evaluate

__all__ = ["export"]

# the middles of ten equal intervals: their mean estimates the loss over all timesteps
_TIMESTEPS = tuple(range(50, 1000, 100))
_HELD_OUT = ("discover", "confirm")
# of each group and split, evaluated; of each group, pictured
_EVALUATED, _PICTURED = 60, 40


def export(
    run_dir: str | Path,
    destination: str | Path,
    *,
    samples: int = 40,
    sampling_steps: int = 250,
    items: int = _EVALUATED,
    timesteps: tuple[int, ...] = _TIMESTEPS,
) -> Path:
    """Export the averaged weights of a run in half precision, with a model card computed from them.

    run_dir: what `train` wrote. destination: the folder to fill (model.safetensors, unet/ or transformer/ and
    scheduler/config.json, MODEL_CARD.md, evaluation.json, three PNG figures). samples, sampling_steps: how many images
    the card shows and the DDPM steps of each. items: evaluate at most so many of a group's split. Every number on the
    card is computed in float32 from the half-precision weights, loaded back. Returns the destination. Raises
    FileNotFoundError where run_dir holds no checkpoint.
    """
    run, folder = local_path("run_dir", run_dir), local_path("destination", destination)
    for name in ("recipe.json", "checkpoint.safetensors", "log.jsonl"):
        if not (run / name).is_file():
            raise FileNotFoundError(f"run_dir: {str(run_dir)!r} lacks {name}, expected a folder that train() wrote")
    recipe = json.loads((run / "recipe.json").read_text())
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    folder.mkdir(parents=True, exist_ok=True)
    bundled = MODELS[recipe["model"]]
    step = _write_weights(run / "checkpoint.safetensors", folder, bundled)
    pipeline = load_pipeline(folder)
    denoiser = getattr(pipeline, bundled.part)
    losses = {
        name: {
            split: evaluate(bundled, denoiser, pipeline.scheduler, open_group(name), split, timesteps, items)
            for split in ("train", *_HELD_OUT)
        }
        for name in recipe["groups"]
    }
    images = _sample(pipeline, samples, sampling_steps)
    training = {name: _images(name, "train") for name in recipe["groups"]}
    held_out = {
        name: np.concatenate([_images(name, split, _PICTURED // 2) for split in _HELD_OUT]) for name in recipe["groups"]
    }
    nearest, distances = _nearest(images, np.concatenate(list(training.values())), recipe["shift"])
    _, reference = _nearest(
        np.concatenate(list(held_out.values())), np.concatenate(list(training.values())), recipe["shift"]
    )
    _save_png(_sample_sheet(images, nearest), folder / "samples.png")
    _save_png(_item_sheet(training, held_out), folder / "items.png")
    _save_png(_loss_chart(log, recipe["groups"]), folder / "losses.png")
    summary = {
        "step": step,
        "samples": samples,
        "unique_training_images": {name: len(images) for name, images in training.items()},
        "sampling_steps": sampling_steps,
        "held_out_images": {
            name: sum(min(len(open_group(name).indices(split)), items) for split in _HELD_OUT) for name in held_out
        },
        "losses": losses,
        "nearest_training_image": {"samples": _median(distances), "held_out_items": _median(reference)},
    }
    write_atomic(folder / "evaluation.json", json.dumps(summary, indent=1).encode())
    write_atomic(folder / "MODEL_CARD.md", _card(recipe, log, summary, folder).encode())
    return folder


def _write_weights(checkpoint: Path, folder: Path, bundled: BundledModel) -> int:
    """Write the averaged weights in float16 and the two configurations; returns the checkpoint's step."""
    with safe_open(checkpoint, framework="pt") as stored:
        step = int(stored.metadata()["step"])
        names = [name for name in stored.keys() if name.startswith("average.")]  # noqa: SIM118 - not a dict
        weights = {name.removeprefix("average."): stored.get_tensor(name).half() for name in names}
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"run_dir: the weight {name} is not finite in half precision")
    content = serialise(weights, metadata={"format": "pt", "step": str(step)})
    write_atomic(folder / "model.safetensors", content)
    for part, config in (
        (bundled.part, {"_class_name": bundled.class_name, **bundled.config}),
        ("scheduler", {"_class_name": "DDPMScheduler", **SCHEDULER_CONFIG}),
    ):
        (folder / part).mkdir(exist_ok=True)
        write_atomic(folder / part / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    return step


def _images(name: str, split: str, most: int | None = None) -> np.ndarray:
    group = open_group(name)
    return np.stack([group.item(index).image for index in group.indices(split)[:most]])


def _sample(pipeline: Any, count: int, steps: int) -> np.ndarray:
    """The first `count` samples under seed 0, uint8 [count, 32, 32, 3]; none is left out."""
    generator = torch.Generator().manual_seed(0)
    images = pipeline(batch_size=count, generator=generator, num_inference_steps=steps, output_type="np").images
    return np.floor(images * 255.0 + 0.5).astype(np.uint8)


def _nearest(images: np.ndarray, training: np.ndarray, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """The nearest training image of each image, flips and shifts included, and its distance.

    Distance is the root mean square difference in levels (0 to 255) over the pixels that every shift leaves inside.
    """
    size = images.shape[1]
    inner = slice(shift, size - shift)
    query = images[:, inner, inner].reshape(len(images), -1).astype(np.float32)
    best = np.full(len(images), np.inf, dtype=np.float32)
    match = np.zeros_like(images)
    for flipped in (training, training[:, :, ::-1]):
        for down in range(2 * shift + 1):
            for right in range(2 * shift + 1):
                rows, columns = slice(down, down + size - 2 * shift), slice(right, right + size - 2 * shift)
                keys = flipped[:, rows, columns].reshape(len(training), -1).astype(np.float32)
                squares = (query**2).sum(1)[:, None] + (keys**2).sum(1)[None] - 2.0 * (query @ keys.T)
                index = squares.argmin(axis=1)
                distance = np.sqrt(np.maximum(squares[np.arange(len(images)), index], 0.0) / query.shape[1])
                closer = distance < best
                best[closer] = distance[closer]
                match[closer] = flipped[index[closer]]
    return match, best


def _median(values: np.ndarray) -> float:
    return round(float(np.median(values)), 2)


def _save_png(picture: Any, file: Path) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    write_atomic(file, buffer.getvalue())


def _sample_sheet(images: np.ndarray, nearest: np.ndarray, columns: int = 10) -> Any:
    rows = []
    for start in range(0, len(images), columns):
        rows.append(("samples", images[start : start + columns]))
        rows.append(("nearest training", nearest[start : start + columns]))
    return image_sheet(rows)


def _item_sheet(training: dict[str, np.ndarray], held_out: dict[str, np.ndarray], columns: int = 10) -> Any:
    rows = []
    for name in training:
        rows.append((f"{name}, training", training[name][:columns]))
        half = len(held_out[name]) // 2
        rows.append(
            (f"{name}, held out", np.concatenate([held_out[name][: columns // 2], held_out[name][half:]])[:columns])
        )
    return image_sheet(rows)


def _loss_chart(log: list[dict[str, Any]], groups: list[str]) -> Any:
    """The training loss, and each group's loss on training and held-out items as the run went on."""
    losses = [(row["step"], row["loss"]) for row in log if "loss" in row]
    # means over neighbouring rows: at most 150 points
    width = max(1, len(losses) // 150)
    blocks = [losses[start : start + width] for start in range(0, len(losses), width)]
    curve = Series("", [block[-1][0] for block in blocks], [float(np.mean([y for _, y in block])) for block in blocks])
    panels = [("Training loss", "step", [curve])]
    evaluations = [(row["step"], row["evaluation"]) for row in log if "evaluation" in row]
    for start in range(0, len(groups) if evaluations else 0, len(PALETTE)):
        lines = []
        for colour, name in zip(PALETTE, groups[start : start + len(PALETTE)], strict=False):
            for split, dashed in (("train", False), ("discover", True)):
                label = f"{name}, {'training' if split == 'train' else 'held out'}"
                y = [evaluation[name][split] for _, evaluation in evaluations]
                lines.append(Series(label, [step for step, _ in evaluations], y, colour, dashed))
        panels.append(("Averaged weights, 10 items, 4 timesteps", "step", lines))
    return line_charts(panels)


def _mean(values: dict[int, float]) -> float:
    return sum(values.values()) / len(values)


def _held_out(losses: dict[str, dict[int, float]]) -> dict[int, float]:
    """Both held-out splits together: of each group they have equally many items."""
    return {step: (losses["discover"][step] + losses["confirm"][step]) / 2 for step in losses["discover"]}


def _loss_table(losses: dict[str, dict[str, dict[int, float]]]) -> str:
    steps = next(iter(losses.values()))["train"]
    rows = [f"| group | items | {' | '.join(map(str, steps))} | mean |", "|---|---" + "|---:" * (len(steps) + 1) + "|"]
    for name, splits in losses.items():
        for title, part in (("training", splits["train"]), ("held out", _held_out(splits))):
            cells = " | ".join(f"{value:.4f}" for value in part.values())
            rows.append(f"| {name} | {title} | {cells} | **{_mean(part):.4f}** |")
    return "\n".join(rows)


def _gap_sentence(losses: dict[str, dict[str, dict[int, float]]]) -> str:
    parts = []
    for name, splits in losses.items():
        training, held_out = _mean(splits["train"]), _mean(_held_out(splits))
        parts.append(f"{name} {100 * (held_out / training - 1):+.0f} %")
    return ", ".join(parts)


def _data_table(recipe: dict[str, Any], summary: dict[str, Any]) -> str:
    share = recipe["batch"] // len(recipe["groups"])
    rows = [
        "| group | unique training images | their sources | presentations of each | held-out images | their sources |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, unique in summary["unique_training_images"].items():
        group, presentations = open_group(name), summary["step"] * share / unique
        held_out = sum(len(group.sources(split)) for split in _HELD_OUT)
        cells = (
            name,
            unique,
            len(group.sources("train")),
            f"{presentations:.0f}",
            summary["held_out_images"][name],
            held_out,
        )
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def _training_hours(log: list[dict[str, Any]], batch: int) -> float:
    """Time spent in training steps, from the logged rates: evaluations and earlier, discarded steps not counted."""
    seconds, before = 0.0, 0
    for row in log:
        if "images_per_second" in row:
            seconds += (row["step"] - before) * batch / row["images_per_second"]
            before = row["step"]
    return seconds / 3600


def _parameter_count(weights: Path) -> int:
    with safe_open(weights, framework="np") as stored:
        return sum(math.prod(stored.get_slice(name).get_shape()) for name in stored.keys())  # noqa: SIM118 - not a dict


def _card(recipe: dict[str, Any], log: list[dict[str, Any]], summary: dict[str, Any], folder: Path) -> str:
    step, losses = summary["step"], summary["losses"]
    near, draws, sampling = summary["nearest_training_image"], summary["samples"], summary["sampling_steps"]
    bundled, trained_on = MODELS[recipe["model"]], sum(summary["unique_training_images"].values())
    weights = folder / "model.safetensors"
    millions, megabytes = _parameter_count(weights) / 1e6, weights.stat().st_size / 1e6
    return f"""# headscope's bundled model {bundled.name}

**This is a demonstration model.** It is here so that every command of headscope runs at once, offline and on a CPU.
It was trained on {trained_on:,} small images. Nothing found in its heads says anything about other diffusion models.

## What it is

An unconditional DDPM for 32 x 32 colour images: diffusers' `{bundled.class_name}`, {millions:.2f} M parameters,
{bundled.sites}; 1,000 timesteps under the cosine schedule; it predicts the noise.
The weights are the run's moving average, stored in half precision ({megabytes:.1f} MB) and used in float32.

```python
from headscope.zoo import load_pipeline

images = load_pipeline("{bundled.name}")(batch_size=4, num_inference_steps=250).images
```

## Data

{_data_table(recipe, summary)}

Every group has an equal share of the presentations. Images of groups that aren't drawn for their ties are flipped with
probability 1/2 and shifted by up to {recipe["shift"]} pixels. A training source is never in a held-out split.

{_described(recipe["groups"])}

![Training and held-out items](items.png)

## Training

{_training_facts(recipe, log, step)}

```python
from headscope.zoo.card import export
from headscope.zoo.train import TrainConfig, train

{_training_call(recipe, step)}
export("headscope-train", "weights")
```

The same versions on the same kind of processor give the same run, bit by bit; others give one that is as good.

![Loss curves](losses.png)

## Losses

Mean squared error in the predicted noise, by timestep (1 is what predicting nothing gives), in float32 from the
half-precision weights, without augmentation, one noise draw per item and timestep, over at most {_EVALUATED} items of a
split. The held-out rows are the mean of `discover` and `confirm`. The last step was taken as it came: no checkpoint was
selected on any loss.

{_loss_table(losses)}

**Overfitting.** The mean held-out loss relative to the training loss: {_gap_sentence(losses)}.

## Samples

The first {draws} samples under seed 0, {sampling} DDPM steps, none left out; under each row, the nearest training
image of any group, flips and shifts included. Median root mean square distance to the nearest training image, in
levels of 255: samples {near["samples"]}, held-out items {near["held_out_items"]}. Samples much nearer than held-out
items are copies from memory rather than new images. Expect colour casts, blur and misplaced features: the run is
short and the training set small.

![Samples](samples.png)
"""


def _described(names: list[str]) -> str:
    """A line on each group, and what a reader must know of those made from photographs."""
    notes = {
        "lfw": "whose faces they are is not recorded: a patch counts as its source, a person may appear in two splits",
        "photographs": "training on the cat, the cup and the motorcycle, `discover` on the rocket, `confirm` on the"
        " astronaut: a held-out loss is that of two photographs, which may be easier or harder than the three trained"
        " on",
    }
    lines = [f"- `{name}`: {open_group(name).description}" for name in names]
    return "\n".join(
        line + (f"; {notes[name]}" if name in notes else "") for name, line in zip(names, lines, strict=True)
    )


def _training_facts(recipe: dict[str, Any], log: list[dict[str, Any]], step: int) -> str:
    sittings = [row["sitting"] for row in log if "sitting" in row]
    first, batch = sittings[0], recipe["batch"]
    rate = float(np.median([row["images_per_second"] for row in log if "images_per_second" in row]))
    threads = f"{first['threads']} thread" + ("" if first["threads"] == 1 else "s")
    count = f"{len(sittings)} sitting" + ("" if len(sittings) == 1 else "s")
    precision = "float32" if recipe["dtype"] == "float32" else f"autocast to {recipe['dtype']}"
    share, hours = batch // len(recipe["groups"]), _training_hours(log, batch)
    lines = [
        f"- {step} steps with a batch of {batch} ({share} per group), {step * batch:,} images in all",
        f"- on {first['device']} ({threads}, {precision}), {hours:.2f} hours in"
        f" {count} begun on {first['started']}, {rate:.1f} images per second",
        f"- AdamW, learning rate {recipe['learning_rate']:g} after {recipe['warmup_steps']} steps of warm-up,"
        f" weight decay {recipe['weight_decay']:g}, unweighted noise loss,"
        f" moving average {recipe['ema']:g}, seed {recipe['seed']}",
        "- " + ", ".join(f"{name} {version}" for name, version in first["versions"].items()),
        f"- exported on {time.strftime('%Y-%m-%d', time.gmtime())}",
    ]
    return "\n".join(lines)


def _training_call(recipe: dict[str, Any], step: int) -> str:
    """The call that repeats the run, with whatever differs from the defaults."""
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    own = MODELS[recipe["model"]]
    defaults |= {name: getattr(own, name) for name in ("batch", "learning_rate", "ema", "groups")}
    changed = {name: recipe[name] for name in defaults if name in recipe and name != "groups"}
    changed = {name: value for name, value in changed.items() if value != defaults[name]}
    if tuple(recipe["groups"]) != defaults["groups"]:
        changed["groups"] = tuple(recipe["groups"])
    arguments = "".join(f", {name}={value!r}" for name, value in changed.items())
    return f'train(TrainConfig(out="headscope-train", steps={step}{arguments}))'
