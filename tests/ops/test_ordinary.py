"""Calls that go around torch's dispatcher: what they give, and who still sees a call."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from headscope import Distance, GroupMass, HeadEdit, attention
from headscope.ops import api, schema
from headscope.ops.api import AttentionResult
from ops.backends import require_backend

BACKEND = "portable"
OPERATOR = "headscope::portable_attention"


def tensors(**options: Any) -> list[Tensor]:
    """query, key and value."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 8, 16, generator=generator).requires_grad_(**options) for _ in range(3)]


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends of the calls that went through torch's dispatcher."""
    seen: list[str] = []

    def recorded(backend: str, call: Any) -> Any:
        seen.append(backend)
        return schema.dispatched(backend, call)

    monkeypatch.setattr(api, "dispatched", recorded)
    return seen


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Passive(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Own(Tensor):
    """A class of tensors that only torch's functions hear of."""


def test_direct(dispatched: list[str]):
    for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with context:
            attention(*tensors(requires_grad=False), backend=BACKEND)
            attention(*tensors(requires_grad=True), backend=BACKEND)
    with torch.inference_mode():
        attention(*(tensor.clone() for tensor in tensors(requires_grad=False)), backend=BACKEND)
    assert dispatched == []
    attention(*tensors(requires_grad=False), backend="reference")
    assert dispatched == ["reference"]


@pytest.mark.parametrize("backend", ["portable", "cpu"])
@pytest.mark.parametrize("training", [False, True])
def test_same_numbers(dispatched: list[str], backend: str, training: bool):
    """With and without the dispatcher, bit by bit."""
    require_backend(backend)
    options = {"statistics": ["entropy", "max_prob", "logsumexp"], "backend": backend, "is_causal": True}

    def run() -> list[Tensor]:
        inputs = tensors(requires_grad=training)
        gate = torch.tensor([[1.0, 0.5, 0.0]], requires_grad=training)
        result = attention(*inputs, edit=HeadEdit(gate, fill="uniform"), **options)
        values = [result.output, *result.statistics.values()]
        if not training:
            return values
        assert [value.requires_grad for value in values] == [True, True, False, True]
        total = result.output.square().sum() + result.statistics["entropy"].sum()
        return [*(value.detach() for value in values), *torch.autograd.grad(total, [*inputs, gate])]

    direct = run()
    assert dispatched == []
    with Passive():
        other = run()
    assert set(dispatched) == {backend}
    for one, two in zip(direct, other, strict=True):
        assert torch.equal(one, two)
        assert one.stride() == two.stride()


def test_seen_by_dispatch_modes():
    inputs = tensors(requires_grad=False)
    with Seen() as seen:
        attention(*inputs, backend=BACKEND)
    assert seen.names == [OPERATOR]


def test_seen_by_the_profiler():
    with profile(activities=[ProfilerActivity.CPU]) as found:
        attention(*tensors(requires_grad=False), backend=BACKEND)
    assert OPERATOR in {event.key for event in found.key_averages()}


@pytest.mark.parametrize(
    "changed",
    [
        lambda tensor: tensor.as_subclass(Own),
        # minus the tensor, pending
        lambda tensor: torch.view_as_complex(torch.stack([tensor, -tensor], -1)).conj().imag,
        lambda tensor: tensor.to("meta"),
    ],
    ids=["subclass", "sign", "meta"],
)
def test_unusual_tensors(dispatched: list[str], changed: Callable[[Tensor], Tensor]):
    """After a call that looks the same to whoever looks at shape, dtype and device alone."""
    inputs = tensors(requires_grad=False)
    expected = attention(*inputs, backend=BACKEND).output
    assert dispatched == []
    unusual = [changed(tensor) for tensor in inputs]
    found = attention(*unusual, backend=BACKEND).output
    assert dispatched == [BACKEND]
    assert found.is_meta or torch.equal(found, expected)


def test_what_is_checked_again():
    """A call that was fine says nothing about one that differs in anything that checks look at."""
    query, key, value = tensors(requires_grad=False)
    gate, groups = torch.ones(2, 3), torch.zeros(8, dtype=torch.int64)

    def call(**changes: Any) -> AttentionResult:
        options: dict[str, Any] = {
            "query": query,
            "key": key,
            "value": value,
            "scale": 1.0,
            "backend": BACKEND,
            "statistics": [GroupMass(groups, 2), Distance((2, 4))],
            "edit": HeadEdit(gate),
        }
        return attention(**{**options, **changes})

    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"scale": True}, TypeError, "scale: got bool"),
        ({"backend": "fast"}, ValueError, "backend: got 'fast'"),
        ({"edit": gate}, TypeError, "edit: got Tensor"),
        ({"edit": HeadEdit(gate.long())}, TypeError, "edit.gate: got dtype"),
        ({"edit": HeadEdit(gate[:, :2])}, ValueError, "edit.gate: got shape"),
        ({"edit": HeadEdit(None, fill="uniform")}, ValueError, "edit.fill: got a fill without a gate"),
        ({"edit": HeadEdit(gate, fill="mean")}, ValueError, "edit.fill: got 'mean'"),
        ({"key": key.half()}, TypeError, "key: got dtype"),
        ({"key": key[..., :8]}, ValueError, "key: got shape"),
        ({"key": key[:, :1], "value": value[:, :1]}, ValueError, "enable_gqa"),
        ({"value": value[:, :, :7]}, ValueError, "value: got shape"),
        ({"attn_mask": torch.ones(3, 8)}, ValueError, "attn_mask: got shape"),
        ({"statistics": ["entropie"]}, ValueError, "statistics: got 'entropie'"),
        ({"statistics": [GroupMass(groups[:7], 2)]}, ValueError, "has groups for 7 keys"),
        ({"statistics": [Distance((2, 3))]}, ValueError, "has 6 tokens"),
    ]
    for _ in range(2):
        call()
        for changes, error, message in wrong:
            with pytest.raises(error, match=message):
                call(**changes)


def test_gradients_are_noticed():
    """A call whose inputs need none says nothing about one whose inputs do, nor the other way round."""
    for training in (False, True, False, True):
        inputs = tensors(requires_grad=training)
        assert attention(*inputs, backend=BACKEND).output.requires_grad == training
        with torch.no_grad():
            assert not attention(*inputs, backend=BACKEND).output.requires_grad


def test_keeps_nothing_alive():
    inputs = tensors(requires_grad=True)
    gate = torch.ones(2, 3, requires_grad=True)
    groups = torch.zeros(8, dtype=torch.int64)
    statistic = GroupMass(groups, 2)
    result = attention(*inputs, edit=HeadEdit(gate), statistics=[statistic], backend=BACKEND)
    alive = [weakref.ref(value) for value in (*inputs, gate, groups, statistic, *statistic.tensors, result.output)]
    del inputs, gate, groups, statistic, result
    gc.collect()
    assert not any(reference() is not None for reference in alive)
