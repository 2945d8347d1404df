"""Training of the bundled models: counter-based, so that a killed run continues with the numbers it would have had.

Step s draws its images, flips, shifts, timesteps, noise and dropout from streams keyed by the seed and s, never from
a running generator. What a checkpoint must hold is therefore the weights, their moving average and the optimiser's
moments, in one safetensors file that replaces its predecessor in one rename. The learning rate is constant after its
warm-up and the moving average does the annealing, so where a run stops leaves every earlier step as it is.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as serialise

from headscope._extras import require
from headscope._files import local_path, write_atomic
from headscope._machine import checked_device, device_name
from headscope._signals import terminable
from headscope.counter import check_seed, counter_integers, counter_normal, counter_permutation, counter_uniform, whole
from headscope.zoo.groups import GROUPS, ImageGroup, open_group
from headscope.zoo.model import DEFAULT_MODEL, MODELS, SCHEDULER_CONFIG, BundledModel, build_scheduler

__all__ = ["TrainConfig", "TrainResult", "evaluate", "images_to_tensor", "train"]

# a setting that the model brings
_ITS_OWN: Any = None
# limits and places, which leave the numbers of every step as they are
_NOT_RECIPE = ("out", "steps", "minutes", "device", "progress", "checkpoint_every", "log_every", "evaluate_every")


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run; those that determine its numbers are recorded, and compared on resuming.

    What is None is the model's own (`headscope.zoo.model.MODELS`).
    """

    out: str | Path
    model: str = DEFAULT_MODEL
    steps: int = 8000
    minutes: float | None = None  # stop after so much time, at the end of a step
    batch: int = _ITS_OWN  # a multiple of the number of groups, which get equal shares
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"  # of the forward: "float32", or "bfloat16" by autocast; weights are float32 throughout
    learning_rate: float = _ITS_OWN
    warmup_steps: int = 200
    weight_decay: float = 0.01
    ema: float = _ITS_OWN
    shift: int = 2  # pixels, the largest random translation
    groups: tuple[str, ...] = _ITS_OWN
    checkpoint_every: int = 250
    log_every: int = 20
    evaluate_every: int = 500  # 0: never
    progress: bool = True

    def __post_init__(self) -> None:
        local_path("out", self.out)
        # frozen for everybody else
        object.__setattr__(self, "seed", whole("seed", self.seed))
        check_seed(self.seed)
        if self.model not in MODELS:
            raise ValueError(f"model: got {self.model!r}, expected one of {', '.join(MODELS)}")
        for name in ("batch", "learning_rate", "ema", "groups"):
            if getattr(self, name) is _ITS_OWN:
                object.__setattr__(self, name, getattr(self.bundled, name))
        if not self.groups or any(name not in GROUPS for name in self.groups):
            raise ValueError(f"groups: got {self.groups}, expected names among {', '.join(GROUPS)}")
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype: got {self.dtype!r}, expected 'bfloat16' or 'float32'")
        for name, least in (
            *(("batch", 1), ("steps", 1), ("checkpoint_every", 1), ("log_every", 1)),
            *(("warmup_steps", 0), ("shift", 0), ("evaluate_every", 0)),
        ):
            object.__setattr__(self, name, whole(name, getattr(self, name), least))
        for name in ("learning_rate", "weight_decay", "ema"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a finite number of at least 0")
        if self.batch % len(self.groups):
            raise ValueError(
                f"batch: got {self.batch}, expected a multiple of {len(self.groups)}, the number of groups"
            )
        if self.minutes is not None and not self.minutes >= 0:
            raise ValueError(f"minutes: got {self.minutes}, expected at least 0")

    @property
    def bundled(self) -> BundledModel:
        return MODELS[self.model]

    def recipe(self) -> dict[str, Any]:
        """The settings that determine the numbers, as JSON values: no path, no limit."""
        chosen = {name: value for name, value in asdict(self).items() if name not in _NOT_RECIPE}
        described = {"architecture": self.bundled.config, "scheduler": SCHEDULER_CONFIG}
        return {**chosen, "groups": list(self.groups), **described}


@dataclass(frozen=True)
class TrainResult:
    """The state of a run after `train`."""

    out: Path
    step: int  # steps done in all, earlier sittings included
    seconds: float  # of this sitting
    finished: bool  # whether `steps` was reached


def train(config: TrainConfig) -> TrainResult:
    """Train, or continue, a bundled model in the folder `config.out`, until `steps` or `minutes`.

    Writes recipe.json, checkpoint.safetensors and log.jsonl there. An existing run is continued from its last
    checkpoint. Raises ValueError when the folder holds a run of another recipe. SIGTERM ends it as Ctrl-C does, where
    the program has no handler of its own, with SystemExit(143).
    """
    with terminable():
        return _train(config)


def _train(config: TrainConfig) -> TrainResult:
    out = Path(config.out)
    checked_device(config.device)
    out.mkdir(parents=True, exist_ok=True)
    _check_recipe(out, config.recipe())
    state = _State(config)
    checkpoint = out / "checkpoint.safetensors"
    step = state.load(checkpoint) if checkpoint.exists() else 0
    _truncate_log(out / "log.jsonl", step)
    data = _TrainingImages(config)
    begun = time.monotonic()
    last_mark, last_step, recent = begun, step, []
    with _progress_bar(config, step) as advance, (out / "log.jsonl").open("a") as log:
        if step < config.steps:
            _write_line(log, {"step": step, "sitting": _circumstances(config)})
        while step < config.steps:
            recent.append(state.advance(step, *data.batch(step)))
            step += 1
            now = time.monotonic()
            done = step == config.steps or (config.minutes is not None and now - begun > 60 * config.minutes)
            advance(step, recent[-1])
            if step % config.log_every == 0 or done:
                rate = (step - last_step) * config.batch / max(now - last_mark, 1e-9)
                _write_line(log, {"step": step, "loss": sum(recent) / len(recent), "images_per_second": round(rate, 2)})
                last_mark, last_step, recent = now, step, []
            if config.evaluate_every and step % config.evaluate_every == 0:
                _write_line(log, {"step": step, "evaluation": _quick_evaluation(state, config)})
                last_mark = time.monotonic()
            if step % config.checkpoint_every == 0 or done:
                state.save(checkpoint, step)
            if done:
                break
    return TrainResult(out, step, time.monotonic() - begun, step >= config.steps)


def _check_recipe(out: Path, recipe: dict[str, Any]) -> None:
    """Record the recipe of a new run; refuse to continue a run of another."""
    file = out / "recipe.json"
    if not file.exists():
        write_atomic(file, json.dumps(recipe, indent=2).encode())
        return
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"out: {str(file)!r} can't be read ({error})") from None
    if not isinstance(recorded, dict):
        raise ValueError(f"out: {str(file)!r} holds no recipe, expected what headscope train wrote")
    differing = sorted(name for name in recipe.keys() | recorded.keys() if recipe.get(name) != recorded.get(name))
    if differing:
        listed = "; ".join(f"{name}: recorded {recorded.get(name)!r}, now {recipe.get(name)!r}" for name in differing)
        raise ValueError(
            f"out: {str(out)!r} holds a run of another configuration ({listed}), expected the same or none"
        )


def _circumstances(config: TrainConfig) -> dict[str, Any]:
    """The machine of a sitting: for the model card, not for comparison."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    versions["diffusers"] = require("diffusers", "study").__version__
    return {
        "started": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "device": device_name(config.device),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def _write_line(log: Any, row: dict[str, Any]) -> None:
    log.write(json.dumps(row) + "\n")
    log.flush()


def _truncate_log(file: Path, step: int) -> None:
    """Drop what a killed run logged after its last checkpoint: those steps will be done, and logged, again."""
    if not file.exists():
        return
    lines = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                lines.append(line + "\n")
        except json.JSONDecodeError:
            break  # the line that was being written when the run was killed
    write_atomic(file, "".join(lines).encode())


@contextmanager
def _progress_bar(config: TrainConfig, step: int) -> Iterator[Any]:
    if not config.progress:
        yield lambda step, loss: None
        return
    from rich import progress

    columns = ("[bold]{task.description}", progress.BarColumn(), progress.MofNCompleteColumn(), "{task.fields[note]}")
    with progress.Progress(*columns, progress.TimeRemainingColumn(), progress.TimeElapsedColumn()) as bar:
        task = bar.add_task("training", total=config.steps, completed=step, note="")
        begun, first = time.monotonic(), step
        limit = f", stops after {config.minutes:g} min" if config.minutes is not None else ""

        def advance(step: int, loss: float) -> None:
            rate = (step - first) / max(time.monotonic() - begun, 1e-9)
            bar.update(task, completed=step, note=f"{rate:.2f} steps/s, loss {loss:.4f}{limit}")

        yield advance


class _TrainingImages:
    """The training images of each group and the batch of any step.

    Every group has an equal share of a batch, and every image of a group is shown equally often: they are gone through
    in one permutation after another.
    """

    def __init__(self, config: TrainConfig) -> None:
        groups = [open_group(name) for name in config.groups]
        # of each group, [images, 32, 32, 3]
        self.images = [np.stack([group.item(index).image for index in group.indices("train")]) for group in groups]
        self.augmented = [group.augmented for group in groups]
        self.config = config
        self.permutations: dict[tuple[int, int], np.ndarray] = {}

    def _permutation(self, group: int, epoch: int) -> np.ndarray:
        if (group, epoch) not in self.permutations:
            # the epoch before is over
            self.permutations.pop((group, epoch - 2), None)
            key = ("train", self.config.seed, "order", self.config.groups[group], epoch)
            self.permutations[group, epoch] = counter_permutation(*key, count=len(self.images[group]))
        return self.permutations[group, epoch]

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images from -1 to 1, noise (both float32 [batch, 3, 32, 32]) and timesteps (int64 [batch]) of a step."""
        config = self.config
        share = config.batch // len(config.groups)
        key = ("train", config.seed, step)
        flips = counter_uniform(*key, "flip", shape=config.batch) < 0.5
        shifts = counter_integers(*key, "shift", high=2 * config.shift + 1, shape=(config.batch, 2))
        rows = []
        for group, (members, augmented) in enumerate(zip(self.images, self.augmented, strict=True)):
            for position in range(step * share, (step + 1) * share):
                epoch, place = divmod(position, len(members))
                image, row = members[self._permutation(group, epoch)[place]], len(rows)
                rows.append(_augment(image, flips[row], shifts[row], config.shift) if augmented else image)
        images = np.stack(rows)
        # one timestep from each of `batch` equal intervals, dealt out at random: less variance than free draws
        strata = counter_permutation(*key, "strata", count=config.batch)
        offsets = counter_uniform(*key, "timestep", shape=config.batch)
        timesteps = np.floor((strata + offsets) / config.batch * SCHEDULER_CONFIG["num_train_timesteps"]).astype(
            np.int64
        )
        noise = counter_normal(*key, "noise", shape=(config.batch, 3, *images.shape[1:3])).astype(np.float32)
        return images_to_tensor(images), torch.from_numpy(noise), torch.from_numpy(timesteps)


def _augment(image: np.ndarray, flip: bool, shift: np.ndarray, most: int) -> np.ndarray:
    """Flip and translate, repeating the border; `shift` counts from 0 to 2 * most."""
    image = image[:, ::-1] if flip else image
    height, width = image.shape[:2]
    padded = np.pad(image, ((most, most), (most, most), (0, 0)), mode="edge")
    return padded[shift[0] : shift[0] + height, shift[1] : shift[1] + width]


def images_to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [n, size, size, 3] to float32 [n, 3, size, size] from -1 to 1."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 127.5 - 1.0


class _State:
    """The model, its moving average and the optimiser."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.device = torch.device(config.device)
        torch.manual_seed(config.seed)
        self.model = config.bundled.build().to(self.device).train()
        self.scheduler = build_scheduler()
        self.parameters = dict(self.model.named_parameters())
        self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )

    def advance(self, step: int, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> float:
        """One step of the optimiser; returns the batch's mean squared error in the noise."""
        config = self.config
        digest = hashlib.sha256(f"dropout/{config.seed}/{step}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        images, noise, timesteps = (tensor.to(self.device) for tensor in (images, noise, timesteps))
        noisy = self.scheduler.add_noise(images, noise, timesteps)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16"):
            prediction = config.bundled.denoise(self.model, noisy, timesteps)
        loss = torch.nn.functional.mse_loss(prediction.float(), noise)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (step + 1) / max(config.warmup_steps, 1))
        self.optimizer.step()
        # the average forgets its random start quickly
        decay = min(config.ema, (1.0 + step) / (10.0 + step))
        with torch.no_grad():
            averages = list(self.average.values())
            torch._foreach_lerp_(averages, list(self.parameters.values()), 1.0 - decay)
        return float(loss.detach())

    def averaged_model(self) -> Any:
        """A copy of the model with the moving average for weights, in evaluation mode."""
        model = self.config.bundled.build().to(self.device).eval().requires_grad_(False)
        model.load_state_dict(self.average)
        return model

    def save(self, file: Path, step: int) -> None:
        """Write everything the next step needs."""
        tensors = {f"model.{name}": value.detach() for name, value in self.parameters.items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        for name, parameter in self.parameters.items():
            for moment in ("exp_avg", "exp_avg_sq", "step"):
                tensors[f"{moment}.{name}"] = self.optimizer.state[parameter][moment]
        tensors = {name: value.contiguous().cpu() for name, value in tensors.items()}
        write_atomic(file, serialise(tensors, metadata={"step": str(step)}))

    def load(self, file: Path) -> int:
        """Read what `save` wrote; returns the number of steps done."""
        with safe_open(file, framework="pt") as stored:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(stored.get_tensor(f"model.{name}"))
                    self.average[name].copy_(stored.get_tensor(f"average.{name}"))
                    self.optimizer.state[parameter] = {
                        "step": stored.get_tensor(f"step.{name}"),
                        "exp_avg": stored.get_tensor(f"exp_avg.{name}").to(self.device),
                        "exp_avg_sq": stored.get_tensor(f"exp_avg_sq.{name}").to(self.device),
                    }
            return int(stored.metadata()["step"])


def evaluate(
    bundled: BundledModel,
    model: Any,
    scheduler: Any,
    group: ImageGroup,
    split: str,
    timesteps: tuple[int, ...],
    items: int | None = None,
) -> dict[int, float]:
    """Mean squared error in the noise at each timestep, over a split's items (the first `items`), in float32.

    bundled: what the denoiser `model` is.

    The noise of an item is the sweep's: counter_normal("noise", item.key, timestep, 0).
    """
    chosen = [group.item(index) for index in group.indices(split)[:items]]
    images = images_to_tensor(np.stack([item.image for item in chosen]))
    device = next(model.parameters()).device
    losses = {}
    for timestep in timesteps:
        draws = [counter_normal("noise", item.key, timestep, 0, shape=images.shape[1:]) for item in chosen]
        noise = torch.from_numpy(np.stack(draws).astype(np.float32))
        steps = torch.full((len(chosen),), timestep)
        noisy = scheduler.add_noise(images, noise, steps)
        with torch.no_grad():
            prediction = bundled.denoise(model, noisy.to(device), steps.to(device)).float().cpu()
        losses[timestep] = float((prediction - noise).square().mean())
    return losses


def _quick_evaluation(state: _State, config: TrainConfig) -> dict[str, dict[str, float]]:
    """Mean loss of the averaged model over a few timesteps and ten items, per group and split: the gap as it opens."""
    model, timesteps = state.averaged_model(), (50, 200, 400, 700)
    result: dict[str, dict[str, float]] = {}
    for name in config.groups:
        result[name] = {}
        for split in ("train", "discover"):
            losses = evaluate(config.bundled, model, state.scheduler, open_group(name), split, timesteps, items=10)
            result[name][split] = round(sum(losses.values()) / len(losses), 5)
    return result
