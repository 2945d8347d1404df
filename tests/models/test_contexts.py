"""Contexts of a Scope: they nest, and leave nothing behind."""

import contextlib
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as functional

import tiny
from headscope import Scope
from headscope.models.hooks import attachment, caches, routing
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
    """How they act is hidden."""
    contexts = {"record", "record_tokens", "edit", "keep_hooks", "recordings", "token_maps", "edits"}
    shown = {name for name in dir(Scope(unet)) if not name.startswith("_")}
    assert shown == {"denoiser", "sites", "unseen", "site", "matching", "refresh", "timestep", "attribute"} | contexts


@pytest.mark.parametrize("maps_first", [True, False])
def test_an_error_of_one_context_leaves_no_forward_of_another_unfinished(diffusion, maps_first):
    """Token maps refuse a forward with another number of text tokens when it ends; a recording has it all the same."""
    unet = diffusion.unet
    scope = Scope(unet)
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    picture = torch.randn(2, unet.config.in_channels, size, size)

    def forward(timestep, tokens):
        with torch.inference_mode():
            unet(picture, timestep, torch.randn(2, tokens, width))

    with contextlib.ExitStack() as stack:
        opened = [lambda: scope.record_tokens("a b"), lambda: scope.record("entropy")]
        contexts = [stack.enter_context(enter()) for enter in (opened if maps_first else reversed(opened))]
        recording = contexts[1 if maps_first else 0]
        forward(10, 5)
        with pytest.raises(ValueError, match="token maps"):
            forward(900, 6)
    with scope.record("entropy", into=recording):
        forward(30, 5)
    table = recording.to_polars()
    found = table.select("forward", "timestep").unique().sort("forward").rows()
    assert found == [(0, 10.0), (1, 900.0), (2, 30.0)]


def test_an_interrupt_at_a_forward_s_end_leaves_none_of_its_numbers(unet, sample, monkeypatch):
    scope = Scope(unet)
    with scope.record("entropy") as first, scope.record("max_prob") as second, torch.inference_mode():
        end = first.end_forward

        def interrupted(forward):
            raise KeyboardInterrupt

        with monkeypatch.context() as moment:
            moment.setattr(first, "end_forward", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run(unet, sample, 5)
        assert first.end_forward == end
        run(unet, sample, 9)
    for recording in (first, second):
        assert recording.to_polars()["timestep"].unique().to_list() == [9.0]
        assert len(recording) == 2


def test_every_context_hears_of_what_a_cache_left_out(unet, sample, monkeypatch):
    """Also those inside of an edit that it makes impossible."""
    scope = Scope(unet)
    name = scope.sites[0].name
    monkeypatch.setattr(caches.HookWatch, "missing", lambda *_: [caches.Missing(name, None, "some cache")])
    refused = pytest.raises(RuntimeError, match="took its attention from a cache")
    with scope.edit({name: [0]}), scope.record("entropy") as recording, refused:
        run(unet, sample)
    assert [entry.site for entry in recording.reused] == [name]


def test_a_context_hears_of_steps_even_where_another_refuses_the_forward(diffusion):
    scope = Scope(diffusion.unet)
    size, width = diffusion.unet.config.sample_size, diffusion.unet.config.cross_attention_dim
    picture = torch.randn(2, diffusion.unet.config.in_channels, size, size)
    name = scope.sites[0].name

    def refuse(forward):
        raise ValueError("planned")

    unmet = pytest.raises(ValueError, match="steps: got range")
    with unmet, scope.record_tokens("a b") as maps, scope.edit({name: [0]}, steps=range(5, 6)):
        maps.begin_forward = refuse
        with pytest.raises(ValueError, match="planned"), torch.inference_mode():
            diffusion.unet(picture, 10, torch.randn(2, 5, width))


def test_open_contexts_are_listed(unet):
    scope = Scope(unet)
    with scope.record("entropy") as recording, scope.edit({scope.sites[0].name: [0]}):
        assert [context.recording for context in scope.recordings] == [recording]
        assert (len(scope.edits), len(scope.token_maps)) == (1, 0)
    assert (scope.recordings, scope.edits) == ((), ())
