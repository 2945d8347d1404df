"""The ways to run a denoiser that are compared: as it is, with headscope, and as users see every head today."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as functional

from headscope.bench.denoisers import Denoiser
from headscope.models import Scope

STOCK = "stock SDPA"
RECORDING = "headscope, entropy at every site"
REMOVING = "headscope, a head removed per site"
MATERIALISING = "a hook that materialises attention"
NNSIGHT = "nnsight, queries and keys saved"


@dataclass(frozen=True)
class Way:
    """A way to run a denoiser.

    Attributes:
        around: a context in which the model runs that way.
        step: one denoising step; None where a step inside of `around` is it.
        calls_pipelines: whether whole pipeline calls can run that way.
    """

    around: Callable[[], AbstractContextManager[object]]
    step: Callable[[], object] | None = None
    calls_pipelines: bool = True


def ways_of(denoiser: Denoiser) -> dict[str, Way]:
    """Every way that this machine has, by name, stock first."""
    scope = Scope(denoiser.pipeline)
    first_heads = {site.name: [0] for site in scope.sites}
    ways = {
        STOCK: Way(nullcontext),
        RECORDING: Way(lambda: _recorded(scope)),
        REMOVING: Way(lambda: scope.edit(first_heads)),
        MATERIALISING: Way(_materialised),
    }
    # joint attention would need the text's projections, norms and rotary embeddings done over by hand
    plain = all(site.kind != "joint" for site in scope.sites)
    if plain and importlib.util.find_spec("nnsight") is not None:
        ways[NNSIGHT] = Way(nullcontext, _nnsight_step(denoiser, scope), calls_pipelines=False)
    return ways


@contextmanager
def _recorded(scope: Scope) -> Iterator[None]:
    """Record up to the table: the statistics are copied from the device when the context is left."""
    with scope.record("entropy") as recording:
        yield
    recording.to_arrow()


@contextmanager
def _materialised() -> Iterator[None]:
    """Entropy from the attention matrix itself, as attention stores and custom processors have it, for any model."""
    stock = functional.scaled_dot_product_attention
    entropies: list[torch.Tensor] = []

    def attention(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ) -> torch.Tensor:
        if is_causal or enable_gqa:
            raise NotImplementedError("the denoisers measured have neither causal attention nor shared key heads")
        logits = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            logits = logits + attn_mask
        probabilities = logits.softmax(-1)
        entropies.append(torch.special.entr(probabilities.float()).sum(-1).mean(-1))
        return probabilities @ value

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = stock
    torch.cat([entropy.flatten() for entropy in entropies] or [torch.zeros(0)]).tolist()


def _nnsight_step(denoiser: Denoiser, scope: Scope) -> Callable[[], object]:
    """nnsight saves the outputs of the projections; the entropy is computed from them, matrix by matrix."""
    from nnsight import NNsight  # pyright: ignore[reportMissingImports]

    wrapped = NNsight(denoiser.model)
    # nnsight wants modules in the order in which they run
    names: list[str] = []
    modules = [(site.name, denoiser.model.get_submodule(site.name)) for site in scope.sites]
    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: names.append(name)) for name, module in modules
    ]
    denoiser.step()
    for hook in hooks:
        hook.remove()
    heads = [scope.site(name).heads for name in names]

    def step() -> object:
        pairs: list = []
        with torch.inference_mode(), wrapped.trace(**denoiser.arguments):
            for name in names:
                query = wrapped.get(f"{name}.to_q").output.save()
                key = wrapped.get(f"{name}.to_k").output.save()
                pairs.append((query, key))
        entropies = []
        for (query, key), count in zip(pairs, heads, strict=True):
            query, key = (x.unflatten(-1, (count, -1)).transpose(1, 2) for x in (query, key))
            probabilities = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
            entropies.append(torch.special.entr(probabilities.float()).sum(-1).mean(-1))
        return entropies

    return step
