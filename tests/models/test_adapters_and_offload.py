"""Denoisers that users changed before they observe them: LoRA, offloading, casting of their layers."""

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from torch import nn

import headscope
import tiny
from headscope import Scope

CPU = torch.device("cpu")
PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "proj_out"]
# recording may move an image in [0, 1] by this much
IMAGE_TOLERANCE = 1e-5


def draw(pipeline, **arguments):
    generator = torch.Generator().manual_seed(0)
    return pipeline("a fox", num_inference_steps=2, generator=generator, output_type="np", **arguments).images


def difference(one, other):
    return float(np.abs(one - other).max())


def add_adapter(model, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    # the usual start, B = 0, would change nothing
    model.add_adapter(peft.LoraConfig(r=2, target_modules=PROJECTIONS, init_lora_weights=False), **options)
    return model


class TestLora:
    def test_a_pipeline_is_recorded_and_edited(self):
        pipeline = tiny.stable_diffusion()
        plain = draw(pipeline)
        add_adapter(pipeline.unet)
        stock = draw(pipeline)
        assert difference(stock, plain) > 1e-3
        scope = Scope(pipeline)
        name = scope.sites[0].name
        with scope.record("entropy", "q") as recording:
            assert difference(draw(pipeline), stock) <= IMAGE_TOLERANCE
        assert len(recording) == 2 * len(scope.sites)
        # the output projection, adapter included, then gets zeros
        with scope.edit({name: range(scope.site(name).heads)}):
            removed = draw(pipeline)
        handle = pipeline.unet.get_submodule(name).to_out[0].register_forward_pre_hook(lambda _, args: (0 * args[0],))
        by_hand = draw(pipeline)
        handle.remove()
        assert difference(removed, by_hand) <= IMAGE_TOLERANCE
        assert difference(removed, stock) > 1e-3

    def test_scales_toggles_and_fusing_inside_a_context(self):
        pipeline = tiny.stable_diffusion()
        plain = draw(pipeline)
        scope = Scope(pipeline)
        with scope.record("entropy") as recording:
            add_adapter(pipeline.unet)
            adapted = draw(pipeline)
            unscaled = draw(pipeline, cross_attention_kwargs={"scale": 0.0})
            pipeline.unet.disable_adapters()
            disabled = draw(pipeline)
            pipeline.unet.enable_adapters()
            pipeline.fuse_lora()
            fused = draw(pipeline)
            pipeline.unfuse_lora()
            pipeline.unload_lora_weights()
            unloaded = draw(pipeline)
        assert len(recording) == 5 * 2 * len(scope.sites)
        for image in (unscaled, disabled, unloaded):
            assert difference(image, plain) <= IMAGE_TOLERANCE
        assert difference(adapted, fused) <= IMAGE_TOLERANCE
        assert difference(adapted, plain) > 1e-3

    def test_gradients_of_adapters_under_checkpointing(self):
        model = add_adapter(tiny.flux_transformer(double=1, single=2)).train()
        model.enable_gradient_checkpointing()
        inputs = tiny.flux_inputs()

        def gradients():
            model.zero_grad()
            model(**inputs, return_dict=False)[0].square().sum().backward()
            return [p.grad.clone() for p in model.parameters() if p.grad is not None]

        stock = gradients()
        with Scope(model).record("entropy") as recording:
            recorded = gradients()
        assert len(recording) == 3
        assert len(stock) > 0
        for one, other in zip(stock, recorded, strict=True):
            assert float((one - other).abs().max()) <= 1e-5 * max(1.0, float(one.abs().max()))

    def test_the_drop_in_processor(self):
        unet = add_adapter(tiny.stable_diffusion().unet)
        inputs = (torch.randn(2, 4, 8, 8), 5, torch.randn(2, 7, 32))
        with torch.inference_mode():
            stock = unet(*inputs, return_dict=False)[0]
            unet.set_attn_processor(headscope.AttnProcessor())
            assert float((unet(*inputs, return_dict=False)[0] - stock).abs().max()) <= 1e-5

    def test_a_model_that_peft_wrapped_has_the_names_of_the_model_inside(self):
        peft = pytest.importorskip("peft")
        pipeline = tiny.stable_diffusion()
        names = [site.name for site in Scope(pipeline).sites]
        config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
        pipeline.unet = peft.get_peft_model(pipeline.unet, config)
        inputs = (torch.randn(2, 4, 8, 8), 5, torch.randn(2, 7, 32))
        for scope in (Scope(pipeline.unet), Scope(pipeline)):
            assert [site.name for site in scope.sites] == names
            with torch.inference_mode(), scope.record("entropy") as recording:
                pipeline.unet(*inputs, return_dict=False)
            table = recording.to_polars()
            assert set(table["timestep"]) == {5.0}
            assert set(table["query_group"]) == {"image"}


def test_a_model_that_data_parallel_wrapped():
    unet = tiny.ddpm().unet
    scope = Scope(nn.DataParallel(unet))
    assert scope.denoiser is unet
    with torch.inference_mode(), scope.record("entropy") as recording:
        nn.DataParallel(unet)(torch.randn(2, 3, 16, 16), 7)
    assert len(recording) == len(scope.sites)
    # over several GPUs it runs copies
    wrapped = nn.DataParallel(unet)
    wrapped.device_ids = [0, 1]
    with pytest.raises(ValueError, match=r"a DataParallel over 2 GPUs, .* expected its \.module"):
        Scope(wrapped)


def by_leaf(pipeline):
    pipeline.unet.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def by_block(pipeline):
    options = {"offload_type": "block_level", "num_blocks_per_group": 1}
    pipeline.unet.enable_group_offload(onload_device=CPU, offload_device=CPU, **options)


def sequentially(pipeline):
    # what enable_sequential_cpu_offload does with a GPU's device
    cpu_offload(pipeline.unet, CPU)
    assert all(parameter.is_meta for parameter in pipeline.unet.parameters())


def as_a_whole(pipeline):
    cpu_offload_with_hook(pipeline.unet, CPU)


def cast_by_layer(pipeline):
    pipeline.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


@pytest.mark.parametrize("when", ["before", "after", "inside"])
@pytest.mark.parametrize("offload", [by_leaf, by_block, sequentially, as_a_whole, cast_by_layer])
def test_an_offloaded_pipeline(offload, when):
    """The model is offloaded before its Scope is made, after that, or in the middle of a recording."""
    pipeline = tiny.stable_diffusion()
    if when == "before":
        offload(pipeline)
    scope = Scope(pipeline)
    if when == "after":
        offload(pipeline)
    with scope.record("entropy", "head_output") as recording:
        if when == "inside":
            offload(pipeline)
        recorded = draw(pipeline)
    assert len(recording) == 2 * len(scope.sites)
    stock = draw(pipeline)
    assert difference(recorded, stock) <= IMAGE_TOLERANCE
    with scope.edit({"*": [0]}):
        assert difference(draw(pipeline), stock) > 1e-3
    # the mean over the one sample is the sample's own
    with scope.edit({"*": range(4)}, fill=recording):
        assert difference(draw(pipeline), stock) <= IMAGE_TOLERANCE
    assert np.array_equal(draw(pipeline), stock)
    assert not any("headscope" in name for module in pipeline.unet.modules() for name in vars(module))
