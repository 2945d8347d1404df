"""The open contexts of a Scope, and the denoiser's forwards inside them.

Every kind of context (a recording, token maps, edits) is a subclass of `Context`; `ActiveContexts` tells each of them
when a forward begins and ends. An attention site that runs asks `ActiveContexts` which contexts concern it.
"""

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from headscope.models.hooks import routing
from headscope.models.hooks.attachment import Attachment
from headscope.models.hooks.branches import checked_branches
from headscope.models.hooks.caches import Missing
from headscope.models.hooks.forwards import Forward, Progress, begin_forward, running_module


class Context:
    """One context, and the forwards and guidance branches in which it acts.

    Args:
        sites: the names of the sites that it concerns.
        steps: the pipeline's steps; all if None, none if the range is empty.
        branches: their names; all if None.

    Attributes:
        first_forward: the number of denoiser forwards before the context was entered, since the outermost one was.
        forbids_other_attention: True if attention outside of every site is an error inside the context.

    Raises:
        TypeError: steps that are no range; see `checked_branches` for the rest.
    """

    forbids_other_attention = False

    def __init__(self, sites: Iterable[str], steps: range | None = None, branches: Iterable[str] | None = None) -> None:
        if steps is not None and not isinstance(steps, range):
            raise TypeError(f"steps: got {type(steps).__name__}, expected a range of pipeline steps or None")
        self.sites = frozenset(sites)
        self.steps = steps
        self.branches = checked_branches(branches)
        self.first_forward = 0
        # in order, each once
        self._steps_seen: dict[int, None] = {}
        self._branches_seen: dict[str | None, None] = {}

    def enter(self, first_forward: int) -> None:
        """The context begins, after so many forwards."""
        self.first_forward = first_forward

    def leave(self) -> None:
        """The context has ended, by itself or with an exception."""

    def step_of(self, forward: Forward) -> int:
        """The pipeline's step, or the number of forwards since the context was entered where no pipeline counts."""
        return forward.index - self.first_forward if forward.step is None else forward.step

    def acts_in(self, forward: Forward) -> bool:
        return self.steps is None or self.step_of(forward) in self.steps

    def see(self, forward: Forward) -> None:
        """Note the step and the branches of a forward that begins inside the context."""
        self._steps_seen[self.step_of(forward)] = None
        if self.acts_in(forward):
            self._branches_seen.update(dict.fromkeys(forward.branches))

    def begin_forward(self, forward: Forward) -> None:
        """A forward begins inside the context; what an error stopped in the middle of an earlier one is forgotten."""

    def end_forward(self, forward: Forward, completed: bool) -> None:
        """A forward has ended, by itself or (not `completed`) with an exception."""

    def note_missing(self, missing: Missing, forward: Forward) -> None:
        """The forward that ends went without the attention of a site in a branch."""

    def check_met(self) -> None:
        """Raises ValueError where forwards ran, and what was named of steps and branches was not among them."""
        if not self._steps_seen or (self.steps is not None and not self.steps):
            return
        if not self._branches_seen:
            first, last = min(self._steps_seen), max(self._steps_seen)
            raise ValueError(
                f"steps: got {self.steps}, none of which ran in the context, expected some of steps {first} to {last}"
            )
        ran = {branch or "cond" for branch in self._branches_seen}
        missing = [name for name in self.branches or () if name not in ran]
        if missing:
            listed = ", ".join(branch or 'no guidance (which counts as "cond")' for branch in self._branches_seen)
            raise ValueError(f"branches: got {missing[0]!r}, which never ran in the context: expected some of {listed}")


Kind = TypeVar("Kind", bound=Context)


class ActiveContexts:
    """The open contexts on a denoiser, outermost first, and the forward that runs inside them.

    Args:
        pipeline: the one that the denoiser belongs to; None where it is called by itself.

    Attributes:
        version: counts up whenever a context is entered or left: what a site knows of the contexts is out of date then.
        forward: the forward that runs, or the one that ran last; None where none has run since the first context.
    """

    def __init__(self, denoiser: nn.Module, pipeline: Any) -> None:
        self.denoiser = denoiser
        self.version = 0
        self.forward: Forward | None = None
        self._pipeline = pipeline
        self._signature = inspect.signature(type(denoiser).forward)
        self._open: list[Context] = []
        self._attachment: Attachment | None = None
        self._forwards = 0
        # the thread that a forward runs in, while one does
        self._thread: int | None = None
        self._thread_lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    def of(self, kind: type[Kind], site: str) -> list[Kind]:
        """The open contexts of a kind that concern a site, outermost first."""
        return [context for context in self.of_kind(kind) if site in context.sites]

    def of_kind(self, kind: type[Kind]) -> tuple[Kind, ...]:
        """The open contexts of a kind, outermost first."""
        return tuple(context for context in self._open if isinstance(context, kind))

    @contextmanager
    def opened(self, context: Context, attach: Callable[[], Attachment]) -> Iterator[None]:
        """Open a context; what `attach` puts into the model and torch stays there while any is open."""
        if not self._open:
            self._attachment = attach()
            self._forwards = 0
        self._open.append(context)
        self.version += 1
        context.enter(self._forwards)
        try:
            yield
        finally:
            self._open.remove(context)
            context.leave()
            self.version += 1
            if not self._open:
                self._detach()
        # only where the context ended by itself: an exception of its own says more
        context.check_met()

    def _detach(self) -> None:
        if self._attachment is not None:
            self._attachment.remove()
        self._attachment = self.forward = self._thread = None

    @property
    def in_forward(self) -> bool:
        """True while a forward runs, or a backward that may run a part of one again."""
        return self._thread == threading.get_ident() or torch._C._current_graph_task_id() != -1

    # what the bracket around the denoiser's forward calls

    def begin(self, args: tuple, kwargs: dict, cache_context: str | None) -> None:
        """The denoiser is called with these arguments, in a guidance pass that the pipeline may have named."""
        self._claim_thread()
        arguments = self._named_arguments(args, kwargs)
        before = self.forward
        forward = begin_forward(self._forwards, self.denoiser, self._pipeline, arguments, cache_context, before)
        forward.contexts = self.version
        # one object for forwards that are alike, so that sites need not read each anew
        if before is not None and before.geometry.same_as(forward.geometry):
            forward.geometry = before.geometry
        self.forward = forward
        self._forwards += 1
        if self._attachment is not None:
            self._attachment.hooks.begin(forward, arguments, self._named_arguments)
        for context in self._open:
            context.see(forward)
        for context in self._open:
            context.begin_forward(forward)
        routing.watch(self)

    def _claim_thread(self) -> None:
        with self._thread_lock:
            if self._thread not in (None, threading.get_ident()):
                raise RuntimeError(
                    f"{type(self.denoiser).__name__} runs in two threads inside a Scope, which can't tell their"
                    " forwards apart; run one after the other, or a copy of the model with a Scope of its own in each"
                )
            self._thread = threading.get_ident()

    def _named_arguments(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        """The denoiser's arguments by name."""
        arguments = dict(self._signature.bind_partial(self.denoiser, *args, **kwargs).arguments)
        arguments.pop("self", None)
        return arguments | arguments.pop("kwargs", {})

    def end(self, completed: bool) -> None:
        """The denoiser's forward has ended, by itself or (not `completed`) with an exception."""
        # after a forward that `begin` refused, another thread's still runs
        if self._thread not in (None, threading.get_ident()):
            return
        self._thread = None
        routing.unwatch(self)
        forward = self.forward
        # the one before, where `begin` refused this one
        if forward is None or forward.totals is not None:
            return
        # what runs again in a backward belongs to this forward still
        forward.totals = dict(forward.calls)
        told = [partial(context.end_forward, forward, completed) for context in self._open]
        if completed and self._attachment is not None:
            found = self._attachment.hooks.missing(forward, self._attachment.sites)
            told += [partial(context.note_missing, missing, forward) for missing in found for context in self._open]
        _tell_all(told)

    @contextmanager
    def repeat(self, forward: Forward | None, calls: dict[str, Progress]) -> Iterator[None]:
        """Run a part of an earlier forward again as it ran then, without recording it a second time."""
        if not self._open or (forward is not None and forward.contexts != self.version):
            raise RuntimeError(
                "gradient checkpointing runs the forward again in the backward, which came after a context of the Scope"
                " had begun or ended; call backward inside the contexts of its forward"
            )
        if forward is None:
            yield
            return
        before, counts = self.forward, forward.calls
        self.forward, forward.calls = forward, dict(calls)
        try:
            yield
        finally:
            self.forward, forward.calls = before, counts

    def attention_outside(self) -> None:
        """Raises RuntimeError where attention runs outside of every site, and a recording of all would miss it."""
        if any(context.forbids_other_attention for context in self._open):
            where = running_module(self.denoiser)
            raise RuntimeError(
                f"{type(self.denoiser).__name__} calls attention outside of scope.sites{where}, and a"
                " recording of all would miss it; name the sites to record ([site.name for site in scope.sites] are all"
                " that can be seen)"
            )


def _tell_all(calls: Iterable[Callable[[], None]]) -> None:
    """Make every call, then raise the first error: one context's must not leave another's forward unfinished."""
    errors = []
    for call in calls:
        try:
            call()
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]
