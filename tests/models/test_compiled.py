"""Compiled models: recordings and edits are those of the plain model, and no layer or step is compiled anew."""

import warnings

import pytest
import torch
import torch.nn.functional as functional

import tiny
from headscope import AttnProcessor, HeadEdit, Scope

BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def whole(model):
    model.compile(backend=BACKEND, fullgraph=True)
    return model


def by_block(model):
    model.compile_repeated_blocks(backend=BACKEND, fullgraph=True)
    return model


def calls_of(family):
    if family == "unet":
        sample = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        return tiny.ddpm().unet, lambda model, t: model(sample, torch.tensor(t), return_dict=False)[0]
    inputs = tiny.flux_inputs()
    model = tiny.flux_transformer(double=1, single=9)
    return model, lambda model, t: model(**{**inputs, "timestep": torch.full((2,), float(t))}, return_dict=False)[0]


@pytest.mark.parametrize(("family", "how"), [("unet", whole), ("flux", by_block)], ids=["whole", "by block"])
def test_a_compiled_model_is_recorded_and_edited(family, how):
    model, call = calls_of(family)
    scope = Scope(model)
    name = scope.sites[-1].name
    with torch.inference_mode():
        with scope.record("entropy") as recording:
            expected = [call(model, t) for t in (3, 5)]
        with scope.edit({name: [1]}):
            edited = call(model, 3)
        compiled = how(model)
        stock = call(compiled, 3)
        scope = Scope(compiled)
        with scope.record("entropy", "head_output") as found:
            outputs = [call(compiled, t) for t in (3, 5)]
        made = graphs()
        with scope.record("entropy"), scope.edit({name: [1]}):
            compiled_edit = call(compiled, 3)
        # recordings, edits and steps are data to the compiled code
        assert graphs() == made
        assert torch.equal(call(compiled, 3), stock)
        assert graphs() == made
    for one, other in zip(outputs, expected, strict=True):
        assert float((one - other).abs().max()) <= 1e-5
    assert float((compiled_edit - edited).abs().max()) <= 1e-5
    assert float((edited - stock).abs().max()) > 1e-5
    one, other = recording.to_polars(), found.to_polars()
    columns = ["step", "timestep", "site", "call", "sample", "head", "query_group", "queries", "keys"]
    assert one.select(columns).equals(other.select(columns))
    assert other["entropy_mean"].to_numpy() == pytest.approx(one["entropy_mean"].to_numpy(), abs=1e-5)


def test_another_model_of_the_class_is_not_mistaken_for_the_observed_one():
    """Code compiled while a Scope is active knows which modules carry its hooks."""
    observed, other = (tiny.flux_transformer(double=0, single=3) for _ in range(2))
    inputs = tiny.flux_inputs()
    for model in (observed, other):
        model.compile_repeated_blocks(backend=BACKEND, fullgraph=True)
    with torch.inference_mode():
        with Scope(observed).record("entropy") as recording:
            other(**inputs)
            observed(**inputs)
            other(**inputs)
            observed(**inputs)
        assert set(recording.to_polars()["step"]) == {0, 1}
        assert len(recording) == 6
        with Scope(other).record("entropy") as recording:
            observed(**inputs)
            other(**inputs)
        assert len(recording) == 3


def test_leaving_restores_the_compiled_model():
    model, call = calls_of("unet")
    before = functional.scaled_dot_product_attention
    model.compile(backend=BACKEND, fullgraph=True)
    compiled = model.__dict__["_compiled_call_impl"]
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match=r"edit\.fill: got shape"),
        Scope(model).edit({"*": [0]}, fill=torch.zeros(2, 2, 2, 2)),
    ):
        call(model, 3)
    assert functional.scaled_dot_product_attention is before
    assert torch._dynamo.config.skip_nnmodule_hook_guards
    assert model.__dict__["_compiled_call_impl"] is compiled
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not any("headscope" in name for m in model.modules() for name in m.__dict__)


def test_gradients_of_a_compiled_model_are_refused():
    model, call = calls_of("unet")
    model.compile(backend=BACKEND, fullgraph=True)
    with Scope(model).record("entropy"), pytest.raises(RuntimeError, match=r"before torch\.compile"):
        call(model, 3).sum().backward()


@pytest.mark.parametrize("backend", ["cpu", "portable", "reference"])
def test_gradients_of_a_compiled_model_with_processors(backend):
    """Of weights, input and gate, through outputs and entropies: the plain model's."""
    model, call = calls_of("unet")
    gate = torch.tensor([[1.0, 0.5, 1.0, 0.0]], requires_grad=True)
    modules = [module for module in model.modules() if hasattr(module, "set_processor")]
    for module in modules:
        module.set_processor(AttnProcessor(edit=HeadEdit(gate), statistics=["entropy"], backend=backend))
    inputs = [gate, *model.parameters()]

    def gradients():
        loss = call(model, 3).square().sum()
        loss = loss + sum(module.processor.latest["entropy"].mean() for module in modules)
        return torch.autograd.grad(loss, inputs)

    expected = gradients()
    model.compile(backend=BACKEND, fullgraph=True)
    for one, other in zip(expected, gradients(), strict=True):
        assert float((one - other).abs().max()) <= 1e-5 * max(1.0, float(one.abs().max()))
    assert float(expected[0].abs().min()) > 0


@pytest.mark.full
def test_inductor():
    model, call = calls_of("unet")
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Scope(model).record("entropy") as expected:
            stock = call(model, 3)
        model.compile(fullgraph=True)
        with Scope(model).record("entropy") as recording:
            output = call(model, 3)
    assert float((output - stock).abs().max()) <= 1e-4
    found, wanted = (r.to_polars()["entropy_mean"].to_numpy() for r in (recording, expected))
    assert found == pytest.approx(wanted, abs=1e-4)
