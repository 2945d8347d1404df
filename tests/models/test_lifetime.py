"""Scopes while the model around them changes: interrupts, copies, parts run alone, replacements, checkpointing."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as functional

import tiny
from headscope import Scope
from headscope.models.hooks import routing
from running import run

SITES = ["down_blocks.1.attentions.0", "mid_block.attentions.0"]


@pytest.fixture
def unet():
    return tiny.ddpm().unet


def entropies(recording):
    return recording.to_polars()["entropy_mean"].to_numpy()


def test_a_context_goes_on_after_an_interrupt_as_if_the_forward_had_not_been(unet, sample):
    """Attention between the interrupt and the next forward, a text encoder's say, is none of the site's either."""
    scope = Scope(unet)
    with scope.record("entropy") as expected:
        run(unet, sample)
    with scope.record("entropy") as recording:
        interrupt = unet.get_submodule(SITES[1]).to_out[0].register_forward_pre_hook(_interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(unet, sample)
        interrupt.remove()
        assert not routing.active()
        functional.scaled_dot_product_attention(*(torch.randn(3, 4, 16, 8) for _ in range(3)))
        run(unet, sample)
    assert len(recording) == 2
    assert set(recording.to_polars()["forward"]) == {1}
    assert entropies(recording) == pytest.approx(entropies(expected), abs=1e-6)


def _interrupt(module, args):
    raise KeyboardInterrupt


def test_a_forward_that_is_refused_loses_nothing_of_the_one_before(unet, sample, monkeypatch):
    """On a GPU, tensors wait for some forwards until their timesteps are read."""
    scope = Scope(unet)
    with scope.record("head_output") as recording:
        with monkeypatch.context() as patched:
            patched.setattr(type(recording.tensors), "end_forward", lambda self, forward: None)
            run(unet, sample)
        with pytest.raises(ValueError, match="without a tensor"):
            unet(None, 3)
    assert recording.mean("head_output", SITES[0], 0, 7).shape == (4, 64, 8)


def test_copies_are_refused_inside_and_clean_outside(unet, sample):
    scope = Scope(unet)
    stock = run(unet, sample)
    with scope.record("entropy"):
        for copied in (unet, unet.mid_block):
            with pytest.raises(RuntimeError, match="can't be copied or pickled inside a Scope"):
                copy.deepcopy(copied)
            with pytest.raises(RuntimeError, match="can't be copied or pickled inside a Scope"):
                pickle.dumps(copied)
        weights = unet.state_dict()
    assert set(weights) == set(dict(unet.named_parameters()))
    assert torch.equal(run(copy.deepcopy(unet), sample), stock)
    assert not any("headscope" in name for module in unet.modules() for name in vars(module))
    assert unet.__dict__.get("_compiled_call_impl") is None


def test_scopes_of_a_model_and_of_its_part_are_not_active_together(unet, sample):
    whole, part = Scope(unet), Scope(unet.mid_block)
    with whole.record("entropy") as recording:
        with pytest.raises(RuntimeError, match="another Scope is active"), part.record("entropy"):
            pass
        run(unet, sample)
    with part.record("entropy"), pytest.raises(RuntimeError, match="another Scope is active"), whole.record("entropy"):
        pass
    assert len(recording) == 2
    with part.record("entropy") as recording:
        run(unet, sample)
    assert recording.to_polars()["site"].unique().to_list() == ["attentions.0"]


def test_what_runs_outside_of_a_forward_is_refused(unet, sample):
    """A method or a part of the model, called by itself, tells nothing of batch and timestep."""
    scope = Scope(unet)
    message = "'mid_block.attentions.0' ran outside of a forward of UNet2DModel.* call the model itself"
    hidden, embedding = torch.randn(1, 32, 8, 8), torch.randn(1, 64)
    with scope.record("entropy", sites=[SITES[1]]) as recording:
        for act in (lambda: unet.mid_block(hidden, embedding), lambda: unet.forward(sample, 7)):
            with pytest.raises(RuntimeError, match=message):
                act()
        run(unet, sample)
        with pytest.raises(RuntimeError, match=message):
            unet.mid_block(hidden, embedding)
    assert len(recording) == 1
    with scope.edit({SITES[1]: [0]}), pytest.raises(RuntimeError, match=message):
        unet.mid_block(hidden, embedding)
    # elsewhere nothing is asked of it
    with scope.record("entropy", sites=[SITES[0]]):
        unet.mid_block(hidden, embedding)


def test_an_autoencoder_is_called_as_a_whole():
    autoencoder = tiny.autoencoder()
    scope = Scope(autoencoder)
    with scope.record("entropy") as recording:
        with pytest.raises(RuntimeError, match=r"outside of a forward of AutoencoderKL.*vae\.encode"):
            autoencoder.encode(torch.zeros(1, 3, 16, 16))
        autoencoder(torch.zeros(1, 3, 16, 16))
    assert len(recording) == len(scope.sites)


def test_a_pipelines_denoiser_is_looked_up_when_a_context_begins():
    pipeline = tiny.ddpm()
    scope, stock = Scope(pipeline), pipeline.unet
    pipeline.unet = torch.compile(stock, backend="eager")
    with scope.record("entropy"):
        # a compiled model is told of from outside, where nothing of it is traced
        assert not stock._forward_pre_hooks
        assert pipeline.unet._forward_pre_hooks
    pipeline.unet = copy.deepcopy(stock)
    with pytest.raises(RuntimeError, match="DDPMPipeline has another denoiser"), scope.record("entropy"):
        pass


def test_what_is_changed_inside_a_context_stays(unet, sample):
    """The function for checkpointing, and a compiled call."""

    def checkpoint(function, *args):
        return function(*args)

    unet.enable_gradient_checkpointing()
    with Scope(unet).record("entropy"):
        run(unet, sample)
        unet.enable_gradient_checkpointing(checkpoint)
        run(unet, sample)
        unet.compile(backend="eager")
        compiled = vars(unet)["_compiled_call_impl"]
    assert vars(unet)["_compiled_call_impl"] is compiled
    assert vars(unet.mid_block)["_gradient_checkpointing_func"] is checkpoint


@pytest.mark.parametrize("first", ["record", "edit"])
def test_checkpointing_switched_on_inside_a_context_is_seen(first):
    model, inputs = tiny.flux_transformer(), tiny.flux_inputs()
    hidden = inputs["hidden_states"].requires_grad_()
    scope = Scope(model)

    def gradient(switch):
        with scope.record("entropy") if first == "record" else scope.edit({"*": [0]}):
            switch()
            loss = model(**inputs, return_dict=False)[0].square().sum()
            return torch.autograd.grad(loss, hidden, retain_graph=True)[0], loss

    plain, _ = gradient(model.disable_gradient_checkpointing)
    again, loss = gradient(model.enable_gradient_checkpointing)
    assert float((again - plain).abs().max()) <= 1e-5 * float(plain.abs().max())
    with pytest.raises(RuntimeError, match="call backward inside the contexts"):
        loss.backward()
    # another context of the same scope is none of the forward's
    with scope.record("entropy"):
        with scope.edit({"*": [0]}):
            loss = model(**inputs, return_dict=False)[0].square().sum()
        with pytest.raises(RuntimeError, match="call backward inside the contexts"):
            loss.backward()


def test_a_compiled_models_forward_that_is_refused_has_ended(unet, sample):
    """Parts that run after it are outside of a forward."""
    unet.compile(backend="eager")
    with Scope(unet).record("entropy"):
        with pytest.raises(ValueError, match="without a tensor"):
            unet(None, 3)
        with pytest.raises(RuntimeError, match="ran outside of a forward"):
            unet.mid_block.attentions[0](torch.zeros(1, 32, 8, 8))


def test_a_default_device_of_the_users_is_none_of_the_scopes(unet, sample):
    with torch.device("meta"), Scope(unet).record("entropy"):
        handle = vars(unet.get_submodule(SITES[0]))[routing.HANDLE]
    assert handle.device.type == "cpu"
