"""The gradients of attention in float64, and what float32 arithmetic may make of them.

The values are autograd's, of the formula written out below: no code of the library takes part. A gradient is a sum, and
may err by a part of the sum of its terms' sizes, so that what cancels hides nothing; the part is some units for the
terms themselves, and for probabilities what their logits may be off by.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from contract import FINFO_MIN, Inputs
from definitions import for_every_head, softmax
from rounding import UNIT, smallest_step


@dataclass(frozen=True)
class Cotangents:
    """Cotangents of a call's results, each with a dimension of several in front; None is 0.

    Attributes:
        output: [cotangents, batch, heads, queries, dim_v], in query's dtype.
        entropy, logsumexp: [cotangents, batch, heads, queries], float32.
        group_mass: [cotangents, batch, heads, queries, groups], float32; of the groups of the call's inputs.
    """

    output: Tensor | None = None
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None
    group_mass: Tensor | None = None

    def given(self) -> dict[str, Tensor]:
        """Those that aren't None, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    @property
    def count(self) -> int:
        return len(next(iter(self.given().values())))

    def only(self, index: int) -> "Cotangents":
        """One of the several, still with a dimension in front."""
        return Cotangents(**{name: tensor[index : index + 1] for name, tensor in self.given().items()})


def random_cotangents(inputs: Inputs, count: int, names: Collection[str] = ("output", "entropy", "logsumexp")):
    """Normal ones, in the dtypes that the operator has."""
    rows = (count, *inputs.query.shape[:3])
    widths = {"output": (inputs.value.shape[3],), "group_mass": (inputs.group_count,)}
    found = {name: torch.randn(*rows, *widths.get(name, ())) for name in names}
    if "output" in found:
        found["output"] = found["output"].to(inputs.query.dtype)
    return Cotangents(**found)


class Gradient(NamedTuple):
    """A gradient with a dimension of cotangents in front, and what it may err by."""

    value: Tensor
    tolerance: Tensor


def leaves_of(inputs: Inputs) -> dict[str, Tensor]:
    """Everything of a call that has a gradient, by name."""
    mask = inputs.options["attn_mask"]
    tensors = {
        "query": inputs.query,
        "key": inputs.key,
        "value": inputs.value,
        "attn_mask": None if mask is None or mask.dtype == torch.bool else mask,
        "gate": inputs.gate,
        "fill": inputs.fill if isinstance(inputs.fill, Tensor) else None,
        "temperature": inputs.temperature,
        "key_bias": inputs.key_bias,
        "key_scale": inputs.key_scale,
    }
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def truth(inputs: Inputs, cotangents: Cotangents, weights_rounded: float | None = None) -> dict[str, Gradient]:
    """Every gradient of a call whose fill is None or a tensor.

    Args:
        weights_rounded: what p and the logits' gradients may be rounded by, of their size, where they meet other
            factors; None: by the inputs' dtype, as products of its numbers have it.
    """
    leaves = {name: tensor.double().requires_grad_() for name, tensor in leaves_of(inputs).items()}
    formula = _Formula(inputs, leaves)
    results = formula.results()
    values: dict[str, list[Tensor]] = {name: [] for name in leaves}
    for index in range(cotangents.count):
        given = {name: tensor[index].double() for name, tensor in cotangents.given().items()}
        # a row without keys has a constant logsumexp
        pairs = [(results[name], given[name]) for name in given if results[name].requires_grad]
        found = torch.autograd.grad(
            [result for result, _ in pairs],
            list(leaves.values()),
            [cotangent for _, cotangent in pairs],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        for name, gradient in zip(leaves, found, strict=True):
            values[name].append(gradient)
    with torch.no_grad():
        bounds = _Bounds(formula, cotangents, weights_rounded)
        tolerances = [bounds.tolerances(index) for index in range(cotangents.count)]
    gradients = {}
    for name, tensor in leaves_of(inputs).items():
        value = torch.stack(values[name]).detach()
        tolerance = torch.stack([each[name] for each in tolerances])
        # stored in the tensor's own dtype, perhaps by way of float32
        stored = torch.finfo(tensor.dtype).eps * value.abs() + smallest_step(tensor.dtype)
        gradients[name] = Gradient(value, tolerance + stored)
    return gradients


class _Formula:
    """The forward in float64, with all that it comes by."""

    def __init__(self, inputs: Inputs, leaves: dict[str, Tensor]):
        self.inputs, self.leaves = inputs, leaves
        query, heads = leaves["query"], inputs.query.shape[1]
        self.key, self.value = (for_every_head(leaves[name], heads) for name in ("key", "value"))
        scale = inputs.options.get("scale")
        scale = max(1, query.shape[-1]) ** -0.5 if scale is None else scale
        temperature = leaves.get("temperature")
        self.scale = torch.full((1, 1, 1, 1), scale, dtype=torch.float64)
        if temperature is not None:
            self.scale = scale / temperature[..., None, None]
        products = self.scale * (query @ self.key.mT)
        allowed = torch.ones(products.shape, dtype=torch.bool)
        added = torch.zeros_like(products)
        if inputs.options.get("is_causal", False):
            allowed = allowed.tril()
        mask = inputs.options["attn_mask"]
        if mask is not None and mask.dtype == torch.bool:
            allowed = allowed & mask
        elif mask is not None:
            allowed = allowed & (mask != -math.inf)
            added = added + leaves["attn_mask"]
        if "key_bias" in leaves:
            bias = leaves["key_bias"][:, :, None]
            allowed, added = allowed & (bias != -math.inf), added + bias
        # in float32 the lowest number swallows what is added to it, but not its gradient
        lowest = allowed & (added < 0.5 * FINFO_MIN)
        logits = products + added
        logits = torch.where(lowest, logits - logits.detach() + FINFO_MIN, logits)
        self.logits = torch.where(allowed, logits, -math.inf)
        self.probabilities = softmax(self.logits)
        # what a logit's terms come to in size, 0 where it has none that count
        reach = self.scale.abs() * query.norm(dim=-1, keepdim=True) * self.key.norm(dim=-1, keepdim=True).mT
        self.reach = torch.where(allowed & ~lowest, reach + added.abs(), 0.0).detach()
        weights = self.probabilities
        if "key_scale" in leaves:
            weights = weights * leaves["key_scale"][:, :, None]
        self.attention = weights @ self.value

    def results(self) -> dict[str, Tensor]:
        """The output and every differentiable statistic."""
        gate, output = self.leaves.get("gate"), self.attention
        if gate is not None:
            fill = self.leaves.get("fill", torch.zeros(()).double())
            output = fill + gate[..., None, None] * (output - fill)
        p = self.probabilities
        logarithms = torch.where(p == 0, 1.0, p).log()
        dead = (self.logits == -math.inf).all(-1, keepdim=True)
        finite = torch.where(dead, 0.0, self.logits)
        # relative to the largest: beside the lowest float the logarithm would vanish, and torch's own gradient with it
        largest = finite.detach().amax(-1, keepdim=True) if p.shape[-1] else finite.sum(-1, keepdim=True)
        logsumexp = (finite - largest).exp().sum(-1).log()
        found = {
            "output": output,
            "entropy": -(p * logarithms).sum(-1),
            "logsumexp": torch.where(dead[..., 0], 0.0, logsumexp),
        }
        if self.inputs.groups is not None:
            found["group_mass"] = p @ self.members()
        return found

    def members(self) -> Tensor:
        """[batch, heads or 1, keys, groups]: 1 where a key is in a group."""
        ids = self.inputs.groups
        assert ids is not None
        ids = ids if ids.ndim == 3 else ids[:, None]
        return (ids[..., None] == torch.arange(self.inputs.group_count)).double()


class _Bounds:
    """What the gradients of a call may err by, from the sizes of all that is summed."""

    def __init__(self, formula: _Formula, cotangents: Cotangents, weights_rounded: float | None):
        self.formula, self.cotangents = formula, cotangents
        dtype = formula.inputs.query.dtype
        self.rounded = torch.finfo(dtype).eps / 2
        unit = 2.0**-53 if dtype == torch.float64 else UNIT
        if weights_rounded is None:
            weights_rounded = self.rounded
        queries, keys = formula.logits.shape[-2:]
        dim = formula.inputs.query.shape[-1]
        # both factors of a product may be rounded, and what a further sum makes of it
        own = 3 * weights_rounded + unit * (8 + math.sqrt(queries * formula.logits.shape[1] + keys + dim))
        largest = formula.reach.amax(-1, keepdim=True) if keys else torch.zeros(())
        # a logit errs as tests/contract.py has it, and a second time where the backward sums in another order
        self.part = own + torch.expm1(2 * unit * (2 + math.sqrt(dim)) * largest)
        # the deltas take the attention as it was stored
        self.stored = self.rounded if self.rounded > unit else 0.0

    def tolerances(self, index: int) -> dict[str, Tensor]:
        formula, leaves = self.formula, self.formula.leaves
        p, scale = formula.probabilities, formula.scale.abs()
        given = {name: tensor[index].double().abs() for name, tensor in self.cotangents.given().items()}
        gate = leaves["gate"].abs()[..., None, None] if "gate" in leaves else torch.ones(1, 1, 1, 1).double()
        key_scale = leaves["key_scale"].abs()[:, :, None] if "key_scale" in leaves else torch.ones(1, 1, 1, 1).double()
        statistics = torch.zeros_like(p)
        if "entropy" in given:
            # a logarithm errs as its logit does
            statistics += (1.0 - torch.where(p == 0, 1.0, p).log()) * given["entropy"][..., None]
        if "group_mass" in given:
            statistics += given["group_mass"] @ formula.members().mT
        constant = (p * statistics).sum(-1, keepdim=True)
        if "logsumexp" in given:
            constant = constant + given["logsumexp"][..., None]
        output = given.get("output", torch.zeros_like(formula.attention))
        products = output @ formula.value.abs().mT
        along = output * formula.attention.abs()
        delta = gate * along.sum(-1, keepdim=True)
        # what is below the smallest normal number may come to nothing: p itself, and the logits' gradients
        least = torch.where(formula.logits == -math.inf, 0.0, torch.finfo(torch.float32).smallest_normal)
        gradients = key_scale * gate * products + statistics + delta + constant
        logits = (self.part * p + least) * gradients + 2 * self.stored * p * delta + least
        weights = (self.part * p + least) * gate
        # and so may each product of a sum
        lost = least.expand(p.shape)
        query = scale * (logits @ formula.key.abs() + lost.sum(-1, keepdim=True))
        rows = leaves["query"].abs()
        found = {
            "query": query,
            "key": self._of_kv_heads((scale * logits).mT @ rows + (scale * lost).sum(-2)[..., None]),
            "value": self._of_kv_heads((weights * key_scale + least).mT @ output + lost.sum(-2)[..., None]),
        }
        if "attn_mask" in leaves:
            found["attn_mask"] = logits.sum_to_size(leaves["attn_mask"].shape)
        if "gate" in leaves:
            fill = output * leaves["fill"].abs() if "fill" in leaves else torch.zeros(())
            by_row = ((self.part + self.stored) * along + 8 * UNIT * fill).sum((-1, -2))
            found["gate"] = by_row.sum_to_size(leaves["gate"].shape)
        if "fill" in leaves:
            found["fill"] = (4 * self.rounded * (1 + gate) * output).sum_to_size(leaves["fill"].shape)
        if "temperature" in leaves:
            by_head = (query * rows).sum((-1, -2)) / leaves["temperature"].abs()
            found["temperature"] = by_head.sum_to_size(leaves["temperature"].shape)
        if "key_bias" in leaves:
            found["key_bias"] = logits.sum(-2).sum_to_size(leaves["key_bias"].shape)
        if "key_scale" in leaves:
            found["key_scale"] = (weights * products).sum(-2).sum_to_size(leaves["key_scale"].shape)
        return found

    def _of_kv_heads(self, tensor: Tensor) -> Tensor:
        """Summed over the heads that share keys."""
        kv_heads = self.formula.leaves["key"].shape[1]
        return tensor.unflatten(1, (kv_heads, -1)).sum(2) if kv_heads != tensor.shape[1] else tensor


def worst(got: Tensor, expected: Gradient) -> float:
    """The largest error over what is allowed, infinite for a NaN; what its dtype can't hold isn't looked at."""
    largest = torch.finfo(got.dtype).max
    held = expected.value.abs() + expected.tolerance < largest
    error = torch.where(held, got.double() - expected.value, 0.0).abs()
    ratios = error / expected.tolerance
    return float(ratios.nan_to_num(math.inf).max()) if ratios.numel() else 0.0
