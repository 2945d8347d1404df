"""AttnProcessor is faithful to AttnProcessor2_0 in every branch, and leaves other processors their own work."""

import copy
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from diffusers.models.attention_processor import AttnProcessor as EagerProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tiny
from configurations import CASES
from configurations.examine import build, difference, run
from headscope import AttnProcessor, HeadEdit, Scope
from headscope.models import processor as module_under_test
from headscope.ops import AttentionResult


@st.composite
def attentions(draw):
    """An Attention that AttnProcessor2_0 serves, and inputs for it: the branches of its code in all combinations."""
    heads, dim, batch = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([4, 7])), draw(st.integers(1, 3))
    cross = draw(st.booleans())
    picture = draw(st.booleans())
    # diffusers' SpatialNorm has 32 groups
    spatial = picture and draw(st.booleans())
    channels = 32 if spatial else 8 * draw(st.integers(1, 2))
    options = {
        "query_dim": channels,
        "heads": heads,
        "dim_head": dim,
        "bias": draw(st.booleans()),
        "cross_attention_dim": 12 if cross else None,
        "cross_attention_norm": draw(st.sampled_from([None, "layer_norm", "group_norm"])) if cross else None,
        "cross_attention_norm_num_groups": 3,
        "qk_norm": draw(st.sampled_from([None, "layer_norm", "fp32_layer_norm", "rms_norm", "l2"])),
        "norm_num_groups": draw(st.sampled_from([None, 4])),
        "spatial_norm_dim": 6 if spatial else None,
        "rescale_output_factor": draw(st.sampled_from([1.0, 1.4])),
        "residual_connection": draw(st.booleans()),
        # of no effect on AttnProcessor2_0
        "upcast_attention": draw(st.booleans()),
        "upcast_softmax": draw(st.booleans()),
    }
    seed = draw(st.integers(0, 2**16))
    torch.manual_seed(seed)
    attention = Attention(**options).eval()
    # a group norm takes no single value
    height, width = draw(st.integers(2, 4)), draw(st.integers(1, 4))
    queries = height * width
    hidden = torch.randn(batch, channels, height, width) if picture else torch.randn(batch, queries, channels)
    keys = draw(st.integers(1, 6)) if cross else queries
    inputs: dict = {"encoder_hidden_states": torch.randn(batch, keys, 12)} if cross else {}
    if spatial:
        inputs["temb"] = torch.randn(batch, 6, 2, 2)
    shape = {
        "none": None,
        "keys": (batch, 1, keys),
        "matrix": (batch, queries, keys),
        "heads": (batch * heads, 1, keys),
    }
    mask = shape[draw(st.sampled_from(sorted(shape)))]
    if mask:
        inputs["attention_mask"] = torch.where(torch.rand(mask) > 0.4, 0.0, -10000.0)
    return attention, hidden, inputs


def outputs(attention: Any, hidden, inputs, *processors):
    found = []
    for processor in processors:
        attention.set_processor(processor)
        with torch.inference_mode():
            found.append(attention(hidden, **inputs))
    return found


@settings(max_examples=150, deadline=None, derandomize=True)
@given(attentions())
def test_every_branch_of_the_stock_processor(drawn):
    """With torch's own attention inside it is the stock processor bit by bit; with headscope's, to rounding."""
    attention, hidden, inputs = drawn
    stock, ours = outputs(attention, hidden, inputs, AttnProcessor2_0(), AttnProcessor())
    assert ours.shape == stock.shape
    assert float((ours - stock).abs().max()) <= 1e-6 * max(1.0, float(stock.abs().max())) * KEEPS_APART
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module_under_test, "attention", torchs_attention)
        (exact,) = outputs(attention, hidden, inputs, AttnProcessor())
    assert torch.equal(exact, stock)


# kernels differ by some units in the last place of a sum of up to 16 values; layers behind them may add as many
KEEPS_APART = 4.0


def torchs_attention(query, key, value, *, edit, statistics, backend, **options):
    return AttentionResult(functional.scaled_dot_product_attention(query, key, value, **options), {})


@settings(max_examples=50, deadline=None, derandomize=True)
@given(attentions())
def test_fused_projections(drawn):
    attention: Any
    attention, hidden, inputs = drawn
    with torch.no_grad():
        attention.fuse_projections()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module_under_test, "attention", torchs_attention)
        stock, ours = outputs(attention, hidden, inputs, FusedAttnProcessor2_0(), AttnProcessor())
    assert torch.equal(ours, stock)
    # the fused layers do the work: without them the numbers would not change
    fused = attention.to_qkv if "encoder_hidden_states" not in inputs else attention.to_kv
    with torch.no_grad():
        fused.weight.zero_()
        stock, ours = outputs(attention, hidden, inputs, FusedAttnProcessor2_0(), AttnProcessor())
    assert float((ours - stock).abs().max()) <= 1e-6 * max(1.0, float(stock.abs().max())) * KEEPS_APART


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_and_low_precision(dtype):
    torch.manual_seed(0)
    attention: Any = Attention(query_dim=16, heads=4, dim_head=4, norm_num_groups=4, residual_connection=True).to(dtype)
    hidden = torch.randn(2, 9, 16, dtype=dtype)
    results = []
    for processor in (AttnProcessor2_0(), AttnProcessor()):
        attention.set_processor(processor)
        attention.zero_grad()
        output = attention(hidden)
        assert output.dtype == dtype
        output.square().sum().backward()
        results.append((output.detach(), attention.to_q.weight.grad, attention.to_v.weight.grad))
    # bfloat16 keeps 8 bits: the two may round each of a few steps in other directions
    tolerance = 1e-5 if dtype == torch.float32 else 8 * 2**-8
    for stock, ours in zip(*results, strict=True):
        assert float((ours - stock).abs().max()) <= tolerance * max(1.0, float(stock.abs().max()))


def test_in_a_whole_model_with_and_without_a_scope():
    pipeline = tiny.stable_diffusion()
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32)

    def forward():
        with torch.inference_mode():
            return pipeline.unet(latents, 5, text, return_dict=False)[0]

    stock = forward()
    with Scope(pipeline.unet).record("entropy") as recording:
        forward()
    expected = recording.to_polars()
    pipeline.unet.set_attn_processor(AttnProcessor())
    assert float((forward() - stock).abs().max()) <= 1e-5
    scope = Scope(pipeline.unet)
    with scope.record("entropy") as recording:
        assert float((forward() - stock).abs().max()) <= 1e-5
    assert recording.to_polars()["entropy_mean"].to_list() == pytest.approx(
        expected["entropy_mean"].to_list(), abs=1e-5
    )
    with scope.edit({scope.sites[0].name: [0]}):
        assert float((forward() - stock).abs().max()) > 1e-5


def test_a_model_with_fused_projections_and_low_rank_layers():
    """As fuse_qkv_projections() and a LoRA leave it: other layers under the same names, the rest as it was."""
    unet = tiny.stable_diffusion().unet
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32)

    class LowRank(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.layer, self.down = layer, nn.Linear(layer.in_features, 2, bias=False)
            self.up = nn.Linear(2, layer.out_features, bias=False)

        def forward(self, x):
            return self.layer(x) + self.up(self.down(x))

    def forward():
        with torch.inference_mode():
            return unet(latents, 5, text, return_dict=False)[0]

    plain = forward()
    torch.manual_seed(0)
    for module in unet.modules():
        if isinstance(module, Attention):
            assert module.to_out is not None
            module.to_q, module.to_out[0] = LowRank(module.to_q), LowRank(module.to_out[0])
    stock = forward()
    assert float((stock - plain).abs().max()) > 1e-4
    unet.set_attn_processor(AttnProcessor())
    assert float((forward() - stock).abs().max()) <= 1e-5
    unet = tiny.stable_diffusion().unet
    with torch.no_grad():
        unet.fuse_qkv_projections()
    fused = forward()
    unet.set_attn_processor(AttnProcessor())
    assert float((forward() - fused).abs().max()) <= 1e-5


def test_its_own_statistics_and_edit():
    attention: Any = Attention(query_dim=16, heads=4, dim_head=4).eval()
    processor = AttnProcessor(statistics=["entropy"], edit=HeadEdit.remove([1], of=4))
    hidden = torch.randn(2, 9, 16)
    with torch.inference_mode():
        stock = attention(hidden)
        attention.set_processor(processor)
        edited = attention(hidden)
        query, key = (layer(hidden).unflatten(-1, (4, 4)).transpose(1, 2) for layer in (attention.to_q, attention.to_k))
        entropy = torch.special.entr((query @ key.mT / 2).softmax(-1)).sum(-1)

        def without_head(module, args):
            return (torch.cat([args[0][..., :4], torch.zeros(2, 9, 4), args[0][..., 8:]], -1),)

        attention.set_processor(AttnProcessor2_0())
        attention.to_out[0].register_forward_pre_hook(without_head)
        by_hand = attention(hidden)
    assert float((processor.latest["entropy"] - entropy).abs().max()) <= 1e-5
    assert float((edited - by_hand).abs().max()) <= 1e-6
    assert float((edited - stock).abs().max()) > 1e-4


OWN_PROCESSORS = [
    "SD3Transformer2DModel, SD3.5-like",
    "FluxTransformer2DModel",
    "UNet2DConditionModel, added keys",
    "CogVideoXTransformer3DModel, 1.5-like",
    "HunyuanDiT2DModel",
    "QwenImageTransformer2DModel",
    "LTX2VideoTransformer3DModel",
    "WanTransformer3DModel, with image",
    "Lumina2Transformer2DModel",
    "AuraFlowTransformer2DModel",
]


@pytest.mark.parametrize("name", OWN_PROCESSORS)
def test_families_with_processors_of_their_own_keep_them(name):
    """All of their work is done, rotary embeddings included; only attention is headscope's."""
    model = build(name, CASES[name])
    stock = run(model, CASES[name])
    heads = {}
    with Scope(model).record("entropy") as recording:
        run(model, CASES[name])
    for path, module in model.named_modules():
        if hasattr(module, "set_processor") and hasattr(module, "processor"):
            ours = AttnProcessor.over(module.processor, statistics=["entropy"])
            assert isinstance(ours, type(module.processor))
            assert inspect.signature(ours.__call__) == inspect.signature(module.processor.__call__)
            module.set_processor(ours)
            heads[path] = ours
    assert heads
    assert difference(stock, run(model, CASES[name])) <= 1e-5
    means = recording.to_polars().group_by("site", "call").agg(value=entropy_over_queries())
    last = {str(site): value for site, call, value in means.sort("call").iter_rows()}
    for path, ours in heads.items():
        assert float(ours.latest["entropy"].mean()) == pytest.approx(last[path], abs=1e-4), path


def entropy_over_queries():
    """The mean over samples, heads and queries, from the means of groups of queries."""
    import polars

    return (polars.col("entropy_mean") * polars.col("queries")).sum() / polars.col("queries").sum()


def test_an_ip_adapter_keeps_its_scale_its_parameters_and_its_place():
    torch.manual_seed(0)
    attention = Attention(query_dim=16, heads=4, dim_head=4, cross_attention_dim=12).eval()
    stock = IPAdapterAttnProcessor2_0(16, 12, num_tokens=(3,), scale=0.5)
    hidden, text, picture = torch.randn(2, 9, 16), torch.randn(2, 7, 12), [torch.randn(2, 3, 12)]
    inputs = {"encoder_hidden_states": (text, picture)}
    (expected,) = outputs(attention, hidden, inputs, stock)
    names = list(attention.state_dict())
    ours = AttnProcessor.over(stock)
    (got,) = outputs(attention, hidden, inputs, ours)
    assert float((got - expected).abs().max()) <= 1e-5
    assert list(attention.state_dict()) == names
    assert attention.state_dict()["processor.to_k_ip.0.weight"] is not None
    ours.scale = [0.0]
    assert stock.scale == [0.5]
    without, plain = (
        outputs(attention, hidden, inputs, ours)[0],
        outputs(attention, hidden, {"encoder_hidden_states": text}, AttnProcessor2_0())[0],
    )
    assert float((without - plain).abs().max()) <= 1e-5
    # loading an IP-Adapter makes anew the processors of self-attention, by their class
    again = type(AttnProcessor.over(AttnProcessor2_0()))()
    got, expected = outputs(Attention(16, heads=4, dim_head=4).eval(), hidden, {}, again, AttnProcessor2_0())
    assert float((got - expected).abs().max()) <= 1e-5


def test_processors_over_others_inside_a_scope():
    name = "FluxTransformer2DModel"
    model = build(name, CASES[name])
    with Scope(model).record("entropy") as expected:
        run(model, CASES[name])
    ours = {path: AttnProcessor.over(stock) for path, stock in model.attn_processors.items()}
    # diffusers empties the dictionary it is given
    model.set_attn_processor(dict(ours))
    scope = Scope(model)
    with scope.record("entropy") as got:
        run(model, CASES[name])
    assert len(scope.sites) == len(ours)
    assert got.to_polars()["entropy_mean"].to_list() == pytest.approx(
        expected.to_polars()["entropy_mean"].to_list(), abs=1e-5
    )
    model.set_attn_processor({path: AttnProcessor.over(stock, edit=HeadEdit()) for path, stock in ours.items()})
    with pytest.raises(RuntimeError, match="inside an active Scope"), Scope(model).record("entropy"):
        run(model, CASES[name])


def test_a_copied_model_has_processors_of_its_own():
    name = "SD3Transformer2DModel"
    model = build(name, CASES[name])
    processors = {
        path: AttnProcessor.over(stock, statistics=["entropy"]) for path, stock in model.attn_processors.items()
    }
    model.set_attn_processor(dict(processors))
    twin = copy.deepcopy(model)
    run(twin, CASES[name])
    assert all(not processor.latest for processor in processors.values())
    assert all(processor.latest for processor in twin.attn_processors.values())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("UNet2DConditionModel", marks=pytest.mark.full),
        "SD3Transformer2DModel",
        pytest.param("FluxTransformer2DModel", marks=pytest.mark.full),
    ],
)
def test_compiled_without_a_graph_break(name):
    """Traced only: whether the compiled code is fast is not asked here."""
    model = build(name, CASES[name])
    stock = run(model, CASES[name])
    for module in model.modules():
        if hasattr(module, "set_processor") and hasattr(module, "processor"):
            plain = type(module.processor) is AttnProcessor2_0
            edit = HeadEdit.remove([0], of=module.heads)
            module.set_processor(AttnProcessor(edit=edit) if plain else AttnProcessor.over(module.processor, edit=edit))
    eager = run(model, CASES[name])
    model.compile(backend="eager", fullgraph=True)
    compiled = run(model, CASES[name])
    assert difference(eager, compiled) <= 1e-5
    assert difference(stock, compiled) > 1e-4


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "FluxTransformer2DModel", "HunyuanDiT2DModel"])
def test_a_module_with_more_work_than_the_stock_processor_is_refused(name):
    model = build(name, CASES[name])
    if hasattr(model, "set_attn_processor"):
        model.set_attn_processor(AttnProcessor())
    with pytest.raises(TypeError, match=r"AttnProcessor\.over"):
        run(model, CASES[name])


@pytest.mark.parametrize("stock", [EagerProcessor(), SlicedAttnProcessor(2), object()])
def test_processors_without_torchs_attention_are_refused(stock):
    with pytest.raises(TypeError, match="doesn't call torch's scaled_dot_product_attention"):
        AttnProcessor.over(stock)


def test_other_attention_backends_and_dropout_are_refused():
    name = "FluxTransformer2DModel"
    model = build(name, CASES[name])
    for stock in model.attn_processors.values():
        stock._attention_backend = "flex"
    model.set_attn_processor({path: AttnProcessor.over(stock) for path, stock in model.attn_processors.items()})
    with pytest.raises(RuntimeError, match="attention backend flex"):
        run(model, CASES[name])
    tensors = [torch.randn(1, 1, 3, 4) for _ in range(3)]
    with pytest.raises(ValueError, match=r"dropout_p: got 0\.1"):
        AttnProcessor().attend(*tensors, dropout_p=0.1)
    with pytest.raises(ValueError, match="entropi"):
        AttnProcessor(statistics=["entropi"])
