"""Spawned processes of this machine, one per GPU or per so many CPU threads."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
import traceback
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

from headscope._signals import INTERRUPTED, TERMINATED, Terminated, end_once
from headscope.sweep.plan.units import Unit
from headscope.sweep.store.room import DiskFull
from headscope.sweep.work.executors.member import Telling, on_device, take_part, tell
from headscope.sweep.work.progress import Progress
from headscope.sweep.work.worker import TRIES, WorkOrder

# how long a process may take to put its work away when the sweep is stopped
GRACE = 8.0


@dataclass
class _Process:
    number: int
    process: SpawnProcess
    messages: Connection


def run_processes(order: WorkOrder, workers: int, units: tuple[Unit, ...], progress: Progress) -> None:
    """Work on a run with several processes until nothing is left. One that dies is replaced, and its unit done again.

    Raises:
        RuntimeError: a process can't open the run, or processes die without end.
        DiskFull: no results can be written.
    """
    threads = order.execution.threads or max(1, torch.get_num_threads() // workers)
    order = replace(order, execution=replace(order.execution, threads=threads))
    known = {unit.id: unit for unit in units}
    members: list[_Process] = []
    # a death costs a unit one of its tries, so this many are possible at most
    deaths_left = TRIES * (len(units) + workers)
    try:
        for number in range(workers):
            members.append(_start(order, number))
        while members:
            wait([member.messages for member in members] + [member.process.sentinel for member in members])
            for member in list(members):
                _hear(member, known, progress)
                if member.process.is_alive():
                    continue
                _hear(member, known, progress)
                members.remove(member)
                if member.process.exitcode == INTERRUPTED:
                    raise KeyboardInterrupt
                if member.process.exitcode == 0:
                    continue
                deaths_left -= 1
                if deaths_left == 0:
                    raise RuntimeError(f"workers: processes keep dying (exit code {member.process.exitcode})")
                members.append(_start(order, member.number))
    finally:
        _stop(members)


def _start(order: WorkOrder, number: int) -> _Process:
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_main, args=(order, number, sending), daemon=True, name=f"headscope-{number}")
    process.start()
    sending.close()
    return _Process(number, process, receiving)


def _hear(member: _Process, known: dict[str, Unit], progress: Progress) -> None:
    """Pass on what a process has said."""
    while True:
        try:
            if not member.messages.poll():
                return
            message = member.messages.recv()
        except (EOFError, OSError):
            # it is gone, perhaps in the middle of a message; its sentinel says how
            return
        kind, *content = message
        if kind == "full":
            raise DiskFull(*content)
        if kind == "error":
            raise RuntimeError(f"workers: a process couldn't go on:\n{content[0]}")
        tell(message, known, progress)


def _stop(members: list[_Process]) -> None:
    """End what still runs: politely, then not."""
    until = time.monotonic() + GRACE
    for member in members:
        # one that Ctrl-C has reached by itself, from the terminal, ignores it
        member.process.terminate()
    for member in members:
        member.process.join(max(0.0, until - time.monotonic()))
        if member.process.is_alive():
            member.process.kill()
            member.process.join()


def _telling(messages: Connection) -> Telling:
    """A report to the process that started this one."""

    def send(message: tuple[Any, ...]) -> None:
        try:
            messages.send(message)
        except OSError:
            # it is gone, which is no fault of the unit that is worked on, and the work ends
            raise KeyboardInterrupt from None

    return Telling(send)


def _main(order: WorkOrder, number: int, messages: Connection) -> None:
    threading.Thread(target=_follow_parent, daemon=True).start()
    end_once()
    try:
        take_part(on_device(order, number), _telling(messages))
    except Terminated:
        # by somebody else than its parent: it is replaced
        sys.exit(TERMINATED)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except DiskFull as error:
        messages.send(("full", error.errno, error.strerror))
    except Exception:
        messages.send(("error", traceback.format_exc()))


def _follow_parent() -> None:
    """A process whose parent was killed ends, too."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
