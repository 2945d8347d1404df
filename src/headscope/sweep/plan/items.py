"""The model and the items of a sweep, read and checked before any work starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from headscope._extras import require
from headscope._machine import checked_device
from headscope.models import Task
from headscope.models.structure.sites import find_denoiser
from headscope.sweep.plan.choosing import Choice, choose_items
from headscope.sweep.plan.config import IN_MEMORY, SPLITS, SweepConfig
from headscope.sweep.plan.in_memory import modules_of
from headscope.sweep.plan.parts import GroupParts, parts_digest
from headscope.sweep.plan.sources import open_source
from headscope.sweep.plan.texts import read_prompts
from headscope.zoo import BUNDLED, ImageGroup, load_pipeline, open_group

PROMPTS = "prompts"
# images of a group stay in memory up to so many bytes; those of a larger group are read again when needed
KEPT_BYTES = 256 * 2**20


class SweptItem:
    """An item as the sweep uses it: its labels, and its image and part mask at the model's size, read when asked for.

    Attributes:
        group, index, source_id, split, caption, key, part_names: as the group's item has them.
        content: a hash of its caption and image.
        pixels: one of its image alone.
        parts: one of its part mask, its parts' names and its counterparts; None without a mask. It belongs to the
            identity of runs that look at masks, and of no others.
        in_memory: its image stays there.
    """

    def __init__(self, source: ImageGroup, index: int, size: int, keep: bool, masks: GroupParts | None = None) -> None:
        self._source = source
        self._size = size
        self._masks = masks or GroupParts(source, size)
        item = source.item(index)
        self.group, self.index, self.source_id = item.group, item.index, item.source_id
        self.split, self.caption, self.key = item.split, item.caption, item.key
        image = _fitted(item.image, size)
        self.content = hashlib.sha256(item.caption.encode() + image.tobytes()).hexdigest()[:16]
        self.pixels = _digest(image)
        self.parts = parts_digest(item)
        self._masks.see(item)
        self.part_names = item.part_names if item.part_mask is not None else ()
        self.in_memory = keep
        self._image = image if keep else None

    @property
    def image_bytes(self) -> int:
        """How much memory the image takes."""
        return self._size * self._size * 3

    @property
    def image(self) -> np.ndarray:
        """uint8 [size, size, 3].

        Raises:
            ValueError: it is no longer what it was when the run was opened, and the run is known by.
        """
        if self._image is not None:
            return self._image
        image = _fitted(self._source.item(self.index).image, self._size)
        if _digest(image) != self.pixels:
            raise ValueError(f"groups: image {self.source_id!r} of {self.group!r} has changed since the run was opened")
        return image

    @property
    def part_mask(self) -> np.ndarray | None:
        """uint8 [size, size], indices of part_names; None where the item has none.

        Raises:
            ValueError: it is no longer what it was when the run was opened.
        """
        return self._masks.of(self.index, self.parts).mask

    @property
    def counterparts(self) -> np.ndarray | None:
        """int32 [size, size, n]: the pixels that each pixel's tie is to (row * size + column), then -1; None where the
        item's group has no ties.

        Raises:
            ValueError: they are no longer what they were when the run was opened.
        """
        return self._masks.of(self.index, self.parts).counterparts

    def fetch(self) -> None:
        """Hold the image in memory until `drop`."""
        self._image = self.image

    def drop(self) -> None:
        if not self.in_memory:
            self._image = None


@dataclass(frozen=True)
class GroupItems:
    """One group's items as the sweep uses them.

    Attributes:
        name: the group's name.
        description: what it is, for the report.
        swept: the items observed and edited.
        reference: items disjoint from them (by source too, where the group allows it), for the mean fill.
        note: what is less than a sweep takes by itself or than lies there, for a person to read; "" where nothing is.
        source_count: how many different sources the swept items come from.
    """

    name: str
    description: str
    swept: tuple[SweptItem | PromptItem, ...]
    reference: tuple[SweptItem | PromptItem, ...]
    note: str = ""

    @property
    def source_count(self) -> int:
        return len({item.source_id for item in self.swept})


def load_task(config: SweepConfig, pipeline: Any = None) -> Task:
    """The model, on its device, in eval mode.

    Args:
        pipeline: one in memory, to be used instead.

    Raises:
        ValueError: the device isn't there, or the model was one in memory.
    """
    if pipeline is not None:
        return _settled(pipeline)
    if config.model == IN_MEMORY:
        raise ValueError("model: this run's was in memory; call headscope.sweep with that pipeline and the same fields")
    device = checked_device(config.device)
    dtype = getattr(torch, config.dtype)
    if config.model in BUNDLED:
        pipeline = load_pipeline(config.model)
        if dtype != torch.float32:
            find_denoiser(pipeline).to(dtype)
    else:
        pipeline = _loaded(Path(config.model), dtype)
    pipeline.to(device)
    return _settled(pipeline)


def _settled(pipeline: Any) -> Task:
    pipeline.set_progress_bar_config(disable=True)
    task = Task.of(pipeline)
    for component in modules_of(pipeline).values():
        component.eval().requires_grad_(False)
    return task


def _loaded(model: Path, dtype: torch.dtype) -> Any:
    """Raises ValueError where it can't be."""
    diffusers = require("diffusers", "diffusers")
    file = model / "model_index.json"
    try:
        parts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"model: {str(file)!r} can't be read ({error})") from None
    if not isinstance(parts, dict) or not isinstance(parts.get("_class_name"), str):
        raise ValueError(f"model: {str(file)!r} names no pipeline, expected what diffusers' save_pretrained writes")
    if not hasattr(diffusers, parts["_class_name"]):
        raise ValueError(
            f"model: {str(file)!r} names {parts['_class_name']!r}, which diffusers {diffusers.__version__} doesn't have"
        )
    # the parts that a pipeline was saved without: diffusers wants to hear of some, such as SD3's third encoder
    left_out = {name: None for name, kind in parts.items() if kind == [None, None]}
    try:
        return diffusers.DiffusionPipeline.from_pretrained(
            str(model), dtype=dtype, local_files_only=True, use_safetensors=True, **left_out
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"model: {str(model)!r} can't be loaded: {type(error).__name__}: {error}") from error


def model_fingerprint(task: Task) -> str:
    """sha256 over the class, settings, parameters and buffers of every module of the pipeline, and its tokenizers'
    vocabularies."""
    digest = hashlib.sha256()
    for part, component in sorted(task.pipeline.components.items()):
        if isinstance(component, torch.nn.Module):
            digest.update(json.dumps([part, type(component).__name__, _settings(component)], default=str).encode())
            for name, tensor in sorted(component.state_dict().items()):
                digest.update(f"{part} {name} {tensor.dtype} {list(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        elif hasattr(component, "get_vocab"):
            digest.update(json.dumps([part, sorted(component.get_vocab().items())]).encode())
    return digest.hexdigest()


def _settings(component: Any) -> list[Any]:
    """A module's configuration, which its weights don't show: a number of heads, for one."""
    config = getattr(component, "config", None) or {}
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    # where it was loaded from, and what wrote it
    return sorted([key, value] for key, value in values.items() if key[0] != "_" and key != "transformers_version")


def choose_timesteps(config: SweepConfig, task: Task) -> tuple[int, ...]:
    """The configured timesteps, or one per log-SNR band: evenly spaced from 3 to -3, the middles of fixed bands.

    Raises:
        ValueError: a timestep that the scheduler doesn't have, or more bands than it has timesteps for.
    """
    if config.timesteps is not None:
        for timestep in config.timesteps:
            if timestep not in task.timesteps:
                raise ValueError(f"timesteps: got {timestep}, expected {task.timesteps[0]} to {task.timesteps[-1]}")
        return config.timesteps
    if config.bands > len(task.timesteps):
        raise ValueError(f"bands: got {config.bands}, expected at most the scheduler's {len(task.timesteps)} timesteps")
    log_snr = np.array([task.log_snr(timestep) for timestep in task.timesteps])
    wanted = np.linspace(3.0, -3.0, config.bands) if config.bands > 1 else np.zeros(1)
    nearest = tuple(dict.fromkeys(task.timesteps[int(np.abs(log_snr - value).argmin())] for value in wanted))
    if len(nearest) < config.bands:
        raise ValueError(f"bands: got {config.bands}, whose middles are nearest to {len(nearest)} different timesteps")
    return nearest


def open_items(config: SweepConfig, task: Task) -> list[GroupItems]:
    """Every item of the sweep, its image read and resized to the model's size.

    Raises:
        ValueError: an unknown group, one without enough items, a folder or prompts file that can't be used.
    """
    opened = [_open_group(text, config, task.image_size) for text in config.groups]
    if config.prompts is not None:
        if not task.takes_prompts:
            raise ValueError("prompts: got a prompts file, expected none: the model takes no text")
        opened.append(_open_prompts(Path(config.prompts), config))
    names = [group.name for group in opened]
    if len(set(names)) != len(names):
        raise ValueError(f"groups: got {', '.join(names)}, expected different names")
    return opened


def _open_group(text: str, config: SweepConfig, size: int) -> GroupItems:
    name, equals, path = text.partition("=")
    try:
        group = open_source(name, path, size=size) if equals else open_group(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"groups: got {text!r}: {str(error).removeprefix('groups: ')}") from error
    opened: dict[int, SweptItem] = {}
    masks = GroupParts(group, size)
    repeated: list[int] = []
    while True:
        chosen = _chosen(config, group, repeated)
        taken = sorted({*chosen.swept, *chosen.reference})
        keep = len(taken) * size * size * 3 <= KEPT_BYTES
        opened |= {index: SweptItem(group, index, size, keep, masks) for index in taken if index not in opened}
        first: dict[str, int] = {}
        again = [index for index in taken if first.setdefault(opened[index].pixels, index) != index]
        if not again:
            break
        # others take their places: an image counts once, and on one side of every comparison
        repeated += again
    notes = [chosen.note, group.note and f"{name}: {group.note}", repeated and f"{name}: {_repeats(opened, repeated)}"]
    return GroupItems(
        name,
        group.description,
        tuple(opened[index] for index in chosen.swept),
        tuple(opened[index] for index in chosen.reference),
        "\n".join(note for note in notes if note),
    )


def _chosen(config: SweepConfig, group: ImageGroup, repeated: Sequence[int]) -> Choice:
    """Choose what the sweep takes of a group, some of whose items were found to repeat others."""
    without = set(repeated)

    def members(split: str | None = None) -> list[int]:
        return [index for index in group.indices(split) if index not in without]

    by_split = {split: members(split) for split in config.splits}
    try:
        return choose_items(config, group.name, by_split, members("train"), members(), _spread)
    except ValueError as error:
        if not repeated:
            raise
        raise ValueError(f"{error}; images that repeat another don't count, {len(repeated)} were found") from None


def _repeats(opened: Mapping[int, SweptItem], repeated: Sequence[int]) -> str:
    names = sorted(str(opened[index].source_id) for index in repeated)
    listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} image(s) that repeat another are left out ({listed})"


def _digest(image: np.ndarray) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


def _spread(indices: Sequence[int], count: int) -> list[int]:
    """At most `count` of the indices, evenly spaced, so that every source of a long list is met."""
    if len(indices) <= count:
        return list(indices)
    return [indices[position * len(indices) // count] for position in range(count)]


def _fitted(image: np.ndarray, size: int) -> np.ndarray:
    """The image at the model's size (bicubic)."""
    if image.shape[:2] == (size, size):
        return image
    image_module = require("PIL.Image", "study")
    return np.asarray(image_module.fromarray(image).resize((size, size), image_module.Resampling.BICUBIC))


@dataclass(frozen=True)
class PromptItem:
    """A prompt, later with the image the model itself makes of it, whose parts nobody knows."""

    parts: ClassVar[None] = None
    part_mask: ClassVar[None] = None
    counterparts: ClassVar[None] = None
    part_names: ClassVar[tuple[str, ...]] = ()

    index: int
    caption: str
    split: str
    image: np.ndarray | None = None
    group: str = PROMPTS

    @property
    def key(self) -> str:
        return f"{self.group}/{self.source_id}"

    @property
    def source_id(self) -> str:
        """Names the prompt by its text, so that reordering the file changes no noise."""
        return self.content

    @property
    def content(self) -> str:
        return hashlib.sha256(self.caption.encode()).hexdigest()[:16]


def source_weights(items: Sequence[SweptItem | PromptItem]) -> np.ndarray:
    """The weight of each item, [items]: a source counts once, with the mean of its items."""
    sources = [item.source_id for item in items]
    return np.array([1.0 / sources.count(source) for source in sources])


def _open_prompts(path: Path, config: SweepConfig) -> GroupItems:
    lines = read_prompts(path)
    captions = list(dict.fromkeys(lines))
    if not captions:
        raise ValueError(f"prompts: {str(path)!r} has no prompts, expected one per line")
    # prompts have no split: every other line is for selecting, the rest for testing
    items = [PromptItem(index, caption, SPLITS[index % 2]) for index, caption in enumerate(captions)]
    by_split = {split: [item.index for item in items if item.split == split] for split in config.splits}
    every = range(len(items))
    chosen = choose_items(config, PROMPTS, by_split, (), every, lambda members, count: members[:count])
    notes = [chosen.note] if chosen.note else []
    if len(lines) > len(captions):
        repeated = len(lines) - len(captions)
        notes.append(f"{PROMPTS}: {repeated} of {len(lines)} lines repeat an earlier one and are left out")
    return GroupItems(
        PROMPTS,
        f"prompts of {path.name}; their images are the model's own",
        tuple(items[index] for index in chosen.swept),
        tuple(items[index] for index in chosen.reference),
        "\n".join(notes),
    )
