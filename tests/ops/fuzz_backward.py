"""Random backwards of the fuzz's calls: some gradients of some results, from cotangents of any layout and size."""

import dataclasses
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from contract import Inputs
from gradient_truth import Cotangents, leaves_of, truth, worst
from headscope.ops import GroupMass, HeadEdit, Statistic, attention

RESULTS = ("output", "entropy", "logsumexp", "group_mass")
# names of its results begin with it
PREFIX = "d "


class Backward(NamedTuple):
    """A call, the cotangents of some of its results, and the tensors whose gradients are wanted."""

    inputs: Inputs
    cotangents: Cotangents
    wanted: list[str]


def draw_backward(number: int, backend: str, inputs: Inputs) -> Backward | None:
    """The backward of the call of this number; None where all would be NaN, or no bound is known.

    Triton's products take p and ds in the inputs' own type. In float16 those below 2^-14 lose digits, and below 2^-25
    they are 0, which the bound of each element doesn't know: tests/kernels bounds these gradients by the largest.
    """
    if bool(inputs.query.isnan().any()) or (backend == "triton" and inputs.query.dtype == torch.float16):
        return None
    choice = random.Random(f"{number} {backend} backward")
    torch.manual_seed(choice.getrandbits(62))
    # fills by name are calls of their own
    fill = inputs.fill if isinstance(inputs.fill, Tensor) else None
    inputs = dataclasses.replace(inputs, fill=fill)
    names = [name for name in RESULTS if choice.random() < 0.5] if choice.random() < 0.7 else []
    names = names or ["output"]
    count = choice.choice([1, 1, 3])
    rows = (count, *inputs.query.shape[:3])
    widths = {"output": (inputs.value.shape[3],), "group_mass": (inputs.group_count,)}
    precise = inputs.query.dtype == torch.float64
    given = {}
    for name in names:
        cotangent = _cotangent(choice, (*rows, *widths.get(name, ())))
        dtype = inputs.query.dtype if name == "output" else torch.float64 if precise else torch.float32
        given[name] = cotangent.to(dtype)
    leaves = list(leaves_of(inputs))
    wanted = [name for name in leaves if choice.random() < 0.6] or [choice.choice(leaves)]
    return Backward(inputs, Cotangents(**given), wanted)


def _cotangent(choice: random.Random, shape: Sequence[int]) -> Tensor:
    """Of any size; some repeat along dimensions, as those of sums do, and some are laid out from the back."""
    size = 10 ** choice.uniform(-2.0, 2.0)
    layout = choice.choice(["contiguous", "repeated", "reversed", "one row"])
    if layout == "repeated":
        return (size * torch.randn([choice.choice([1, n]) if n else n for n in shape])).expand(shape)
    cotangent = size * torch.randn(shape)
    if layout == "one row" and shape[3]:
        row = choice.randrange(shape[3])
        cotangent *= (torch.arange(shape[3]) == row).view(1, 1, 1, -1, *[1] * (len(shape) - 4))
    if layout == "reversed":
        order = tuple(reversed(range(len(shape))))
        return cotangent.permute(order).contiguous().permute(order)
    return cotangent


def gradient_ratios(backward: Backward, backend: str) -> dict[str, float]:
    """For each gradient the largest error over its bound, and of torch's own attention where it serves the call."""
    expected = truth(backward.inputs, backward.cotangents)
    got = _gradients(backward, backend)
    found = {f"{PREFIX}{name}": worst(gradient, expected[name]) for name, gradient in got.items()}
    if _torch_serves(backward):
        # in float32: a second opinion on what is expected
        second = _gradients(backward, "torch")
        found[f"{PREFIX}torch"] = max((worst(second[name], expected[name]) for name in second), default=0.0)
    return found


def _torch_serves(backward: Backward) -> bool:
    inputs = backward.inputs
    edits = (inputs.gate, inputs.temperature, inputs.key_bias, inputs.key_scale)
    plain = all(edit is None for edit in edits) and list(backward.cotangents.given()) == ["output"]
    return plain and inputs.query.dtype == torch.float32 and inputs.key.shape[2] > 0


def _gradients(backward: Backward, backend: str) -> dict[str, Tensor]:
    inputs, cotangents = backward.inputs, backward.cotangents
    leaves = {
        name: tensor.detach().requires_grad_(name in backward.wanted) for name, tensor in leaves_of(inputs).items()
    }
    options = dict(inputs.options)
    options["attn_mask"] = leaves.get("attn_mask", options["attn_mask"])
    qkv = (leaves["query"], leaves["key"], leaves["value"])
    given = cotangents.given()
    if backend == "torch":
        results: dict[str, Tensor] = {"output": functional.scaled_dot_product_attention(*qkv, **options)}
    else:
        edits = (leaves.get(name) for name in ("gate", "fill", "temperature", "key_bias", "key_scale"))
        statistics: list[str | Statistic] = [name for name in ("entropy", "logsumexp") if name in given]
        if "group_mass" in given:
            assert inputs.groups is not None
            statistics.append(GroupMass(inputs.groups, inputs.group_count))
        result = attention(*qkv, edit=HeadEdit(*edits), statistics=statistics, backend=backend, **options)
        results = {"output": result.output, **result.statistics}
    # a result of nothing that a gradient is wanted of has none
    asked = [name for name in given if results[name].requires_grad]
    wanted = {name: leaves[name] for name in backward.wanted}
    if not asked:
        return {name: tensor.new_zeros(cotangents.count, *tensor.shape) for name, tensor in wanted.items()}
    several = cotangents.count > 1
    found = torch.autograd.grad(
        [results[name] for name in asked],
        list(wanted.values()),
        [given[name] if several else given[name][0] for name in asked],
        is_grads_batched=several,
        allow_unused=True,
        materialize_grads=True,
    )
    return {name: gradient if several else gradient[None] for name, gradient in zip(wanted, found, strict=True)}
