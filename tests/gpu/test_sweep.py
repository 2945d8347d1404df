"""Sweeps on a GPU: the CPU's numbers, a host that waits for nothing inside a forward, and memory that runs out.

What of them needs no GPU runs without one, too: on the CPU, or on the meta device, where a value that the host would
read back doesn't exist.
"""

import copy
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import headscope
import tiny
from headscope.models import Scope
from headscope.sweep import Execution, SweepConfig
from headscope.sweep.compute.edits import head_edits, mean_fill
from headscope.sweep.compute.opened import Opened
from headscope.sweep.compute.sharing import Prefix
from headscope.sweep.compute.unit import compute_unit
from headscope.sweep.plan.config import IN_MEMORY
from headscope.sweep.plan.heads import Edit

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
)
MODELS = {
    "ddpm": lambda: tiny.ddpm(size=32),
    "stable_diffusion": tiny.stable_diffusion,
    "stable_diffusion_3": tiny.stable_diffusion_3,
}
TIMESTEP = 500


@pytest.fixture
def exact_products():
    """float32 products are float32's, not TF32's."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products


def table(pipeline, folder, batch: int, **options: Any) -> pl.DataFrame:
    run = headscope.sweep(
        folder,
        model=pipeline,
        progress=False,
        batch=batch,
        groups=["faces"],
        splits=["confirm"],
        items=2,
        reference_items=3,
        timesteps=[60, TIMESTEP],
        fills=["mean", "zero", "uniform"],
        scores=["loss", "distance"],
        observe=False,
        **options,
    )
    frame = run.table("ablations").collect().with_columns(pl.col(pl.Categorical).cast(pl.String))
    return frame.sort("item", "timestep", "site", "head", "fill")


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("family", MODELS)
def test_the_table_is_the_cpu_s(family, device, tmp_path):
    """And doesn't depend on how many rows go through at once."""
    expected = table(MODELS[family](), tmp_path / "expected", batch=4)
    found = table(MODELS[family]().to(device), tmp_path / "found", batch=16)
    named = ["item", "timestep", "site", "head", "fill"]
    assert found.select(named).equals(expected.select(named))
    for column in ("clean", "edited"):
        np.testing.assert_allclose(found[column], expected[column], rtol=1e-4)
    # a distance is a difference of predictions of about 1, squared
    assert np.abs(np.sqrt(found["distance"]) - np.sqrt(expected["distance"])).max() < 1e-4
    assert found["distance"].to_numpy().max() > 1e-6


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("family", MODELS)
def test_replayed_forwards_give_the_same_table(family, tmp_path):
    """From CUDA graphs; a forward that couldn't be replayed would warn."""
    pipeline = MODELS[family]().to("cuda")
    expected = table(pipeline, tmp_path / "expected", batch=5)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="graphs:")
        found = table(pipeline, tmp_path / "found", batch=5, graphs=True)
    for column in ("clean", "edited", "distance"):
        np.testing.assert_allclose(found[column], expected[column], rtol=1e-5, atol=1e-9)


class Traffic(TorchDispatchMode):
    """Counts what moves between the host's memory and a device: copies that the host waits for, all copies' bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = 0
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function._schema.name
        # in inference mode tensors' own `to` comes by, elsewhere what it is made of
        if name in ("aten::to", "aten::_to_copy", "aten::copy_"):
            given = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False)) | kwargs
            source = given["src"] if name == "aten::copy_" else given["self"]
            if source.device.type != result.device.type:
                self.waiting += not given.get("non_blocking")
                self.bytes += result.nbytes
        return result


class Forwards:
    """Edited forwards of a small UNet as a sweep makes them: learned and its means recorded on the CPU, then moved."""

    def __init__(self, device: str) -> None:
        unet = tiny.stable_diffusion().unet.requires_grad_(False)
        self.scope = Scope(unet)
        self.site = self.scope.sites[2]
        self.device = torch.device(device)
        latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32)

        def forward(rows, place="cpu"):
            rows = torch.as_tensor(rows, device=latents.device)
            timesteps = torch.full((len(rows),), TIMESTEP, device=place)
            return unet(latents[rows], timesteps, text[rows], return_dict=False)[0]

        names = [site.name for site in self.scope.sites]
        self.prefix = Prefix.learn(unet, names, forward)
        assert self.prefix.shares
        with torch.inference_mode(), self.scope.record("head_output", sites=[self.site.name]) as self.means:
            forward([0, 1])
        unet.to(self.device)
        self.latents, self.text = latents.to(self.device), text.to(self.device)
        self.unet = unet
        self.rows = torch.tensor([0, 1, 0, 1]).to(self.device)
        self.timesteps = [torch.full((count,), TIMESTEP, device=self.device) for count in (2, 4)]

    @contextmanager
    def ready(self):
        """The clean forward is done, as before a unit's edits."""
        edited = frozenset([self.site.name])
        with torch.inference_mode(), self.scope.edit({}), self.prefix.attached():
            with self.prefix.clean([edited]) as self.kept:
                self.unet(self.latents, self.timesteps[0], self.text, return_dict=False)
            yield

    def edited(self, fill):
        edits = [Edit(self.site.name, ((self.site.name, head),)) for head in (0, 0, 1, 1)]
        latents, text = self.latents[self.rows], self.text[self.rows]
        sites = frozenset([self.site.name])
        with (
            self.scope.edit(head_edits(edits, self.scope, {}), fill=fill),
            self.prefix.replay(self.kept, sites, self.rows),
        ):
            return self.unet(latents, self.timesteps[1], text, return_dict=False)[0]


@pytest.mark.parametrize("fill", ["zero", "mean", "uniform"])
@pytest.mark.parametrize("device", ["meta", CUDA])
def test_an_edited_forward_waits_for_nothing(device, fill):
    """After the first forward with a fill, the gate is all that moves."""
    forwards = Forwards(device)
    mean = mean_fill(forwards.means, forwards.site.name, TIMESTEP, forwards.device)
    chosen = {"zero": None, "uniform": "uniform", "mean": mean}[fill]
    with forwards.ready():
        forwards.edited(chosen)
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            with Traffic() as traffic:
                forwards.edited(chosen)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert traffic.waiting == 0
    # [rows, heads] of float32
    assert traffic.bytes == 4 * forwards.site.heads * 4


def test_the_timestep_that_a_recording_is_asked_for_is_read_back():
    """What sweeps save by asking once for a unit; the check above would see it."""
    forwards = Forwards("meta")
    with forwards.ready(), pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        forwards.edited(forwards.means)


def test_copies_that_are_waited_for_are_counted():
    with Traffic() as traffic:
        torch.ones(3).to("meta")
        torch.empty(5, device="meta").copy_(torch.ones(5))
        torch.ones(7).to("meta", non_blocking=True)
    assert traffic.waiting == 2
    assert traffic.bytes == 4 * (3 + 5 + 7)


class Reads(TorchDispatchMode):
    """Counts the numbers that the host reads out of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def synchronisations(device: str, work: Callable[..., None], *arguments) -> int:
    """How often the host waits for the device; without one, for numbers that it reads."""
    if device != "cuda":
        with Reads() as reads:
            work(*arguments)
        return reads.count
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("fill", ["zero", "mean"])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_unit_waits_as_often_whatever_it_edits(device, fill, tmp_path):
    """For its items and its table, not for every batch of edits."""
    pipeline = tiny.stable_diffusion().to(device)
    names = [site.name for site in Scope(pipeline.unet).sites]
    waits = []
    for sites in (names[:1], names[:3]):
        config = SweepConfig(
            model=IN_MEMORY,
            groups=("faces",),
            splits=("confirm",),
            items=2,
            reference_items=2 if fill == "mean" else None,
            timesteps=(TIMESTEP,),
            observe=False,
            fills=(fill,),
            scores=("loss", "distance"),
            sites=tuple(sites),
            device=device,
        )
        opened = Opened(config, Execution(rows=4), pipeline)
        context = opened.context(opened.store(tmp_path / str(len(sites))))
        *before, unit = opened.plan.units
        for reference in before:
            context.store.write(reference, compute_unit(reference, context, lambda forwards: None))
        # learns, and starts everything for the first time
        compute_unit(unit, context, lambda forwards: None)
        waits.append(synchronisations(device, compute_unit, unit, context, lambda forwards: None))
    assert waits[0] == waits[1]


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_memory_that_runs_out_halves_the_rows(device, tmp_path, monkeypatch):
    """On a GPU so much is lent that 8 rows fit; on the CPU a forward of more than that is refused."""
    from headscope.zoo import load_pipeline

    config = SweepConfig(
        groups=("faces",),
        splits=("confirm",),
        items=4,
        timesteps=(TIMESTEP,),
        observe=False,
        fills=("zero",),
        sites=("mid_block.*",),
        device=device,
    )

    def losses(name: str, rows: int, prepare) -> tuple[np.ndarray, int]:
        opened = Opened(copy.deepcopy(config), Execution(rows=rows), load_pipeline("unet").to(device))
        context = opened.context(opened.store(tmp_path / name))
        (unit,) = (unit for unit in opened.plan.units if unit.kind == "ablations")
        prepare(opened)
        table = compute_unit(unit, context, lambda forwards: None).table
        assert table is not None
        return table["edited"].to_numpy(), context.rows.most

    def limited(opened: Opened) -> None:
        if device == "cpu":
            predict = opened.task.predict

            def small(inputs):
                if len(inputs.sample) > 8:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return predict(inputs)

            monkeypatch.setattr(opened.task, "predict", small)
            return
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with torch.inference_mode():
            opened.forward(8)
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(torch.cuda.max_memory_reserved() / total)

    expected, most = losses("whole", 32, lambda opened: None)
    assert most == 32
    try:
        found, most = losses("limited", 32, limited)
    finally:
        if device == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert most < 32
    np.testing.assert_allclose(found, expected, rtol=1e-3 if device == "cuda" else 1e-5)
