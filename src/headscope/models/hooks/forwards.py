"""One forward of the denoiser: its step in the pipeline's call, and the guidance branch of each sample."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headscope.models.hooks.branches import branches_of
from headscope.models.structure.layout import Geometry, Layout, Place
from headscope.models.structure.sites import find_denoiser

# the call's own prompt; some pipelines take others for their further text encoders
PROMPT = "prompt"
_PROMPTS = (PROMPT, "prompt_2", "prompt_3")


class Progress(NamedTuple):
    """The progress of a site's attention in a forward.

    Attributes:
        calls: how many attention calls there were, each over the whole batch: one to each sample make up one.
        start: those before the walk over the batch that goes on.
        samples: that runs of the module were given so far.
        passes: calls that the run of the module that goes on has begun.
    """

    calls: int = 0
    start: int = 0
    samples: int = 0
    passes: int = 0


class Schedule:
    """The timesteps that a pipeline's call iterates over.

    Args:
        timesteps: of every step: a tensor, an array, or a list of numbers.
    """

    def __init__(self, timesteps: Any) -> None:
        self.timesteps = timesteps

    @cached_property
    def visits(self) -> list[int]:
        """For each step, the number of earlier ones with its timestep. Read back from the device once."""
        known = self.timesteps.tolist() if hasattr(self.timesteps, "tolist") else list(self.timesteps)
        return [known[:step].count(timestep) for step, timestep in enumerate(known)]


@dataclass(eq=False)
class Forward:
    """One forward of the denoiser.

    Attributes:
        index: its number since the scope's outermost context was entered.
        step: the pipeline's step; None where no pipeline is running or it doesn't count.
        timestep: [1] or [batch], on the model's device.
        branches: the guidance branch of each equal part of the batch, in order; None where there is no guidance.
        geometry: what is known of its tokens.
        calls: the progress of each site's attention.
        totals: the same, once the forward has ended. What still runs of it then runs a second time, for
            the backward of a checkpoint, and is not recorded again.
        schedule: the pipeline's, one object for all forwards of a call; None where no pipeline counts.
        guided: the call had guidance branches, in this forward or an earlier one.
        prompts: those that the pipeline was called with, by the name of the argument; None where no call is running.
        contexts: `ActiveContexts.version` when it began.
    """

    index: int
    step: int | None
    timestep: Tensor
    branches: tuple[str | None, ...]
    geometry: Geometry
    calls: dict[str, Progress] = field(default_factory=dict)
    totals: dict[str, Progress] | None = None
    schedule: Schedule | None = None
    guided: bool = False
    prompts: Mapping[str, Sequence[str]] | None = None
    contexts: int = 0

    @property
    def batch(self) -> int:
        return self.geometry.batch

    @property
    def samples(self) -> int:
        """The samples of one guidance branch."""
        return self.batch // len(self.branches)

    @cached_property
    def single_timestep(self) -> float:
        """The timestep of the whole batch, read back from the device once.

        Raises:
            ValueError: the samples have different timesteps.
        """
        return single(self.timestep.tolist())

    @property
    def visit(self) -> int:
        """The number of earlier steps of the call with this timestep: PNDM's and Heun's schedules repeat some."""
        if self.schedule is None or self.step is None:
            return 0
        visits = self.schedule.visits
        return visits[self.step] if self.step < len(visits) else 0

    def count(self, site: str, place: Place, attended: int) -> tuple[int, int]:
        """The number of a site's attention call, which begins, and the first sample of the batch that it is of.

        Args:
            attended: rows of earlier calls in the same run of the site's module.
        """
        calls, start, samples, passes = self.calls.get(site, Progress())
        if attended == 0 or place.alone:
            if samples % self.batch == 0:
                start = calls
            samples, passes = samples + place.samples, 0
        passes += place.first == 0
        call = start + max(0, passes - 1)
        self.calls[site] = Progress(max(calls, call + 1), start, samples, passes)
        if self.totals is not None:
            call %= max(1, self.totals.get(site, Progress()).calls)
        fold = place.rows // place.samples
        return call, (samples - place.samples) % self.batch + place.first // fold

    def samples_of(self, part: int, layout: Layout) -> range:
        """The samples of a branch, counted within it, that an attention call is of: all, some or none."""
        first = part * self.samples
        return range(max(layout.first_sample - first, 0), min(layout.end_sample - first, self.samples))

    def branch_of(self, sample: int) -> str | None:
        """The branch of the sample at a position of the whole batch."""
        return self.branches[sample // self.samples]


def comparable(timestep: float) -> float:
    """The timestep; where a model has none, the one NaN that equals itself as a dictionary's key."""
    return math.nan if math.isnan(timestep) else float(timestep)


def single(timesteps: list[float]) -> float:
    """The one timestep of a batch; raises ValueError where there are several."""
    values = set(map(comparable, timesteps))
    if len(values) != 1:
        raise ValueError(f"timestep: got {len(values)} different ones in a batch, expected one for means over samples")
    return values.pop()


def begin_forward(
    index: int,
    denoiser: nn.Module,
    pipeline: Any,
    arguments: Mapping[str, Any],
    cache_context: str | None,
    before: Forward | None = None,
) -> Forward:
    """Describe a forward that starts; nothing is read back from the device.

    Args:
        arguments: the denoiser's, by name.
        cache_context: the name that the pipeline gave to this pass of the denoiser, if it did.
        before: the forward before it, if the scope saw one.
    """
    geometry = Geometry.of(denoiser, arguments)
    pipeline, call = _running_call(pipeline, denoiser)
    step = call["i"] if isinstance(call.get("i"), int) and "timesteps" in call else None
    timesteps = call["timesteps"] if step is not None else None
    schedule = None if before is None else before.schedule
    # schedulers make new timesteps for every call; those that are given again start again
    if before is None or schedule is None or schedule.timesteps is not timesteps or (before.step or 0) > (step or 0):
        before, schedule = None, None if timesteps is None else Schedule(timesteps)
    earlier = None if before is None else before.branches
    was_guided = before is not None and before.guided
    branches = branches_of(pipeline, call, geometry.batch, arguments, cache_context, earlier, was_guided)
    return Forward(
        index,
        step,
        _timestep(arguments, geometry.batch, call if step is not None else {}),
        branches,
        geometry,
        schedule=schedule,
        guided=branches != (None,) or was_guided,
        prompts=_prompts(call) if call else None,
    )


def _timestep(arguments: Mapping[str, Any], batch: int, call: Mapping[str, Any]) -> Tensor:
    """The scheduler's timestep, [1] or [batch], from the denoiser's arguments or the pipeline's loop."""
    scheduled = call.get("t")
    # flow models are given a rescaled one
    if isinstance(scheduled, Tensor) and scheduled.numel() == 1:
        timestep = scheduled.reshape(-1)
    else:
        given = (arguments.get(name) for name in ("timestep", "t"))
        timestep = next((value for value in given if value is not None), torch.nan)
        timestep = torch.as_tensor(timestep).detach().reshape(-1)
        # a timestep per token or frame, as some video models take it: the first of each sample
        if timestep.numel() not in (1, batch):
            timestep = timestep.reshape(batch, -1)[:, 0] if timestep.numel() % batch == 0 else timestep[:1]
    # read when a table is made: until then, a loop may count on in the tensor that it gave
    return timestep.clone()


def running_module(model: nn.Module) -> str:
    """The module of a model that this thread runs, for an error; "" where no method of one is running."""
    names = {id(module): name for name, module in model.named_modules()}
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self")
        if names.get(id(module)):
            return f", in {names[id(module)]!r} ({type(module).__name__})"
        frame = frame.f_back
    return ""


def _prompts(call: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The prompts in a pipeline's call, those that it has."""
    given = {name: call.get(name) for name in _PROMPTS}
    found = {name: (value,) if isinstance(value, str) else value for name, value in given.items()}
    return {
        name: tuple(texts)
        for name, texts in found.items()
        if isinstance(texts, (list, tuple)) and texts and all(isinstance(text, str) for text in texts)
    }


def _running_call(pipeline: Any, denoiser: nn.Module) -> tuple[Any, Mapping[str, Any]]:
    """The pipeline whose call this thread is inside of, and that call's local variables; empty if there is none.

    Other pipelines may share the denoiser: those that `from_pipe` makes, or one inside of a combined pipeline.
    """
    frame = sys._getframe(1) if pipeline is not None else None
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            owner = frame.f_locals.get("self")
            if owner is pipeline or _is_denoiser_of(owner, denoiser):
                return owner, frame.f_locals
        frame = frame.f_back
    return pipeline, {}


def _is_denoiser_of(owner: Any, denoiser: nn.Module) -> bool:
    """True if a pipeline's denoiser is that one, whatever is wrapped around it."""
    if owner is None or isinstance(owner, nn.Module):
        return False
    try:
        found = find_denoiser(owner)
    except TypeError:
        return False
    return getattr(found, "_orig_mod", found) is denoiser
