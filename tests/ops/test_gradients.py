"""Gradients: the reference by gradcheck, portable against the reference; errors where there is no backward."""

import pytest
import torch

from contract import CASES, make_inputs
from headscope.ops import HeadEdit, attention

DIFFERENTIABLE = ["entropy", "logsumexp"]


def _tensors(seed: int, dtype=torch.float64):
    torch.manual_seed(seed)
    shapes = [(2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 2), (1, 4, 5, 6), (2, 4), (4, 5, 2)]
    query, key, value, mask, gate, fill = (torch.randn(*shape, dtype=dtype) for shape in shapes)
    mask[..., 1, :] = -torch.inf
    gate = gate.sigmoid()
    gate[0, 0], gate[1, 1] = 0.0, 1.0
    return [tensor.requires_grad_() for tensor in (query, key, value, mask, gate, fill)]


def _call(backend, query, key, value, mask, gate, fill):
    result = attention(
        query,
        key,
        value,
        attn_mask=mask,
        enable_gqa=True,
        edit=HeadEdit(gate, fill),
        statistics=DIFFERENTIABLE,
        backend=backend,
    )
    finite = torch.where(result.statistics["logsumexp"].isinf(), 0, result.statistics["logsumexp"])
    return result.output, result.statistics["entropy"], finite


def test_gradcheck_of_the_reference():
    query, key, value, mask, gate, fill = _tensors(0)
    finite_mask = mask.detach().clamp(min=-3.0).requires_grad_()
    # exact gates select, so finite differences there see a jump in nothing but rounding; keep them inside (0, 1)
    inner_gate = gate.detach().clamp(0.1, 0.9).requires_grad_()
    inputs = (query, key, value, finite_mask, inner_gate, fill)
    assert torch.autograd.gradcheck(lambda *tensors: _call("reference", *tensors), inputs)


@pytest.mark.parametrize("chunk_bytes", [8 * 2**20, 512])
def test_portable_gradients_equal_the_reference(chunk_bytes, monkeypatch):
    from headscope.ops import portable

    monkeypatch.setattr(portable, "CHUNK_BYTES", chunk_bytes)
    tensors = _tensors(1)
    cotangents = [torch.randn_like(output) for output in _call("reference", *tensors)]
    expected = torch.autograd.grad(_call("reference", *tensors), tensors, cotangents)
    got = torch.autograd.grad(_call("portable", *tensors), tensors, cotangents)
    for name, a, b in zip(("query", "key", "value", "mask", "gate", "fill"), got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_gate_gradient_at_exactly_zero_and_one():
    """d output / d gate = attention - fill wherever the gate stands."""
    query, key, value, _, _, fill = (tensor.detach() for tensor in _tensors(2))
    gate = torch.tensor([[0.0, 1.0, 0.5, 1.0]], dtype=torch.float64, requires_grad=True)
    attended = attention(query, key, value, enable_gqa=True, backend="reference").output
    for backend in ("reference", "portable"):
        output = attention(query, key, value, enable_gqa=True, edit=HeadEdit(gate, fill), backend=backend).output
        (grad,) = torch.autograd.grad(output.sum(), gate)
        torch.testing.assert_close(grad, (attended - fill).sum((0, 2, 3))[None])


def test_max_statistics_carry_no_gradient():
    query, key, value = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    for backend in ("reference", "portable"):
        result = attention(query, key, value, statistics=["max_logit", "max_prob", "entropy"], backend=backend)
        assert not result.statistics["max_logit"].requires_grad
        assert not result.statistics["max_prob"].requires_grad
        assert result.statistics["entropy"].requires_grad


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_forward_only_backends_say_so(backend):
    query, key, value = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    with pytest.raises(RuntimeError, match=r"no backward|source"):
        attention(query, key, value, backend=backend)
    assert attention(query, key, value).output.requires_grad


def test_dead_rows_have_zero_gradient():
    query, key, value = (torch.randn(1, 1, 4, 8, requires_grad=True) for _ in range(3))
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[2] = False
    for backend in ("reference", "portable"):
        result = attention(query, key, value, attn_mask=mask, statistics=DIFFERENTIABLE, backend=backend)
        total = result.output.sum() + result.statistics["entropy"].sum() + result.statistics["logsumexp"][..., :2].sum()
        (grad,) = torch.autograd.grad(total, query)
        assert torch.equal(grad[:, :, 2], torch.zeros(1, 1, 8))
        assert grad.isfinite().all()


def test_bfloat16_training_runs_on_portable():
    inputs = make_inputs(CASES[0], torch.bfloat16)
    query = inputs.query.clone().requires_grad_()
    result = attention(query, inputs.key, inputs.value, statistics=["entropy"])
    (grad,) = torch.autograd.grad(result.output.float().sum() + result.statistics["entropy"].sum(), query)
    assert grad.dtype == torch.bfloat16
    assert grad.isfinite().all()
