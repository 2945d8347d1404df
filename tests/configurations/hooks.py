"""diffusers' hooks, caches and guiders: one configuration each, and what a Scope makes of it.

An entry runs a few steps of a tiny model, once without a Scope and with every attention call noted, once inside one.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import diffusers.guiders
import diffusers.hooks
import torch
import torch.nn.functional as functional
from diffusers import guiders, hooks
from diffusers.hooks.smoothed_energy_guidance_utils import _apply_smoothed_energy_guidance_hook
from torch import Tensor, nn

from configurations import CASES
from configurations.case import normal
from configurations.examine import build
from headscope import Scope

STEPS = 4
Outcome = Literal["recorded", "reused", "refused"]

# public names that need no entry, and why
WITHOUT_HOOK_ENTRY = {
    "BaseGuidance": "what guiders are made of",
    "HookRegistry": "what hooks are kept in",
    "ModelHook": "what hooks are made of",
    "apply_context_parallel": "a Scope refuses a model that `enable_parallelism` has spread over processes",
    "apply_tensor_parallel": "a Scope refuses a model that `enable_parallelism` has spread over processes",
}


def _nothing(model: nn.Module) -> None:
    pass


@dataclass(frozen=True)
class HookCase:
    """A hook, cache or guider on a tiny model.

    Attributes:
        outcome: "recorded": every attention call is; "reused": what is computed is recorded, and what isn't is in
            `recording.reused`; "refused": recording raises.
        says: what the page says of it.
        model: the entry of CASES that it runs on.
        options: constructor arguments that differ from that entry's.
        attach: puts it on the model.
        guider: makes the guider that runs the passes; else one pass a step.
        passes: what each pass of the guider gets, by the denoiser's argument: one value per condition.
        inputs: what differs from the entry's inputs.
        named: what the refusal names.
    """

    outcome: Outcome
    says: str
    model: str = "FluxTransformer2DModel"
    options: Mapping[str, Any] = field(default_factory=lambda: {"num_layers": 2, "num_single_layers": 2})
    attach: Callable[[Any], Any] = _nothing
    guider: Callable[[], Any] | None = None
    passes: Callable[[Mapping[str, Any]], dict[str, tuple]] | None = None
    inputs: Callable[[], Mapping[str, Any]] = dict
    named: str = ""

    def build(self) -> nn.Module:
        """Random weights, the same at every call."""
        case = CASES[self.model]
        model = build(self.model, type(case)({**case.options, **self.options}, case.inputs, build=case.build))
        self.attach(model)
        return model

    @torch.inference_mode()
    def run(self, model: Any) -> list[Tensor]:
        """The output of each step; inputs and noise are the same at every call."""
        torch.manual_seed(1)
        inputs = CASES[self.model].inputs() | dict(self.inputs())
        if self.guider is not None:
            return list(self._guided(model, inputs))
        return [self._plain(model, inputs, step) for step in range(STEPS)]

    def _plain(self, model: Any, inputs: dict[str, Any], step: int) -> Tensor:
        told = {"step_index": step, "num_inference_steps": STEPS, "sigma": 1 - 0.9 * step / STEPS}
        context = model.cache_context("cond_uncond", **told) if hasattr(model, "cache_context") else nullcontext()
        with context:
            return _first(model(**inputs, return_dict=False))

    def _guided(self, model: Any, inputs: dict[str, Any]) -> Iterator[Tensor]:
        assert self.guider is not None
        guider = self.guider()
        if self.passes is not None:
            passes = self.passes(inputs)
        else:
            text = inputs["encoder_hidden_states"]
            passes = {"encoder_hidden_states": (text, normal(*text.shape))}
        for step in range(STEPS):
            guider.set_state(step=step, num_inference_steps=STEPS, timestep=torch.tensor(500))
            batches = guider.prepare_inputs(passes)
            for batch in batches:
                guider.prepare_models(model)
                own = {name: getattr(batch, name) for name in passes}
                batch.noise_pred = _first(model(**(inputs | own), return_dict=False))
                guider.cleanup_models(model)
            yield guider(batches).pred


def _first(value: Any) -> Tensor:
    while not isinstance(value, Tensor):
        value = value[0]
    return value


def _enabled(config: Callable[[], Any]) -> Callable[[Any], None]:
    return lambda model: model.enable_cache(config())


def _skip(**options: Any) -> Callable[[Any], None]:
    options = {"fqn": "transformer_blocks"} | options
    return lambda model: hooks.apply_layer_skip(model, hooks.LayerSkipConfig([1], **options))


def _guider(kind: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(guiders, kind)(**options)


def _modalities(inputs: Mapping[str, Any]) -> dict[str, tuple]:
    """With the prompt, without it, with perturbed attention, with sound and picture apart."""
    text, sound = inputs["encoder_hidden_states"], inputs["audio_encoder_hidden_states"]
    return {
        "encoder_hidden_states": (text, normal(*text.shape), text, text),
        "audio_encoder_hidden_states": (sound, normal(*sound.shape), sound, sound),
        "spatio_temporal_guidance_blocks": (None, None, [1], None),
        "isolate_modalities": (False, False, False, True),
    }


_JOINT = {"model": "CogView4Transformer2DModel", "options": {"num_layers": 3}}
_VIDEO = {"model": "CogVideoXTransformer3DModel", "options": {"num_layers": 2}}
_WAN = {"model": "WanTransformer3DModel", "options": {"num_layers": 2}}
_EVERY_PASS = "every pass of it"
_SCORES = "where scores are skipped, AttentionScoreSkipFunctionMode stands for attention; other sites are recorded"
_MODE = r"diffusers\.hooks\.layer_skip\.AttentionScoreSkipFunctionMode"

HOOKS: dict[str, HookCase] = {
    "FasterCacheConfig": HookCase(
        "reused",
        "the branch without the prompt is listed where it is estimated from the other, and attention where it is taken"
        " from the cache",
        **_VIDEO,
        attach=_enabled(
            lambda: hooks.FasterCacheConfig(
                spatial_attention_block_skip_range=2,
                spatial_attention_timestep_skip_range=(-1, 1000),
                unconditional_batch_skip_range=3,
                unconditional_batch_timestep_skip_range=(-1, 1000),
                attention_weight_callback=lambda module: 0.3,
                current_timestep_callback=lambda: 500,
                tensor_format="BFCHW",
            )
        ),
    ),
    "FirstBlockCacheConfig": HookCase(
        "reused", "the skipped blocks are listed", attach=_enabled(lambda: hooks.FirstBlockCacheConfig(threshold=1e9))
    ),
    "LayerSkipConfig": HookCase("reused", "the skipped layers are listed, in every step", attach=_skip()),
    "LayerSkipConfig, attention alone": HookCase(
        "reused",
        "the skipped attention is listed, in every step",
        **_JOINT,
        attach=_skip(skip_ff=False),
    ),
    "LayerSkipConfig, attention scores": HookCase(
        "refused",
        _SCORES,
        **_JOINT,
        attach=_skip(skip_attention=False, skip_attention_scores=True),
        named=_MODE,
    ),
    "LayerSkipConfig, dropout": HookCase(
        "recorded", "what is dropped is computed before", **_WAN, attach=_skip(fqn="blocks", dropout=0.5)
    ),
    "MagCacheConfig": HookCase(
        "reused",
        "the skipped blocks are listed",
        attach=_enabled(
            lambda: hooks.MagCacheConfig(
                num_inference_steps=STEPS, mag_ratios=torch.ones(STEPS), retention_ratio=0.25, max_skip_steps=2
            )
        ),
    ),
    "PyramidAttentionBroadcastConfig": HookCase(
        "reused",
        "attention that is broadcast is listed",
        attach=_enabled(
            lambda: hooks.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                spatial_attention_timestep_skip_range=(-1, 1000),
                current_timestep_callback=lambda: 500,
            )
        ),
    ),
    "SeaCacheConfig": HookCase(
        "reused",
        "the skipped blocks are listed",
        **_WAN,
        attach=_enabled(lambda: hooks.SeaCacheConfig(threshold=1e9)),
    ),
    "SeaCacheConfig, Cosmos3": HookCase(
        "reused",
        "the skipped decoder layers are listed",
        model="Cosmos3OmniTransformer",
        options={"num_hidden_layers": 2},
        attach=_enabled(lambda: hooks.SeaCacheConfig(threshold=1e9)),
    ),
    "SmoothedEnergyGuidanceConfig": HookCase(
        "recorded",
        "with the queries that it blurs",
        **_JOINT,
        attach=lambda model: _apply_smoothed_energy_guidance_hook(
            model, hooks.SmoothedEnergyGuidanceConfig([1], fqn="transformer_blocks"), 1.0
        ),
    ),
    "TaylorSeerCacheConfig": HookCase(
        "reused",
        "attention that is extrapolated is listed",
        attach=_enabled(lambda: hooks.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1)),
    ),
    "TaylorSeerCacheConfig, lite": HookCase(
        "reused",
        "the layers whose output is extrapolated are listed",
        attach=_enabled(
            lambda: hooks.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, use_lite_mode=True)
        ),
    ),
    "TextKVCacheConfig": HookCase(
        "recorded",
        "keys and values of the text come from the cache, and attention is computed",
        model="NucleusMoEImageTransformer2DModel",
        options={"num_layers": 2, "capacity_factors": [8.0] * 2},
        attach=_enabled(hooks.TextKVCacheConfig),
    ),
    "apply_group_offloading": HookCase(
        "recorded",
        "offloading changes nothing",
        attach=lambda model: hooks.apply_group_offloading(
            model, onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
        ),
    ),
    "apply_layerwise_casting": HookCase(
        "recorded",
        "in the type that is computed in",
        attach=lambda model: hooks.apply_layerwise_casting(model, torch.bfloat16, torch.float32),
    ),
    "apply_layerwise_casting_hook": HookCase(
        "recorded",
        "in the type that is computed in",
        attach=lambda model: hooks.apply_layerwise_casting_hook(
            model.transformer_blocks[0].attn.to_q, torch.bfloat16, torch.float32, non_blocking=False
        ),
    ),
    "AdaptiveProjectedGuidance": HookCase("recorded", _EVERY_PASS, guider=_guider("AdaptiveProjectedGuidance")),
    "AdaptiveProjectedMixGuidance": HookCase("recorded", _EVERY_PASS, guider=_guider("AdaptiveProjectedMixGuidance")),
    "AutoGuidance": HookCase(
        "recorded",
        "every pass of it; what is dropped is computed before",
        **_WAN,
        guider=_guider(
            "AutoGuidance",
            auto_guidance_config=hooks.LayerSkipConfig([1], fqn="blocks", dropout=0.5),
        ),
    ),
    "ClassifierFreeGuidance": HookCase("recorded", _EVERY_PASS, guider=_guider("ClassifierFreeGuidance")),
    "ClassifierFreeZeroStarGuidance": HookCase(
        "recorded", _EVERY_PASS, guider=_guider("ClassifierFreeZeroStarGuidance")
    ),
    "FrequencyDecoupledGuidance": HookCase(
        "recorded", _EVERY_PASS, **_JOINT, guider=_guider("FrequencyDecoupledGuidance", guidance_scales=[5.0, 3.0])
    ),
    "LTX2Guidance": HookCase(
        "reused",
        "sites that a pass perturbs or isolates are listed",
        model="LTX2VideoTransformer3DModel",
        options={"num_layers": 2},
        guider=_guider("LTX2Guidance", guidance_scale=3.0, stg_scale=1.0, modality_scale=3.0),
        passes=_modalities,
    ),
    "MagnitudeAwareGuidance": HookCase("recorded", _EVERY_PASS, guider=_guider("MagnitudeAwareGuidance")),
    "PerturbedAttentionGuidance": HookCase(
        "refused",
        _SCORES,
        **_JOINT,
        guider=_guider(
            "PerturbedAttentionGuidance",
            perturbed_guidance_config=hooks.LayerSkipConfig(
                [1], fqn="transformer_blocks", skip_attention=False, skip_attention_scores=True, skip_ff=False
            ),
            perturbed_guidance_start=0.0,
            perturbed_guidance_stop=1.0,
        ),
        named=_MODE,
    ),
    "SkipLayerGuidance": HookCase(
        "reused",
        "the layers that a pass goes without are listed",
        **_JOINT,
        guider=_guider(
            "SkipLayerGuidance",
            skip_layer_config=hooks.LayerSkipConfig([1], fqn="transformer_blocks"),
            skip_layer_guidance_start=0.0,
            skip_layer_guidance_stop=1.0,
        ),
    ),
    "SmoothedEnergyGuidance": HookCase(
        "recorded",
        "with the queries that it blurs",
        **_JOINT,
        guider=_guider(
            "SmoothedEnergyGuidance",
            seg_guidance_config=[hooks.SmoothedEnergyGuidanceConfig([1], fqn="transformer_blocks")],
            seg_blur_sigma=1.0,
        ),
    ),
    "TangentialClassifierFreeGuidance": HookCase(
        "recorded", _EVERY_PASS, guider=_guider("TangentialClassifierFreeGuidance")
    ),
}


def public_names() -> set[str]:
    """The public classes of diffusers' hooks and guiders, and the functions that put on a hook without a class."""
    found: set[str] = set()
    for module in (diffusers.hooks, diffusers.guiders):
        own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        classes = {name for name, value in own.items() if inspect.isclass(value)}
        configured = {name.removesuffix("Config").lower() for name in classes}
        found |= classes
        found |= {
            name
            for name, value in own.items()
            if name.startswith("apply_") and name.removeprefix("apply_").replace("_", "") not in configured
        }
    return found


@dataclass
class Noted:
    """The attention of a run without a Scope: how often, at (site, number of the forward)."""

    calls: Counter[tuple[str, int]]
    forwards: int


@contextmanager
def noted(model: nn.Module, sites: Sequence[str]) -> Iterator[Noted]:
    """Every attention call of the model, by hand."""
    found = Noted(Counter(), 0)
    running: list[str] = []
    stock = functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        if running:
            found.calls[running[-1], found.forwards - 1] += 1
        return stock(*args, **kwargs)

    def begin(module: nn.Module, args: tuple) -> None:
        found.forwards += 1

    def enter(name: str) -> Callable[..., None]:
        return lambda module, args: running.append(name)

    handles = [model.register_forward_pre_hook(begin)]
    for name in sites:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(lambda *_: running.pop() and None, always_call=True))
    functional.scaled_dot_product_attention = spy
    try:
        yield found
    finally:
        functional.scaled_dot_product_attention = stock
        for handle in handles:
            handle.remove()


def names_of_sites(model: nn.Module) -> list[str]:
    return [site.name for site in Scope(model).sites]
