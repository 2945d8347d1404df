"""headscope.sweep(...), from a directory and from a pipeline in memory."""

import inspect
from dataclasses import fields

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

import headscope
import tiny
from headscope import Scope
from headscope.sweep import HeadSet, Run, SweepConfig
from headscope.sweep.api import Fields, sweep
from headscope.sweep.plan.in_memory import structure
from sweep.faults import ordered

ASKED = {"groups": ["faces"], "splits": ["confirm"], "items": 2, "timesteps": [60], "fills": ["zero"], "observe": False}


def test_the_package_is_called_and_is_a_package():
    assert headscope.sweep.Run is Run
    assert callable(headscope.sweep)
    with pytest.raises(ValueError, match="itemz: unknown key, expected 'items'"):
        headscope.sweep("nowhere", groups=["faces"], itemz=3)
    with pytest.raises(ValueError, match="items: got 'many'"):
        headscope.sweep("nowhere", groups=["faces"], items="many")
    with pytest.raises(ValueError, match="job: got 'timeout_min', expected a mapping"):
        headscope.sweep("nowhere", groups=["faces"], executor="slurm", job="timeout_min")
    with pytest.raises(ValueError, match="executor: got 'dask'"):
        headscope.sweep("nowhere", groups=["faces"], executor="dask")


def test_every_field_of_a_configuration_can_be_given():
    given = set(inspect.signature(sweep).parameters) | set(Fields.__annotations__)
    assert {field.name for field in fields(SweepConfig)} <= given


def test_it_gives_the_run(ddpm_directory, tmp_path):
    middle = {"name": "middle", "sites": ["mid_block.*"]}
    run = headscope.sweep(tmp_path / "a", model=ddpm_directory, progress=False, sets=[middle], **ASKED)
    assert run.complete
    assert run.tables == ("ablations", "set_ablations")
    # gone on with: nothing is left to do, and sets may be objects
    again = headscope.sweep(
        tmp_path / "a", model=ddpm_directory, progress=False, sets=[HeadSet("middle", sites=("mid_block.*",))], **ASKED
    )
    assert again.manifest == run.manifest


def test_a_pipeline_in_memory_gives_the_rows_of_its_directory(ddpm_directory, tmp_path):
    """And comes back as it was; the run goes on with an equal pipeline and no other."""
    pipeline = tiny.ddpm(size=32)
    pipeline.unet.train()
    weight = pipeline.unet.conv_in.weight
    weight.requires_grad_(True)
    before = weight.stride(), weight.clone()
    run = headscope.sweep(tmp_path / "memory", model=pipeline, progress=False, **ASKED)
    assert pipeline.unet.training
    assert weight.requires_grad
    assert weight.stride() == before[0]
    assert torch.equal(weight, before[1])
    stored = headscope.sweep(tmp_path / "disk", model=ddpm_directory, progress=False, **ASKED)
    assert_frame_equal(ordered(run, "ablations"), ordered(stored, "ablations"), check_exact=True)
    headscope.sweep(tmp_path / "memory", model=tiny.ddpm(size=32), progress=False, **ASKED)
    with torch.no_grad():
        weight[0, 0, 0, 0] += 1
    with pytest.raises(ValueError, match=r"another configuration.*\n  model: "):
        headscope.sweep(tmp_path / "memory", model=pipeline, progress=False, **ASKED)


def test_a_pipeline_that_has_run_is_the_same(tmp_path):
    """Text encoders that hand out their layers' outputs keep hooks of their own from then on."""
    pipeline = tiny.stable_diffusion_3()
    layer = pipeline.text_encoder.text_model.encoder.layers[0]
    assert not layer._forward_hooks
    heads = [("transformer_blocks.0.attn", 1)]
    first = headscope.sweep(tmp_path / "first", model=pipeline, progress=False, heads=heads, **ASKED)
    assert layer._forward_hooks
    second = headscope.sweep(tmp_path / "second", model=pipeline, progress=False, heads=heads, **ASKED)
    assert_frame_equal(ordered(first, "ablations"), ordered(second, "ablations"), check_exact=True)


def test_the_same_weights_in_another_model_are_another_run(tmp_path):
    """As many weights, cut into other heads: nothing in the tensors tells."""
    pipeline = tiny.ddpm(size=32)
    headscope.sweep(tmp_path / "run", model=pipeline, progress=False, **ASKED)
    site = pipeline.unet.mid_block.attentions[0]
    site.heads //= 2
    with pytest.raises(ValueError, match=r"another configuration.*\n  structure: "):
        headscope.sweep(tmp_path / "run", model=pipeline, progress=False, **ASKED)


class Scaled:
    """A processor of the user's own, which changes what the model computes by what it holds."""

    def __init__(self, scale: float, offset: torch.Tensor) -> None:
        self.scale, self.offset = scale, offset


@pytest.mark.parametrize("other", [Scaled(5.0, torch.zeros(2)), Scaled(1.0, torch.ones(2))])
def test_what_processors_hold_tells_models_apart(other):
    pipeline = tiny.ddpm(size=32)
    site = pipeline.unet.mid_block.attentions[0]
    site.processor = Scaled(1.0, torch.zeros(2))
    before = structure(pipeline)
    site.processor = Scaled(1.0, torch.zeros(2))
    assert structure(pipeline) == before
    site.processor = other
    assert structure(pipeline) != before


def hooked(pipeline) -> None:
    pipeline.unet.mid_block.register_forward_hook(lambda module, args, output: output * 2)


def replaced(pipeline) -> None:
    pipeline.unet.mid_block.forward = lambda hidden, temb=None: hidden


def compiled(pipeline) -> None:
    # as pipeline.unet.compile() leaves it, without torch's compiler
    pipeline.unet._compiled_call_impl = pipeline.unet._call_impl


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hooked, "unet.mid_block has hooks or a forward of its own"),
        (replaced, "unet.mid_block has hooks or a forward of its own"),
        (compiled, "unet is compiled"),
    ],
)
def test_what_the_weights_do_not_show_is_refused(change, message, tmp_path):
    pipeline = tiny.ddpm(size=32)
    change(pipeline)
    with pytest.raises(ValueError, match=message):
        headscope.sweep(tmp_path / "run", model=pipeline, progress=False, **ASKED)
    assert not (tmp_path / "run").exists()


def test_a_pipeline_inside_a_scope_context_is_refused(tmp_path):
    pipeline = tiny.ddpm(size=32)
    with Scope(pipeline).edit({}), pytest.raises(ValueError, match="model: unet is inside a headscope"):
        headscope.sweep(tmp_path / "run", model=pipeline, progress=False, **ASKED)
    assert not (tmp_path / "run").exists()


def test_a_pipeline_in_memory_stays_in_its_process(tmp_path):
    pipeline = tiny.ddpm(size=32)
    with pytest.raises(ValueError, match="executor: got 'processes' with a model in memory"):
        headscope.sweep(tmp_path / "run", model=pipeline, workers=2, **ASKED)
    with pytest.raises(ValueError, match="dtype: got 'float16' with a model in memory"):
        headscope.sweep(tmp_path / "run", model=pipeline, dtype="float16", **ASKED)
    with pytest.raises(TypeError, match="model: got Conv2d"):
        headscope.sweep(tmp_path / "run", model=torch.nn.Conv2d(1, 1, 1), **ASKED)
    run = headscope.sweep(tmp_path / "run", model=pipeline, progress=False, **ASKED)
    assert run.table("ablations").select(pl.len()).collect().item() > 0
    with pytest.raises(ValueError, match="was in memory; call headscope"):
        headscope.sweep.run_sweep(SweepConfig.from_json(run.manifest["config"]), tmp_path / "run")
