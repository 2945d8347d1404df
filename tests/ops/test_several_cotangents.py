"""Several cotangents at once: is_grads_batched=True of torch.autograd.grad, and torch.vmap over torch.autograd.grad."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from headscope.ops import GroupMass, HeadEdit, attention, cpu_library
from ops.backends import require_backend

# the rules are the same for all operators, and the interpreter is slow
OPERATORS = ["portable", "cpu", pytest.param("triton", marks=pytest.mark.full)]
NAMES = ("query", "key", "value", "attn_mask", "gate", "fill", "temperature", "key_bias", "key_scale")
COUNT = 4


class Passive(TorchFunctionMode):
    """Whoever listens sees the registered operators."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def results(backend: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The results of a call that uses everything, its leaves, and COUNT cotangents of each result."""
    torch.manual_seed(0)
    shapes = [(2, 4, 7, 6), (2, 2, 9, 6), (2, 2, 9, 5), (4, 1, 9), (1, 4), (4, 1, 5), (2, 4), (1, 4, 9), (2, 1, 9)]
    tensors = [torch.randn(shape) for shape in shapes]
    tensors[4], tensors[6] = tensors[4].sigmoid(), tensors[6].exp()
    query, key, value, mask, gate, fill, temperature, key_bias, key_scale = (t.requires_grad_() for t in tensors)
    result = attention(
        query,
        key,
        value,
        attn_mask=mask,
        enable_gqa=True,
        edit=HeadEdit(gate, fill, temperature, key_bias, key_scale),
        statistics=["entropy", "logsumexp", GroupMass(torch.randint(-1, 2, (2, 9)), 2), "max_prob"],
        backend=backend,
    )
    outputs = [value for value in (result.output, *result.statistics.values()) if value.requires_grad]
    assert len(outputs) == 4
    return outputs, tensors, [torch.randn(COUNT, *output.shape) for output in outputs]


def looped(outputs: Sequence[Tensor], leaves: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
    """What it should be: one backward after the other."""
    each = [
        torch.autograd.grad(outputs, leaves, [cotangent[index] for cotangent in cotangents], retain_graph=True)
        for index in range(COUNT)
    ]
    return [torch.stack(gradients) for gradients in zip(*each, strict=True)]


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Within the rounding of sums in another order, relative to each gradient's largest."""
    for name, a, b in zip(NAMES, got, expected, strict=True):
        allowed = 2e-6 * float(b.abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=allowed, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", ["reference", "portable", "cpu", "triton"])
def test_batched_cotangents(backend):
    require_backend(backend)
    outputs, leaves, cotangents = results(backend)
    expected = looped(outputs, leaves, cotangents)
    options = {"retain_graph": True, "is_grads_batched": True}
    assert_same(torch.autograd.grad(outputs, leaves, cotangents, **options), expected)
    # the batch needn't come in order, nor be laid out as one
    turned = [cotangent.movedim(0, -1).contiguous().movedim(-1, 0) for cotangent in cotangents]
    assert_same(torch.autograd.grad(outputs, leaves, turned, **options), expected)


@pytest.mark.parametrize("backend", ["reference", *OPERATORS])
def test_mapped_backwards(backend):
    require_backend(backend)
    outputs, leaves, cotangents = results(backend)
    expected = looped(outputs, leaves, cotangents)

    def backward(*cotangents: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)

    assert_same(torch.vmap(backward)(*cotangents), expected)
    # in any dimension, and in two
    turned = [cotangent.movedim(0, 2) for cotangent in cotangents]
    assert_same(torch.vmap(backward, in_dims=2)(*turned), expected)
    pairs = [cotangent.unflatten(0, (2, COUNT // 2)) for cotangent in cotangents]
    nested = torch.vmap(torch.vmap(backward))(*pairs)
    assert_same([gradient.flatten(0, 1) for gradient in nested], expected)


@pytest.mark.parametrize("backend", OPERATORS)
def test_some_cotangents_are_the_same_for_all(backend):
    require_backend(backend)
    outputs, leaves, cotangents = results(backend)
    same = [cotangent[0] for cotangent in cotangents]
    repeated = [cotangents[0], *(cotangent.expand(COUNT, *cotangent.shape) for cotangent in same[1:])]
    got = torch.vmap(lambda first: torch.autograd.grad(outputs, leaves, [first, *same[1:]], retain_graph=True))(
        cotangents[0]
    )
    assert_same(got, looped(outputs, leaves, repeated))


@pytest.mark.parametrize("backend", OPERATORS)
def test_of_statistics_alone(backend):
    """Without a cotangent of the output, what only the output depends on has gradients of 0."""
    require_backend(backend)
    outputs, leaves, cotangents = results(backend)
    for index in (1, 2, 3):
        got = torch.autograd.grad(outputs[index], leaves, cotangents[index], retain_graph=True, is_grads_batched=True)
        assert_same(got, looped(outputs[index : index + 1], leaves, cotangents[index : index + 1]))
        for name in ("value", "gate", "fill", "key_scale"):
            assert not got[NAMES.index(name)].any(), name


@pytest.mark.parametrize("backend", OPERATORS)
def test_through_the_registered_operator(backend):
    require_backend(backend)
    with Passive():
        outputs, leaves, cotangents = results(backend)
    expected = looped(outputs, leaves, cotangents)
    options = {"retain_graph": True, "is_grads_batched": True}
    assert_same(torch.autograd.grad(outputs, leaves, cotangents, **options), expected)


def test_the_cpu_kernel_takes_all_in_one_call(monkeypatch):
    require_backend("cpu")
    counts: list[int] = []
    original = cpu_library.attention_backward

    def recorded(*arguments, **options):
        counts.append(len(next(iter(options["gradients"].values()))))
        return original(*arguments, **options)

    monkeypatch.setattr(cpu_library, "attention_backward", recorded)
    outputs, leaves, cotangents = results("cpu")
    torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True, is_grads_batched=True)
    torch.vmap(lambda *each: torch.autograd.grad(outputs, leaves, each, retain_graph=True))(*cotangents)
    torch.autograd.grad(outputs, leaves, [cotangent[0] for cotangent in cotangents])
    assert counts == [COUNT, COUNT, 1]


@pytest.mark.parametrize("backend", OPERATORS)
def test_a_second_derivative_is_an_error_here_too(backend):
    require_backend(backend)
    outputs, leaves, cotangents = results(backend)
    with pytest.raises(RuntimeError, match='backend="reference" can be'):
        torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True, create_graph=True, is_grads_batched=True)
    with pytest.raises(RuntimeError, match='backend="reference" can be'):
        torch.vmap(lambda *each: torch.autograd.grad(outputs, leaves, each, create_graph=True))(*cotangents)


@pytest.mark.parametrize("several", [None, 3])
@pytest.mark.parametrize("backend", OPERATORS)
def test_opcheck_of_the_backward(backend, several):
    """The shapes that torch is told, for one cotangent and for several."""
    require_backend(backend)
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 7, 3, 8).transpose(1, 2) for _ in range(3))
    gate, fill = torch.tensor([[0.0, 1.0, 0.5]]), torch.randn(1, 3, 1, 8)
    temperature, key_bias, key_scale = torch.rand(2, 3) + 0.5, torch.randn(1, 1, 7), torch.randn(2, 3, 7)
    mask = torch.randn(1, 3, 1, 7)
    groups = torch.tensor([[[0, 1, -1, 1, 0, 1, 1]]], dtype=torch.int32)
    statistics = ["entropy", "max_prob", "logsumexp", "group_mass(2,)"]
    edits = (gate, fill, temperature, key_bias, key_scale)
    call = (query, key, value, mask, False, 0.3, *edits, statistics, [groups], True)
    output, values, saved = getattr(torch.ops.headscope, f"{backend}_attention").default(*call)
    front = () if several is None else (several,)
    grads = [torch.randn(*front, *value.shape) for value in (output, *values)]
    grads[2] = None
    attention_ = saved[2] if saved else None
    operator = getattr(torch.ops.headscope, f"{backend}_attention_backward").default
    for needed in ([True] * 9, [name in ("temperature", "fill") for name in NAMES]):
        arguments = (grads[0], grads[1:], several, attention_, values if saved else [], saved[:2], needed, *call)
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
        found = operator(*arguments)
        assert [gradient.shape[: len(front)] for gradient in found] == [front] * sum(needed)
