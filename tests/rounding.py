"""How far float32 arithmetic may take attention from its value: tolerances that no library's own error enters.

Each operation rounds its result by at most UNIT of it. Roundings are taken as independent and centred: those of sizes
a_1, a_2, ... UNIT sum to more than CERTAINTY * UNIT * sqrt(sum a^2) with a chance below 2 exp(-CERTAINTY^2 / 2)
(Hoeffding's inequality), 3e-8. The order of a sum and whether products are fused into it don't matter: in an order that
doesn't know its n terms x, a sum s passes n partial sums of s^2 / 3 + |x|^2 / 6 each in the mean square (a random walk
that ends in s). One order's may be larger by a factor, which is made up for by how loose the inequality is: for
roundings that are spread evenly CERTAINTY is ten standard deviations. Trees have fewer and smaller partial sums.

What all keys of a row share, such as a rounded scale, isn't independent, and is added as it is.
"""

import torch
from torch import Tensor

UNIT = 2.0**-24
CERTAINTY = 6.0


def sum_variance(total: Tensor, squares: Tensor, terms: int) -> Tensor:
    """The variance, in UNIT^2, of sums of `terms` products: their values, and the sums of their squares."""
    # each product rounds, and so does one of its factors
    return terms * total.square() / 3 + (terms / 6 + 2) * squares


def attention_tolerance(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    multiplier: Tensor | float,
    added: Tensor,
    logits: Tensor,
    probabilities: Tensor,
    key_scale: Tensor | float,
    dtype: torch.dtype,
) -> Tensor:
    """What the output may err by before gate and fill, [batch, heads, queries, dim_v]; of float64 inputs, in float64.

    Args:
        query, key, value: float64, with as many heads each.
        multiplier: scale / temperature, broadcastable to [batch, heads, queries, keys].
        added: |key_bias| + |mask|, finite, and broadcastable likewise.
        logits, probabilities: [batch, heads, queries, keys], float64, -inf and 0 where masked.
        key_scale: broadcastable to the same.
        dtype: of the inputs: that of the weights where they meet the values, and of the output.
    """
    if not logits.shape[-1]:
        return torch.zeros_like(query[..., :1]).expand(*query.shape[:3], value.shape[3])
    products = query @ key.mT * multiplier
    squares = query.square() @ key.square().mT * (torch.as_tensor(multiplier) ** 2)
    # beside the lowest float everything else vanishes, without a rounding
    counts = logits > 0.5 * torch.finfo(torch.float32).min
    logits = torch.where(counts, logits, 0.0)
    highest = logits.amax(-1, keepdim=True)
    # the product; its temperature and its conversion to base 2; bias and mask; the maximum's offset; the power itself
    variance = sum_variance(products, squares, query.shape[-1]) + 2 * products.square()
    variance += 2 * (products.abs() + added).square()
    variance += highest.square() + (highest - logits).square() + 4
    variance = torch.where(counts, variance, 4.0)
    weighted = probabilities * key_scale
    output = weighted @ value
    # logits that err by e change the output by sum p e (key_scale value - output)
    spread = probabilities.square() * variance
    total = (spread * key_scale * key_scale) @ value.square()
    total = total - 2 * output * ((spread * key_scale) @ value) + output.square() * spread.sum(-1, keepdim=True)
    terms = logits.shape[-1]
    parts = weighted.square() @ value.square()
    total = total.clamp(min=0) + sum_variance(output, parts, terms)
    # the normaliser is a sum of positive terms
    total = total + (terms / 2 + 2) * output.square()
    unit = 2.0**-53 if dtype == torch.float64 else UNIT
    rounded = torch.finfo(dtype).eps / 2 / unit
    if rounded > 1:
        total = total + rounded**2 * parts
    # a scale that is off by one unit, or two with a temperature or another base
    shared = torch.where(counts, products, 0.0) * probabilities
    shared = ((shared * key_scale) @ value - output * shared.sum(-1, keepdim=True)).abs()
    # the output's own rounding, twice: weights and outputs that are truncated lose up to a whole unit each
    error = unit * (CERTAINTY * total.sqrt() + 3 * shared + 4 * rounded * output.abs())
    return error + smallest_step(dtype)


def smallest_step(dtype: torch.dtype) -> float:
    """What a result near 0 may be off by: float16's distance from 0 to the next number, and what others flush to 0."""
    limits = torch.finfo(dtype)
    return max(limits.smallest_normal * limits.eps, torch.finfo(torch.float32).smallest_normal)


def blend_tolerance(
    attention: Tensor,
    attention_error: Tensor,
    gate: Tensor,
    fill: Tensor,
    fill_error: Tensor | float,
    dtype: torch.dtype,
) -> Tensor:
    """What gate * attention + (1 - gate) * fill may err by, where attention and fill do; 0 and 1 select."""
    rounded, step = 2 * torch.finfo(dtype).eps, smallest_step(dtype)
    kept, filled = gate != 0, gate != 1
    error = torch.where(kept, gate.abs() * (attention_error + rounded * attention.abs()), 0.0)
    return step + error + torch.where(filled, (1 - gate).abs() * (fill_error + rounded * fill.abs()), 0.0)
