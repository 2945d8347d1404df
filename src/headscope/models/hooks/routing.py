"""The one place where a running model meets headscope.attention.

While a Scope is active, `torch.nn.functional.scaled_dot_product_attention` is routed: calls made inside an observed
attention module go to that module's frame, every other call goes, as it is, to the function that was there before.
Which module is running is known from its forward hooks, per thread, so two models in two threads don't meet.

Torch function modes and functions that users put into torch's place act as they would without the routing. A frame sees
attention as it arrives beneath the modes, and raises an error that names whoever replaces what it computed.

Compiled models take the same way. The hooks are plain functions that torch.compile traces; a module is told by a tensor
that it holds, which is an input of the compiled code and no constant in it, so that layers share code; and the routed
attention is an operator whose inside is not traced, so that recordings and edits are as free as in eager mode.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from headscope.models.hooks import overrides
from headscope.ops.schema import LIBRARY

# the attribute in which an observed module holds its number
HANDLE = "_headscope_handle"
# the attribute that forbids copies of it, which would send their attention to the same frame
_BOUND = "_headscope_bound"
# the attribute that counts how often hooks of diffusers left it out, where there are any
HOOKED = "_headscope_hooked"
# torch counts its hooks' ids up from 0
_HOOK_ID = -1


class AttentionArguments(NamedTuple):
    """The arguments of torch's scaled_dot_product_attention, in its order."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


class Frame(Protocol):
    """An observed attention module, as the router sees it."""

    def wanted(self) -> bool:
        """True if anything of its attention is recorded or edited in the forward that runs."""
        ...

    def attend(self, given: Sequence[int], arguments: AttentionArguments) -> Tensor:
        """The output of its attention; `given` are the fields of a `layout.Given`."""
        ...

    def refuse(self, who: str) -> NoReturn:
        """Raises RuntimeError: `who` decides what its attention gives, which can't be recorded or edited."""
        ...

    def silent(self, replacement: str | None) -> None:
        """Its module ran without attention; `replacement` stands in place of torch's function since."""
        ...


class Watcher(Protocol):
    """An object that is told of attention outside of every observed module."""

    def attention_outside(self) -> None: ...


class Uncopyable:
    """A part of a model that must not be copied with it."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise RuntimeError(
            "a model can't be copied or pickled inside a Scope, for its copy would report to the Scope for good;"
            " copy it before the context, or after"
        )


class _Running(threading.local):
    """The modules and scopes that run in this thread.

    Attributes:
        modules: the observed attention modules, innermost last: [handle, what it was given, attention calls so far,
            whether it was told to leave its attention out]; the second is a list of the text tokens beside the image,
            the rows and tokens of its own tensor, the rows of its attention calls so far, and whether there are image
            prompts.
        watchers: the scopes whose denoiser is in its forward, each with the number of modules around that.
    """

    def __init__(self) -> None:
        self.modules: list[list[Any]] = []
        self.watchers: list[tuple[Watcher, int]] = []


_running = _Running()
# by the number that a module's handle holds; and by the handle itself, which needs no reading while modules hold it
_frames: dict[int, Frame] = {}
_frames_by_handle: dict[int, Frame] = {}
_numbers = itertools.count(1)
_lock = threading.Lock()
_users = 0
_guards_skipped = True
# what the routing stands for: torch's own function, or what a user put into its place
_stock: Callable[..., Tensor] = functional.scaled_dot_product_attention
# the threads inside of a watched forward; none begins one while another thread takes the routing away for a moment
_forwards: set[int] = set()
_name_lock = threading.RLock()


def is_observed(module: nn.Module) -> bool:
    return HANDLE in module.__dict__


def observe(module: nn.Module, frame: Frame) -> None:
    """Send the module's attention to the frame until `forget`; a module is observed by one."""
    number = next(_numbers)
    # read at every call of a compiled module, so not on a default device of the user's
    handle = torch.tensor(number, device="cpu")
    # past nn.Module's own __setattr__: neither a buffer nor part of the state
    module.__dict__[HANDLE], module.__dict__[_BOUND] = handle, Uncopyable()
    _frames[number] = _frames_by_handle[id(handle)] = frame
    # as register_forward_pre_hook(with_kwargs=True) and register_forward_hook(always_call=True) do, but under one id in
    # every module: ids are constants in compiled code, and one per layer would compile every layer anew
    module._forward_pre_hooks[_HOOK_ID] = _enter
    module._forward_pre_hooks_with_kwargs[_HOOK_ID] = True
    module._forward_hooks[_HOOK_ID] = _leave
    module._forward_hooks_always_called[_HOOK_ID] = True


def forget(module: nn.Module) -> None:
    """Undo `observe`, also where an interrupt cut it short, and drop what else an interrupt left in this thread."""
    for hooks in (
        module._forward_pre_hooks,
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks,
        module._forward_hooks_always_called,
    ):
        hooks.pop(_HOOK_ID, None)
    module.__dict__.pop(_BOUND, None)
    handle = module.__dict__.pop(HANDLE, None)
    if handle is None:
        return
    _frames.pop(int(handle), None)
    _frames_by_handle.pop(id(handle), None)
    _running.modules = [entry for entry in _running.modules if entry[0] is not handle]


def watch(watcher: Watcher) -> None:
    """Its denoiser's forward begins."""
    if not _running.watchers:
        # what an interrupt of a backward left
        _running.modules.clear()
    _watched([*_running.watchers, (watcher, len(_running.modules))])


def unwatch(watcher: Watcher) -> None:
    """Its denoiser's forward has ended, and with it all that ran inside."""
    for other, around in _running.watchers:
        if other is watcher:
            del _running.modules[around:]
    _watched([entry for entry in _running.watchers if entry[0] is not watcher])


def _watched(watchers: list[tuple[Watcher, int]]) -> None:
    _running.watchers = watchers
    with _name_lock:
        if watchers:
            _forwards.add(threading.get_ident())
        else:
            _forwards.discard(threading.get_ident())


def active() -> bool:
    """True if this thread is inside an observed attention module."""
    return bool(_running.modules)


def install() -> None:
    """Start routing, or count one more user of it."""
    global _users, _stock, _guards_skipped
    with _lock:
        if _users == 0:
            # a user who restores what was there inside an earlier context has put the routing back
            if functional.scaled_dot_product_attention is not _routed:
                _stock = functional.scaled_dot_product_attention
            functional.scaled_dot_product_attention = _routed
            # code compiled meanwhile must know which modules carry our hooks
            _guards_skipped = torch._dynamo.config.skip_nnmodule_hook_guards
            torch._dynamo.config.skip_nnmodule_hook_guards = False
        _users += 1


def uninstall() -> None:
    """Count one user less; the last one restores torch's function."""
    global _users
    with _lock:
        _users -= 1
        if _users == 0:
            torch._dynamo.config.skip_nnmodule_hook_guards = _guards_skipped
            if functional.scaled_dot_product_attention is _routed:
                functional.scaled_dot_product_attention = _stock


def _enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
    text = kwargs.get("encoder_hidden_states")
    # with image prompts (IP-Adapter) the text comes first
    images = isinstance(text, tuple)
    text = text[0] if isinstance(text, tuple) else text
    own_text = text.shape[1] if isinstance(text, Tensor) and text.ndim == 3 else 0
    hidden = args[0] if args else kwargs.get("hidden_states")
    rows = tokens = 0
    if isinstance(hidden, Tensor) and hidden.ndim in (3, 4):
        rows, tokens = hidden.shape[0], hidden.shape[1] if hidden.ndim == 3 else hidden.shape[2] * hidden.shape[3]
    # so LTX2 is told by guiders that perturb every sample
    left_out = kwargs.get("all_perturbed", False)
    _running.modules.append([module.__dict__[HANDLE], [own_text, rows, tokens, 0, int(images)], 0, left_out])


def _next_call(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, list[int]]:
    """The handle of the module that calls attention, and what it was given before this call."""
    entry = _running.modules[-1]
    entry[2] += 1
    given = list(entry[1])
    entry[1][3] += (args[0] if args else kwargs["query"]).shape[0]
    return entry[0], given


def _leave(module: nn.Module, args: tuple, output: Any) -> None:
    handle = module.__dict__.get(HANDLE)
    entry = _running.modules.pop()
    # an exception may have left modules behind that ran inside this one
    while entry[0] is not handle:
        entry = _running.modules.pop()
    # after an exception in the module there is no output
    if entry[2] == 0 and output is not None and not entry[3]:
        hooked = module.__dict__.get(HOOKED)
        # what a cache gives in its place is listed when the forward ends
        if hooked is None or not hooked.left_out:
            _silent(handle)


def _silent(handle: Tensor) -> None:
    if torch.compiler.is_compiling():
        raise RuntimeError("an attention module ran without torch's scaled_dot_product_attention inside a Scope")
    current = functional.scaled_dot_product_attention
    _frames_by_handle[id(handle)].silent(None if current is _routed else overrides.named(current))


def _routed(*args: Any, **kwargs: Any) -> Tensor:
    """scaled_dot_product_attention while a Scope is active."""
    if overrides.anyone_acts(args, kwargs):
        return _overridden(args, kwargs)
    if not _running.modules:
        if not torch.compiler.is_compiling():
            for watcher, _ in _running.watchers:
                watcher.attention_outside()
        return _stock(*args, **kwargs)
    handle, given = _next_call(args, kwargs)
    if torch.compiler.is_compiling():
        return torch.ops.headscope.observed_attention(*AttentionArguments(*args, **kwargs), handle, given)
    frame = _frames_by_handle[id(handle)]
    if not frame.wanted():
        return _stock(*args, **kwargs)
    _refuse_replacement(frame)
    return frame.attend(given, AttentionArguments(*args, **kwargs))


# modes tell functions by identity, which compiled code doesn't keep
@torch.compiler.disable
def _overridden(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The call where modes or classes of tensors act on it."""
    if not _running.modules:
        for watcher, _ in _running.watchers:
            watcher.attention_outside()
        with _unrouted():
            return _stock(*args, **kwargs)
    handle, given = _next_call(args, kwargs)
    frame = _frames_by_handle[id(handle)]
    if not frame.wanted():
        with _unrouted():
            return _stock(*args, **kwargs)
    _refuse_replacement(frame)
    for one in overrides.acting_classes(args, kwargs):
        frame.refuse(overrides.named(one))
    beneath = overrides.Beneath(lambda *call, **options: frame.attend(given, AttentionArguments(*call, **options)))
    with _unrouted(), beneath.placed():
        output = _stock(*args, **kwargs)
    if len(beneath.outputs) != 1 or beneath.outputs[0] is not output:
        frame.refuse(" or ".join(overrides.named(mode) for mode in overrides.acting_modes()))
    return output


def _refuse_replacement(frame: Frame) -> None:
    if _stock is not overrides.TORCHS_OWN:
        frame.refuse(f"{overrides.named(_stock)}, which stands in the place of torch's scaled_dot_product_attention,")


@contextmanager
def _unrouted() -> Iterator[None]:
    """Put the function from before the routing back under its name, where modes look for the one they know."""
    with _name_lock:
        if _forwards - {threading.get_ident()}:
            raise RuntimeError(
                "a torch function mode acts on attention while another thread runs a model inside a Scope, whose"
                " attention would go by unseen; run them one after the other"
            )
        before = functional.scaled_dot_product_attention
        functional.scaled_dot_product_attention = _stock
        try:
            yield
        finally:
            functional.scaled_dot_product_attention = before


def _empty_output(query: Tensor, value: Tensor) -> Tensor:
    """An empty [batch, heads, queries, dim_v] in query's dtype and stride order."""
    order = sorted(range(query.ndim), key=query.stride().__getitem__, reverse=True)
    shape = (*query.shape[:-1], value.shape[-1])
    return torch.empty_permuted(shape, order, dtype=query.dtype, device=query.device)


def _observed(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, handle, given) -> Tensor:
    if query.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "headscope can't record or edit inside a CUDA graph, whose replays run no Python; compile the model"
            ' without mode="reduce-overhead" or "max-autotune"'
        )
    frame = _frames[int(handle)]
    if frame.wanted():
        _refuse_replacement(frame)
        arguments = AttentionArguments(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        output = frame.attend(given, arguments)
    else:
        output = _stock(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    # compiled code relies on the strides it was promised
    promised = _empty_output(query, value)
    return output if output.stride() == promised.stride() else promised.copy_(output)


def _observed_fake(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, handle, given) -> Tensor:
    return _empty_output(query, value)


def _no_backward(ctx, grad: Tensor):
    raise RuntimeError(
        "a compiled model has no gradients inside a Scope: its edits and recordings are outside of the compiled graph,"
        " which can't differentiate them; use the model as it was before torch.compile, or, compiled, a"
        " headscope.AttnProcessor(edit=..., statistics=...), which is traced with the model"
    )


LIBRARY.define(
    "observed_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float dropout_p, bool is_causal,"
    " float? scale, bool enable_gqa, Tensor handle, SymInt[] given) -> Tensor"
)
LIBRARY.impl("observed_attention", _observed, "CompositeExplicitAutograd")
torch.library.register_fake("headscope::observed_attention", _observed_fake, lib=LIBRARY)
torch.library.register_autograd("headscope::observed_attention", _no_backward, lib=LIBRARY)
