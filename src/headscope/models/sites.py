"""The attention sites of a denoiser: where they are, and which of them headscope can see."""

import inspect
from dataclasses import dataclass

from torch import nn

# what the code of a processor (or of an attention module without one) calls when its attention can be seen
VISIBLE_CALLS = frozenset({"scaled_dot_product_attention", "dispatch_attention_fn"})


@dataclass(frozen=True)
class Site:
    """One attention module of the denoiser.

    Attributes:
        name: its module path, as in `model.named_modules()`.
        kind: "self", "cross" (keys from the conditioning) or "joint" (image and text in one sequence).
        heads: the number of heads.
        head_dim: the dim of a head.
    """

    name: str
    kind: str
    heads: int
    head_dim: int


@dataclass(frozen=True)
class Unseen:
    """An attention module whose attention headscope can't see, and why."""

    name: str
    reason: str


def find_sites(denoiser: nn.Module) -> tuple[list[Site], list[Unseen]]:
    """Every module that has an attention processor, in the order of `named_modules()`."""
    sites, unseen = [], []
    for name, module in denoiser.named_modules():
        processor = getattr(module, "processor", None)
        if processor is None or not hasattr(module, "heads"):
            continue
        reason = _hidden(module, processor)
        if reason:
            unseen.append(Unseen(name, reason))
        else:
            sites.append(Site(name, _kind(module), int(module.heads), _inner_dim(module) // int(module.heads)))
    return sites, unseen


def _hidden(module: nn.Module, processor: object) -> str | None:
    """Why the attention of this module can't be seen, or None."""
    if getattr(processor, "sees_attention", False):
        return None
    called = inspect.unwrap(type(processor).__call__)
    names = getattr(called, "__code__", None)
    if names is not None and VISIBLE_CALLS & set(names.co_names):
        backend = getattr(processor, "_attention_backend", None)
        if backend is None or str(getattr(backend, "value", backend)) in ("native", "_native_math"):
            return None
        return f"{type(processor).__name__} uses the attention backend {backend}, not torch's"
    return f"{type(processor).__name__} doesn't call torch's scaled_dot_product_attention"


def _kind(module: nn.Module) -> str:
    if getattr(module, "add_k_proj", None) is not None:
        return "joint"
    return "cross" if getattr(module, "is_cross_attention", False) else "self"


def _inner_dim(module: nn.Module) -> int:
    inner = getattr(module, "inner_dim", None)
    return int(inner) if inner is not None else int(module.to_q.out_features)
