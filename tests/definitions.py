"""The operator's definitions in float64, row by row: shares no code with the library.

Tensors are as the operator takes them, with any number of key heads; tests/contract.py says what a result may err by.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

FINFO_MIN = torch.finfo(torch.float32).min


class Scores(NamedTuple):
    """Attention's logits and probabilities [batch, heads, queries, keys], and their parts.

    Attributes:
        allowed: True where a query may attend to a key.
        added: mask and key_bias, 0 where a key isn't allowed.
        sizes: the sum of their absolute values, which broadcasts.
    """

    logits: Tensor
    probabilities: Tensor
    allowed: Tensor
    added: Tensor
    sizes: Tensor


def for_every_head(tensor: Tensor, heads: int) -> Tensor:
    """key or value in float64, repeated for the heads that share one."""
    return tensor.double().repeat_interleave(heads // max(1, tensor.shape[1]), 1)


def scale_of(scale: float | None, dim: int, temperature: Tensor | None) -> Tensor | float:
    """The factor of query . key, 1 / sqrt(dim) over the temperature by default."""
    scale = 1 / math.sqrt(dim) if scale is None else scale
    return scale if temperature is None else scale / temperature.double()[..., None, None]


def scores(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None,
    temperature: Tensor | None,
    key_bias: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> Scores:
    """softmax(scale / temperature * query . key + key_bias + mask); rows without a key are 0."""
    factor = scale_of(scale, query.shape[-1], temperature)
    products = factor * torch.einsum("bhqd,bhkd->bhqk", query.double(), for_every_head(key, query.shape[1]))
    allowed, added = _mask_parts(attn_mask, is_causal, products)
    # all that is added on the way, whatever it comes to
    sizes = torch.where(added > 0.5 * FINFO_MIN, added.abs(), 0.0)
    if key_bias is not None:
        bias = key_bias.double()[:, :, None]
        allowed = allowed & (bias != -math.inf)
        bias = torch.where(bias == -math.inf, 0.0, bias)
        sizes = sizes + bias.abs()
        # beside the lowest float a bias vanishes as well
        added = torch.where(added > 0.5 * FINFO_MIN, added + bias, added)
    logits = torch.where(allowed, products + added, -math.inf)
    return Scores(logits, softmax(logits), allowed, added, sizes)


def _mask_parts(mask: Tensor | None, is_causal: bool, products: Tensor) -> tuple[Tensor, Tensor]:
    allowed = torch.ones(products.shape, dtype=torch.bool, device=products.device)
    if is_causal:
        allowed = allowed.tril()
    if mask is None:
        return allowed, torch.zeros_like(products)
    if mask.dtype == torch.bool:
        return mask.expand(products.shape), torch.zeros_like(products)
    mask = mask.expand(products.shape)
    # torch adds in float32, where finfo.min swallows the logit: a row of it is uniform
    products[(mask == FINFO_MIN) & ~products.isnan()] = 0.0
    return mask != -math.inf, torch.where(mask == -math.inf, 0.0, mask).double()


def softmax(logits: Tensor) -> Tensor:
    """The softmax of each row, 0 where all are -inf."""
    if not logits.shape[-1]:
        return logits
    dead = (logits == -math.inf).all(-1, keepdim=True)
    return torch.where(dead, 0.0, torch.softmax(torch.where(dead, 0.0, logits), -1))


def blended(attention: Tensor, gate: Tensor | None, fill: Tensor) -> Tensor:
    """gate * attention + (1 - gate) * fill; a gate of exactly 0 or 1 selects."""
    if gate is None:
        return attention
    gate = gate.double()[..., None, None]
    mixed = gate * attention + (1 - gate) * fill
    return torch.where(gate == 1, attention, torch.where(gate == 0, fill, mixed))


def _extreme(values: Tensor, without_keys: float) -> Tensor:
    return values.amax(-1) if values.shape[-1] else values.new_full(values.shape[:-1], without_keys)


def _collision_entropy(logits: Tensor, probabilities: Tensor) -> Tensor:
    dead = (logits == -math.inf).all(-1)
    return torch.where(dead, 0.0, -probabilities.square().sum(-1).log())


# statistics without arguments that have a number for each row: from logits and probabilities
ROWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "entropy": lambda logits, probabilities: torch.special.entr(probabilities).sum(-1),
    "logsumexp": lambda logits, probabilities: torch.logsumexp(logits, -1),
    "max_logit": lambda logits, probabilities: _extreme(logits, -math.inf),
    "max_prob": lambda logits, probabilities: _extreme(probabilities, 0.0),
    "collision_entropy": _collision_entropy,
}


def key_mass(probabilities: Tensor) -> Tensor:
    """[batch, heads, keys]."""
    return probabilities.sum(-2)


def distance(probabilities: Tensor, width: int, key_width: int) -> Tensor:
    """The mean distance of keys from their query, on grids of these widths."""
    queries, keys = probabilities.shape[-2:]
    apart = _positions(queries, width)[:, None] - _positions(keys, key_width)
    return (probabilities * apart.norm(dim=-1).to(probabilities.device)).sum(-1)


def _positions(count: int, width: int) -> Tensor:
    return torch.stack([torch.arange(count) // width, torch.arange(count) % width], -1).double()


def groups(probabilities: Tensor, ids: Tensor, numbers: Iterable[int], least: float) -> tuple[Tensor, Tensor]:
    """The mass and the entropy of each group of keys, [batch, heads, queries, groups].

    Args:
        ids: the group of each key, [batch or 1, heads or 1, keys].
        numbers: the groups.
        least: a weight below this part of its row's largest counts as nothing.
    """
    largest = _extreme(probabilities, 0.0)[..., None]
    unknown = probabilities.isnan().any(-1, keepdim=True)
    masses, entropies = [], []
    for number in numbers:
        seen = (ids == number)[:, :, None] & ~(probabilities < least * largest)
        own = torch.where(unknown, math.nan, torch.where(seen, probabilities, 0.0))
        mass = own.sum(-1)
        masses.append(mass)
        share = own / torch.where(mass == 0, 1.0, mass)[..., None]
        entropies.append(torch.special.entr(share).sum(-1))
    return torch.stack(masses, -1), torch.stack(entropies, -1)
