"""The contenders of sweeps.py: the loop a researcher would write, and headscope with each of its parts taken away."""

import copy
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from encoders import give_encoders
from headscope.bench.denoisers import DENOISERS
from headscope.bench.timing import wait, wall_seconds
from headscope.models import attending
from headscope.models.hooks import routing
from headscope.models.structure.sites import find_denoiser
from headscope.ops import AttentionResult
from headscope.sweep import Execution, SweepConfig
from headscope.sweep.compute.fitting import prefers_channels_last
from headscope.sweep.compute.opened import Opened
from headscope.sweep.compute.unit import compute_unit
from headscope.sweep.plan.config import IN_MEMORY

TIMESTEP = 500
# of one group; a unit of work holds as many
ITEMS = 4
WHOLE = "headscope"


@contextmanager
def two_passes() -> Iterator[None]:
    """Inside, edited attention is torch's, and the gate is a second pass, which the fused kernel saves."""

    def attention(query, key, value, *, edit, statistics, **options) -> AttentionResult:
        assert edit.fill is None, "zeros"
        # past the routing, which would come back here
        output = routing._stock(query, key, value, **options)
        return AttentionResult(output * edit.gate.to(output.dtype)[..., None, None], {})

    fused, attending.attention = attending.attention, attention
    try:
        yield
    finally:
        attending.attention = fused


@dataclass(frozen=True)
class Contender:
    """A way for headscope to run the sweep.

    Attributes:
        part: what it does without, to be said in the result; "" where nothing.
        channels_last: None as the sweep chooses.
        around: a context in which it runs.
    """

    part: str = ""
    execution: Execution = field(default_factory=Execution)
    channels_last: bool | None = None
    compile: bool = False
    graphs: bool = False
    around: Callable[[], AbstractContextManager[None]] = nullcontext


def contenders(denoiser: nn.Module, compile: bool) -> dict[str, Contender]:
    """headscope, and headscope without each of its parts that this model and device have."""
    found = {
        WHOLE: Contender(),
        "headscope without sharing": Contender("sharing", Execution(share=False)),
        "headscope without fused attention": Contender("fused attention", around=two_passes),
    }
    if prefers_channels_last(denoiser):
        found["headscope without channels_last"] = Contender("channels_last", channels_last=False)
        found["headscope with neither"] = Contender(
            "sharing and channels_last", Execution(share=False), channels_last=False
        )
    if compile:
        # compiled forwards run whole
        found["headscope compiled, without sharing"] = Contender("", Execution(share=False), compile=True)
    if next(denoiser.parameters()).is_cuda:
        found["headscope with CUDA graphs"] = Contender(graphs=True)
    return found


class Models:
    """One pipeline for each way in which its weights lie or run: contenders that agree on that share it."""

    def __init__(self, name: str, device: str, dtype: str) -> None:
        torch.manual_seed(0)
        denoiser = DENOISERS[name](torch.device(device).type != "cpu", device, getattr(torch, dtype))
        self.description = denoiser.description
        self._first = denoiser.pipeline
        give_encoders(self._first)
        self._first.to(device)
        if dtype != "float32":
            self._first.to(getattr(torch, dtype))
        self.device, self.dtype = device, dtype
        self.denoiser: nn.Module = find_denoiser(self._first)
        self._copies: dict[tuple[bool, bool], Any] = {(False, False): self._first}

    def pipeline(self, channels_last: bool | None, compile: bool = False) -> Any:
        chosen = prefers_channels_last(self.denoiser) if channels_last is None else channels_last
        if (chosen, compile) not in self._copies:
            self._copies[chosen, compile] = copy.deepcopy(self._first)
        return self._copies[chosen, compile]

    def open(self, contender: Contender, sites: tuple[str, ...]) -> Opened:
        config = SweepConfig(
            model=IN_MEMORY,
            groups=("faces",),
            splits=("confirm",),
            items=ITEMS,
            timesteps=(TIMESTEP,),
            observe=False,
            fills=("zero",),
            sites=sites,
            device=self.device,
            dtype=self.dtype,
            channels_last=contender.channels_last,
            compile=contender.compile,
            graphs=contender.graphs,
        )
        return Opened(config, contender.execution, self.pipeline(contender.channels_last, contender.compile))


class Loop:
    """One edit per forward, as one would write it, on the sites that the sweep edits."""

    def __init__(self, models: Models, sites: tuple[str, ...]) -> None:
        self.opened = models.open(Contender(channels_last=False), sites)
        self.task = self.opened.task
        edited = {site for site, _ in self.opened.plan.heads}
        self.sites = [site for site in self.opened.scope.sites if site.name in edited]

    def losses(self, inputs: Any, site: Any, head: int) -> torch.Tensor:
        width = slice(head * site.head_dim, (head + 1) * site.head_dim)

        def zero(module, args):
            hidden = args[0].clone()
            hidden[..., width] = 0
            return (hidden, *args[1:])

        handles = [module.register_forward_pre_hook(zero) for module in joining(self.task.denoiser, site.name)]
        try:
            return self.task.loss(inputs)
        finally:
            for handle in handles:
                handle.remove()

    def inputs(self, batch: int) -> Any:
        items = self.opened.groups[0].swept
        prepared = self.task.noisy_inputs(self.task.prepare(items), TIMESTEP)
        return prepared.rows(torch.arange(batch, device=self.task.device) % len(items))

    def edits_per_second(self, batch: int) -> float:
        """One head of every site: a whole forward takes the same time whichever head it edits."""
        inputs = self.inputs(batch)

        def every_site() -> None:
            with torch.inference_mode():
                for site in self.sites:
                    self.losses(inputs, site, 0)

        return batch * len(self.sites) / wall_seconds(every_site, self.opened.config.device)


def joining(denoiser: Any, site: str) -> list[nn.Module]:
    """The projections behind a site's attention, in whose input the heads lie side by side."""
    attention = denoiser.get_submodule(site)
    found: list[nn.Module] = []
    if getattr(attention, "to_out", None) is not None:
        found.append(attention.to_out[0])
    if getattr(attention, "to_add_out", None) is not None:
        found.append(attention.to_add_out)
    # Flux's single blocks project attention and MLP together, the attention first
    return found or [denoiser.get_submodule(f"{site.rpartition('.')[0]}.proj_out")]


class Engine:
    """One unit of ablations, whose tables stay in memory."""

    def __init__(self, models: Models, contender: Contender, sites: tuple[str, ...]) -> None:
        self.opened = models.open(contender, sites)
        self.contender = contender
        self.folder = tempfile.TemporaryDirectory()
        store = self.opened.store(Path(self.folder.name) / "run")
        self.context = self.opened.context(store)
        self.unit = next(unit for unit in self.opened.plan.units if unit.kind == "ablations")
        self.tables: list[Any] = []
        self.heads = sum(site.heads for site in self.opened.scope.sites)

    def edits_per_second(self) -> float:
        """Of a sweep of all heads."""
        device, edited = self.opened.config.device, len(self.opened.plan.heads)
        clean: list[float] = []

        def advance(forwards: int) -> None:
            # the first to be heard of are the clean ones
            if not clean:
                wait(device)
                clean.append(time.perf_counter() - started)

        wait(device)
        started = time.perf_counter()
        with self.contender.around():
            self.tables.append(compute_unit(self.unit, self.context, advance).table)
        wait(device)
        taken = time.perf_counter() - started
        pieces = math.ceil(len(self.unit.items) / self.context.rows.most)
        edits = taken - pieces * clean[0]
        return len(self.unit.items) * self.heads / (taken + (self.heads / edited - 1) * edits)
