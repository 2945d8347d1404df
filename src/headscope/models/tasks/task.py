"""Teacher-forced denoising and generation: what all families share."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol, overload, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from headscope._shapes import Conditioning, Float, Images, ItemScore, Sample
from headscope.counter import counter_normal
from headscope.models.structure.sites import find_denoiser
from headscope.models.tasks.noising import Diffusion, Noising, Timesteps

# a learned variance makes it twice the sample's channels
Answer = Float[Tensor, "items _channels height width"]


@runtime_checkable
class TaskItem(Protocol):
    """The parts of an item that a task needs; the zoo's items have them.

    An item may know more of its image, which scores may look at: the zoo's have `part_names`, `part_mask` and
    `counterparts` (None where there are none; see `headscope.zoo.Item`).

    Attributes:
        key: its name, the same on every machine; noise is drawn from it.
        image: uint8 [height, width, 3], or None where only a prompt is given.
        caption: the prompt, "" for none.
    """

    @property
    def key(self) -> str: ...
    @property
    def image(self) -> np.ndarray | None: ...
    @property
    def caption(self) -> str: ...


@dataclass(frozen=True)
class Prepared:
    """Items as the denoiser takes them, before noise is added.

    Attributes:
        keys: the items' keys, for their noise.
        clean: the images or latents without noise.
        conditioning: further inputs of the denoiser.
        items: the items themselves; none where a task of somebody's own doesn't say.
    """

    keys: tuple[str, ...]
    clean: Sample
    conditioning: Mapping[str, Conditioning]
    items: Sequence[TaskItem] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self, indices: Tensor) -> "Prepared":
        """The items at these indices, repeats allowed."""
        chosen = indices.tolist()
        conditioning = {name: _rows(tensor, indices) for name, tensor in self.conditioning.items()}
        items = tuple(self.items[i] for i in chosen) if self.items else ()
        return Prepared(tuple(self.keys[i] for i in chosen), _rows(self.clean, indices), conditioning, items)


@dataclass(frozen=True)
class NoisyInputs:
    """A denoiser's inputs at one timestep, and what it should answer.

    Attributes:
        items: the item of each row; none where a task of somebody's own doesn't say.
    """

    sample: Sample
    timestep: int
    conditioning: Mapping[str, Conditioning]
    target: Sample
    items: Sequence[TaskItem] = ()

    def rows(self, indices: Tensor) -> "NoisyInputs":
        """The items at these indices, repeats allowed."""
        conditioning = {name: _rows(tensor, indices) for name, tensor in self.conditioning.items()}
        items = ItemRows(self.items, indices) if self.items else ()
        return NoisyInputs(_rows(self.sample, indices), self.timestep, conditioning, _rows(self.target, indices), items)


class ItemRows(Sequence[TaskItem]):
    """Items at some indices, which are read back from their device when one is looked at, and not before."""

    def __init__(self, items: Sequence[TaskItem], indices: Tensor) -> None:
        self._items, self._indices = items, indices

    @cached_property
    def _chosen(self) -> tuple[TaskItem, ...]:
        return tuple(self._items[index] for index in self._indices.tolist())

    def __len__(self) -> int:
        return self._indices.numel()

    @overload
    def __getitem__(self, index: int) -> TaskItem: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[TaskItem, ...]: ...
    def __getitem__(self, index: int | slice) -> TaskItem | tuple[TaskItem, ...]:
        return self._chosen[index]


_FAMILIES: list[type["Task"]] = []


class Task(ABC):
    """Teacher-forced denoising and generation with one model.

    Noise comes from a counter-based generator keyed by (item, timestep, replicate): the same for the clean and every
    edited run, on every machine.

    Three scores of a denoiser's prediction p of an item at timestep t, each a mean over its elements, float64:

    - the loss, (p - target)^2, with the target the model was taught (`noising.Noising`);
    - the error of the clean image that p implies, the loss times `x0_factor(t)`;
    - of two predictions p and q of the same inputs, their distance (p - q)^2.

    A subclass with a `fits` of its own is a family of pipelines: it says how images become what the denoiser works on,
    what conditions it, and how it is called. Defining it is enough for `Task.of` and for sweeps in the same process to
    find it.

    Attributes:
        pipeline: the diffusers pipeline.
        denoiser: its unet or transformer.
        scheduler: its scheduler.
        noising: the noise process that the model was taught, from the scheduler.
        expects: the parts that pipelines of the family have, in a line.
        takes_prompts: False if the model can't be given a prompt.
    """

    expects: ClassVar[str]
    takes_prompts: ClassVar[bool] = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # a base of families says nothing of pipelines
        if "fits" not in cls.__dict__:
            return
        # a notebook cell that is run again replaces its own class
        _FAMILIES[:] = [known for known in _FAMILIES if _full_name(known) != _full_name(cls)]
        _FAMILIES.append(cls)

    @staticmethod
    def families() -> tuple[type["Task"], ...]:
        """Every family that is defined, in the order of their definition; `of` asks the last one first."""
        return tuple(_FAMILIES)

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.denoiser: Any = find_denoiser(pipeline)
        self.scheduler = pipeline.scheduler
        self.noising = self._noise_process(self.scheduler)

    @classmethod
    @abstractmethod
    def fits(cls, pipeline: Any) -> bool:
        """True if a pipeline has what this family needs."""

    @staticmethod
    def of(pipeline: Any) -> "Task":
        """The task that fits a pipeline, by what the pipeline has.

        Raises:
            TypeError: no family fits; names what each needs.
            ValueError: one fits but for a detail, which is named.
        """
        for family in reversed(_FAMILIES):
            if family.fits(pipeline):
                return family(pipeline)
        known = "; ".join(family.expects for family in _FAMILIES)
        parts = sorted(getattr(pipeline, "components", {}))
        described = f" (with {', '.join(parts)})" if parts else ""
        raise TypeError(f"pipeline: got {type(pipeline).__name__}{described}, expected one of: {known}")

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.denoiser.parameters()).dtype

    @property
    def timesteps(self) -> range:
        """The timesteps that the model was taught at: 0 to N - 1, of a flow 1 to N (sigma = t / N)."""
        return self.noising.timesteps

    @property
    def sample_size(self) -> int:
        """The edge of the denoiser's input, in its own pixels."""
        return square("model", self.denoiser.config.sample_size)

    @property
    def image_size(self) -> int:
        """The edge of the images it takes and makes, in pixels."""
        return self.sample_size

    @property
    def sampling_rows(self) -> int:
        """Rows that pass through the denoiser for an item at each step of `generate`: 2 under guidance."""
        return 1

    def log_snr(self, timestep: int) -> float:
        """ln(a^2 / s^2) at a timestep, where the denoiser sees a x_0 + s noise; of a flow 2 ln((1 - sigma) / sigma)."""
        return self.noising.log_snr(timestep)

    def x0_factor(self, timestep: int) -> float:
        """The factor by which the loss gives the squared error of the clean image that a prediction implies."""
        return self.noising.x0_factor(timestep)

    @abstractmethod
    def prepare(self, items: Sequence[TaskItem]) -> Prepared:
        """Encode items; guidance is off, and items without a caption get the empty prompt.

        Raises:
            ValueError: an item lacks what the model needs.
        """

    def noise(self, prepared: Prepared, timestep: int, replicate: int = 0) -> Sample:
        """Standard normal noise like `prepared.clean`, float32, keyed by (item, timestep, replicate)."""
        shape = tuple(prepared.clean.shape[1:])
        drawn = [counter_normal("noise", key, timestep, replicate, shape=shape) for key in prepared.keys]
        return torch.from_numpy(np.stack(drawn).astype(np.float32)).to(self.device)

    def noisy_inputs(self, prepared: Prepared, timestep: int, replicate: int = 0) -> NoisyInputs:
        """The denoiser's inputs at a timestep, and the target that it was taught."""
        if timestep not in self.timesteps:
            raise ValueError(f"timestep: got {timestep}, expected {self.timesteps[0]} to {self.timesteps[-1]}")
        noise = self.noise(prepared, timestep, replicate)
        clean = prepared.clean.float()
        sample = self.noising.add(clean, noise, timestep).to(self.dtype)
        target = self.noising.target(clean, noise, timestep)
        return NoisyInputs(sample, timestep, prepared.conditioning, target, prepared.items)

    def predict(self, inputs: NoisyInputs) -> Sample:
        """The denoiser's answer; a learned variance is left out."""
        timesteps = self.noising.given(inputs.timestep, len(inputs.sample), self.device)
        answer = self._answer(inputs.sample, timesteps, inputs.conditioning)
        return answer[:, : inputs.target.shape[1]]

    def loss(self, inputs: NoisyInputs) -> ItemScore:
        """The teacher-forced loss: mean squared error of the prediction over its elements."""
        error = self.predict(inputs).double() - inputs.target.double()
        return error.square().flatten(1).mean(1)

    @abstractmethod
    def generate(self, items: Sequence[TaskItem], *, steps: int = 25, seed: int = 0) -> Images:
        """Images from each item's prompt and initial noise.

        The noise is keyed by (item, seed), so an edited run starts where the clean one did; the sampler is
        deterministic. Wrap the call in `scope.edit(..., steps=range(a, b))` to edit a window of its steps.
        """

    def _noise_process(self, scheduler: Any) -> Noising:
        return Diffusion(scheduler)

    def _answer(self, sample: Sample, timesteps: Timesteps, conditioning: Mapping[str, Conditioning]) -> Answer:
        """The denoiser's output, with a learned variance if it has one.

        Args:
            timesteps: as the pipeline holds them.
        """
        return self.denoiser(sample, timesteps, **conditioning, return_dict=False)[0]

    def _initial_noise(self, items: Sequence[TaskItem], channels: int, seed: int) -> Sample:
        shape = (channels, self.sample_size, self.sample_size)
        drawn = [counter_normal("generate", item.key, seed, shape=shape) for item in items]
        return torch.from_numpy(np.stack(drawn).astype(np.float32)).to(self.device, self.dtype)


def _full_name(family: type[Task]) -> tuple[str, str]:
    return family.__module__, family.__qualname__


def _rows(tensor: Tensor, indices: Tensor) -> Tensor:
    """tensor[indices], in a quarter of the time on a CPU."""
    return tensor.index_select(0, indices.to(tensor.device))


def square(argument: str, size: Any) -> int:
    """The edge of a size that is a number or equal ones.

    Raises:
        ValueError: it isn't square.
    """
    edges = {int(edge) for edge in (size if isinstance(size, (list, tuple)) else [size])}
    if len(edges) != 1:
        raise ValueError(f"{argument}: got a sample size of {size}, expected a square one")
    return edges.pop()


def parameters(function: Callable[..., Any]) -> set[str]:
    """The names of a function's parameters."""
    return set(inspect.signature(function).parameters)
