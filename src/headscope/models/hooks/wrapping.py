"""The bracket around a denoiser's forward: its begin and end, checkpointed parts, and the name of a guidance pass."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from headscope.models.hooks.forwards import Forward, Progress
from headscope.models.hooks.routing import Uncopyable, Watcher

_ABSENT = object()
# where modules of diffusers have the function that checkpoints a part of them
_CHECKPOINT = "_gradient_checkpointing_func"


def is_bracketed(module: nn.Module) -> bool:
    """True if a `ForwardWrap` is around the module's forwards now."""
    return getattr(module.__dict__.get("_compiled_call_impl"), "__module__", None) == __name__


class Watched(Watcher, Protocol):
    """An object that is told of a denoiser's forwards."""

    @property
    def forward(self) -> Forward | None:
        """The forward that runs, or the one that ran last."""
        ...

    def begin(self, args: tuple, kwargs: dict, cache_context: str | None) -> None: ...

    def end(self, completed: bool) -> None: ...

    def repeat(self, forward: Forward | None, calls: dict[str, Progress]) -> AbstractContextManager[None]:
        """The context in which a checkpointed part of a forward runs again, after those calls of its sites."""
        ...


class ForwardWrap(Uncopyable):
    """Tells `watched` of every forward until `remove`, which leaves the modules as they were.

    A compiled model is bracketed from outside: nothing of this is traced.

    Args:
        called: the module that users call: the denoiser, or what torch.compile made of it.
    """

    def __init__(self, called: nn.Module, watched: Watched) -> None:
        self._watched = watched
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        # module, name, what is there now, and what was
        self._replaced: list[tuple[nn.Module, str, Callable[..., Any], Any]] = []
        self._cache_context: str | None = None
        denoiser: nn.Module = getattr(called, "_orig_mod", called)
        compiled = getattr(called, "_compiled_call_impl", None)
        if compiled is not None:
            self._replace(called, "_compiled_call_impl", self._bracketed(compiled))
        else:
            self._hooks.append(called.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._hooks.append(called.register_forward_hook(self._leave, always_call=True))
            self._replace(called, "_compiled_call_impl", self._interruptible(called._call_impl))
        if hasattr(denoiser, "cache_context"):
            self._replace(denoiser, "cache_context", self._named(denoiser.cache_context))
        self._may_checkpoint = [module for module in denoiser.modules() if hasattr(module, "gradient_checkpointing")]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for module, name, function, before in reversed(self._replaced):
            # what somebody has put there meanwhile stays
            if module.__dict__.get(name) is not function:
                continue
            if before is _ABSENT:
                del module.__dict__[name]
            else:
                module.__dict__[name] = before

    def _replace(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        self._replaced.append((module, name, function, module.__dict__.get(name, _ABSENT)))
        module.__dict__[name] = function

    def _begin(self, args: tuple, kwargs: dict) -> None:
        self._replace_checkpoints()
        self._watched.begin(args, kwargs, self._cache_context)

    def _replace_checkpoints(self) -> None:
        """Replace the checkpointing of modules where it was switched on since the last forward."""
        ours = [function for _, name, function, _ in self._replaced if name == _CHECKPOINT]
        for module in self._may_checkpoint:
            stock = getattr(module, _CHECKPOINT, None) if module.gradient_checkpointing else None
            if stock is not None and stock not in ours:
                self._replace(module, _CHECKPOINT, self._checkpointed(stock))

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._begin(args, kwargs)

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._watched.end(output is not None)

    def _bracketed(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args, **kwargs):
            completed = False
            try:
                self._begin(args, kwargs)
                output = compiled(*args, **kwargs)
                completed = True
            finally:
                self._watched.end(completed)
            return output

        return call

    def _interruptible(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """End the forward on Ctrl-C, too: torch runs the hooks of a module's end for Exceptions alone."""

        def call(*args, **kwargs):
            try:
                return stock(*args, **kwargs)
            except BaseException as error:
                if not isinstance(error, Exception):
                    self._watched.end(completed=False)
                raise

        return call

    def _named(self, stock: Callable[..., AbstractContextManager]) -> Callable[..., AbstractContextManager]:
        """Take note of the name that a pipeline gives to a guidance pass which it runs by itself."""

        @contextlib.contextmanager
        def cache_context(name: str, *args, **kwargs) -> Iterator[Any]:
            before, self._cache_context = self._cache_context, name
            try:
                with stock(name, *args, **kwargs) as value:
                    yield value
            finally:
                self._cache_context = before

        return cache_context

    def _checkpointed(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """Mark what gradient checkpointing runs a second time, in the backward."""

        def checkpoint(function: Callable[..., Any], *args, **kwargs):
            forward = self._watched.forward
            calls = dict(forward.calls) if forward is not None else {}
            ran = False

            def run(*inner, **options):
                nonlocal ran
                if not ran:
                    ran = True
                    return function(*inner, **options)
                with self._watched.repeat(forward, calls):
                    return function(*inner, **options)

            return stock(run, *args, **kwargs)

        return checkpoint
