"""The backends: their names, the reasons why one isn't available or can't take a call, and the choice of one."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch

# cpu_library at once: it has to see forks from the start
from headscope.ops import cpu_library, cpu_structs
from headscope.ops.statistics import CLASSES, STATISTICS, KeyMass, Statistic


@dataclass(frozen=True)
class Problem:
    """The properties of a call that the choice of a backend depends on."""

    device: torch.device
    dtype: torch.dtype
    dim: int
    dim_v: int
    needs_gradient: bool
    statistics: tuple[Statistic, ...] = ()


@dataclass(frozen=True)
class Backend:
    """A way to compute the operator.

    Attributes:
        name: its name as `backend=` takes it.
        description: one line for `headscope doctor`.
        unavailable: returns the reason why it can't run on this machine, or None.
        rejects: returns the reason why it can't take a problem, or None.
    """

    name: str
    description: str
    unavailable: Callable[[], str | None]
    rejects: Callable[[Problem], str | None]


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


# looked up once: it costs more than a small kernel, and torch 2.11 can't trace it
_TRITON_INSTALLED = all(find_spec(name) is not None for name in ("triton", "headscope_kernels"))


def _triton_unavailable() -> str | None:
    if not _TRITON_INSTALLED:
        return "triton isn't installed"
    if torch.cuda.is_available() or _interpreted():
        return None
    return "no CUDA or ROCm device (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, slowly)"


def _triton_rejects(problem: Problem) -> str | None:
    if problem.device.type != "cuda" and not (problem.device.type == "cpu" and _interpreted()):
        return f"the tensors are on {problem.device}, it needs a GPU"
    if min(problem.dim, problem.dim_v) == 0:
        return "a head dim is 0, it takes at least 1"
    if max(problem.dim, problem.dim_v) > 512:
        return f"head dims reach {max(problem.dim, problem.dim_v)}, it takes at most 512"
    for statistic in problem.statistics:
        if statistic.key == KeyMass.key:
            continue
        kernel = statistic.kernel()
        if kernel is None or statistic.sums_over_queries:
            return f"{statistic.key!r} has no Triton functions; it gives {_those_with_kernels()}"
        lacks_gradient = kernel.gradient is None and not statistic.constant_gradient
        if problem.needs_gradient and statistic.differentiable and lacks_gradient:
            return f"an input requires grad, and {statistic.key!r} has no Triton function for its gradient"
    return _single_precision(problem)


def _those_with_kernels() -> str:
    from headscope_kernels.attention import STATISTICS as KERNELS

    # those that can be asked for by name come first
    keys = dict.fromkeys([*STATISTICS, *CLASSES])
    return ", ".join([*(key for key in keys if key in KERNELS), KeyMass.key])


def _cpu_unavailable() -> str | None:
    return cpu_library.unavailable_reason()


def _cpu_rejects(problem: Problem) -> str | None:
    if problem.device.type != "cpu":
        return f"the tensors are on {problem.device}, it needs CPU tensors"
    if max(problem.dim, problem.dim_v) > cpu_structs.MAX_DIM:
        return f"head dims reach {max(problem.dim, problem.dim_v)}, it takes at most {cpu_structs.MAX_DIM}"
    keys = [statistic.key for statistic in problem.statistics]
    if len(keys) > cpu_structs.MAX_STATISTICS or keys.count(KeyMass.key) > 1:
        return f"{len(keys)} statistics are asked for, it takes {cpu_structs.MAX_STATISTICS}, key_mass once"
    for statistic in problem.statistics:
        if statistic.key not in cpu_structs.STATISTICS:
            return f"{statistic.key!r} isn't built into it; it gives {', '.join(cpu_structs.STATISTICS)}"
        if statistic.tensor_count and statistic.constants[0] > cpu_structs.MAX_GROUPS:
            return f"{statistic.name!r} has {statistic.constants[0]} groups, it takes {cpu_structs.MAX_GROUPS}"
    return _single_precision(problem)


def _single_precision(problem: Problem) -> str | None:
    if problem.dtype == torch.float64:
        return "it computes in float32 and can't keep float64's precision"
    return None


def _nothing() -> None:
    return None


def _anything(problem: Problem) -> None:
    return None


# fastest first; reference is only used when asked for
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("triton", "fused Triton kernels, GPU", _triton_unavailable, _triton_rejects),
        Backend("cpu", "fused C++ kernels, CPU", _cpu_unavailable, _cpu_rejects),
        Backend("portable", "plain torch over chunks of rows, any device, with gradients", _nothing, _anything),
        Backend("reference", "plain torch in float64, for tests", _nothing, _anything),
    )
}


def backend_status() -> dict[str, str | None]:
    """For each backend, why it is unavailable here, or None."""
    return {name: backend.unavailable() for name, backend in BACKENDS.items()}


def select(requested: str | None, problem: Problem) -> str:
    """The name of the backend that serves the problem: the requested one, or the fastest that can.

    Raises:
        ValueError: the backend is unknown.
        RuntimeError: the requested backend isn't available or can't take the problem.
    """
    if requested is not None and requested not in BACKENDS:
        raise ValueError(f"backend: got {requested!r}, expected None or one of {', '.join(BACKENDS)}")
    if requested is not None:
        backend = BACKENDS[requested]
        reason = backend.unavailable() or backend.rejects(problem)
        if reason:
            raise RuntimeError(
                f"backend {requested!r} can't serve this call: {reason}; backend=None picks one that can"
            )
        return requested
    # the interpreter makes Triton available on a CPU, but never the fastest
    first = "triton" if problem.device.type == "cuda" else "cpu"
    backend = BACKENDS[first]
    return "portable" if backend.rejects(problem) or backend.unavailable() else first
