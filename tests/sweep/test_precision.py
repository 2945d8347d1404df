"""Sharing in 16 bits and under autocast: right sharing isn't refused for its rounding, wrong sharing still is."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from headscope.models import Scope
from headscope.sweep import Execution, SweepConfig
from headscope.sweep.compute.opened import Opened
from headscope.sweep.compute.sharing import ROW_TOLERANCE, Prefix
from headscope.sweep.compute.unit import compute_unit
from headscope.sweep.plan.config import IN_MEMORY
from headscope.zoo import MODELS, load_pipeline

PIPELINES = {
    **{name: partial(load_pipeline, name) for name in MODELS},
    "stable_diffusion": tiny.stable_diffusion,
    "stable_diffusion_xl": tiny.stable_diffusion_xl,
    "stable_diffusion_3": lambda: tiny.stable_diffusion_3(layers=12),
    "flux": lambda: tiny.flux(double=2, single=2, guidance=True),
}
# the model's dtype, and what its forward is cast to
PRECISIONS = {
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "autocast_bfloat16": (torch.float32, torch.bfloat16),
    "autocast_float16": (torch.float32, torch.float16),
}


def opened(family: str, precision: str, execution: Execution) -> Opened:
    """A sweep of a few heads of two items."""
    dtype, cast = PRECISIONS[precision]
    pipeline = PIPELINES[family]()
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.to(dtype)
    sites = Scope(pipeline).sites
    config = SweepConfig(
        model=IN_MEMORY,
        groups=("faces",),
        splits=("confirm",),
        items=2,
        timesteps=(500,),
        observe=False,
        fills=("zero",),
        heads=tuple((site.name, 0) for site in (sites[0], sites[len(sites) // 2], sites[-1])),
        dtype=str(dtype).removeprefix("torch."),
        autocast=None if cast is None else str(cast).removeprefix("torch."),
    )
    return Opened(config, execution, pipeline)


def losses(sweep: Opened, folder) -> tuple[np.ndarray, Prefix | None]:
    """Of every head and item, float64 [heads * items]; and what was shared."""
    context = sweep.context(sweep.store(folder))
    (unit,) = (unit for unit in sweep.plan.units if unit.kind == "ablations")
    table = compute_unit(unit, context, lambda forwards: None).table
    assert table is not None
    return table["edited"].to_numpy(), context.prefix


# float16 is slow on a CPU
QUICK = {
    ("unet", "bfloat16"),
    ("stable_diffusion_3", "bfloat16"),
    ("stable_diffusion_3", "autocast_float16"),
    ("flux", "float16"),
}
CASES = [
    pytest.param(family, precision, marks=() if (family, precision) in QUICK else pytest.mark.full)
    for family in PIPELINES
    for precision in PRECISIONS
]


# torch's, of Flux's normalisation under autocast
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize(("family", "precision"), CASES)
def test_sharing_changes_losses_by_rounding_only(family, precision, tmp_path):
    """By no more than other batch sizes do, or by a quarter of a rounding: means over an image's elements average."""
    shared, prefix = losses(opened(family, precision, Execution(rows=4)), tmp_path / "shared")
    assert prefix is not None
    assert prefix.reason is None
    whole, none = losses(opened(family, precision, Execution(rows=4, share=False)), tmp_path / "whole")
    assert none is None
    other, _ = losses(opened(family, precision, Execution(rows=1, share=False)), tmp_path / "other")
    dtype, cast = PRECISIONS[precision]
    noise = np.abs(other / whole - 1).max()
    assert np.abs(shared / whole - 1).max() <= max(2 * noise, torch.finfo(cast or dtype).eps / 4)


def test_bfloat16_differs_between_batches_by_more_than_float32_may():
    """What made a fixed tolerance refuse to share: the bundled model's own rounding, of one row and of two."""
    unet = load_pipeline("unet").unet.to(torch.bfloat16)
    sample = torch.randn(2, 3, 32, 32, generator=torch.manual_seed(1)).bfloat16()
    with torch.inference_mode():
        alone, both = (unet(sample[:rows], 400, return_dict=False)[0][:1].float() for rows in (1, 2))
    assert float((alone - both).abs().max() / both.abs().max()) > ROW_TOLERANCE


class Model(nn.Module):
    """A denoiser with one attention site, and before it a module that a clean forward's work is taken over from."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.site = tiny.ddpm().unet.mid_block.attentions[0]

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        hidden = sample.repeat(1, 32, 1, 1)
        return self.site(hidden + self.first(hidden))


class OwnRows(nn.Module):
    def forward(self, hidden):
        return 0.1 * hidden.flip(-1)


class MixesRows(nn.Module):
    """A twentieth of the rows' mean: less than coarse numbers may round to over many calls."""

    def forward(self, hidden):
        return 0.05 * hidden.mean(0, keepdim=True)


class CountsRows(nn.Module):
    def forward(self, hidden):
        return hidden / len(hidden)


class CountsCalls(nn.Module):
    """Another answer every time."""

    calls = 0

    def forward(self, hidden):
        self.calls += 1
        return 0.1 * self.calls * hidden


class KeepsAside(nn.Module):
    """Hands its result on where no watcher of calls sees it."""

    def __init__(self, aside: list[torch.Tensor]) -> None:
        super().__init__()
        self.aside = aside

    def forward(self, hidden):
        self.aside[:] = [0.1 * hidden.flip(-1)]
        return torch.zeros_like(hidden)


class ReadsAside(Model):
    def __init__(self, first: KeepsAside) -> None:
        super().__init__(first)
        self.aside = first.aside

    def forward(self, sample):
        hidden = sample.repeat(1, 32, 1, 1)
        hidden = hidden + self.first(hidden)
        return self.site(hidden + self.aside[0])


def learned(model: Model, dtype: torch.dtype) -> Prefix:
    torch.manual_seed(0)
    model = model.to(dtype).eval()
    sample = torch.randn(2, 1, 4, 4).to(dtype)
    return Prefix.learn(model, ["site"], lambda rows: model(sample[rows]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Model(MixesRows()), "differs from the same row beside another"),
        (lambda: Model(CountsRows()), "a row alone differs"),
        (lambda: Model(CountsCalls()), "differs"),
        (lambda: ReadsAside(KeepsAside([])), "a forward that begins at 'site' differs"),
    ],
    ids=["mixes_rows", "counts_rows", "counts_calls", "keeps_aside"],
)
def test_wrong_sharing_is_found_in_every_dtype(make, reason, dtype):
    assert learned(Model(OwnRows()), dtype).shares
    prefix = learned(make(), dtype)
    assert not prefix.shares
    assert reason in str(prefix.reason)
