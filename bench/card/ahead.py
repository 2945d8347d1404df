"""Kernels compiled before the card is asked, by as many processes as there are cores, into Triton's cache.

A job is a call as the stage will make it, on CPU tensors of the same layout: Triton compiles for the card and hands its
launcher's arguments to a driver that isn't one (tests/stand_in.py). The binaries are those of the launches to come
(tests/kernels/test_launches.py shows it), and no process here touches the card.
"""

import os
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from card.device import Card
from card.stage import Report
from card.workers import in_processes

# a function of a module and its arguments
Job = tuple[Callable[..., Any], tuple[Any, ...]]


def compile_ahead(report: Report, device: Card, jobs: Sequence[Job]) -> None:
    """Compiles what the jobs launch; says how many kernels they are and what it cost."""
    started, cores, kernels, failed = time.monotonic(), 0.0, 0, []
    jobs = device.jobs(jobs)
    answers = in_processes(
        _compiled,
        jobs,
        count=device.processes,
        # every edit at once takes the compiler twenty
        seconds_each=300.0,
        left=report.left,
        environment={"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""},
    )
    for answer in answers:
        if not answer.error:
            kernels, cores = kernels + answer.result[0], cores + answer.result[1]
        else:
            function, arguments = answer.task
            failed.append({"job": f"{function.__name__}{arguments}"[:300], "error": answer.error})
            report.tell(f"NOT COMPILED {failed[-1]['job']}: {answer.error[-300:]}")
    wall = time.monotonic() - started
    report.facts["compiled_ahead"] = {
        "jobs": len(jobs),
        "kernels": kernels,
        "core_seconds": round(cores, 1),
        "seconds": round(wall, 1),
        "failed": failed,
    }
    report.tell(f"compiled {kernels} kernels in {wall:.1f} s, {cores:.0f} core-seconds")
    if report.mode == "compile":
        report.write("compiled")
        raise SystemExit(0)


def binaries() -> int:
    """Those in Triton's cache."""
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    return sum(1 for _ in folder.glob("*/*.cubin")) if folder.exists() else 0


def _compiled(job: Job) -> tuple[int, float]:
    """Makes the call without a card; returns its kernels and core-seconds, those of the assembler included."""
    import stand_in

    pretend()
    function, arguments = job
    before = _core_seconds()
    function(*arguments)
    binaries_launched = {binary for binary, *_ in stand_in.launched}
    # they hold on to tensors
    stand_in.launched.clear()
    return len(binaries_launched), _core_seconds() - before


def _core_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def pretend() -> None:
    """From now on this process compiles for sm_90 what it launches on CPU tensors, and launches nothing."""
    import torch

    import stand_in
    from headscope.ops.backends import BACKENDS
    from headscope_kernels.attention import key_mass
    from headscope_kernels.attention.backward import launch as backward
    from headscope_kernels.attention.forward import launch as forward
    from headscope_kernels.attention.inspection.compiling import TARGETS, target_key

    torch.set_num_threads(1)
    stand_in.install()
    for module in (forward, backward, key_mass):
        module.device_target = lambda tensor: target_key(TARGETS["sm_90"])
    BACKENDS["triton"] = replace(BACKENDS["triton"], unavailable=lambda: None, rejects=lambda problem: None)
