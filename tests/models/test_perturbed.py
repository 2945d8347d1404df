"""Perturbed-attention guidance: every row of every branch, against attention captured by hand."""

from collections import defaultdict
from contextlib import contextmanager

import polars as pl
import pytest
import torch
import torch.nn.functional as functional
from diffusers import (
    AnimateDiffPAGPipeline,
    MotionAdapter,
    PixArtSigmaPAGPipeline,
    PixArtTransformer2DModel,
    StableDiffusion3PAGPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionXLPAGPipeline,
)
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

import tiny
from headscope import Scope

STEPS = 2


def stable_diffusion():
    return StableDiffusionPAGPipeline(**tiny.stable_diffusion().components, requires_safety_checker=False)


def with_image_prompt():
    """IP-Adapter: cross-attention attends to the text, then to 4 tokens of an image."""
    pipeline = stable_diffusion()
    torch.manual_seed(0)
    unet, processors = pipeline.unet, {}
    for name in unet.attn_processors:
        module = unet.get_submodule(name.removesuffix(".processor"))
        processors[name] = AttnProcessor2_0()
        if module.is_cross_attention:
            processors[name] = IPAdapterAttnProcessor2_0(module.inner_dim, 32, num_tokens=(4,), scale=1.0)
    unet.set_attn_processor(processors)
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(32, 32, num_image_text_embeds=4)])
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    return pipeline


def stable_diffusion_xl():
    return StableDiffusionXLPAGPipeline(**tiny.stable_diffusion_xl().components, add_watermarker=False)


def stable_diffusion_3():
    components = tiny.stable_diffusion_3(layers=2).components
    encoder = {name: components.pop(name) for name in ("image_encoder", "feature_extractor")}
    assert set(encoder.values()) == {None}
    return StableDiffusion3PAGPipeline(**components, pag_applied_layers="blocks.1")


def pixart_sigma():
    flux = tiny.flux()
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=32,
        use_additional_conditions=False,
        norm_type="ada_norm_single",
    ).eval()
    return PixArtSigmaPAGPipeline(
        tokenizer=flux.tokenizer_2,
        text_encoder=flux.text_encoder_2,
        vae=tiny.autoencoder(),
        transformer=transformer,
        scheduler=tiny.latent_scheduler(),
    )


def animated():
    """Frames are folded into the batch where a picture attends to itself, places of the picture where frames do."""
    pipeline = tiny.stable_diffusion()
    torch.manual_seed(0)
    adapter = MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=4
    )
    return AnimateDiffPAGPipeline(
        vae=pipeline.vae,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        unet=pipeline.unet,
        motion_adapter=adapter,
        scheduler=pipeline.scheduler,
        pag_applied_layers=r"mid.*(attentions\.\d+).*attn1",
    )


# pipeline, its arguments by whether there is guidance, whether perturbed rows of a perturbed layer attend
PIPELINES = {
    "stable diffusion": (stable_diffusion, lambda guided: {}, False),
    "image prompt": (
        with_image_prompt,
        lambda guided: {"ip_adapter_image_embeds": [torch.ones(2 if guided else 1, 1, 32)]},
        False,
    ),
    "stable diffusion xl": (stable_diffusion_xl, lambda guided: {}, False),
    "stable diffusion 3": (stable_diffusion_3, lambda guided: {"height": 16, "width": 16}, True),
    "animated": (animated, lambda guided: {"num_frames": 2, "height": 16, "width": 16}, False),
    "pixart": (
        pixart_sigma,
        lambda guided: {
            "height": 16,
            "width": 16,
            "max_sequence_length": 8,
            "clean_caption": False,
            "use_resolution_binning": False,
        },
        False,
    ),
}


def draw(pipeline, options, guided, samples):
    pipeline.set_progress_bar_config(disable=True)
    frames = [options["num_frames"]] if "num_frames" in options else []
    latents = torch.randn(samples, 4, *frames, 8, 8, generator=torch.Generator().manual_seed(3))
    return pipeline(
        ["a red fox", "a blue boat", "a cat"][:samples],
        latents=latents,
        num_inference_steps=STEPS,
        guidance_scale=5.0 if guided else 1.0,
        pag_scale=3.0,
        output_type="latent",
        **options,
    )[0]


def apart(images, others):
    """The largest difference, in units of the largest entry where that is more than 1."""
    return float((images - others).abs().max() / others.abs().max().clamp(min=1))


@contextmanager
def watched(denoiser, sites, change=None):
    """Every attention call of the sites, [(forward, site, query, key, mask)]; `change` may change its output."""
    calls, running, forwards = [], [], [-1]
    stock = functional.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        output = stock(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if not running:
            return output
        calls.append((forwards[0], running[-1], query, key, attn_mask))
        return output if change is None else change(forwards[0], running[-1], output.clone())

    def count(module, args):
        forwards[0] += 1

    handles = [denoiser.register_forward_pre_hook(count)]
    for name in sites:
        module = denoiser.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda module, args, name=name: running.append(name)))
        handles.append(module.register_forward_hook(lambda module, args, output: running.pop() and None))
    functional.scaled_dot_product_attention = spy
    try:
        yield calls
    finally:
        functional.scaled_dot_product_attention = stock
        for handle in handles:
            handle.remove()


def entropies(query, key, mask):
    """The mean over queries, [rows, heads], float64."""
    logits = query.double() @ key.double().mT / query.shape[-1] ** 0.5
    logits = logits if mask is None else logits + mask
    return torch.special.entr(logits.softmax(-1)).sum(-1).mean(-1)


def by_hand(calls, branches, samples, frames):
    """{(forward, site, call, branch, sample, head): entropy}, the rows of a site's calls being those of its batch.

    Frames are folded into it, or places of the picture where motion modules attend.
    """
    found, rows_so_far = {}, defaultdict(int)
    whole = len(branches) * samples
    for forward, site, query, key, mask in calls:
        fold = len(query) // whole if "motion" in site else frames
        rows = entropies(query, key, mask).unflatten(0, (-1, fold)).mean(1)
        for row, heads in enumerate(rows.tolist(), rows_so_far[forward, site]):
            call, place = divmod(row, whole)
            branch, sample = divmod(place, samples)
            for head, entropy in enumerate(heads):
                found[forward, site, call, branches[branch], sample, head] = entropy
        rows_so_far[forward, site] += len(rows)
    return found


def recorded(recording):
    rows = recording.to_polars().with_columns(pl.col("site", "branch").cast(pl.String))
    key = ["forward", "site", "call", "branch", "sample", "head"]
    total = (pl.col("entropy_mean") * pl.col("queries")).sum() / pl.col("queries").sum()
    rows = rows.group_by(key).agg(total.alias("entropy"))
    return {tuple(row[:-1]): row[-1] for row in rows.select(*key, "entropy").rows()}


@pytest.mark.parametrize(
    "samples", [1, pytest.param(2, marks=pytest.mark.full), pytest.param(3, marks=pytest.mark.full)]
)
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("name", PIPELINES)
def test_every_row_of_every_branch(name, guided, samples):
    build, options, perturbed_attends = PIPELINES[name]
    pipeline, options = build(), options(guided)
    scope = Scope(pipeline)
    sites = [site.name for site in scope.sites]
    branches = ["uncond", "cond", "perturbed"] if guided else ["cond", "perturbed"]
    with watched(scope.denoiser, sites) as calls:
        stock = draw(pipeline, options, guided, samples)
    with scope.record("entropy") as recording:
        images = draw(pipeline, options, guided, samples)
    assert apart(images, stock) <= 1e-5
    assert torch.equal(draw(pipeline, options, guided, samples), stock)
    expected, found = by_hand(calls, branches, samples, options.get("num_frames", 1)), recorded(recording)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, abs=1e-5)
    # where the perturbed rows of a perturbed layer don't attend, they have no rows
    missing = {site for site in sites if not any(key[1] == site and key[3] == "perturbed" for key in found)}
    assert bool(missing) is not perturbed_attends
    # what isn't recorded is as it was, bit by bit
    with scope.record("entropy", sites=()):
        assert torch.equal(draw(pipeline, options, guided, samples), stock)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("name", ["stable diffusion", "stable diffusion 3"])
def test_edits_are_of_the_right_rows(name, guided):
    build, options, perturbed_attends = PIPELINES[name]
    pipeline, options, samples = build(), options(guided), 2
    scope = Scope(pipeline)
    perturbed_layer = next(site.name for site in scope.sites if "mid" in site.name or "blocks.1." in site.name)
    plain = next(site.name for site in scope.sites if site.name != perturbed_layer and site.kind != "cross")
    branches = ["uncond", "cond", "perturbed"] if guided else ["cond", "perturbed"]
    stock = draw(pipeline, options, guided, samples)
    for site in (plain, perturbed_layer):
        for part, branch in enumerate(branches):
            seen = defaultdict(int)

            def change(forward, running, output, site=site, part=part, seen=seen):
                if running == site:
                    # sample 1 of that branch
                    row = part * samples + 1 - seen[forward]
                    seen[forward] += len(output)
                    if 0 <= row < len(output):
                        output[row, 0] = 0
                return output

            with watched(scope.denoiser, [site], change):
                expected = draw(pipeline, options, guided, samples)
            edits = [{}, {site: [0]}]
            attends = site == plain or branch != "perturbed" or perturbed_attends
            if attends:
                with scope.edit(edits, branches=branch):
                    edited = draw(pipeline, options, guided, samples)
                assert apart(edited, expected) <= 1e-5
                assert apart(edited, stock) > 1e-4
            else:
                said = "'perturbed', in which none of the edited sites attends, expected some of "
                with pytest.raises(ValueError, match=said), scope.edit(edits, branches=branch):
                    draw(pipeline, options, guided, samples)


def test_fills_of_a_recording_know_the_branches_that_attend():
    pipeline, options = stable_diffusion_3(), {"height": 16, "width": 16}
    scope = Scope(pipeline)
    site = next(site.name for site in scope.sites if "blocks.1." in site.name)
    stock = draw(pipeline, options, True, 2)
    with scope.record("head_output", sites=[site], reduce=None) as recording:
        draw(pipeline, options, True, 2)
    # every sample's own output in its place changes nothing
    with scope.edit({site: [0, 1]}, fill=recording):
        assert apart(draw(pipeline, options, True, 2), stock) <= 1e-5
    with scope.edit({site: [0, 1]}, fill=recording.take([1, 0])):
        assert apart(draw(pipeline, options, True, 2), stock) > 1e-4
    pipeline = stable_diffusion()
    scope = Scope(pipeline)
    stock = draw(pipeline, {}, True, 2)
    with scope.record("head_output", reduce=None) as recording:
        draw(pipeline, {}, True, 2)
    with scope.edit({"*": [0, 1]}, fill=recording):
        assert apart(draw(pipeline, {}, True, 2), stock) <= 1e-5


def test_token_maps_are_of_the_branch_with_the_prompt():
    pipeline, options = stable_diffusion_3(), {"height": 16, "width": 16}
    scope = Scope(pipeline)
    site = next(site.name for site in scope.sites if "blocks.1." in site.name)
    with watched(scope.denoiser, [site]) as calls:
        draw(pipeline, options, True, 2)
    with scope.record_tokens(["a red fox", "a blue boat"], sites=[site]) as maps:
        draw(pipeline, options, True, 2)
    # the first call of every forward is of the uncond and cond branches
    expected = torch.zeros(2, 4, 4, dtype=torch.float64)
    for _, _, query, key, _ in calls[::2]:
        p = (query.double() @ key.double().mT / query.shape[-1] ** 0.5).softmax(-1)
        expected += p[2:4, :, :16, 16 + 3].mean(1).unflatten(1, (4, 4)) / STEPS
    for sample in range(2):
        assert maps.map([3], sample).numpy() == pytest.approx(expected[sample].numpy(), abs=1e-6)
