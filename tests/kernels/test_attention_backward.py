"""The backward kernels against float64 autograd of a formula written apart from them, interpreted or on a GPU.

What the forward saves comes from the same formula, rounded to float32, so nothing here needs the forward kernel.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from headscope_kernels.attention import STATISTICS, BoundStatistic, attention_forward
from headscope_kernels.attention.backward import passes
from headscope_kernels.attention.backward.configs import BackwardConfiguration, BackwardConfigurations, query_splits
from headscope_kernels.attention.backward.launch import attention_backward
from headscope_kernels.attention.backward.passes import DIFFERENTIABLE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FINFO_MIN = torch.finfo(torch.float32).min
GROUPS = 5
# what rounding probabilities, their gradients, sums and results may add up to, of the largest gradient; the interpreter
# truncates to bfloat16, which doubles all of it and makes it one-sided
FLOOR = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 4e-2 if DEVICE == "cpu" else 1.6e-2}
COTANGENTS = ("output", "entropy", "logsumexp", "group_mass")


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch: pytest.MonkeyPatch):
    """Whatever is allocated without being filled holds NaN: a kernel that leaves a hole is found out."""
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def poisoned(*arguments: Any, allocate: Callable[..., Tensor] = allocate, **keywords: Any) -> Tensor:
            tensor = allocate(*arguments, **keywords)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, poisoned)


def test_interpreter_or_gpu():
    """Everything below needs one; without this check it would fail with an error about devices."""
    assert DEVICE == "cuda" or triton.knobs.runtime.interpret, "without a GPU these tests need TRITON_INTERPRET=1"


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


@dataclass
class Problem:
    """Inputs and cotangents of one call; the defaults are an unmasked self-attention with an output's gradient."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    gate: Tensor | None = None
    fill: Tensor | None = None
    temperature: Tensor | None = None
    key_bias: Tensor | None = None
    key_scale: Tensor | None = None
    cotangents: tuple[str, ...] = ("output",)
    grads: dict[str, Tensor] = field(default_factory=dict)

    @property
    def scale_(self) -> float:
        return self.query.shape[3] ** -0.5 if self.scale is None else self.scale

    def inputs(self) -> dict[str, Tensor]:
        """What there is to differentiate."""
        tensors = {name: getattr(self, name) for name in DIFFERENTIABLE}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None and tensor.is_floating_point()}

    def groups(self) -> Tensor:
        """Every key's group, some of them in none."""
        keys = self.key.shape[2]
        return (torch.arange(keys, device=DEVICE, dtype=torch.int32) * 7 % (GROUPS + 1) - 1).view(1, 1, keys)

    def cotangent(self, name: str) -> Tensor:
        batch, heads, queries, _ = self.query.shape
        if name not in self.grads:
            if name == "output":
                self.grads[name] = normal(batch, heads, queries, self.value.shape[3], dtype=self.query.dtype, seed=11)
            elif name == "group_mass":
                self.grads[name] = normal(batch, heads, queries, GROUPS, seed=12)
            else:
                self.grads[name] = normal(batch, heads, queries, seed=13 + len(name))
        return self.grads[name]

    def formula(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Everything that the operator computes, and its inputs' leaves, all in float64."""
        dtype = torch.float64
        leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in self.inputs().items()}
        heads = self.query.shape[1]
        group = heads // self.key.shape[1]
        key, value = leaves["key"].repeat_interleave(group, 1), leaves["value"].repeat_interleave(group, 1)
        keys = key.shape[2]
        logits = leaves["query"] @ key.mT * self.scale_
        if self.temperature is not None:
            logits = logits / leaves["temperature"][..., None, None]
        if self.key_bias is not None:
            logits = logits + leaves["key_bias"][..., None, :]
        if self.attn_mask is not None:
            if self.attn_mask.dtype == torch.bool:
                logits = logits.masked_fill(~self.attn_mask, -math.inf)
            else:
                logits = logits + leaves["attn_mask"]
        if self.is_causal:
            logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -math.inf)
        dead = (logits == -math.inf).all(-1)
        alive = logits.masked_fill(dead[..., None], 0.0)
        row_max = alive.detach().amax(-1) if keys else torch.zeros_like(dead, dtype=dtype)
        row_max = row_max.float().to(dtype)
        total = (alive - row_max[..., None]).exp().sum(-1)
        probabilities = ((alive - row_max[..., None]).exp() / total[..., None]).masked_fill(dead[..., None], 0.0)
        logarithm = (alive - row_max[..., None] - total.log()[..., None]).masked_fill(probabilities == 0, 0.0)
        scaled = probabilities if self.key_scale is None else probabilities * leaves["key_scale"][..., None, :]
        attention = output = scaled @ value
        if self.gate is not None:
            gate = leaves["gate"][..., None, None]
            output = gate * attention + (1 - gate) * leaves.get("fill", torch.zeros((), dtype=dtype, device=DEVICE))
        one_hot = self.groups()[0, 0][:, None] == torch.arange(GROUPS, device=DEVICE)
        results = {
            "output": output,
            "attention": attention,
            "entropy": -(probabilities * logarithm).sum(-1),
            "logsumexp": (row_max + total.log()).masked_fill(dead, 0.0),
            "group_mass": probabilities @ one_hot.to(dtype),
            "row_max": row_max,
            "log2_sum": total.log2().masked_fill(dead, math.inf),
            "logits": alive,
            "probabilities": probabilities,
        }
        return results, leaves

    def autograd(self) -> dict[str, Tensor]:
        """Torch's gradients of the formula, computed in float64."""
        results, leaves = self.formula()
        loss = sum((results[name] * self.cotangent(name).double()).sum() for name in self.cotangents)
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if gradient is None else gradient
            for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
        }

    def arguments(self) -> dict[str, Any]:
        """What attention_backward takes, but for `needed`."""
        with torch.no_grad():
            results, _ = self.formula()
        statistics, grads = [], []
        constants = None
        for name in self.cotangents:
            if name == "output":
                continue
            grad = self.cotangent(name)
            if name == "logsumexp":
                own = -grad
            else:
                if name == "group_mass":
                    bound = BoundStatistic(STATISTICS[name]((GROUPS,)), (self.groups(),))
                else:
                    bound = BoundStatistic(STATISTICS[name](()))
                statistics.append(bound)
                grads.append(grad)
                own = grad.double() * results[name]
                own = own.sum(-1) if name == "group_mass" else own
            constants = own.double() if constants is None else constants + own
        return {
            "grad_output": self.cotangent("output") if "output" in self.cotangents else None,
            "query": self.query,
            "key": self.key,
            "value": self.value,
            "attn_mask": self.attn_mask,
            "is_causal": self.is_causal,
            "scale": self.scale_,
            "gate": self.gate,
            "fill": self.fill,
            "temperature": self.temperature,
            "key_bias": self.key_bias,
            "key_scale": self.key_scale,
            "attention": results["attention"].to(self.query.dtype),
            "row_max": results["row_max"].float(),
            "log2_sum": results["log2_sum"].float(),
            "row_constants": None if constants is None else constants.float(),
            "statistics": statistics,
            "statistic_grads": grads,
        }

    def run(
        self, needed: Sequence[str] | None = None, configurations: BackwardConfigurations | None = None, **changes: Any
    ) -> dict[str, Tensor]:
        needed = list(self.inputs()) if needed is None else needed
        flags = {name: name in needed for name in DIFFERENTIABLE}
        return attention_backward(**{**self.arguments(), **changes}, needed=flags, configurations=configurations)

    def check(
        self, needed: Sequence[str] | None = None, configurations: BackwardConfigurations | None = None, **changes: Any
    ) -> dict[str, Tensor]:
        """Every gradient within what roundings explain; no library's own error enters, as it depends on the machine."""
        gradients = self.run(needed, configurations, **changes)
        expected = self.autograd()
        with torch.no_grad():
            results = self.formula()[0]
        logits = results["logits"]
        finite = logits[logits.isfinite() & (logits > FINFO_MIN / 2)]
        # a logit is right to its own last bit at best, which is an error of its probability's logarithm ...
        logit_error = 4 * 2**-24 * (finite.abs().max().item() if finite.numel() else 0.0)
        # ... that reaches the gradients of query and key through the other one
        reach = {}
        if logits.numel():
            largest_grad = max(self.cotangent(name).abs().max().item() for name in self.cotangents)
            column = results["probabilities"].sum(-2).max().item()
            reach["query"] = self.scale_ * self.key.abs().max().item() * largest_grad
            reach["key"] = self.scale_ * self.query.abs().max().item() * largest_grad * column
        assert list(gradients) == [name for name in DIFFERENTIABLE if name in (needed or self.inputs())]
        for name, gradient in gradients.items():
            argument = self.inputs()[name]
            assert gradient.shape == argument.shape, name
            assert gradient.dtype == argument.dtype, name
            if not gradient.numel():
                continue
            size = max(expected[name].abs().max().item(), 1.0)
            if name == "temperature":
                # a sum over queries and channels, whose terms cancel
                terms = (expected["query"] * self.query.double()).abs().sum((-1, -2)) / argument.double().abs()
                size = max(size, terms.max().item())
            torch.testing.assert_close(
                gradient.double(),
                expected[name],
                rtol=0,
                atol=FLOOR[self.query.dtype] * size + logit_error * max(size, reach.get(name, 0.0)),
                msg=lambda text, name=name: f"gradient of {name}: {text}",
            )
        return gradients


def attention(
    batch: int = 1,
    heads: int = 2,
    queries: int = 20,
    keys: int = 23,
    dim: int = 16,
    *,
    kv_heads: int | None = None,
    dim_v: int | None = None,
    dtype: torch.dtype = torch.float32,
    **others: Any,
) -> Problem:
    kv_heads = kv_heads or heads
    return Problem(
        normal(batch, heads, queries, dim, dtype=dtype, seed=1),
        normal(batch, kv_heads, keys, dim, dtype=dtype, seed=2),
        normal(batch, kv_heads, keys, dim_v or dim, dtype=dtype, seed=3),
        **others,
    )


def tiles(block_queries: int = 32, block_keys: int = 32, **others: Any) -> BackwardConfigurations:
    all_kernels = dict.fromkeys(("key_value", "query", "mask"), BackwardConfiguration(block_queries, block_keys))
    return BackwardConfigurations(**{**all_kernels, "block_rows": 32, **others})


def everything(**shape: Any) -> Problem:
    """All edits and all cotangents at once."""
    problem = attention(**{"batch": 2, "heads": 4, "kv_heads": 2, "dim_v": 24, **shape}, cotangents=COTANGENTS)
    batch, heads = problem.query.shape[:2]
    keys, dim_v = problem.value.shape[2:]
    problem.gate = torch.tensor([[0.0, 1.0, 0.3, -1.5]], device=DEVICE).expand(batch, heads)
    problem.fill = normal(1, heads, 1, dim_v)
    problem.temperature = normal(batch, heads, seed=4).abs() + 0.5
    problem.key_bias = normal(1, heads, keys, seed=5)
    problem.key_scale = normal(batch, 1, keys, seed=6) + 1
    return problem


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (33, 77), (1, 77), (64, 32), (77, 1)])
def test_sizes(queries: int, keys: int, dtype: torch.dtype):
    attention(heads=1, queries=queries, keys=keys, dtype=dtype, cotangents=("output", "entropy")).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "dim_v"), [(1, 1), (12, 40), (40, 7), (80, 80), (160, 16), (16, 512), (512, 16)])
def test_head_dimensions(dim: int, dim_v: int, dtype: torch.dtype):
    attention(heads=1, queries=17, keys=40, dim=dim, dim_v=dim_v, dtype=dtype).check()


@pytest.mark.parametrize(("dim", "widths"), [(40, (32, 16)), (80, (64, 16))])
def test_split_head_dimension(dim: int, widths: tuple[int, ...]):
    problem = attention(heads=1, queries=20, keys=40, dim=dim, temperature=torch.full((1, 1), 0.7, device=DEVICE))
    problem.check(configurations=tiles(dim_widths=widths, value_widths=widths))


@pytest.mark.parametrize(("block_queries", "block_keys"), [(16, 64), (64, 16)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_tile_shapes(block_queries: int, block_keys: int, is_causal: bool):
    problem = attention(heads=1, queries=77, keys=70, is_causal=is_causal)
    problem.check(configurations=tiles(block_queries, block_keys))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("splits", [2, 5])
def test_queries_of_one_key_tile_shared_by_programs(splits: int, is_causal: bool):
    problem = attention(heads=2, kv_heads=1, queries=50, keys=18, is_causal=is_causal)
    problem.key_bias, problem.key_scale = normal(1, 1, 18), normal(1, 1, 18)
    problem.check(configurations=tiles(16, splits=splits))


def test_splits():
    assert query_splits(programs=1000, queries=4096, block_queries=64) == 1
    assert query_splits(programs=20, queries=4096, block_queries=64) == 13
    assert query_splits(programs=1, queries=4096, block_queries=64) == 16
    assert query_splits(programs=1, queries=64, block_queries=64) == 1
    assert query_splits(programs=0, queries=0, block_queries=64) == 1


def test_tensor_descriptors():
    problem = everything(dim=40, dim_v=80, dtype=torch.float16)
    described = BackwardConfiguration(16, 16, descriptors=True)
    problem.check(configurations=tiles(16, 16, key_value=described, query=described))
    # a head of 12 channels isn't addressable: pointers, whatever the configuration says
    attention(dim=12).check(configurations=tiles(key_value=described, query=described))


def test_key_and_value_in_separate_launches():
    everything(queries=20, keys=20).check(configurations=tiles(separate=True))


@pytest.mark.parametrize(("kv_heads", "dtype"), [(1, torch.float32), (2, torch.float16)])
def test_grouped_heads(kv_heads: int, dtype: torch.dtype):
    attention(heads=4, kv_heads=kv_heads, keys=35, dtype=dtype).check()


@pytest.mark.parametrize(("queries", "keys"), [(63, 63), (100, 40), (40, 100), (1, 50)])
def test_causal(queries: int, keys: int):
    problem = attention(heads=1, queries=queries, keys=keys, is_causal=True, cotangents=COTANGENTS)
    problem.check()


@pytest.mark.parametrize(
    "cotangents", [*((name,) for name in COTANGENTS), COTANGENTS], ids=lambda names: "-".join(names)
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cotangents(cotangents: tuple[str, ...], dtype: torch.dtype):
    attention(queries=33, cotangents=cotangents, dtype=dtype).check()


@pytest.mark.parametrize(
    "shape",
    [
        (2, 2, 20, 23),
        (1, 1, 20, 23),
        (2, 1, 20, 23),
        (1, 2, 20, 23),
        (2, 1, 1, 23),
        (1, 2, 1, 23),
        (2, 2, 20, 1),
        (1, 1, 20, 1),
        (2, 1, 1, 1),
        (1, 1, 1, 1),
    ],
)
def test_mask_gradients(shape: tuple[int, ...]):
    """logsumexp is what moves when a whole row's logits do: without it row sums are 0."""
    problem = attention(batch=2, cotangents=("output", "logsumexp"))
    problem.attn_mask = normal(*shape)
    problem.check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 20, 23), (2, 1, 1, 23)])
def test_low_precision_masks(shape: tuple[int, ...], dtype: torch.dtype):
    problem = attention(batch=2, dtype=dtype)
    problem.attn_mask = normal(*shape, dtype=dtype)
    problem.check()


@pytest.mark.parametrize("shape", [(1, 2, 40, 45), (1, 1, 1, 45), (1, 2, 40, 1)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_that_mask(shape: tuple[int, ...], dtype: torch.dtype):
    problem = attention(queries=40, keys=45, cotangents=COTANGENTS)
    allowed = normal(*shape) > -0.5
    problem.attn_mask = allowed if dtype == torch.bool else torch.zeros(shape, device=DEVICE)
    if dtype != torch.bool:
        problem.attn_mask[~allowed] = -math.inf
    problem.check()


@pytest.mark.parametrize("cotangents", [("output",), COTANGENTS])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_rows_without_a_valid_key(dtype: torch.dtype, cotangents: tuple[str, ...]):
    problem = attention(queries=40, keys=45, heads=1, cotangents=cotangents)
    allowed = torch.ones(1, 1, 40, 45, dtype=torch.bool, device=DEVICE)
    allowed[..., ::3, :] = False
    # valid keys only in the last tile
    allowed[..., 1, :40] = False
    problem.attn_mask = allowed
    if dtype != torch.bool:
        problem.attn_mask = torch.zeros(allowed.shape, device=DEVICE).masked_fill(~allowed, -math.inf)
    gradients = problem.check()
    assert (gradients["query"][:, :, ::3] == 0).all()
    if dtype != torch.bool:
        assert (gradients["attn_mask"][:, :, ::3] == 0).all()


def test_cotangents_of_rows_without_a_valid_key_do_not_matter():
    """The loss's derivative with respect to a logsumexp of -inf may well be infinite."""
    problem = attention(queries=20, cotangents=("output", "logsumexp"))
    problem.attn_mask = torch.ones(1, 1, 20, 23, dtype=torch.bool, device=DEVICE)
    problem.attn_mask[..., 4, :] = False
    expected = problem.check()
    problem.cotangent("logsumexp")[:, :, 4] = math.inf
    gradients = problem.run()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name


def test_all_keys_muted():
    problem = attention(queries=20, cotangents=COTANGENTS)
    problem.key_bias = torch.zeros(1, 2, 23, device=DEVICE)
    problem.key_bias[0, 0] = -math.inf
    problem.key_bias[0, 1, ::2] = -math.inf
    gradients = problem.check()
    for gradient in gradients.values():
        assert (gradient[:, 0] == 0).all()


@pytest.mark.parametrize("where", ["mask", "key_bias"])
def test_rows_of_the_lowest_float_are_uniform(where: str):
    problem = attention(heads=1, queries=40, keys=45, cotangents=("output", "entropy"))
    if where == "key_bias":
        problem.key_bias = torch.full((1, 1, 45), FINFO_MIN, device=DEVICE)
    else:
        problem.attn_mask = torch.zeros(1, 1, 40, 45, device=DEVICE)
        problem.attn_mask[..., 3, :] = FINFO_MIN
        problem.attn_mask[..., 5, :40] = FINFO_MIN
        problem.attn_mask[..., 7, 7:] = FINFO_MIN
    problem.check()


@pytest.mark.parametrize("magnitude", [1e2, 1e4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(magnitude: float, masked: bool, dtype: torch.dtype):
    problem = attention(dtype=dtype, cotangents=("output", "entropy"))
    with torch.no_grad():
        largest = problem.formula()[0]["logits"].abs().max().item()
    problem.scale = problem.scale_ * magnitude / largest
    if masked:
        problem.attn_mask = torch.zeros(1, 1, 1, 23, device=DEVICE, dtype=dtype)
    problem.check()


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_shifted_logits(offset: float):
    problem = attention(attn_mask=torch.full((1, 1, 20, 1), offset, device=DEVICE))
    problem.check()


@pytest.mark.parametrize("scale", [-0.5, 0.0, 3.0])
@pytest.mark.parametrize("mask", [None, torch.bool, torch.float32])
def test_scales(scale: float, mask: torch.dtype | None):
    problem = attention(heads=1, queries=20, keys=40, scale=scale, cotangents=("output", "entropy"))
    if mask is not None:
        problem.attn_mask = normal(1, 1, 20, 40) > 0 if mask == torch.bool else normal(1, 1, 20, 40)
    problem.check()


@pytest.mark.parametrize("cotangents", [("output",), ("output", "logsumexp"), COTANGENTS])
@pytest.mark.parametrize(
    ("gate", "kv_heads"), [([[0.0, 1.0, 0.25]], 3), ([[0.0, 1.0, 0.25]], 1), ([[0.0, 0.0], [0.5, -2.0]], 2)]
)
def test_gates(gate: list[list[float]], kv_heads: int, cotangents: tuple[str, ...]):
    problem = attention(batch=len(gate), heads=len(gate[0]), kv_heads=kv_heads, cotangents=cotangents)
    problem.gate = torch.tensor(gate, device=DEVICE)
    problem.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [(2, 2, 20, 16), (1, 2, 20, 16), (1, 2, 1, 16), (2, 1, 20, 1), (1, 1, 1, 1), (2, 20, 1), (20, 16), (16,), ()],
)
def test_fills(shape: tuple[int, ...], dtype: torch.dtype):
    problem = attention(batch=2, dtype=dtype)
    problem.gate = torch.tensor([[0.0, 1.0], [0.25, -2.0]], device=DEVICE)
    problem.fill = normal(*shape, dtype=dtype)
    problem.check(needed=("gate", "fill"))


@pytest.mark.parametrize("shape", [(2, 2), (1, 2)])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_temperatures(shape: tuple[int, ...], kv_heads: int):
    problem = attention(batch=2, kv_heads=kv_heads, cotangents=("output", "entropy"))
    problem.temperature = normal(*shape).abs() + 0.5
    problem.check()


@pytest.mark.parametrize("shape", [(2, 2), (1, 2), (2, 1), (1, 1)])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_key_edits(shape: tuple[int, int], kv_heads: int):
    problem = attention(batch=2, kv_heads=kv_heads, cotangents=("output", "entropy"))
    problem.key_bias = normal(*shape, 23, seed=5)
    problem.key_scale = normal(*shape, 23, seed=6) + 1
    problem.check()


@pytest.mark.parametrize(
    ("mask", "dtype"),
    [
        ("none", torch.bfloat16),
        ("causal", torch.float32),
        ("bool", torch.float16),
        ((1, 1, 20, 23), torch.float32),
        ((2, 4, 1, 23), torch.bfloat16),
        ((2, 1, 20, 1), torch.float32),
    ],
)
def test_everything(mask: str | tuple[int, ...], dtype: torch.dtype):
    problem = everything(dtype=dtype)
    problem.is_causal = mask == "causal"
    if mask == "bool":
        problem.attn_mask = normal(2, 1, 20, 23) > 0
    elif isinstance(mask, tuple):
        problem.attn_mask = normal(*mask)
    # tiles with and without a border
    problem.check(configurations=tiles(16, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["none", "causal", "additive"])
def test_on_what_the_forward_saves(mask: str, dtype: torch.dtype):
    """The formula's rows replaced by the forward kernel's: attention, largest logit, sum."""
    problem = everything(dtype=dtype)
    problem.is_causal = mask == "causal"
    if mask == "additive":
        problem.attn_mask = normal(2, 1, 20, 23)
        problem.attn_mask[:, :, 3] = -math.inf
        problem.attn_mask[:, :, 5] = FINFO_MIN
    arguments = problem.arguments()
    saved = {name: torch.full_like(arguments[name], math.nan) for name in ("attention", "row_max", "log2_sum")}
    inputs = ("query", "key", "value", "attn_mask", "is_causal", "scale", "gate", "fill")
    edits = ("temperature", "key_bias", "key_scale")
    attention_forward(
        **{name: arguments[name] for name in (*inputs, *edits)},
        statistics=(),
        statistic_outputs=(),
        output=torch.empty_like(arguments["attention"]),
        **saved,
    )
    problem.check(**saved)


def test_only_what_is_needed():
    """Each gradient alone is the one that comes with all others, and needs no more kernels than its own."""
    problem = everything(queries=20, keys=20)
    problem.attn_mask = normal(1, 1, 20, 20)
    expected = problem.check()
    launched = []
    launch = passes.Pass.launch

    def recorded(self: Any, kernel: Any, *arguments: Any, **keywords: Any) -> None:
        launched.append(kernel)
        launch(self, kernel, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes.Pass, "launch", recorded)
        for name in DIFFERENTIABLE:
            launched.clear()
            gradients = problem.run([name])
            assert list(gradients) == [name]
            assert torch.equal(gradients[name], expected[name]), name
            assert len(launched) == {"gate": 1, "fill": 0}.get(name, 2), name
        launched.clear()
        assert problem.run([]) == {}
        assert launched == []


def test_needed_as_a_sequence():
    problem = attention(queries=20)
    flags = [name in ("key", "value") for name in DIFFERENTIABLE]
    assert list(attention_backward(**problem.arguments(), needed=flags)) == ["key", "value"]


def test_deterministic():
    problem = everything()
    problem.attn_mask = normal(1, 1, 20, 23)
    first, second = problem.run(), problem.run()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strides(dtype: torch.dtype):
    """Tokens before heads, transposed channels, expanded inputs and cotangents."""
    problem = everything(dim=12, dim_v=12, dtype=dtype)
    problem.attn_mask = normal(1, 1, 20, 23)
    expected = problem.check()
    heads_last = problem.query.transpose(1, 2).contiguous().transpose(1, 2)
    strided = replace(problem, query=heads_last, value=problem.value.mT.contiguous().mT)
    strided.grads["output"] = problem.cotangent("output").transpose(1, 3).contiguous().transpose(1, 3)
    strided.key_bias = normal(1, 4, 23, seed=5).mT.contiguous().mT
    strided.gate = torch.stack([problem.gate, problem.gate], -1)[..., 0]
    strided.attn_mask = problem.attn_mask.mT.contiguous().mT
    gradients = strided.run()
    for name in expected:
        assert torch.equal(gradients[name], expected[name]), name
    assert gradients["query"].stride() == heads_last.stride()

    problem.key = problem.key[:, :1].expand(-1, 2, -1, -1)
    problem.grads["output"] = torch.ones((), dtype=dtype, device=DEVICE).expand(2, 4, 20, 12)
    problem.check()


def test_padded_rows():
    """Inputs whose rows are 16-byte aligned, gradients whose rows are not."""
    problem = attention(queries=20, dim=12, dtype=torch.float16)
    expected = problem.check()
    padded = replace(
        problem,
        **{
            name: torch.nn.functional.pad(getattr(problem, name), (0, 4))[..., :12]
            for name in ("query", "key", "value")
        },
    )
    padded.grads["output"] = torch.nn.functional.pad(problem.cotangent("output"), (0, 4))[..., :12]
    for name, gradient in padded.run().items():
        assert torch.equal(gradient, expected[name]), name


def test_far_apart():
    """Rows whose distance within a tile takes 64 bits."""
    problem = attention(queries=1, keys=20)
    expected = problem.run()
    problem.query = problem.query.as_strided((1, 2, 1, 16), (32, 16, 2**31, 1))
    for name, gradient in problem.run().items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("kv_heads", [3, 1])
def test_nothing_comes_from_a_removed_head(kv_heads: int):
    """Not even if all of it is NaN."""
    problem = attention(batch=1, heads=3, kv_heads=kv_heads, queries=20)
    problem.gate = torch.tensor([[0.5, 0.0, 1.0]], device=DEVICE)
    problem.temperature = torch.full((1, 3), 0.7, device=DEVICE)
    names = ("query", "key", "value", "temperature")
    expected = problem.check(names)
    assert (expected["query"][:, 1] == 0).all()
    arguments = problem.arguments()
    for name in ("query", "attention", "row_max", "log2_sum", "grad_output"):
        arguments[name][:, 1] = math.nan
    if kv_heads == 3:
        arguments["key"][:, 1] = math.nan
        arguments["value"][:, 1] = math.nan
    gradients = attention_backward(**arguments, needed=dict.fromkeys(names, True))
    for name in names:
        assert torch.equal(gradients[name], expected[name]), name


@pytest.mark.parametrize("kv_heads", [3, 1])
def test_statistics_of_a_removed_head_do_not_see_its_output(kv_heads: int):
    problem = attention(batch=1, heads=3, kv_heads=kv_heads, queries=20, cotangents=COTANGENTS)
    problem.gate = torch.tensor([[0.5, 0.0, 1.0]], device=DEVICE)
    problem.key_scale = normal(1, 3, 23)
    problem.attn_mask = normal(1, 1, 20, 23)
    names = ("query", "key", "value", "attn_mask", "key_scale")
    expected = problem.check(names)
    assert (expected["query"][:, 1] != 0).all()
    arguments = problem.arguments()
    for name in ("attention", "grad_output"):
        arguments[name][:, 1] = math.nan
    if kv_heads == 3:
        arguments["value"][:, 1] = math.nan
    gradients = attention_backward(**arguments, needed=dict.fromkeys(names, True))
    for name in names:
        assert torch.equal(gradients[name], expected[name]), name


def test_kept_heads_do_not_see_their_fill():
    problem = attention(queries=20)
    problem.gate = torch.tensor([[1.0, 0.5]], device=DEVICE)
    problem.fill = normal(1, 2, 20, 16)
    problem.grads["output"] = problem.cotangent("output").clone()
    expected = problem.check(("query", "key", "value", "fill"))
    assert (expected["fill"][:, 0] == 0).all()
    problem.fill[:, 0] = math.nan
    gradients = problem.run(("query", "key", "value", "fill"))
    for name in gradients:
        assert torch.equal(gradients[name], expected[name]), name


def test_nan_stays_in_its_row():
    problem = attention(queries=40, keys=45, cotangents=("output", "entropy"))
    expected = problem.run(["query"])["query"]
    problem.query[0, 1, 5] = math.nan
    gradients = problem.run()
    assert gradients["query"][0, 1, 5].isnan().all()
    others = torch.ones_like(expected, dtype=torch.bool)
    others[0, 1, 5] = False
    assert torch.equal(gradients["query"][others], expected[others])
    assert gradients["key"][0, 1].isnan().all()
    assert gradients["key"][0, 0].isfinite().all()
    assert gradients["value"][0, 0].isfinite().all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_no_keys(is_causal: bool):
    problem = attention(queries=20, keys=0, is_causal=is_causal)
    problem.gate, problem.fill = torch.tensor([[0.5, 1.0]], device=DEVICE), normal(1, 2, 20, 16)
    problem.key_bias = normal(1, 1, 0)
    gradients = problem.check()
    assert (gradients["query"] == 0).all()


def test_no_queries():
    problem = attention(queries=0)
    problem.gate, problem.temperature = torch.tensor([[0.5, 1.0]], device=DEVICE), torch.ones(1, 2, device=DEVICE)
    problem.attn_mask = normal(1, 1, 1, 23)
    for gradient in problem.run().values():
        assert (gradient == 0).all()


@pytest.mark.parametrize("shape", [{"batch": 0}, {"batch": 0, "keys": 0}, {"queries": 0, "keys": 0}])
def test_nothing_to_do(shape: dict[str, int]):
    problem = everything(**shape) if "batch" in shape else attention(**shape)
    if "batch" in shape:
        problem.key_bias = normal(1, 4, problem.key.shape[2])
    for name, gradient in problem.run().items():
        assert (gradient == 0).all(), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(1, 2, 4, 600)}, "head dimensions"),
        ({"query": torch.zeros(1, 2, 4, 16, dtype=torch.float64)}, "must share one of"),
        ({"key": torch.zeros(1, 3, 4, 16), "value": torch.zeros(1, 3, 4, 16)}, "multiple of key's"),
        ({"grad_output": torch.zeros(1, 2, 4, 8)}, "grad_output must be"),
        ({"attention": None}, "needs the attention"),
        ({"row_max": torch.zeros(1, 2, 4).double()}, "row_max must be contiguous float32"),
        ({"statistic_grads": [torch.zeros(1, 2, 4)]}, "0 statistics need as many"),
        ({"attn_mask": torch.zeros(1, 1, 5, 7)}, "attn_mask must broadcast"),
        ({"key_bias": torch.zeros(1, 2, 5)}, "key_bias must broadcast"),
        ({"needed": {"gate": True}}, "gate is None"),
        ({"needed": {"attn_mask": True}, "attn_mask": torch.ones(1, 1, 1, 4, dtype=torch.bool)}, "bool attn_mask"),
        (
            {"statistics": [BoundStatistic(STATISTICS["max_prob"](()))], "statistic_grads": [torch.zeros(1, 2, 4)]},
            "has no gradient",
        ),
    ],
)
def test_unsupported(changes: dict[str, Any], message: str):
    arguments = {**attention(queries=4, keys=4).arguments(), "needed": {"query": True}, **changes}
    arguments = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        attention_backward(**arguments)


def test_many_heads():
    """Beyond 65,535 programs."""
    if DEVICE == "cpu":
        pytest.skip("takes minutes in the interpreter; the launch grid is one-dimensional by construction")
    attention(batch=700, heads=100, queries=16, keys=16).check()
