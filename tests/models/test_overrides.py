"""Whoever acts on attention besides the model acts inside a Scope as without it, or is named where it can't."""

import threading
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as functional
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import tiny
from headscope import Scope

TORCHS_OWN = functional.scaled_dot_product_attention


class Sharpened(TorchFunctionMode):
    """Sharpens attention at the call; it holds torch's function from before, as modules that import it do."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is TORCHS_OWN:
            args = (2 * args[0], *args[1:])
        return func(*args, **(kwargs or {}))


class Doubled(TorchFunctionMode):
    """Changes what attention returned; it looks torch's function up."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        return 2 * output if func is functional.scaled_dot_product_attention else output


class Counted(TorchFunctionMode):
    """Changes nothing."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += getattr(func, "__name__", "") == "scaled_dot_product_attention"
        return func(*args, **(kwargs or {}))


class Marked(torch.Tensor):
    """A tensor whose class acts on attention."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is functional.scaled_dot_product_attention:
            return args[2]
        return super().__torch_function__(func, types, args, kwargs or {})


def sharp(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, **kwargs):
    """As SageAttention's function is made: torch's first three by position, other names after them."""
    assert set(kwargs) <= {"attn_mask", "dropout_p"}, "called with what the model didn't give"
    return torch.softmax(3 * q @ k.transpose(-1, -2), -1) @ v


@contextmanager
def replaced(function):
    before = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = function
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = before


OTHERS = {
    "score skip": AttentionScoreSkipFunctionMode,
    "knows torch's": Sharpened,
    "looks it up": Doubled,
    "counts": Counted,
    "two": lambda: both(),
    "replacement": lambda: replaced(sharp),
    "kernel": lambda: sdpa_kernel(SDPBackend.MATH),
}
NAMES = {
    "score skip": r"diffusers\.hooks\.layer_skip\.AttentionScoreSkipFunctionMode",
    "looks it up": r"test_overrides\.Doubled",
    "two": r"test_overrides\.Sharpened or \S*test_overrides\.Doubled",
    "replacement": r"test_overrides\.sharp, which stands in the place",
}


@contextmanager
def both():
    with Sharpened(), Doubled():
        yield


@pytest.fixture(scope="module")
def sample():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def run(unet, sample):
    return unet(sample, torch.tensor(7), return_dict=False)[0]


@pytest.mark.parametrize("inside", [False, True], ids=["entered before the scope", "entered inside"])
@pytest.mark.parametrize("other", OTHERS)
def test_sites_that_are_not_recorded_run_what_they_would(unet, sample, other, inside):
    scope = Scope(unet)
    with OTHERS[other]():
        expected = run(unet, sample)
    if inside:
        with scope.edit({}), OTHERS[other]():
            output = run(unet, sample)
    else:
        with OTHERS[other](), scope.edit({}):
            output = run(unet, sample)
    assert torch.equal(output, expected)
    assert other in ("counts", "kernel") or not torch.equal(expected, run(unet, sample))
    assert functional.scaled_dot_product_attention is TORCHS_OWN


@pytest.mark.parametrize("other", OTHERS)
def test_attention_outside_of_the_model_is_what_it_would_be(unet, other):
    query, key, value = torch.randn(3, 1, 2, 6, 8).unbind()
    with OTHERS[other]():
        expected = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        with Scope(unet).record("entropy"):
            assert torch.equal(functional.scaled_dot_product_attention(query, key, value, is_causal=True), expected)


@pytest.mark.parametrize("other", NAMES)
@pytest.mark.parametrize("what", ["record", "edit", "record a quantity"])
def test_who_keeps_a_site_from_being_recorded_or_edited_is_named(unet, sample, other, what):
    scope = Scope(unet)
    site = scope.sites[1].name
    contexts = {
        "record": lambda: scope.record("entropy", sites=site),
        "record a quantity": lambda: scope.record("head_output", sites=site),
        "edit": lambda: scope.edit({site: [1]}),
    }
    with OTHERS[other](), contexts[what](), pytest.raises(RuntimeError, match=NAMES[other]) as raised:
        run(unet, sample)
    assert repr(site) in str(raised.value)
    assert functional.scaled_dot_product_attention is TORCHS_OWN


def test_what_a_mode_hands_to_attention_is_what_is_recorded(unet, sample):
    """Queries sharpened by a mode: the entropies and the picture are those of the sharpened attention."""
    scope = Scope(unet)
    with Sharpened():
        expected = run(unet, sample)
    calls = []
    with replaced(lambda *args, **options: calls.append(args) or TORCHS_OWN(2 * args[0], *args[1:], **options)):
        run(unet, sample)
    with scope.record("entropy", reduce=None) as recording, Sharpened():
        output = run(unet, sample)
    assert float((output - expected).abs().max()) <= 1e-5
    rows = recording.to_polars().filter(site=scope.sites[0].name).sort("sample", "head")
    query, key = calls[0][:2]
    weights = torch.softmax(2 * query.double() @ key.double().transpose(-1, -2) * query.shape[-1] ** -0.5, -1)
    entropies = torch.special.entr(weights).sum(-1)
    assert torch.tensor(rows["entropy"].to_list()) == pytest.approx(entropies.flatten(0, 1).float(), abs=1e-4)


def test_modes_that_change_nothing_see_every_call_and_are_no_hindrance(unet, sample):
    scope = Scope(unet)
    with scope.record("entropy") as expected:
        run(unet, sample)
    with scope.record("entropy") as recording, Counted() as mode, torch.device("cpu"):
        run(unet, sample)
    assert mode.calls == len(recording) == len(scope.sites)
    assert recording.to_polars().equals(expected.to_polars())


def test_the_kernel_that_torch_is_told_to_take_is_the_sites_that_are_not_recorded(unet, sample):
    """A recorded one is computed by headscope: the same attention, up to rounding."""
    scope = Scope(unet)
    with sdpa_kernel(SDPBackend.MATH):
        expected = run(unet, sample)
        with scope.record("entropy") as recording:
            output = run(unet, sample)
    assert len(recording) == len(scope.sites)
    assert float((output - expected).abs().max()) <= 1e-5


def test_an_edit_that_rests_leaves_the_site_to_others(unet, sample):
    scope = Scope(unet)
    with AttentionScoreSkipFunctionMode():
        expected = run(unet, sample)
        with scope.edit({"*": [0]}, steps=range(1, 2)):
            assert torch.equal(run(unet, sample), expected)
            with pytest.raises(RuntimeError, match="AttentionScoreSkipFunctionMode"):
                run(unet, sample)


def test_a_mode_hinders_only_the_attention_it_replaces(sample):
    """Skipping scores is for attention with as many keys as queries: cross-attention to the text goes on."""
    model = tiny.stable_diffusion().unet
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor(7), torch.randn(2, 5, 32))
    scope = Scope(model)
    with torch.inference_mode(), AttentionScoreSkipFunctionMode():
        expected = model(*inputs).sample
        with scope.record("entropy", sites="*.attn2") as recording:
            output = model(*inputs).sample
        with scope.record("entropy"), pytest.raises(RuntimeError, match=r"attn1' can't be recorded"):
            model(*inputs)
    assert len(recording) == sum(site.kind == "cross" for site in scope.sites)
    assert float((output - expected).abs().max()) <= 1e-5


def test_classes_of_tensors_act_as_they_would(unet):
    site = Scope(unet).sites[0].name
    module = unet.get_submodule(site)
    states = torch.randn(1, module.heads * 8, 4, 4)
    with torch.no_grad():
        expected = module(states.as_subclass(Marked)).as_subclass(torch.Tensor)
        with Scope(unet).edit({}):
            output = module(states.as_subclass(Marked)).as_subclass(torch.Tensor)
        assert torch.equal(output, expected)
        assert not torch.equal(expected, module(states))
    sample = torch.randn(1, 3, 16, 16).as_subclass(Marked)
    with (
        torch.no_grad(),
        Scope(unet).record("entropy", sites=site),
        pytest.raises(RuntimeError, match=rf"'{site}' can't be .*test_overrides\.Marked"),
    ):
        unet(sample, torch.tensor(7))


def test_a_replacement_made_inside_a_context_is_named(unet, sample):
    with (
        Scope(unet).record("entropy"),
        replaced(sharp),
        pytest.raises(RuntimeError, match=r"ran without torch's .*test_overrides\.sharp was put into its place"),
    ):
        run(unet, sample)


def test_a_routing_put_back_after_its_context_routes_again(unet, sample):
    """Whoever saves the function inside a context and restores it afterwards, restores the routing."""
    expected = run(unet, sample)
    with Scope(unet).record("entropy"):
        inside = functional.scaled_dot_product_attention
    with replaced(inside):
        assert torch.equal(run(unet, sample), expected)
        with Scope(unet).record("entropy") as recording:
            run(unet, sample)
    assert len(recording) == len(Scope(unet).sites)


def test_a_mode_in_one_thread_never_hides_attention_of_another(unet, sample):
    """The function's name is shared: while a model runs in a Scope elsewhere, modes can't be given torch's own."""
    begun, done = threading.Event(), threading.Event()
    failed = []

    def wait(module, args):
        begun.set()
        done.wait(10)

    def other():
        with Scope(unet).record("entropy") as recording:
            run(unet, sample)
        failed.append(len(recording) != len(Scope(unet).sites))

    handle = unet.conv_in.register_forward_pre_hook(wait)
    thread = threading.Thread(target=other)
    thread.start()
    try:
        assert begun.wait(10)
        with AttentionScoreSkipFunctionMode(), pytest.raises(RuntimeError, match="another thread"):
            functional.scaled_dot_product_attention(*torch.randn(3, 1, 1, 4, 8))
    finally:
        done.set()
        thread.join()
        handle.remove()
    assert failed == [False]


@pytest.mark.full
@pytest.mark.parametrize("other", ["score skip", "knows torch's", "looks it up"])
def test_compiled_models_leave_modes_alone(unet, sample, other):
    torch._dynamo.reset()
    model = tiny.ddpm().unet
    with OTHERS[other]():
        expected = run(unet, sample)
        model.compile(backend="aot_eager")
        with Scope(model).edit({}):
            output = run(model, sample)
        with Scope(model).record("entropy"):
            if other == "knows torch's":
                recorded = run(model, sample)
            else:
                with pytest.raises(RuntimeError, match=NAMES[other]):
                    run(model, sample)
                recorded = expected
    assert float((output - expected).abs().max()) <= 1e-5
    assert float((recorded - expected).abs().max()) <= 1e-5
    torch._dynamo.reset()


@pytest.mark.full
def test_a_default_device_breaks_no_graph(sample):
    torch._dynamo.reset()
    model = tiny.ddpm().unet
    model.compile(backend="aot_eager", fullgraph=True)
    with torch.device("cpu"), Scope(model).record("entropy") as recording:
        run(model, sample)
    assert len(recording) == len(Scope(model).sites)
    torch._dynamo.reset()
