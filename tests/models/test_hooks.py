"""diffusers' hooks, caches and guiders in a Scope: what is computed is recorded, what isn't is listed or refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import ContextParallelConfig, ParallelConfig, TensorParallelConfig, hooks
from diffusers.hooks import HookRegistry, ModelHook

import tiny
from configurations.hooks import HOOKS, STEPS, WITHOUT_HOOK_ENTRY, names_of_sites, noted, public_names
from configurations.table import PAGE
from configurations.table import hooks as hooks_section
from headscope import Recording, Scope


def pairs(recording):
    """(site, forward) of everything recorded."""
    table = recording.to_polars().select("site", "forward").unique()
    return set(zip(table["site"].cast(str), table["forward"], strict=True))


def steps_with(recording):
    return {(entry.site, entry.step) for entry in recording.reused}


def apart(outputs, expected):
    return max(float((one - other).abs().max()) for one, other in zip(outputs, expected, strict=True))


def test_no_hook_and_no_guider_is_forgotten():
    assert {name.partition(",")[0] for name in HOOKS} | set(WITHOUT_HOOK_ENTRY) == public_names()


def test_the_page_lists_every_hook_and_what_becomes_of_it():
    """Each line is an entry, and each entry is run by the test below."""
    assert f"\n\n{hooks_section()}\n" in PAGE.read_text()


# diffusers' own: what torch deprecates, and layers without weights
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", HOOKS)
def test_every_hook(name):
    case = HOOKS[name]
    expected = case.run(case.build())
    model = case.build()
    with Scope(model).edit({}):
        outputs = case.run(model)
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))
    model = case.build()
    if case.outcome == "refused":
        refused = [site for site in names_of_sites(model) if ".1." in site]
        for enter in (lambda scope: scope.record("entropy"), lambda scope: scope.edit({refused[0]: [0]})):
            # a guider that is interrupted leaves its hooks behind
            model = case.build()
            with enter(Scope(model)), pytest.raises(RuntimeError, match=rf"{refused[0]!r} can't be .*{case.named}"):
                case.run(model)
        model = case.build()
        with Scope(model).record("entropy", sites=sorted({*names_of_sites(model)} - {*refused})) as others:
            outputs = case.run(model)
        assert apart(outputs, expected) <= 1e-5 * max(1.0, max(float(one.abs().max()) for one in expected))
        assert not others.reused
        return
    with Scope(model).record("entropy") as recording:
        outputs = case.run(model)
    assert apart(outputs, expected) <= 1e-5 * max(1.0, max(float(one.abs().max()) for one in expected))
    model = case.build()
    sites = names_of_sites(model)
    with noted(model, sites) as truth:
        case.run(model)
    assert pairs(recording) == set(truth.calls)
    everything = {(site, step) for site in sites for step in range(truth.forwards)}
    if not any(entry.branch for entry in recording.reused):
        assert steps_with(recording) == everything - set(truth.calls)
    assert (case.outcome == "reused") == bool(recording.reused)


# torch's own of meshgrid, once a process
@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")
def test_the_branch_that_faster_cache_estimates_is_listed_and_never_taken_for_the_other():
    """Step 1 has neither branch's attention, step 2 the one with the prompt, step 3 both."""
    case = HOOKS["FasterCacheConfig"]
    model = case.build()
    site, other = names_of_sites(model)
    with Scope(model).record("entropy") as recording:
        case.run(model)
    table = recording.to_polars().filter(site=site)
    found = set(zip(table["step"], table["branch"].cast(str), table["sample"], strict=True))
    assert found == {(step, branch, 0) for step in (0, 3) for branch in ("uncond", "cond")} | {(2, "cond", 0)}
    missing = [(1, "cond"), (1, "uncond"), (2, "uncond")]
    assert sorted((entry.step, entry.branch) for entry in recording.reused if entry.site == other) == missing
    # the first block is given the same in every step
    entropies = {
        step: table.filter(step=step, branch="cond").sort("head", "frame")["entropy_mean"].to_list() for step in (0, 2)
    }
    assert entropies[2] == pytest.approx(entropies[0], abs=1e-5)


def test_a_part_of_the_batch_that_is_no_branch_is_an_error():
    model = HOOKS["ClassifierFreeGuidance"].build()

    class Half(ModelHook):
        def new_forward(self, module, *args, **kwargs):
            forward: Any = self.fn_ref.original_forward
            return forward(*args, **{name: half(value) for name, value in kwargs.items()})

    def half(value):
        return value[1:] if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == 2 else value

    HookRegistry.check_if_exists_or_initialize(model).register_hook(Half(), "half")
    with Scope(model).record("entropy"), pytest.raises(RuntimeError, match="Half runs the model on 1 of the 2 samples"):
        model(**tiny.flux_inputs())


@pytest.mark.parametrize(
    "name", ["FirstBlockCacheConfig", "PyramidAttentionBroadcastConfig", "SeaCacheConfig, Cosmos3"]
)
def test_what_comes_from_a_cache_cannot_be_edited(name):
    case = HOOKS[name]
    model = case.build()
    scope = Scope(model)
    site = scope.sites[-1].name
    with (
        scope.edit({site: [0]}),
        pytest.raises(RuntimeError, match=rf"{site!r} can't be edited in step \d, for diffusers\.hooks\.\w+\.\w+Hook"),
    ):
        case.run(model)
    # where it is computed, it can
    model = case.build()
    with Scope(model).edit({site: [0]}, steps=range(1)):
        outputs = case.run(model)
    assert not torch.equal(outputs[0], case.run(case.build())[0])


def test_a_skipped_layer_has_nothing_to_edit():
    case = HOOKS["SkipLayerGuidance"]
    expected = case.run(case.build())
    model = case.build()
    with Scope(model).edit({"transformer_blocks.1.attn1": [0]}):
        outputs = case.run(model)
    assert not torch.equal(outputs[-1], expected[-1])


class Eager:
    """Attention without torch's function."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        return attn.to_out[0](attn.to_v(hidden_states)), encoder_hidden_states


def test_attention_that_goes_another_way_beneath_a_hook_is_an_error():
    case = HOOKS["PyramidAttentionBroadcastConfig"]
    model = case.build()
    with Scope(model).record("entropy"):
        model.transformer_blocks[0].attn.processor = Eager()
        with pytest.raises(RuntimeError, match="ran without torch's scaled_dot_product_attention"):
            case.run(model)


@pytest.mark.parametrize("kind", ["context", "tensor"])
def test_a_model_that_is_spread_over_processes_is_refused(kind):
    """As `enable_parallelism` leaves it, which needs several processes."""
    degree = ContextParallelConfig(ring_degree=2) if kind == "context" else TensorParallelConfig(tp_degree=2)
    model = tiny.flux_transformer()
    model._parallel_config = ParallelConfig(**{f"{kind}_parallel_config": degree})
    with pytest.raises(ValueError, match=r"no attention site .*\n.*FluxTransformer2DModel is spread over processes"):
        Scope(model)


def chains(model):
    found = {}
    for name, module in model.named_modules():
        registry = module.__dict__.get("_diffusers_hook")
        for number, link in enumerate(registry._fn_refs if registry else ()):
            found[name, number] = (link.pre_forward, link.forward, link.original_forward)
    return found


def test_leaving_restores_the_hooks():
    case = HOOKS["FirstBlockCacheConfig"]
    model = case.build()
    before = chains(model)
    with Scope(model).record("entropy"):
        case.run(model)
        assert chains(model) != before
    assert chains(model) == before
    assert not any("headscope" in name for module in model.modules() for name in module.__dict__)
    # hooks that are removed inside leave the plain model
    with Scope(model).record("entropy") as recording:
        case.run(model)
        model.disable_cache()
        case.run(model)
    plain = replace(case, attach=lambda model: None)
    assert torch.equal(case.run(model)[0], plain.run(plain.build())[0])
    # the cache has the run before, and nothing is reused without it
    assert {step for site, step in steps_with(recording)} == set(range(STEPS))
    assert not any(module.__dict__.get("forward", module.forward).__name__ == "own" for module in model.modules())


def test_a_saved_recording_says_what_was_reused(tmp_path):
    case = HOOKS["FirstBlockCacheConfig"]
    model = case.build()
    with Scope(model).record("entropy") as recording:
        case.run(model)
    recording.save(tmp_path)
    assert Recording.load(tmp_path).reused == recording.reused
    assert recording.reused[0] == ("transformer_blocks.1.attn", 1, None)


def test_token_maps_say_which_steps_they_go_without():
    pipeline = tiny.stable_diffusion()
    options = {"cross_attention_block_skip_range": 2, "cross_attention_timestep_skip_range": (-1, 1000)}
    hooks.apply_pyramid_attention_broadcast(
        pipeline.unet, hooks.PyramidAttentionBroadcastConfig(**options, current_timestep_callback=lambda: 500)
    )
    scope = Scope(pipeline)
    crossing = {site.name for site in scope.sites if site.kind == "cross"}
    with scope.record_tokens("a red fox") as maps:
        pipeline("a red fox", num_inference_steps=3, guidance_scale=5.0, output_type="latent")
    assert set(maps.reused) == {(site, 1, "cond") for site in crossing}


@pytest.mark.full
def test_a_compiled_model_with_a_cache():
    case = HOOKS["FirstBlockCacheConfig"]
    expected = case.run(case.build())
    plain, model = case.build(), case.build()
    with Scope(plain).record("entropy") as wanted:
        case.run(plain)
    torch._dynamo.reset()
    model.compile(backend="aot_eager")
    with Scope(model).record("entropy") as recording:
        outputs = case.run(model)
    torch._dynamo.reset()
    assert apart(outputs, expected) <= 1e-5 * max(1.0, max(float(one.abs().max()) for one in expected))
    assert pairs(recording) == pairs(wanted)
    assert recording.reused == wanted.reused
