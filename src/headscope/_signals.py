"""SIGTERM ends work as Ctrl-C does: schedulers, containers and `kill` send it, and give some seconds."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# exit codes, as shells report Ctrl-C and SIGTERM
INTERRUPTED, TERMINATED = 130, 143
# seconds until an interrupt that Python ignored comes again
AGAIN = 0.05


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
    once = Once()
    signal.signal(signal.SIGTERM, once)
    try:
        with once.kept():
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
    once = Once()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, once)
    once.keep()


@contextmanager
def handler_kept() -> Iterator[None]:
    """Restore the handler of SIGTERM that was there before, whatever is called in here sets."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        # None is a handler that isn't Python's
        if _in_main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)


class Once:
    """A signal handler that interrupts once.

    What a handler raises while a destructor or a callback of C code runs, Python reports as ignored and goes on. While
    interrupts are kept, such a one, and such a Ctrl-C, comes again a moment later.
    """

    def __init__(self) -> None:
        self.came: int | None = None
        self._again: threading.Timer | None = None
        self._ignored: int | None = None

    def __call__(self, number: int, frame: Any) -> None:
        if self.came is not None:
            return
        self.came = number
        raise _interrupt(number)

    def keep(self) -> None:
        """Keep interrupts for as long as the process lives."""
        report = sys.unraisablehook

        def heard(unraisable: Any) -> None:
            if not isinstance(unraisable.exc_value, KeyboardInterrupt):
                report(unraisable)
                return
            self._ignored = signal.SIGTERM if isinstance(unraisable.exc_value, Terminated) else signal.SIGINT
            if self.came == self._ignored:
                self.came = None
            self._again = threading.Timer(AGAIN, self._send, [self._ignored])
            self._again.daemon = True
            self._again.start()

        sys.unraisablehook = heard

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep interrupts in here; one that has yet to come again is raised at the end.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM (`Terminated`) was ignored at the end of what was done in here.
        """
        before = sys.unraisablehook
        self.keep()
        try:
            yield
        finally:
            sys.unraisablehook = before
            if self._again is not None:
                self._again.cancel()
        if self._ignored is not None:
            raise _interrupt(self._ignored)

    def _send(self, number: int) -> None:
        self._ignored = None
        os.kill(os.getpid(), number)


def _interrupt(number: int) -> KeyboardInterrupt:
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
