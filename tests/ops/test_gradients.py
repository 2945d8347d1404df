"""Gradients: the reference by gradcheck, every other backend against the reference."""

import pytest
import torch

from contract import CASES, Case, make_inputs
from gradients import COMPARABLE, gradients_of
from headscope.ops import GroupMass, HeadEdit, attention
from ops.backends import require_backend

DIFFERENTIABLE = ["entropy", "logsumexp"]
NAMES = ("query", "key", "value", "mask", "gate", "fill", "temperature", "key_bias", "key_scale")
GROUPS = torch.tensor([[0, 1, -1, 1, 0, 2], [2, -1, 0, 0, 0, 1]])


def _tensors(seed: int, dtype=torch.float64):
    torch.manual_seed(seed)
    shapes = [(2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 2), (1, 4, 5, 6), (2, 4), (4, 5, 2), (1, 4), (2, 1, 6), (2, 4, 6)]
    tensors = [torch.randn(*shape, dtype=dtype) for shape in shapes]
    query, key, value, mask, gate, fill, temperature, key_bias, key_scale = tensors
    mask[..., 1, :] = -torch.inf
    gate = gate.sigmoid()
    gate[0, 0], gate[1, 1] = 0.0, 1.0
    temperature = temperature.exp()
    return [
        tensor.requires_grad_() for tensor in (query, key, value, mask, gate, fill, temperature, key_bias, key_scale)
    ]


def _call(backend, query, key, value, mask, gate, fill, temperature, key_bias, key_scale):
    result = attention(
        query,
        key,
        value,
        attn_mask=mask,
        enable_gqa=True,
        edit=HeadEdit(gate, fill, temperature, key_bias, key_scale),
        statistics=[*DIFFERENTIABLE, GroupMass(GROUPS, 3)],
        backend=backend,
    )
    finite = torch.where(result.statistics["logsumexp"].isinf(), 0, result.statistics["logsumexp"])
    return result.output, result.statistics["entropy"], finite, result.statistics["group_mass"]


def test_gradcheck_of_the_reference():
    tensors = _tensors(0)
    # finite differences can't follow -inf, nor the jump of a gate at exactly 0 and 1
    tensors[3] = tensors[3].detach().clamp(min=-3.0).requires_grad_()
    tensors[4] = tensors[4].detach().clamp(0.1, 0.9).requires_grad_()
    assert torch.autograd.gradcheck(lambda *tensors: _call("reference", *tensors), tensors)


@pytest.mark.parametrize("chunk_bytes", [8 * 2**20, 512])
def test_portable_gradients_equal_the_reference(chunk_bytes, monkeypatch):
    from headscope.ops import portable

    monkeypatch.setattr(portable, "CHUNK_BYTES", chunk_bytes)
    tensors = _tensors(1)
    cotangents = [torch.randn_like(output) for output in _call("reference", *tensors)]
    expected = torch.autograd.grad(_call("reference", *tensors), tensors, cotangents)
    got = torch.autograd.grad(_call("portable", *tensors), tensors, cotangents)
    for name, a, b in zip(NAMES, got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", COMPARABLE, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", ["portable", "cpu", "triton"])
def test_gradients_equal_the_reference(backend: str, case: Case):
    """Within float32's rounding: sums of up to hundreds of terms, relative to the largest gradient."""
    require_backend(backend)
    inputs = make_inputs(case, torch.float32)
    expected = gradients_of(inputs, "reference")
    got = gradients_of(inputs, backend)
    assert set(got) == set(expected)
    for name, gradient in expected.items():
        size = float(gradient.abs().max()) if gradient.numel() else 0.0
        torch.testing.assert_close(
            got[name], gradient, rtol=0, atol=2e-5 * size + 1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("backend", ["reference", "portable", "cpu", "triton"])
def test_gate_gradient_at_exactly_zero_and_one(backend):
    """d output / d gate = attention - fill wherever the gate stands."""
    require_backend(backend)
    query, key, value, _, _, fill, *_ = (tensor.detach().float() for tensor in _tensors(2))
    gate = torch.tensor([[0.0, 1.0, 0.5, 1.0]], requires_grad=True)
    attended = attention(query, key, value, enable_gqa=True, backend="reference").output
    output = attention(query, key, value, enable_gqa=True, edit=HeadEdit(gate, fill), backend=backend).output
    (grad,) = torch.autograd.grad(output.sum(), gate)
    torch.testing.assert_close(grad, (attended - fill).sum((0, 2, 3))[None])


@pytest.mark.parametrize("backend", ["reference", "portable", "cpu", "triton"])
def test_the_others_carry_no_gradient(backend):
    require_backend(backend)
    query, key, value = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    fixed = ["max_logit", "max_prob", "collision_entropy", "key_mass"]
    result = attention(query, key, value, statistics=[*fixed, "entropy"], backend=backend)
    for name in fixed:
        assert not result.statistics[name].requires_grad, name
    assert result.statistics["entropy"].requires_grad


@pytest.mark.parametrize("backend", ["reference", "portable", "cpu", "triton"])
def test_dead_rows_have_zero_gradient(backend):
    require_backend(backend)
    query, key, value = (torch.randn(1, 1, 4, 8, requires_grad=True) for _ in range(3))
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[2] = False
    result = attention(query, key, value, attn_mask=mask, statistics=DIFFERENTIABLE, backend=backend)
    total = result.output.sum() + result.statistics["entropy"].sum() + result.statistics["logsumexp"][..., :2].sum()
    grads = torch.autograd.grad(total, (query, key, value))
    assert torch.equal(grads[0][:, :, 2], torch.zeros(1, 1, 8))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("backend", ["portable", "cpu", "triton"])
def test_a_second_derivative_is_an_error_that_says_what_can(backend):
    require_backend(backend)
    query = torch.randn(1, 2, 5, 8, requires_grad=True)
    entropy = attention(query, query, query, statistics="entropy", backend=backend).statistics["entropy"]
    (grad,) = torch.autograd.grad(entropy.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        grad.sum().backward()
    entropy = attention(query, query, query, statistics="entropy", backend="reference").statistics["entropy"]
    (grad,) = torch.autograd.grad(entropy.sum(), query, create_graph=True)
    grad.sum().backward()
    assert query.grad is not None


@pytest.mark.parametrize("backend", ["portable", "cpu", "triton"])
def test_bfloat16_training(backend):
    require_backend(backend)
    inputs = make_inputs(CASES[0], torch.bfloat16)
    query = inputs.query.clone().requires_grad_()
    result = attention(query, inputs.key, inputs.value, statistics=["entropy"], backend=backend)
    (grad,) = torch.autograd.grad(result.output.float().sum() + result.statistics["entropy"].sum(), query)
    assert grad.dtype == torch.bfloat16
    assert grad.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "portable", "cpu", "triton"])
def test_gate_gradient_with_a_uniform_fill(backend):
    """attention - fill wherever the gate stands, with a mask that hides nothing and with none at all."""
    require_backend(backend)
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    weights = torch.randn(1, 2, 5, 8)
    attended = attention(query, key, value, backend="reference").output
    expected = ((attended - value.mean(2, keepdim=True)) * weights).sum((2, 3))
    for mask in (None, torch.ones(5, 7, dtype=torch.bool)):
        for stands in (1.0, 0.0, 0.3):
            gate = torch.full((1, 2), stands, requires_grad=True)
            edit = HeadEdit(gate, "uniform")
            output = attention(query, key, value, attn_mask=mask, edit=edit, backend=backend).output
            (grad,) = torch.autograd.grad((output * weights).sum(), gate)
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["portable", "cpu", "triton"])
def test_nan_in_a_removed_head_stays_out_of_the_gradients(backend):
    require_backend(backend)
    query, key, value = torch.randn(1, 2, 5, 8), torch.randn(1, 1, 7, 8), torch.randn(1, 1, 7, 8)
    query[:, 0] = torch.nan
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    edit = HeadEdit(torch.tensor([[0.0, 1.0]]))
    output = attention(*leaves, enable_gqa=True, edit=edit, backend=backend).output
    grads = torch.autograd.grad(output.sum(), leaves)
    assert torch.equal(grads[0][:, 0], torch.zeros(1, 5, 8))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("backend", ["portable", "cpu", "triton"])
def test_a_key_that_no_query_sees_gets_nothing(backend):
    """Also where it is NaN, and where the last tile of queries isn't full."""
    require_backend(backend)
    query, key, value = (torch.randn(1, 1, tokens, 8) for tokens in (5, 7, 7))
    key[..., 6, :] = torch.nan
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    result = attention(*leaves, is_causal=True, statistics=["key_mass"], backend=backend)
    assert result.statistics["key_mass"][..., 5:].tolist() == [[[0.0, 0.0]]]
    _, key_grad, value_grad = torch.autograd.grad(result.output.sum(), leaves)
    assert torch.equal(key_grad[..., 5:, :], torch.zeros(1, 1, 2, 8))
    assert torch.equal(value_grad[..., 5:, :], torch.zeros(1, 1, 2, 8))


@pytest.mark.parametrize("backend", ["portable", "cpu", "triton"])
def test_any_layout_of_cotangents(backend):
    require_backend(backend)
    query, key, value = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    weights = torch.randn(1, 5, 2)
    found = []
    for name in ("reference", backend):
        entropy = attention(query, key, value, statistics=["entropy"], backend=name).statistics["entropy"]
        found.append(torch.autograd.grad((entropy.transpose(1, 2) * weights).sum(), (query, key)))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["portable", "cpu", "triton"])
def test_gradients_have_the_strides_that_compiled_code_expects(backend):
    """Every gradient is laid out as `empty_like` of its tensor, whatever that is laid out like."""
    require_backend(backend)
    query, key, value = (torch.randn(2, 7, 2, 8).transpose(1, 2) for _ in range(3))
    mask = torch.randn(2, 2, 7, 7).transpose(2, 3)
    gate, temperature = torch.rand(2, 2).t(), torch.rand(2, 2).t() + 0.5
    fill = torch.randn(2, 2, 8, 7).transpose(2, 3)
    key_bias = torch.randn(2, 7, 1).transpose(1, 2)
    leaves = [t.requires_grad_() for t in (query, key, value, mask, gate, fill, temperature, key_bias)]
    edit = HeadEdit(gate, fill, temperature, key_bias)
    output = attention(query, key, value, attn_mask=mask, edit=edit, backend=backend).output
    for leaf, grad in zip(leaves, torch.autograd.grad(output.sum(), leaves), strict=True):
        assert grad.stride() == torch.empty_like(leaf).stride()


@pytest.mark.parametrize("backend", ["portable", "cpu", "triton"])
def test_autocast_leaves_the_inside_alone(backend):
    """Statistics of bfloat16 inputs under autocast are those of the inputs, and so are gradients."""
    require_backend(backend)
    query, key, value = (torch.randn(1, 2, 33, 16) for _ in range(3))
    rounded = [tensor.bfloat16() for tensor in (query, key, value)]
    exact = attention(*rounded, statistics=["logsumexp"], backend="reference").statistics["logsumexp"]
    leaf = rounded[0].clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = attention(query, key, value, statistics=["logsumexp"], backend=backend).statistics["logsumexp"]
        inside = attention(leaf, *rounded[1:], statistics=["logsumexp"], backend=backend).statistics["logsumexp"]
        (grad,) = torch.autograd.grad(inside.sum(), leaf)
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-5)
    outside = attention(leaf, *rounded[1:], statistics=["logsumexp"], backend=backend).statistics["logsumexp"]
    assert torch.equal(grad, torch.autograd.grad(outside.sum(), leaf)[0])


# torch's own forward mode uses it
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("backend", ["portable", "cpu", "triton"])
def test_derivatives_that_only_plain_torch_has_raise(backend):
    require_backend(backend)
    query, key, value = (torch.randn(1, 2, 5, 8) for _ in range(3))
    for transform in (
        lambda run: torch.func.jvp(run, (query,), (query,)),
        lambda run: torch.func.grad(lambda query: run(query).sum())(query),
    ):
        with pytest.raises(RuntimeError, match='backend="reference" has'):
            transform(lambda query: attention(query, key, value, backend=backend).output)
    total = torch.func.grad(lambda query: attention(query, key, value, backend="reference").output.sum())
    assert total(query).abs().sum() > 0


def test_a_statistic_of_ones_own_that_returns_its_input():
    """The caller's cotangent stays as it was."""
    import headscope

    class Probabilities(headscope.Statistic):
        key = "probabilities_themselves"
        differentiable = True

        def shape(self, batch, heads, queries, keys):
            return (batch, heads, queries, keys)

        def formula(self, logits, probabilities, rows, tensors):
            return probabilities

    query, key, value = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    cotangent = torch.randn(1, 2, 5, 5)
    before = cotangent.clone()
    found = []
    for backend in ("reference", "portable"):
        result = attention(query, key, value, statistics=[Probabilities()], backend=backend)
        values = result.statistics["probabilities_themselves"]
        found.append(torch.autograd.grad(values, (query, key), cotangent))
    assert torch.equal(cotangent, before)
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "portable", "cpu"])
@pytest.mark.parametrize("hidden", [torch.finfo(torch.float32).min, -1e30])
def test_logsumexp_of_a_row_that_a_finite_mask_hides_has_the_gradient_p(backend, hidden):
    require_backend(backend)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, rows, 8, generator=generator) for rows in (6, 5, 5))
    mask = torch.zeros(6, 5)
    mask[4] = hidden
    mask.requires_grad_()
    found = attention(query, key, value, attn_mask=mask, statistics="logsumexp", backend=backend)
    (gradient,) = torch.autograd.grad(found.statistics["logsumexp"].sum(), mask)
    # such logits are all one number, and each row's p sum to 1
    assert torch.allclose(gradient[4], torch.full((5,), 0.2), rtol=0, atol=2e-7 * 5)
    assert torch.allclose(gradient.sum(1), torch.ones(6), rtol=0, atol=1e-5)
