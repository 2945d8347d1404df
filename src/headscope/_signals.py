"""SIGTERM ends work as Ctrl-C does: schedulers, containers and `kill` send it, and give some seconds."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# what shells say of Ctrl-C and of SIGTERM
INTERRUPTED, TERMINATED = 130, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM came: whatever puts work away on Ctrl-C does so."""


@contextmanager
def sigterm_interrupts() -> Iterator[bool]:
    """SIGTERM raises `Terminated` in here, once.

    In threads but the main one, and in programs that have a handler of their own, nothing is changed: then it yields
    False.
    """
    if not _in_main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield False
        return
    once = _Once()
    signal.signal(signal.SIGTERM, once)
    try:
        yield True
    except KeyboardInterrupt as error:
        # Ray raises one of its own in the other's place
        if once.came == signal.SIGTERM and not isinstance(error, Terminated):
            raise Terminated from error
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM interrupts what is done in here, and raises SystemExit(143) at the end of it; but where somebody further
    out has seen to it that SIGTERM interrupts, that is theirs."""
    outermost = False
    try:
        with sigterm_interrupts() as outermost:
            yield
    except Terminated:
        if outermost:
            raise SystemExit(TERMINATED) from None
        raise


def end_once() -> None:
    """For a process that works for another: the first SIGTERM or Ctrl-C ends it, and those that come while it puts its
    work away are ignored, for they come from the other process as well as from the terminal."""
    once = _Once()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, once)


@contextmanager
def handler_kept() -> Iterator[None]:
    """What is called in here may set a handler of SIGTERM; afterwards there is the one from before."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        # None is a handler that isn't Python's
        if _in_main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)


class _Once:
    """A signal handler that interrupts once."""

    def __init__(self) -> None:
        self.came: int | None = None

    def __call__(self, number: int, frame: Any) -> None:
        if self.came is not None:
            return
        self.came = number
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
