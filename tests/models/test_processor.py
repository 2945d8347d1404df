"""AttnProcessor is faithful to diffusers' AttnProcessor2_0 in every branch."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

import tiny
from headscope import AttnProcessor, HeadEdit, Scope

VARIANTS = {
    "plain": ({}, (2, 9, 16), None, None),
    "cross": ({"cross_attention_dim": 12}, (2, 9, 16), (2, 7, 12), None),
    "cross normed": ({"cross_attention_dim": 12, "cross_attention_norm": "layer_norm"}, (2, 9, 16), (2, 7, 12), None),
    "group norm, residual, rescaled": (
        {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 1.4, "bias": True},
        (2, 16, 3, 4),
        None,
        None,
    ),
    "spatial norm": (
        {"query_dim": 32, "spatial_norm_dim": 6, "residual_connection": True},
        (2, 32, 4, 4),
        None,
        "temb",
    ),
    "query and key norm": ({"qk_norm": "layer_norm"}, (2, 9, 16), None, None),
    "masked": ({"cross_attention_dim": 12}, (2, 9, 16), (2, 7, 12), "mask"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_output_as_stock(variant):
    options, shape, context_shape, extra = VARIANTS[variant]
    torch.manual_seed(0)
    attention = Attention(**{"query_dim": 16, "heads": 4, "dim_head": 4, **options}).eval()
    hidden = torch.randn(*shape)
    inputs: dict = {}
    if context_shape:
        inputs["encoder_hidden_states"] = torch.randn(*context_shape)
    if extra == "temb":
        inputs["temb"] = torch.randn(2, 6, 4, 4)
    if extra == "mask":
        inputs["attention_mask"] = torch.where(torch.rand(2, 1, 7) > 0.4, 0.0, -10000.0)
    with torch.inference_mode():
        attention.set_processor(AttnProcessor2_0())
        expected = attention(hidden, **inputs)
        attention.set_processor(AttnProcessor())
        got = attention(hidden, **inputs)
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) <= 1e-5


def test_in_a_whole_model_with_and_without_a_scope():
    pipeline = tiny.stable_diffusion()
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32)

    def run():
        with torch.inference_mode():
            return pipeline.unet(latents, 5, text, return_dict=False)[0]

    stock = run()
    with Scope(pipeline.unet).record("entropy") as recording:
        run()
    expected = recording.to_polars()
    pipeline.unet.set_attn_processor(AttnProcessor())
    assert float((run() - stock).abs().max()) <= 1e-5
    scope = Scope(pipeline.unet)
    with scope.record("entropy") as recording:
        assert float((run() - stock).abs().max()) <= 1e-5
    assert recording.to_polars()["entropy_mean"].to_list() == pytest.approx(
        expected["entropy_mean"].to_list(), abs=1e-5
    )
    with scope.edit({scope.sites[0].name: [0]}):
        assert float((run() - stock).abs().max()) > 1e-5


def test_its_own_statistics_and_edit():
    attention = Attention(query_dim=16, heads=4, dim_head=4).eval()
    processor = AttnProcessor(statistics=["entropy"], edit=HeadEdit.remove([1], of=4))
    hidden = torch.randn(2, 9, 16)
    with torch.inference_mode():
        stock = attention(hidden)
        attention.set_processor(processor)
        edited = attention(hidden)
    assert processor.latest["entropy"].shape == (2, 4, 9)
    assert float((edited - stock).abs().max()) > 1e-4
