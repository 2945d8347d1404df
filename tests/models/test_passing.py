"""Layers that gradients of gates pass through: what they give, which are replaced, and that nothing else is."""

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from torch.overrides import TorchFunctionMode

import tiny
from headscope import HeadEdit, Scope, Task
from headscope.models.hooks import overrides, passing
from headscope.models.hooks.passing import PassingGradients
from headscope.ops.ordinary import unobserved
from tiny import pictures

ROUNDING = 2.0**-24
acts = pytest.mark.skipif(not PassingGradients()._acts, reason="torch has no MKL or no oneDNN here")


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def is_replaced(output):
    return "_Linear" in type(output.grad_fn).__name__ or "_Gelu" in type(output.grad_fn).__name__


@acts
@pytest.mark.parametrize("shape", [(2, 5, 96), (3, 64, 512), (7, 40), (2, 3, 4, 16)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_a_linear_layer_and_its_gradient_are_those_of_float64(shape, bias, transposed):
    dim, out = shape[-1], 48
    value, weight, offset = drawn(*shape), drawn(out, dim, seed=1), drawn(out, seed=2) if bias else None
    if transposed:
        value = value.transpose(-1, -2).contiguous().transpose(-1, -2)
    cotangent = drawn(*shape[:-1], out, seed=3)
    given = value.requires_grad_()
    with PassingGradients():
        output = functional.linear(given, weight.requires_grad_(), offset)
        assert is_replaced(output)
        gradients = [torch.autograd.grad(output, given, cotangent, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(gradients[0], gradients[1])
    value, weight = value.detach().double(), weight.detach().double()
    offset = torch.zeros(out).double() if offset is None else offset.double()
    # a sum of n products is off by less than n roundings of its terms' magnitudes
    error = (output.double() - functional.linear(value, weight, offset)).abs()
    size = functional.linear(value.abs(), weight.abs(), offset.abs())
    assert bool((error <= (dim + 1) * ROUNDING * size).all())
    error = (gradients[0].double() - cotangent.double() @ weight).abs()
    assert bool((error <= out * ROUNDING * (cotangent.double().abs() @ weight.abs())).all())


@acts
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_and_its_gradient_are_torchs(approximate):
    value = torch.linspace(-12, 12, 4001).requires_grad_()
    cotangent = drawn(4001)
    with PassingGradients():
        output = functional.gelu(value, approximate=approximate)
        assert is_replaced(output)
        (found,) = torch.autograd.grad(output, value, cotangent)
    expected = functional.gelu(value, approximate=approximate)
    (gradient,) = torch.autograd.grad(expected, value, cotangent)
    assert torch.equal(output, expected)
    # the derivative is at most 1.13, rounded once before the product and the product once
    assert float((found - gradient).abs().max()) <= 4 * ROUNDING * float(cotangent.abs().max())


def cases():
    value, weight = drawn(3, 8, 16).requires_grad_(), drawn(4, 16, seed=1)
    factor = torch.tensor(2.0, requires_grad=True)
    yield "float64", value.double(), weight.double()
    yield "bfloat16", value.bfloat16(), weight.bfloat16()
    yield "one dimension", drawn(16).requires_grad_(), weight
    yield "no rows", drawn(0, 16).requires_grad_(), weight
    yield "a weight that is computed", value, weight * factor
    yield "a weight of one output", value, weight[0]
    yield "a class of tensors", value.as_subclass(type("Own", (torch.Tensor,), {})), weight


@pytest.mark.parametrize(("value", "weight"), [pytest.param(*case[1:], id=case[0]) for case in cases()])
def test_other_linear_layers_are_torchs(value, weight):
    with PassingGradients():
        output = functional.linear(value, weight)
    assert not is_replaced(output)
    assert torch.equal(output, functional.linear(value, weight))


def test_a_computed_weight_has_its_gradient():
    factor = torch.tensor(2.0, requires_grad=True)
    value, weight = drawn(3, 8, 16).requires_grad_(), drawn(4, 16, seed=1)
    with PassingGradients():
        (found,) = torch.autograd.grad(functional.linear(value, weight * factor).sum(), factor)
    (expected,) = torch.autograd.grad(functional.linear(value, weight * factor).sum(), factor)
    assert torch.equal(found, expected)


def test_autocast_decides_as_without_it():
    with torch.autocast("cpu", torch.bfloat16), PassingGradients():
        output = functional.linear(drawn(3, 8, 16), drawn(4, 16))
    assert output.dtype == torch.bfloat16


def test_sizes_that_do_not_fit_are_torchs_error():
    with PassingGradients(), pytest.raises(RuntimeError, match="cannot be multiplied"):
        functional.linear(drawn(3, 8, 16), drawn(4, 15))
    with PassingGradients(), pytest.raises(RuntimeError, match="size"):
        functional.linear(drawn(3, 8, 16), drawn(4, 16), drawn(5))


@acts
@pytest.mark.parametrize("bias", [drawn(96)[::2], drawn(1).expand(48), drawn(49)[1:]], ids=["strided", "one", "offset"])
def test_a_bias_is_read_by_its_strides(bias):
    value, weight = drawn(3, 8, 16).requires_grad_(), drawn(48, 16, seed=1)
    with PassingGradients():
        output = functional.linear(value, weight, bias)
    assert is_replaced(output)
    size = functional.linear(value.abs(), weight.abs(), bias.abs())
    assert bool(((output - functional.linear(value, weight, bias)).abs() <= 2 * 17 * ROUNDING * size).all())


@acts
@pytest.mark.parametrize("shape", [(3, 8, 16), (8, 16)])
def test_outputs_may_be_changed_in_place(shape):
    value, weight = drawn(*shape).requires_grad_(), drawn(4, 16, seed=1)

    def gradient():
        output = functional.linear(value, weight)
        return torch.autograd.grad(functional.gelu(output.relu_()).mul_(2).sum(), value)[0]

    with PassingGradients():
        found = gradient()
    # sums of 4 products of a factor below 2.3, off by as many roundings as its sum has terms and some, and a weight
    assert float((found - gradient()).abs().max()) <= 64 * ROUNDING * 2.3 * float(weight.abs().sum(0).max())


@acts
def test_a_linear_layer_can_be_differentiated_again():
    value, weight = drawn(3, 8, 16).requires_grad_(), drawn(4, 16, seed=1)

    def second():
        energy = functional.linear(value, weight).pow(3).sum()
        (force,) = torch.autograd.grad(energy, value, create_graph=True)
        return torch.autograd.grad(force.sum(), value)[0]

    with PassingGradients():
        found = second()
    expected = second()
    assert float(expected.abs().max()) > 0
    assert float((found - expected).abs().max()) <= 100 * ROUNDING * float(expected.abs().max())


@acts
def test_gelu_says_that_it_cannot_be_differentiated_again():
    value = drawn(8).requires_grad_()
    with PassingGradients():
        output = functional.gelu(value)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(output.sum(), value, create_graph=True)


# torch's own forward-mode formulas are scripts
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_forward_mode_gradients_are_torchs():
    with torch.autograd.forward_ad.dual_level(), PassingGradients():
        value = torch.autograd.forward_ad.make_dual(drawn(8, 16), drawn(8, 16, seed=1))
        output = functional.gelu(functional.linear(value, drawn(4, 16)))
        assert torch.autograd.forward_ad.unpack_dual(output).tangent is not None


def test_weights_made_in_inference_mode_are_torchs():
    with torch.inference_mode():
        layer = torch.nn.Linear(16, 4)
    with PassingGradients():
        assert torch.equal(layer(drawn(8, 16)), functional.linear(drawn(8, 16), layer.weight, layer.bias))


def test_a_weight_whose_rows_overlap_is_torchs():
    value, weight = drawn(8, 16).requires_grad_(), drawn(100).as_strided((24, 16), (1, 2))
    with PassingGradients():
        output = functional.linear(value, weight)
    assert torch.equal(output, functional.linear(value, weight))


@pytest.mark.full
def test_a_part_may_be_compiled_without_breaks():
    layers = torch.nn.Sequential(torch.nn.Linear(16, 4), torch.nn.GELU())
    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
    with PassingGradients():
        output = compiled(drawn(8, 16))
    assert torch.allclose(output, layers(drawn(8, 16)), rtol=1e-5, atol=1e-6)


class Listening(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_another_mode_sees_the_calls_that_it_would_without():
    value = drawn(3, 8, 16).requires_grad_()
    with Listening() as listening, PassingGradients():
        output = functional.linear(value, drawn(4, 16))
        assert not unobserved()
    assert functional.linear in listening.seen
    assert not is_replaced(output)


def test_attention_takes_no_notice_of_it():
    with PassingGradients():
        assert unobserved()
        assert overrides.acting_modes() == []
        with Listening():
            assert not unobserved()


@pytest.mark.parametrize("family", ["ddpm", "dit", "flux", "sd3", "xl"])
def test_attribution_is_that_of_torchs_layers(family, monkeypatch):
    task = TASKS[family]()
    items, timesteps = pictures(2), (200, 600)
    scope, product, products = Scope(task.denoiser), passing._product, []
    monkeypatch.setattr(passing, "_product", lambda *given: products.append(given) or product(*given))
    found = scope.attribute(task, items, timesteps, cotangents=2, integrate=2)
    assert bool(products) == PassingGradients()._acts
    monkeypatch.setattr(passing, "_REPLACED", {})
    expected = scope.attribute(task, items, timesteps, cotangents=2, integrate=2)
    assert found.heads == expected.heads
    for name in ("loss", "g", "c", "integrated"):
        one, other = getattr(found, name), getattr(expected, name)
        # float32 roundings through some tens of layers
        assert np.abs(one - other).max() <= 1e-4 * np.abs(other).max(), name
        assert np.abs(other).max() > 0, name


TASKS = {
    "ddpm": lambda: Task.of(tiny.ddpm()),
    "dit": lambda: Task.of(tiny.pixel_dit()),
    "flux": lambda: Task.of(tiny.flux()),
    "sd3": lambda: Task.of(tiny.stable_diffusion_3(layers=2)),
    "xl": lambda: Task.of(tiny.stable_diffusion_xl()),
}


def test_checkpointed_layers_run_again_as_they_ran():
    task = Task.of(tiny.flux(double=1, single=1))
    scope, items = Scope(task.denoiser), pictures(2)
    expected = scope.attribute(task, items, [300], cotangents=2)
    task.denoiser.enable_gradient_checkpointing()
    found = scope.attribute(task, items, [300], cotangents=2)
    assert np.abs(found.g - expected.g).max() <= 1e-5 * np.abs(expected.g).max()
    assert np.abs(found.c - expected.c).max() <= 1e-5 * np.abs(expected.c).max()


def test_two_threads_attribute_at_once():
    """A mode that acts on attention would rule that out."""
    results, tasks = {}, [Task.of(tiny.ddpm()) for _ in range(2)]

    def attribute(number):
        task = tasks[number]
        results[number] = Scope(task.denoiser).attribute(task, pictures(1), [300], cotangents=1).g

    threads = [threading.Thread(target=attribute, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(results[0], results[1])


def test_gates_keep_their_gradients():
    task = Task.of(tiny.ddpm())
    scope = Scope(task.denoiser)
    inputs = task.noisy_inputs(task.prepare(pictures(1)), 300)
    site = scope.sites[0]
    gate = torch.ones(1, site.heads, requires_grad=True)
    with PassingGradients(), scope.edit({site.name: HeadEdit(gate)}):
        (found,) = torch.autograd.grad(task.loss(inputs).sum(), gate)
    with scope.edit({site.name: HeadEdit(gate)}):
        (expected,) = torch.autograd.grad(task.loss(inputs).sum(), gate)
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    assert float(expected.abs().max()) > 0
