"""Processes that compute one thing after another, and that may hang, crash or lose their card without harm.

A wrong barrier never returns, an illegal address ends every later call of its process: a process that did either is
killed, and a fresh one takes its place.
"""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from card.stage import die_with_parent

# in errors of torch and Triton when this process can't use its GPU any more
BROKEN = (
    "CUDA error",
    "CUDA driver error",
    "illegal memory access",
    "misaligned address",
    "unspecified launch failure",
)


@dataclass(frozen=True)
class Answer:
    """A task's result, or the reason why there is none."""

    task: Any
    result: Any = None
    error: str | None = None


class Worker:
    """One process, which remembers from task to task what its functions keep in their modules."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        with _environment(environment or {}):
            self.process.start()
        theirs.close()

    def send(self, function: Callable[[Any], Any], task: Any) -> None:
        self.task = task
        with contextlib.suppress(OSError):
            self.connection.send((function, task))

    def answer(self, seconds: float) -> Answer:
        """The task's; a process that has none in time, or that is of no use any more, is ended."""
        try:
            if not self.connection.poll(max(0.0, seconds)):
                self.end()
                return Answer(self.task, error="no answer in time")
            result, error = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(1)
            code = self.process.exitcode
            self.end()
            return Answer(self.task, error=f"the process died, code {code}")
        if error is not None and is_broken(error):
            self.end()
        return Answer(self.task, result, error)

    @property
    def alive(self) -> bool:
        return not self.connection.closed

    def end(self) -> None:
        if self.alive:
            self.process.kill()
            self.process.join(5)
            self.connection.close()


def is_broken(error: str) -> bool:
    return any(text in error for text in BROKEN)


def _serve(connection: Any) -> None:
    die_with_parent()
    with contextlib.suppress(EOFError):
        while True:
            function, task = connection.recv()
            try:
                connection.send((function(task), None))
            except Exception as error:
                connection.send((None, f"{type(error).__name__}: {str(error)[-1500:]}"))


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def in_processes(
    function: Callable[[Any], Any],
    tasks: Sequence[Any],
    *,
    count: int,
    seconds_each: float,
    left: Callable[[], float],
    environment: Mapping[str, str] | None = None,
) -> Iterator[Answer]:
    """Every task's answer as it comes, from `count` processes at the most.

    Args:
        function: of a module, so that it can be sent.
        seconds_each: after which a task's process is killed.
        left: seconds that remain for all of them.
    """
    waiting, idle = list(tasks), []
    busy: dict[Any, tuple[Worker, float]] = {}
    try:
        while waiting or busy:
            while waiting and len(busy) < count and left() > 0:
                worker = idle.pop() if idle else Worker({"OMP_NUM_THREADS": "1", **(environment or {})})
                worker.send(function, waiting.pop(0))
                busy[worker.connection] = (worker, time.monotonic() + seconds_each)
            if not busy:
                break
            next_end = min(end for _, end in busy.values()) - time.monotonic()
            ready = wait(list(busy), timeout=max(0.0, min(next_end, left())))
            late = [c for c, (_, end) in busy.items() if time.monotonic() >= end or left() <= 0]
            for connection in {*ready, *late}:
                worker, _ = busy.pop(connection)
                yield worker.answer(0.0 if connection not in ready else 5.0)
                if worker.alive:
                    idle.append(worker)
    finally:
        for worker in [*idle, *(worker for worker, _ in busy.values())]:
            worker.end()
    for task in waiting:
        yield Answer(task, error="out of time")
