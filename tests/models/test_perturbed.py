"""Perturbed-attention guidance: every row of every branch, against attention captured by hand."""

import diffusers
import polars as pl
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from configurations.perturbed import PERTURBED, PROMPTS, STEPS, with_image_prompts
from configurations.table import PAGE, perturbed
from configurations.watched import Watched, by_hand, places, watched
from headscope import Scope

# what the quick tests run; the full ones run them all
QUICK = [
    ("StableDiffusionPAGPipeline", 1),
    ("StableDiffusionXLPAGPipeline", 0),
    ("StableDiffusionXLPAGPipeline", 1),
    ("StableDiffusion3PAGPipeline", 0),
    ("PixArtSigmaPAGPipeline", 0),
    ("SanaPAGPipeline", 0),
    ("HunyuanDiTPAGPipeline, 1.2", 0),
    ("KolorsPAGPipeline", 0),
    ("AnimateDiffPAGPipeline", 0),
]
FULL = pytest.mark.full
# diffusers' own: Kolors gives its UNet an image prompt as older versions did
OLD_IMAGES = pytest.mark.filterwarnings("ignore:.*passed a tensor as `image_embeds`:FutureWarning")


def cases(quick=(), most=False):
    """(name, IP-Adapters): every pipeline without one and, where it takes one, with it; `most`: those with it alone."""
    every = [
        (name, count)
        for name, case in PERTURBED.items()
        for count in range(1 + case.image_prompt)
        if not most or count == case.image_prompt
    ]
    return [
        pytest.param(name, count, id=f"{name}{', image prompt' * count}", marks=() if (name, count) in quick else FULL)
        for name, count in every
    ]


def made(name, adapters, layers=None):
    case = PERTURBED[name]
    pipeline = with_image_prompts(case.build(), adapters) if adapters else case.build()
    if layers is not None:
        pipeline.set_pag_applied_layers(layers, pipeline._pag_attn_processors)
    return case, pipeline


def branches_of(guided):
    return ("uncond", "cond", "perturbed") if guided else ("cond", "perturbed")


def apart(images, others):
    """The largest difference, in units of the largest entry where that is more than 1."""
    return float((images - others).abs().max() / others.abs().max().clamp(min=1))


def recorded(recording):
    rows = recording.to_polars().with_columns(pl.col("site", "branch").cast(pl.String))
    key = ["forward", "site", "call", "branch", "sample", "head"]
    total = (pl.col("entropy_mean") * pl.col("queries")).sum() / pl.col("queries").sum()
    rows = rows.group_by(key).agg(total.alias("entropy"))
    return {tuple(row[:-1]): row[-1] for row in rows.select(*key, "entropy").rows()}


def steps_of(recording):
    """[(forward, step, timestep)]"""
    return recording.to_polars().select("forward", "step", "timestep").unique().sort("forward").rows()


def check_recording(case, pipeline, guided, samples, adapters, per_prompt=1, **changes):
    """A recording is what was seen; returns both."""
    branches, count = branches_of(guided), len(samples) * per_prompt

    def draw():
        return case.draw(pipeline, guided, samples, per_prompt=per_prompt, adapters=adapters, **changes)

    scope = Scope(pipeline)
    sites = [site.name for site in scope.sites]
    with watched(pipeline, sites) as seen:
        stock = draw()
    with scope.record("entropy", sites=sites) as recording:
        images = draw()
    assert apart(images, stock) <= 1e-5
    assert torch.equal(draw(), stock)
    expected, found = by_hand(seen, branches, count), recorded(recording)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, abs=1e-5)
    # where the perturbed rows of a perturbed layer don't attend, they have no rows
    missing = {site for site in sites if not any(key[1] == site and key[3] == "perturbed" for key in found)}
    assert missing == (set() if case.attends else seen.perturbed)
    assert steps_of(recording) == [(step, step, pytest.approx(time)) for step, time in enumerate(seen.timesteps)]
    # what isn't recorded is as it was, bit by bit
    with scope.edit({}):
        assert torch.equal(draw(), stock)
    return found, seen


def test_no_pipeline_is_forgotten():
    names = {name for name in dir(diffusers) if "PAG" in name and name.endswith("Pipeline")}
    assert {name.partition(",")[0] for name in PERTURBED} == names


def test_the_page_says_what_becomes_of_every_pipeline():
    """Each line is an entry, and each entry is run by the tests below."""
    assert PAGE.read_text().endswith(f"\n\n{perturbed()}")


@OLD_IMAGES
@pytest.mark.parametrize(
    ("samples", "per_prompt"),
    [((0,), 1), pytest.param((0, 1), 2, marks=FULL)],
    ids=["one image", "two prompts, two images of each"],
)
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize(("name", "adapters"), cases(QUICK))
def test_every_row_of_every_branch(name, adapters, guided, samples, per_prompt):
    case, pipeline = made(name, adapters)
    per_prompt = per_prompt if case.several else 1
    if case.unguided and not guided:
        with pytest.raises(RuntimeError, match=case.unguided):
            case.draw(pipeline, guided, samples, per_prompt=per_prompt)
        return
    check_recording(case, pipeline, guided, samples, adapters, per_prompt)


@OLD_IMAGES
@pytest.mark.parametrize(("name", "adapters"), cases([("StableDiffusionXLPAGPipeline", 1)]))
def test_branches_and_samples_are_what_they_are_called(name, adapters):
    """Against calls with one sample, without guidance: the first step of "cond" is theirs."""
    case, pipeline = made(name, adapters)
    scope = Scope(pipeline)
    sites = [site.name for site in scope.sites]
    with scope.record("entropy", sites=sites) as recording:
        case.draw(pipeline, True, (0, 1), adapters=adapters)
    with watched(pipeline, sites) as seen:
        case.draw(pipeline, True, (0, 1), adapters=adapters)
    found = {key[1:]: entropy for key, entropy in recorded(recording).items() if key[0] == 0}
    alone = {}
    # some pipelines leave their perturbed layers behind after a call for latents
    _, pipeline = made(name, adapters)
    for sample in range(2):
        with watched(pipeline, sites) as plain:
            case.draw(pipeline, False, (sample,), adapters=adapters, pag_scale=0.0)
        for (forward, site, call, _, _, head), entropy in by_hand(plain, ("cond",), 1).items():
            if forward == 0:
                alone[site, call, sample, head] = entropy
    if adapters and case.shared_image:
        # diffusers divides an image's tokens among a call's samples; before that, they are told apart still
        first = next(call.site for call in seen.calls if not call.site.endswith("attn1"))
        order = list(dict.fromkeys(call.site for call in seen.calls))
        alone = {key: entropy for key, entropy in alone.items() if order.index(key[0]) < order.index(first)}
    for (site, call, sample, head), entropy in alone.items():
        assert found[site, call, "cond", sample, head] == pytest.approx(entropy, abs=1e-4)
    assert alone

    def largest(other):
        return max(abs(entropy - other(*key)) for key, entropy in alone.items())

    # other samples and branches are told apart by that
    assert largest(lambda site, call, sample, head: alone[site, call, 1 - sample, head]) > 1e-3
    if not (adapters and case.shared_image):
        assert largest(lambda site, call, sample, head: found[site, call, "uncond", sample, head]) > 1e-3
    # the perturbed branch is as the one with the prompt up to the first perturbed layer
    order = list(dict.fromkeys(call.site for call in seen.calls))
    first = min((order.index(site) for site in seen.perturbed), default=0)
    both = [
        (order.index(site), abs(entropy - found[site, call, "cond", sample, head]))
        for (site, call, branch, sample, head), entropy in found.items()
        if branch == "perturbed"
    ]
    assert max((distance for place, distance in both if place < first), default=0.0) <= 1e-5
    assert max(distance for place, distance in both if place >= first) > 1e-4


def chosen(scope, perturbed, kind):
    """A site that is perturbed, or one of a kind that isn't; None where there is none."""
    if kind == "perturbed":
        return min(perturbed, default=None)
    return next(
        (site.name for site in scope.sites if site.name not in perturbed and (site.kind == "self") is (kind == "self")),
        None,
    )


@OLD_IMAGES
@pytest.mark.parametrize("kind", ["self", "with text", "perturbed"])
@pytest.mark.parametrize("guided", [True, pytest.param(False, marks=FULL)], ids=["guided", "unguided"])
@pytest.mark.parametrize(
    ("name", "adapters"), cases([("StableDiffusionXLPAGPipeline", 1), ("StableDiffusion3PAGPipeline", 0)], most=True)
)
def test_edits_are_of_the_right_rows(name, adapters, guided, kind):
    """Head 0 of sample 1, in one branch: against the same cut out of the attention's output by hand."""
    case, pipeline = made(name, adapters)
    if case.unguided and not guided:
        pytest.skip("diffusers' own code fails")
    branches, scope = branches_of(guided), Scope(pipeline)

    def draw():
        return case.draw(pipeline, guided, (0, 1), adapters=adapters)

    names = [site.name for site in scope.sites]
    with watched(pipeline, names) as seen:
        stock = draw()
    before = by_hand(seen, branches, 2, forward=0)
    site = chosen(scope, seen.perturbed, kind)
    if site is None:
        pytest.skip("has no such site")
    for branch in branches:
        edits = [{}, {site: [0]}]
        if not any(key[1] == site and key[3] == branch for key in before):
            said = "'perturbed', in which none of the edited sites attends, expected some of "
            with pytest.raises(ValueError, match=said), scope.edit(edits, branches=branch):
                draw()
            continue

        def change(call, output, branch=branch):
            if call.site == site:
                for row, (_, own, sample) in enumerate(places(call, branches, 2)):
                    if (own, sample) == (branch, 1):
                        output[row, 0] = 0
            return output

        with watched(pipeline, names, change) as changed:
            expected = draw()
        with scope.edit(edits, branches=branch), scope.record("entropy", sites=names) as recording:
            edited = draw()
        assert apart(edited, expected) <= 1e-5
        assert apart(edited, stock) > 1e-4
        found = {key: entropy for key, entropy in recorded(recording).items() if key[0] == 0}
        assert found == pytest.approx(by_hand(changed, branches, 2, forward=0), abs=1e-5)
        # in the first forward no other branch and no other sample has seen anything of it
        others = {key: entropy for key, entropy in before.items() if key[3:5] != (branch, 1)}
        assert {key: found[key] for key in others} == pytest.approx(others, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "layers", "count"),
    [
        ("StableDiffusionXLPAGPipeline", ["down", "mid"], 2),
        ("StableDiffusionXLPAGPipeline", r"(down|up)_blocks\.\d\.attentions", 3),
        ("StableDiffusion3PAGPipeline", r"blocks\.(0|1)", 2),
        ("PixArtSigmaPAGPipeline", ["blocks.0", "blocks.1"], 2),
        # a motion module attends to frames, twice
        pytest.param("AnimateDiffPAGPipeline", "mid", 3, marks=FULL),
    ],
)
def test_patterns_that_cover_several_layers(name, layers, count):
    case, pipeline = made(name, 0, layers)
    for guided in (True, False):
        _, seen = check_recording(case, pipeline, guided, (0, 1), 0)
        assert len(seen.perturbed) == count


@pytest.mark.parametrize("guided", [True, False])
def test_the_perturbed_branch_still_runs_where_an_adaptive_scale_has_come_to_nothing(guided):
    case, pipeline = made("StableDiffusionXLPAGPipeline", 0)
    adaptive = {"num_inference_steps": 4, "pag_adaptive_scale": 0.005}
    found, seen = check_recording(case, pipeline, guided, (0,), 0, **adaptive)
    scales = [pipeline._get_pag_scale(timestep) for timestep in seen.timesteps]
    assert [scale > 0 for scale in scales] == [True, True, False, False]
    for forward in range(4):
        assert {key[3] for key in found if key[0] == forward} == {*branches_of(guided)}


@pytest.mark.parametrize("off", [{"pag_scale": 0.0}, {"layers": []}])
def test_without_a_scale_or_layers_there_is_no_perturbed_branch(off):
    case, pipeline = made("StableDiffusionXLPAGPipeline", 0, off.get("layers"))
    scale = {} if "layers" in off else off
    for guided, branches in ((True, ["uncond", "cond"]), (False, [None])):
        with Scope(pipeline).record("entropy") as recording:
            case.draw(pipeline, guided, (0, 1), **scale)
        table = recording.to_polars()
        assert sorted(table["branch"].unique().cast(str), key=str) == sorted(branches, key=str)
        assert set(table["sample"]) == {0, 1}


@pytest.mark.parametrize(
    ("pag_scale", "guidance_scale", "kept", "processor", "branches"),
    [
        (0.0, 5.0, slice(0, 2), AttnProcessor2_0(), ["cond", "uncond"]),
        (3.0, 1.0, slice(1, 3), None, ["cond", "perturbed"]),
        (0.0, 1.0, slice(1, 2), AttnProcessor2_0(), ["cond"]),
    ],
)
def test_a_callback_that_switches_one_of_them_off(pag_scale, guidance_scale, kept, processor, branches):
    case, pipeline = made("StableDiffusionPAGPipeline", 0)

    def callback(pipeline, index, timestep, tensors):
        if index == 0:
            pipeline._pag_scale, pipeline._guidance_scale = pag_scale, guidance_scale
            unguided = pipeline.pag_attn_processors and processor is None
            for module in pipeline.unet.modules():
                if type(getattr(module, "processor", None)).__name__.startswith("PAG"):
                    module.processor = pipeline._pag_attn_processors[1] if unguided else processor
            tensors["prompt_embeds"] = torch.cat(tensors["prompt_embeds"].chunk(3)[kept])
        return tensors

    scope = Scope(pipeline)
    switched = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    with watched(pipeline, [site.name for site in scope.sites]) as seen:
        stock = case.draw(pipeline, True, (0, 1), **switched)
    _, pipeline = made("StableDiffusionPAGPipeline", 0)
    with Scope(pipeline).record("entropy") as recording:
        assert apart(case.draw(pipeline, True, (0, 1), **switched), stock) <= 1e-5
    found = recorded(recording)
    for forward, own in enumerate((["uncond", "cond", "perturbed"], sorted(branches, key=branches_of(True).index))):
        now = Watched()
        now.calls = [call for call in seen.calls if call.forward == forward]
        expected = by_hand(now, own, 2)
        assert {key: entropy for key, entropy in found.items() if key[0] == forward} == pytest.approx(
            expected, abs=1e-5
        )


def test_a_pipeline_that_shares_the_denoiser_of_the_one_in_the_scope():
    case = PERTURBED["StableDiffusionXLPAGPipeline"]
    pipeline = case.build()
    plain = diffusers.StableDiffusionXLPipeline.from_pipe(pipeline)
    for owner in (plain, pipeline):
        scope = Scope(owner)
        with watched(pipeline, [site.name for site in scope.sites]) as seen:
            case.draw(pipeline, True, (0, 1))
        with scope.record("entropy") as recording:
            case.draw(pipeline, True, (0, 1))
            plain("a cat", num_inference_steps=1, output_type="latent", guidance_scale=5.0)
        found = recorded(recording)
        first = {key: entropy for key, entropy in found.items() if key[0] < STEPS}
        assert first == pytest.approx(by_hand(seen, branches_of(True), 2), abs=1e-5)
        assert {key[3:5] for key in found if key[0] == STEPS} == {("uncond", 0), ("cond", 0)}


@pytest.mark.parametrize("masked", [False, True])
def test_several_image_prompts(masked):
    """Each is a call of its own, after the text; and so is each image of one, within a mask."""
    case, pipeline = made("StableDiffusionXLPAGPipeline", 2)
    half = torch.zeros(1, 1, 16, 16)
    half[..., :8] = 1
    options = {"cross_attention_kwargs": {"ip_adapter_masks": [half, 1 - half]}} if masked else {}
    found, _ = check_recording(case, pipeline, True, (0, 1), 2, **options)
    site = next(key[1] for key in found if key[1].endswith("attn2"))
    for branch in branches_of(True):
        assert {key[2] for key in found if key[1] == site and key[3] == branch} == {0, 1, 2}


def test_one_call_of_one_branch_is_edited():
    """The image prompt's (call 1), where it is perturbed: the text's, and the other branches', stay."""
    case, pipeline = made("StableDiffusionXLPAGPipeline", 1)
    scope = Scope(pipeline)
    names = [site.name for site in scope.sites]
    site = next(name for name in names if name.endswith("attn2"))

    def change(call, output):
        if call.site == site:
            for row, (number, branch, _) in enumerate(places(call, branches_of(True), 2)):
                if number == 1 and branch == "perturbed":
                    output[row, 1] = 0
        return output

    with watched(pipeline, names, change):
        expected = case.draw(pipeline, True, (0, 1), adapters=1)
    with scope.edit({site: lambda where: [1] if where.call == 1 else []}, branches="perturbed"):
        edited = case.draw(pipeline, True, (0, 1), adapters=1)
    assert apart(edited, expected) <= 1e-5
    assert apart(edited, case.draw(pipeline, True, (0, 1), adapters=1)) > 1e-4


def test_perturbed_layers_that_cannot_be_seen_are_refused_by_name():
    """Sana's attend linearly; what attends to the text is recorded, above."""
    case, pipeline = made("SanaPAGPipeline", 0)
    said = r"SanaLinearAttnProcessor2_0 doesn't call torch's scaled_dot_product_attention"
    with pytest.raises(ValueError, match=f"transformer_blocks.0.attn1: {said}"), Scope(pipeline).record("entropy"):
        case.draw(pipeline, True)
    site = "transformer_blocks.0.attn1"
    with pytest.raises(KeyError, match=f"{site}.* {said}"), Scope(pipeline).edit({site: [0]}):
        case.draw(pipeline, True)


@pytest.mark.parametrize(
    ("name", "adapters"), [("StableDiffusion3PAGPipeline", 0), ("StableDiffusionXLPAGPipeline", 1)]
)
def test_fills_of_a_recording_know_the_branches_that_attend(name, adapters):
    case, pipeline = made(name, adapters)

    def draw():
        return case.draw(pipeline, True, (0, 1), adapters=adapters)

    scope = Scope(pipeline)
    stock = draw()
    with scope.record("head_output", reduce=None) as recording:
        draw()
    # every sample's own output in its place changes nothing
    with scope.edit({"*": [0, 1]}, fill=recording):
        assert apart(draw(), stock) <= 1e-5
    with scope.edit({"*": [0, 1]}, fill=recording.take([1, 0])):
        assert apart(draw(), stock) > 1e-4


@pytest.mark.parametrize(
    ("name", "adapters"), [("StableDiffusion3PAGPipeline", 0), ("StableDiffusionXLPAGPipeline", 1)]
)
def test_token_maps_are_of_the_branch_with_the_prompt(name, adapters):
    case, pipeline = made(name, adapters)
    scope = Scope(pipeline)
    site = next(site.name for site in scope.sites if "blocks.1." in site.name and site.kind != "self")
    with watched(pipeline, [site]) as seen:
        case.draw(pipeline, True, (0, 1), adapters=adapters)
    with scope.record_tokens(PROMPTS[:2], sites=[site]) as maps:
        case.draw(pipeline, True, (0, 1), adapters=adapters)
    # the first call of every forward has the uncond and cond branches, and the text
    calls = [call for call in seen.calls if call.start == 0]
    assert len(calls) == STEPS
    joint = scope.site(site).kind == "joint"
    expected = torch.zeros(2, 4, 4, dtype=torch.float64)
    for call in calls:
        p = (call.query.double() @ call.key.double().mT / call.query.shape[-1] ** 0.5).softmax(-1)
        # where they are one sequence, the image's 16 tokens come before the text
        expected += p[2:4, :, :16, (16 if joint else 0) + 3].mean(1).unflatten(1, (4, 4)) / STEPS
    for sample in range(2):
        assert maps.map([3], sample).numpy() == pytest.approx(expected[sample].numpy(), abs=1e-6)


def test_token_maps_tell_the_text_from_an_image_prompt_of_as_many_tokens():
    """4 of each."""
    case, pipeline = made("StableDiffusionPAGPipeline", 1)
    scope = Scope(pipeline)
    site = next(site.name for site in scope.sites if site.kind == "cross")
    texts = {"prompt_embeds": torch.randn(1, 4, 32), "negative_prompt_embeds": torch.randn(1, 4, 32)}
    options = {"adapters": 1, "prompt": None, "negative_prompt": None, **texts}
    with watched(pipeline, [site]) as seen:
        case.draw(pipeline, True, **options)
    assert [call.key.shape[2] for call in seen.calls] == [4] * 2 * STEPS
    with pytest.warns(UserWarning, match="nothing tells whether"), scope.record_tokens("ab", sites=[site]) as maps:
        case.draw(pipeline, True, **options)
    expected = torch.zeros(8, 8, dtype=torch.float64)
    for call in seen.calls[::2]:
        p = (call.query.double() @ call.key.double().mT / call.query.shape[-1] ** 0.5).softmax(-1)
        expected += p[1, :, :, 1].mean(0).unflatten(0, (8, 8)) / STEPS
    assert maps.map([1], 0).numpy() == pytest.approx(expected.numpy(), abs=1e-6)
