"""A pipeline that is already in memory, instead of a directory: what it is, and lending it out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from headscope.models.hooks.wrapping import is_bracketed
from headscope.models.structure.sites import find_denoiser

# what PEFT decides by at run time and keeps out of the weights
_ADAPTER = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CAPTURING = "transformers.utils.output_capturing"


def modules_of(pipeline: Any) -> dict[str, nn.Module]:
    """A pipeline's modules by the names it gives them, sorted."""
    return {
        name: component for name, component in sorted(pipeline.components.items()) if isinstance(component, nn.Module)
    }


def check_pipeline(pipeline: Any) -> None:
    """A run is told from others by its model's weights, classes and settings: nothing else may decide what it computes.

    Raises:
        TypeError: not a diffusers pipeline.
        ValueError: a module has hooks, a forward of its own, is compiled, or inside a Scope context.
    """
    if not isinstance(getattr(pipeline, "components", None), dict):
        raise TypeError(
            f"model: got {type(pipeline).__name__}, expected a bundled model's name, a directory with a diffusers"
            " pipeline, or such a pipeline"
        )
    for part, component in modules_of(pipeline).items():
        for name, module in component.named_modules():
            where = f"{part}.{name}" if name else part
            if is_bracketed(module):
                raise ValueError(f"model: {where} is inside a headscope.Scope context; leave it, a sweep has its own")
            if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
                raise ValueError(f"model: {where} is compiled; pass the model as it was, with compile=True if need be")
            if "forward" in vars(module) or _has_hooks(module):
                raise ValueError(
                    f"model: {where} has hooks or a forward of its own, and a run could not be told from one without"
                    " them; remove them (of accelerate: pipeline.remove_all_hooks())"
                )


def _has_hooks(module: nn.Module) -> bool:
    """True if it has any but those with which text encoders, once they have run, hand out their layers' outputs."""
    hooks = [hook for kind in _HOOKS for hook in (getattr(module, kind, None) or {}).values()]
    return any(getattr(hook, "__module__", None) != _CAPTURING for hook in hooks)


def structure(pipeline: Any) -> str:
    """sha256 over every module's place, class and plain settings, in which models of the same weights may differ."""
    digest = hashlib.sha256()
    for part, component in modules_of(pipeline).items():
        for name, module in component.named_modules():
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            settings = {key: value for key, value in vars(module).items() if key[0] != "_" and _is_plain(value)}
            # how parts are run, which sweeps set themselves
            settings.pop("training", None)
            settings |= {key: repr(getattr(module, key)) for key in _ADAPTER if hasattr(module, key)}
            processor = _processor(getattr(module, "processor", None))
            digest.update(json.dumps([part, name, kind, settings, processor], sort_keys=True).encode())
    return digest.hexdigest()


def _processor(processor: Any) -> list[Any]:
    """An attention processor's class and what it holds; modules among them are the model's, with weights."""
    kind = f"{type(processor).__module__}.{type(processor).__qualname__}"
    held = {} if isinstance(processor, nn.Module) else getattr(processor, "__dict__", {})
    return [kind, {key: _content(value) for key, value in held.items()}]


def _content(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        return [str(value.dtype), list(value.shape), hashlib.sha256(data).hexdigest()]
    # of objects that say no more than where they lie in memory the class
    return value if _is_plain(value) else f"{type(value).__module__}.{type(value).__qualname__}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, (bool, int, float, str))


@contextmanager
def borrowed(pipeline: Any) -> Iterator[None]:
    """Inside, a sweep may set the pipeline's modules as it likes: modes, gradients and memory formats come back."""
    modules = [module for component in modules_of(pipeline).values() for module in component.modules()]
    modes = [(module, module.training) for module in modules]
    parameters = [parameter for component in modules_of(pipeline).values() for parameter in component.parameters()]
    layouts = [(parameter, parameter.requires_grad, parameter.stride()) for parameter in parameters]
    bar = dict(getattr(pipeline, "_progress_bar_config", {}))
    denoiser = find_denoiser(pipeline)
    try:
        yield
    finally:
        # nothing of either kind was there: `check_pipeline`
        denoiser.__dict__.pop("forward", None)
        denoiser._compiled_call_impl = None
        for module, training in modes:
            module.training = training
        for parameter, needs_gradient, stride in layouts:
            parameter.requires_grad_(needs_gradient)
            if parameter.stride() != stride:
                laid_out = torch.empty_strided(parameter.shape, stride, dtype=parameter.dtype, device=parameter.device)
                parameter.data = laid_out.copy_(parameter.data)
        pipeline.set_progress_bar_config(**bar)
