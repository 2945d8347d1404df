"""Gradients of the contract's cases, through any backend."""

import math

import torch
import torch.nn.functional as functional
from torch import Tensor

from contract import CASES, Inputs
from gradient_truth import leaves_of
from headscope.ops import GroupMass, HeadEdit, Statistic, attention

DIFFERENTIABLE = ("entropy", "logsumexp")


def _leaves(inputs: Inputs) -> dict[str, Tensor]:
    """Every tensor of a case that gradients flow into, requiring them."""
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in leaves_of(inputs).items()}


def gradients_of(inputs: Inputs, backend: str, *, statistics: bool = True) -> dict[str, Tensor]:
    """Gradients of a random sum of the output and, if asked, of all differentiable statistics; "torch" is its SDPA."""
    leaves = _leaves(inputs)
    options = dict(inputs.options)
    if "attn_mask" in leaves:
        options["attn_mask"] = leaves["attn_mask"]
    edit = HeadEdit(
        leaves.get("gate"),
        leaves.get("fill", inputs.fill),  # type: ignore[arg-type]
        leaves.get("temperature"),
        leaves.get("key_bias"),
        leaves.get("key_scale"),
    )
    qkv = (leaves["query"], leaves["key"], leaves["value"])
    if backend == "torch":
        outputs = [functional.scaled_dot_product_attention(*qkv, **options)]
    else:
        asked: list[str | Statistic] = [*DIFFERENTIABLE] if statistics else []
        if statistics and inputs.groups is not None:
            asked.append(GroupMass(inputs.groups, inputs.group_count))
        result = attention(*qkv, edit=edit, statistics=asked, backend=backend, **options)
        outputs = [result.output, *result.statistics.values()]
    torch.manual_seed(3)
    total = torch.zeros((), dtype=torch.float64, device=inputs.query.device)
    for output in outputs:
        weights = torch.randn(output.shape, dtype=torch.float64).to(output.device)
        # the logsumexp of a row without keys
        finite = output != -math.inf
        total = total + (torch.where(finite, weights, 0) * torch.where(finite, output.double(), 0)).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {name: grad for name, grad in zip(leaves, found, strict=True) if grad is not None}


# NaN has no gradient to compare, nor have logits of 1e4; float64 doesn't swallow a logit beside finfo.min
COMPARABLE = [case for case in CASES if case.name not in ("nan_row", "extreme_logits", "finfo_min_row")]
