"""Memory of a call and of the process, in bytes."""

import resource
from pathlib import Path

import torch

from headscope.bench.timing import Call, is_gpu, wait


def peak_bytes(call: Call, device: str) -> int | None:
    """The most memory that is allocated at once during a call, beyond what was allocated before; results included.

    On a CPU the process's resident memory counts, reset through /proc; None where the system doesn't allow that.
    """
    if is_gpu(device):
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = resident_bytes()
    call()
    return max(0, _status("VmHWM") - before)


def resident_bytes() -> int:
    """The process's resident memory."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The process's largest resident memory so far, torch's libraries included."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status(field: str) -> int:
    """A number of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")
