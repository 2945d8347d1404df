"""Kernels compiled before the card is asked, by as many processes as there are cores, into Triton's own cache.

A job is a call as the stage will make it, on CPU tensors of the same layout: Triton compiles for the card and hands its
launcher's arguments to a driver that drops them. The binaries are those of the launches to come
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
    pretend()
    function, arguments = job
    loaded, before = len(_loaded), _core_seconds()
    function(*arguments)
    return len(_loaded) - loaded, _core_seconds() - before


# names of kernels that this process would have loaded
_loaded: list[str] = []


def _core_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def pretend() -> None:
    """From now on this process compiles for sm_90 what it launches on CPU tensors, and launches nothing."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia

    from headscope.ops.backends import BACKENDS
    from headscope_kernels.attention import backward, forward, key_mass

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            pass

        def __call__(self, *arguments: Any) -> None:
            pass

    class Utilities:
        def get_device_properties(self, device: int) -> dict[str, int]:
            return {"max_shared_mem": 227 * 1024}

        def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple:
            _loaded.append(name)
            return object(), kernel, 255, 0, 1024

    class Driver:
        launcher_cls = Launcher
        utils = Utilities()

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def map_python_to_cpp_type(self, name: str) -> str:
            return nvidia.ty_to_cpp(name)

    torch.set_num_threads(1)
    triton.runtime.driver.set_active(Driver())
    for module in (forward, backward, key_mass):
        module.device_target = lambda tensor: ("cuda", 90)
    BACKENDS["triton"] = replace(BACKENDS["triton"], unavailable=lambda: None, rejects=lambda problem: None)
