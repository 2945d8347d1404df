"""Gradients of the cpu backend beyond the contract's cases: low precision, layouts, threads, NaN, memory."""

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from contract import CASES, Case, make_inputs
from gradient_truth import Cotangents, truth
from gradients import COMPARABLE
from headscope.ops import GroupMass, HeadEdit, attention
from headscope.ops.statistics import Entropy
from ops.backends import require_backend

NAMES = ("query", "key", "value", "attn_mask", "gate", "fill", "temperature", "key_bias", "key_scale")
# torch can serve them: no edits
PLAIN = [
    case for case in COMPARABLE if not (case.gate or case.temperature or case.key_bias or case.key_scale or case.poison)
]
BATCH, HEADS, KV_HEADS, QUERIES, KEYS, DIM, DIM_V = 2, 4, 2, 21, 33, 12, 10


@pytest.fixture(autouse=True)
def _needs_the_library():
    require_backend("cpu")


def _gradients(leaves: list[Tensor], cotangent: Tensor, backend: str, **options) -> tuple[Tensor, ...]:
    """Of query, key and value; "torch" is its SDPA."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    if backend == "torch":
        output = functional.scaled_dot_product_attention(*leaves, **options)
    else:
        output = attention(*leaves, backend=backend, **options).output
    return torch.autograd.grad(output, leaves, cotangent)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_low_precision_is_as_good_as_torch(case: Case, dtype: torch.dtype):
    """Against float64 on the same inputs: twice torch's own largest error, and a floor for where torch is lucky.

    The floor is what rounding a result once may cost, and what the sums before it may err by in float32: with one key
    all of the query's gradient cancels, and torch's is exactly 0 on some processors.
    """
    inputs = make_inputs(case, dtype)
    qkv = [inputs.query, inputs.key, inputs.value]
    options = dict(inputs.options)
    cotangent = torch.randn(*inputs.query.shape[:3], inputs.value.shape[3]).to(dtype)
    if isinstance(options["attn_mask"], Tensor) and options["attn_mask"].is_floating_point():
        options["attn_mask"] = options["attn_mask"].to(dtype)
    single = dataclasses.replace(inputs, **{name: getattr(inputs, name).float() for name in ("query", "key", "value")})
    sums = truth(single, Cotangents(output=cotangent.float()[None]))
    exact = _gradients([tensor.double() for tensor in qkv], cotangent.double(), "reference", **options)
    torchs = _gradients(qkv, cotangent, "torch", **options)
    ours = _gradients(qkv, cotangent, "cpu", **options)
    for name, expected, peer, got in zip(("query", "key", "value"), exact, torchs, ours, strict=True):
        assert got.dtype == dtype
        if not expected.numel():
            continue
        # torch answers NaN for rows that see nothing in some of these; the truth is finite everywhere
        error, allowed = (float((found.double() - expected).abs().nan_to_num(0.0).max()) for found in (got, peer))
        assert got.isfinite().all(), name
        floor = torch.finfo(dtype).eps * float(expected.abs().max()) + float(sums[name].tolerance.max())
        assert error <= 2 * allowed + floor, f"{name}: {error:.3g}, torch {allowed:.3g}, floor {floor:.3g}"


class Everything:
    """A call with every edit and statistic that has a gradient, in the dtype of `query`."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, small: bool = True) -> None:
        torch.manual_seed(5)
        one = 1 if small else None
        shapes = {
            "query": (BATCH, HEADS, QUERIES, DIM),
            "key": (BATCH, KV_HEADS, KEYS, DIM),
            "value": (BATCH, KV_HEADS, KEYS, DIM_V),
            "attn_mask": (one or BATCH, HEADS, QUERIES, KEYS),
            "gate": (one or BATCH, HEADS),
            "fill": (BATCH, one or HEADS, QUERIES, DIM_V),
            "temperature": (one or BATCH, HEADS),
            "key_bias": (BATCH, one or HEADS, KEYS),
            "key_scale": (one or BATCH, HEADS, KEYS),
        }
        self.leaves = {name: torch.randn(shape) for name, shape in shapes.items()}
        self.leaves["gate"].sigmoid_()
        self.leaves["gate"][0, :2] = torch.tensor([0.0, 1.0])
        # far from 0, where logits would be large and so would be their errors
        self.leaves["temperature"] = 0.5 + torch.rand(shapes["temperature"])
        for name in ("query", "key", "value"):
            self.leaves[name] = self.leaves[name].to(dtype)
        self.groups = [torch.randint(-1, 3, (KEYS,)), torch.randint(-1, 200, (BATCH, KEYS))]

    def outputs(self, backend: str, wanted: tuple[str, ...] = NAMES, *, name: str | None = None) -> list[Tensor]:
        """The output and the statistics; `wanted` of the leaves require gradients afterwards."""
        for leaf, tensor in self.leaves.items():
            self.leaves[leaf] = tensor.detach().requires_grad_(leaf in wanted)
        found = self.leaves
        edit = HeadEdit(*(found[name] for name in NAMES[4:]))
        statistics = [
            "logsumexp",
            "entropy",
            GroupMass(self.groups[0], 3),
            GroupMass(self.groups[1], 200, name="many"),
            # of one kind twice: their cotangents add up
            Entropy(name="again"),
        ]
        result = attention(
            *(found[name] for name in NAMES[:3]),
            attn_mask=found["attn_mask"],
            enable_gqa=True,
            edit=edit,
            statistics=statistics,
            backend=backend,
        )
        return [result.output, *result.statistics.values()]


def _assert_close(name: str, got: Tensor, expected: Tensor) -> None:
    """Within float32's rounding of sums, relative to the largest."""
    assert got.shape == expected.shape
    allowed = 2e-5 * float(expected.abs().max()) + 1e-6
    torch.testing.assert_close(got, expected, rtol=0, atol=allowed, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("small", [True, False], ids=["repeated", "whole"])
def test_everything_at_once(small: bool):
    """Edits and masks that repeat along dimensions, and such that don't."""
    problem = Everything(small=small)
    cotangents = [torch.randn_like(output) for output in problem.outputs("reference")]
    expected = torch.autograd.grad(problem.outputs("reference"), list(problem.leaves.values()), cotangents)
    got = torch.autograd.grad(problem.outputs("cpu"), list(problem.leaves.values()), cotangents)
    for name, a, b in zip(NAMES, got, expected, strict=True):
        _assert_close(name, a, b)


@pytest.mark.parametrize("name", NAMES)
def test_each_gradient_alone(name: str):
    problem = Everything()
    cotangents = [torch.randn_like(output) for output in problem.outputs("cpu")]
    together = torch.autograd.grad(problem.outputs("cpu"), list(problem.leaves.values()), cotangents)
    (alone,) = torch.autograd.grad(problem.outputs("cpu", (name,)), [problem.leaves[name]], cotangents)
    _assert_close(name, alone, together[NAMES.index(name)])


@pytest.mark.parametrize("index", range(6))
def test_each_cotangent_alone(index: int):
    problem = Everything()
    expected_output, output = (problem.outputs(backend)[index] for backend in ("reference", "cpu"))
    cotangent = torch.randn_like(output)
    found = []
    for backend in ("reference", "cpu"):
        output = problem.outputs(backend)[index]
        leaves = list(problem.leaves.values())
        found.append(torch.autograd.grad(output, leaves, cotangent, materialize_grads=True))
    assert expected_output.shape == output.shape
    for name, expected, got in zip(NAMES, *found, strict=True):
        _assert_close(name, got, expected)


def test_layouts_of_cotangents():
    """Repeated by a sum, with strides of 0; transposed; a part of something larger. The bits are the same."""
    problem = Everything()
    shapes = [output.shape for output in problem.outputs("cpu")]
    leaves = list(problem.leaves)

    def run(cotangents: list[Tensor]) -> tuple[Tensor, ...]:
        outputs = problem.outputs("cpu")
        return torch.autograd.grad(outputs, [problem.leaves[name] for name in leaves], cotangents)

    kinds = {
        "repeated": [torch.ones(()).expand(shape) for shape in shapes],
        "transposed": [torch.randn(shape).mT.contiguous().mT for shape in shapes],
        "partial": [torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2] for shape in shapes],
    }
    for kind, cotangents in kinds.items():
        expected = run([cotangent.contiguous() for cotangent in cotangents])
        for name, a, b in zip(leaves, run(cotangents), expected, strict=True):
            assert torch.equal(a, b), f"{kind}: {name}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_give_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    problem = Everything(dtype)
    outputs = problem.outputs("cpu")
    cotangents = [torch.randn_like(output) for output in outputs]
    found = []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        outputs = problem.outputs("cpu")
        found.append(torch.autograd.grad(outputs, list(problem.leaves.values()), cotangents))
    for other in found[1:]:
        for name, a, b in zip(NAMES, found[0], other, strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("statistics", [[], ["entropy", "logsumexp"]], ids=["output", "statistics"])
@pytest.mark.parametrize("special", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["bool", "additive", "key_bias"])
def test_a_hidden_key_reaches_no_gradient(kind: str, special: float, statistics: list[str]):
    """What no query sees may hold anything; its own gradients are 0."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 2, 9, 8), torch.randn(2, 2, 17, 8), torch.randn(2, 2, 17, 8)
    hidden = 5
    shown = torch.arange(17) != hidden
    options = {}
    if kind == "key_bias":
        bias = torch.zeros(1, 1, 17)
        bias[..., hidden] = -math.inf
        options["edit"] = HeadEdit(key_bias=bias)
    else:
        mask = shown.expand(9, 17)
        options["attn_mask"] = mask if kind == "bool" else torch.zeros(9, 17).masked_fill(~mask, -math.inf)

    def run(key: Tensor, value: Tensor, **options) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        result = attention(*leaves, statistics=statistics, backend="cpu", **options)
        total = sum(x.square().sum() for x in (result.output, *result.statistics.values()))
        return list(torch.autograd.grad(total, leaves))

    expected = run(key[:, :, shown], value[:, :, shown])
    key[:, :, hidden], value[:, :, hidden] = special, special
    got = run(key, value, **options)
    assert torch.equal(got[1][:, :, hidden], torch.zeros(2, 2, 8))
    assert torch.equal(got[2][:, :, hidden], torch.zeros(2, 2, 8))
    for name, a, b in zip(NAMES, [got[0], got[1][:, :, shown], got[2][:, :, shown]], expected, strict=False):
        _assert_close(name, a, b)


def test_a_removed_head_reaches_no_gradient():
    """Its queries, keys and values may hold NaN; with a gradient of its gate alone looked at."""
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3, 9, 8), torch.randn(2, 3, 17, 8), torch.randn(2, 3, 17, 8)]
    for tensor in tensors:
        tensor[:, 1] = math.nan
    leaves = [tensor.requires_grad_() for tensor in tensors]
    edit = HeadEdit(torch.tensor([[1.0, 0.0, 0.5]]), torch.randn(3, 9, 8), torch.ones(2, 3))
    output = attention(*leaves, edit=edit, backend="cpu").output
    assert output.isfinite().all()
    for gradient in torch.autograd.grad(output.square().sum(), leaves):
        assert gradient.isfinite().all()
        assert torch.equal(gradient[:, 1], torch.zeros_like(gradient[:, 1]))


@pytest.mark.parametrize("shape", [(0, 2, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0), (2, 0, 5, 7)], ids=str)
def test_nothing_to_sum_is_zero(shape: tuple[int, int, int, int]):
    batch, heads, queries, keys = shape
    leaves = [
        torch.randn(batch, heads, queries, 8),
        torch.randn(batch, heads, keys, 8),
        torch.randn(batch, heads, keys, 6),
        torch.randn(1, heads, 1, keys),
        torch.rand(1, heads),
        torch.randn(1, heads, 1, 6),
        torch.rand(batch, heads) + 0.5,
        torch.randn(1, 1, keys) if heads else torch.randn(1, 0, keys),
        torch.randn(1, heads, keys),
    ]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    groups = GroupMass(torch.zeros(keys, dtype=torch.int64), 2)
    found = []
    for backend in ("reference", "cpu"):
        result = attention(
            *leaves[:3],
            attn_mask=leaves[3],
            edit=HeadEdit(*leaves[4:]),
            statistics=["entropy", groups],
            backend=backend,
        )
        total = result.output.sum() + sum(value.sum() for value in result.statistics.values())
        found.append(torch.autograd.grad(total, leaves))
    for name, expected, got in zip(NAMES, *found, strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_a_bfloat16_mask_and_fill_have_gradients_of_their_own_dtype():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 9, 8).bfloat16() for _ in range(3))
    mask, fill = torch.randn(9, 9).bfloat16().requires_grad_(), torch.randn(2, 1, 8).bfloat16().requires_grad_()
    cotangent = torch.randn(1, 2, 9, 8).bfloat16()
    edit = HeadEdit(torch.tensor([[0.5, 0.25]]), fill)
    found = []
    for cast, backend in ((torch.Tensor.double, "reference"), (torch.Tensor.bfloat16, "cpu")):
        output = attention(*(cast(x) for x in (query, key, value)), attn_mask=mask, edit=edit, backend=backend).output
        found.append(torch.autograd.grad(output, (mask, fill), cast(cotangent)))
    for expected, got in zip(*found, strict=True):
        assert got.dtype == torch.bfloat16
        assert got.shape == expected.shape
        # rounded to bfloat16 once each: two units in the last place of the largest
        torch.testing.assert_close(got, expected, rtol=0, atol=2 * 2.0**-8 * float(expected.abs().max()))


MEMORY = """
import resource, sys, torch, headscope
torch.set_num_threads(2)
gate = torch.rand(1, 2).requires_grad_()
for tokens in (64, 4096):
    leaves = [torch.randn(1, 2, tokens, 40).requires_grad_() for _ in range(3)]
    edit = headscope.HeadEdit(gate)
    result = headscope.attention(*leaves, edit=edit, statistics=["entropy"], backend=sys.argv[1])
    outputs = [result.output, result.statistics["entropy"]]
    cotangents = [torch.randn_like(output) for output in outputs]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = torch.autograd.grad(outputs, [*leaves, gate], cotangents)
    gradients = sum(tensor.nbytes for tensor in found)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 - gradients)
"""


def test_peak_memory_of_a_backward_at_4096_tokens():
    """Under 32 MiB beyond inputs and gradients, where a matrix of scores would be 128 MiB; in a process of its own."""
    run = subprocess.run([sys.executable, "-c", MEMORY, "cpu"], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 32 * 2**20


def test_other_cases_have_rows_without_keys():
    """Of the cases above, some have rows that see nothing, whose gradients are 0 in low precision, too."""
    case = next(case for case in CASES if case.name == "bool_mask")
    inputs = make_inputs(case, torch.bfloat16)
    leaves = [tensor.requires_grad_() for tensor in (inputs.query, inputs.key, inputs.value)]
    result = attention(*leaves, statistics=["entropy"], backend="cpu", **inputs.options)
    (gradient,) = torch.autograd.grad(result.output.sum() + result.statistics["entropy"].sum(), leaves[:1])
    assert torch.equal(gradient[:, :, 0], torch.zeros_like(gradient[:, :, 0]))
