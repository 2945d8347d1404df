"""Contexts of a Scope: they nest, and leave nothing behind."""

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as functional

import tiny
from headscope import Scope
from headscope.models.hooks import attachment, routing
from running import hooks, run


def test_an_exception_leaves_nothing_behind(unet, sample):
    scope = Scope(unet)
    stock = run(unet, sample)
    original = functional.scaled_dot_product_attention

    def fail(module, args):
        raise RuntimeError("planned")

    handle = unet.get_submodule(scope.sites[0].name).to_out[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="planned"), scope.record("entropy"):
        run(unet, sample)
    handle.remove()
    assert functional.scaled_dot_product_attention is original
    assert hooks(unet) == 0
    assert torch.equal(run(unet, sample), stock)
    with scope.record("entropy") as recording:
        run(unet, sample)
    assert len(recording) == 2


@pytest.mark.parametrize(
    ("place", "done"), [("observe", False), ("observe", True), ("ForwardWrap", False), ("install", False)]
)
def test_an_interrupt_while_a_context_begins_leaves_nothing_behind(unet, sample, monkeypatch, place, done):
    scope, original = Scope(unet), functional.scaled_dot_product_attention
    where = attachment if place == "ForwardWrap" else routing
    step, calls = getattr(where, place), []

    def interrupted(*arguments):
        calls.append(arguments)
        # in the middle of the sites
        if place == "observe" and len(calls) == 1:
            return step(*arguments)
        if place == "observe" and done:
            step(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as moment:
        moment.setattr(where, place, interrupted)
        with pytest.raises(KeyboardInterrupt), scope.record("entropy"):
            pass
    assert calls
    assert functional.scaled_dot_product_attention is original
    assert hooks(unet) == 0
    assert not any(routing.HANDLE in module.__dict__ for module in unet.modules())
    with Scope(unet).record("entropy") as recording:
        run(unet, sample)
    assert len(recording) == 2
    assert not routing.active()


def test_an_interrupt_inside_attention_leaves_nothing_behind(unet, sample):
    scope = Scope(unet)

    def interrupt(module, args):
        raise KeyboardInterrupt

    handle = unet.get_submodule(scope.sites[0].name).to_out[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), scope.record("entropy"):
        run(unet, sample)
    handle.remove()
    assert not routing.active()
    with scope.record("entropy") as recording:
        functional.scaled_dot_product_attention(*(torch.randn(1, 1, 4, 8) for _ in range(3)))
        run(unet, sample)
    assert len(recording) == 2


def test_contexts_nest(unet, sample):
    scope = Scope(unet)
    first, second = (site.name for site in scope.sites)
    with scope.record("entropy") as outer, scope.edit({first: [0]}), scope.record("max_prob", sites=[second]) as inner:
        run(unet, sample)
    assert (len(outer), len(inner)) == (2, 1)
    with scope.edit({first: [0]}), scope.edit({first: [1]}):
        composed = run(unet, sample)
    with scope.edit({first: [0, 1]}):
        assert torch.equal(run(unet, sample), composed)


def test_a_second_scope_on_an_active_model_is_refused(unet, sample):
    first, second = Scope(unet), Scope(unet)
    with first.record("entropy"):
        with pytest.raises(RuntimeError, match="another Scope is active"), second.record("entropy"):
            pass
        run(unet, sample)
    with second.record("entropy") as recording:
        run(unet, sample)
    assert len(recording) == 2


def test_two_models_in_two_threads_do_not_meet(sample):
    models = [tiny.ddpm().unet for _ in range(2)]
    expected = []
    for model in models:
        with Scope(model).record("entropy") as recording:
            run(model, sample)
        expected.append(recording.to_polars())
    found = [None, None]

    def work(index):
        with Scope(models[index]).record("entropy") as recording:
            for _ in range(3):
                run(models[index], sample)
        found[index] = recording.to_polars()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for table, single in zip(found, expected, strict=True):
        assert table is not None
        assert len(table) == 3 * len(single)
        first = table.filter(table["step"] == 0)
        assert np.allclose(first["entropy_mean"].to_numpy(), single["entropy_mean"].to_numpy(), atol=1e-6)


def test_one_model_in_two_threads_is_refused(unet, sample):
    """A thread's forward stands still while another one asks for its own."""
    scope = Scope(unet)
    refusals = []

    def in_the_middle(module, args):
        handle.remove()

        def work():
            with pytest.raises(RuntimeError, match="UNet2DModel runs in two threads inside a Scope") as refused:
                run(unet, 2 * sample)
            refusals.append(refused)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    with scope.record("entropy") as alone:
        run(unet, sample)
    handle = unet.mid_block.register_forward_pre_hook(in_the_middle)
    with scope.record("entropy") as recording:
        run(unet, sample)
    assert len(refusals) == 1
    assert recording.to_polars().equals(alone.to_polars())
    # one after the other they are no trouble
    with scope.record("entropy") as recording:
        run(unet, sample)
        thread = threading.Thread(target=run, args=(unet, sample))
        thread.start()
        thread.join()
    assert set(recording.to_polars()["forward"]) == {0, 1}


def test_hooks_stay_in_place_between_contexts(unet, sample):
    scope = Scope(unet)
    stock = run(unet, sample)
    with scope.keep_hooks():
        assert hooks(unet) > 0
        assert scope.timestep is None
        assert not torch.equal(run(unet, sample, timestep=9), stock)
        assert scope.timestep == 9
        assert torch.equal(run(unet, sample), stock)
        with scope.edit({scope.sites[0].name: [0]}):
            assert not torch.equal(run(unet, sample), stock)
        assert hooks(unet) > 0
    assert hooks(unet) == 0
    assert scope.timestep is None


def test_a_scope_shows_sites_and_contexts_alone(unet):
    """The state of its contexts is hidden."""
    contexts = {"record", "record_tokens", "edit", "keep_hooks"}
    shown = {name for name in dir(Scope(unet)) if not name.startswith("_")}
    assert shown == {"denoiser", "sites", "unseen", "site", "matching", "refresh", "timestep", "attribute"} | contexts
