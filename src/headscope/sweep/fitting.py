"""How many rows pass through a denoiser at once, and how they lie in memory."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

# on a CPU more rows bring no speed and fall out of its caches: 122 images/s at 16 rows, 90 at 32 and 69 at 64 through
# the bundled UNet on two cores
CPU_ROWS = 16
GPU_ROWS = 256
# of the memory that is free
USED_SHARE = 0.7


def prefers_channels_last(denoiser: nn.Module) -> bool:
    """Whether most of its weights are convolutions', which are faster with channels innermost."""
    convolutions = sum(module.weight.numel() for module in denoiser.modules() if isinstance(module, nn.Conv2d))
    return 2 * convolutions > sum(parameter.numel() for parameter in denoiser.parameters())


def fitting_rows(device: torch.device, forward: Callable[[int], Any]) -> int:
    """How many rows fit in memory beside what is there, from what forwards of one and two rows take.

    Args:
        forward: runs the denoiser on so many rows.
    """
    used = [measured_bytes(device, lambda rows=rows: forward(rows)) for rows in (1, 2)]
    if device.type != "cuda":
        return _rows(used, available_memory(), CPU_ROWS)
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _rows(used, free, GPU_ROWS)


def measured_bytes(device: torch.device, call: Callable[[], Any]) -> int:
    """What a call takes: the peak on a GPU, on a CPU the sum of all it makes, which is more."""
    if device.type != "cuda":
        with _Bytes() as counter:
            call()
        return counter.total
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _rows(used: list[int], free: int, most: int) -> int:
    each = max(used[1] - used[0], used[0] // 2, 1)
    fitting = int(USED_SHARE * free / each)
    if fitting >= most:
        return most
    # multiples of 8 where there are as many: kernels are made for them
    return max(1, fitting // 8 * 8 if fitting >= 8 else fitting)


class _Bytes(torch.utils._python_dispatch.TorchDispatchMode):
    """The bytes of all tensors that operators make: more than are alive at a time, so on the safe side."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.total += result.numel() * result.element_size()
        return result


def available_memory() -> int:
    """Bytes of memory that a process may take, from the system and its control group."""
    found = [2**33]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        found = [int(lines["MemAvailable"].split()[0]) * 1024]
    limit, current = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and current.exists() and limit.read_text().strip() != "max":
        found.append(max(0, int(limit.read_text()) - int(current.read_text())))
    return min(found)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


class Rows:
    """How many rows go through at once: halved whenever memory runs out.

    Attributes:
        release: gives memory back that is held to be used again.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.release: Callable[[], None] = lambda: None

    def run(self, count: int, compute: Callable[[range], None]) -> None:
        """Call `compute` for all of range(count), piece by piece; a piece for which memory runs out is done again in
        halves.

        Raises:
            torch.OutOfMemoryError or the like: not even one row fits.
        """
        start = 0
        while start < count:
            piece = range(start, min(start + self.most, count))
            try:
                compute(piece)
            except Exception as error:
                if not is_out_of_memory(error) or len(piece) == 1:
                    raise
                self.most = max(1, len(piece) // 2)
            else:
                start = piece.stop
                continue
            # outside of the handler: the traceback holds the tensors of the failed piece
            self.release()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
