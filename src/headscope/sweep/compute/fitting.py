"""How many rows pass through a denoiser at once, and how they lie in memory."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from headscope.sweep.store.store import Fit

# on a CPU more rows bring no speed and fall out of its caches: 122 images/s at 16 rows, 90 at 32 and 69 at 64 through
# the bundled UNet on two cores
CPU_ROWS = 16
GPU_ROWS = 256
# of the memory that is free
USED_SHARE = 0.7


def prefers_channels_last(denoiser: nn.Module) -> bool:
    """True if most of its weights are convolutions', which are faster with channels innermost."""
    convolutions = sum(module.weight.numel() for module in denoiser.modules() if isinstance(module, nn.Conv2d))
    return 2 * convolutions > sum(parameter.numel() for parameter in denoiser.parameters())


@dataclass(frozen=True)
class Sharing:
    """The memory of module outputs that edited forwards take over from clean ones, in bytes.

    Attributes:
        cached: of each row of a clean forward, while its edits run.
        copied: of those, what each row of an edited forward gets a copy of, at most.
    """

    cached: int = 0
    copied: int = 0


def fit(device: torch.device, forward: Callable[[int], Any], sharing: Sharing, items: int) -> Fit:
    """Measure how many rows fit in memory beside what is there, with forwards of one and of two rows.

    Args:
        forward: runs the denoiser on so many rows.
        items: of a unit: more clean rows are never wanted.
    """
    used = [measured_bytes(device, lambda rows=rows: forward(rows)) for rows in (1, 2)]
    if device.type != "cuda":
        return fitted(used, sharing, items, available_memory(), CPU_ROWS)
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return fitted(used, sharing, items, free, GPU_ROWS)


def fitted(used: Sequence[int], sharing: Sharing, items: int, free: int, most: int) -> Fit:
    """How many rows fit.

    Args:
        used: bytes that forwards of one and of two rows take.
        free: bytes of memory.
        most: as many rows as are of use.
    """
    budget = int(USED_SHARE * free)
    each = max(used[1] - used[0], used[0] // 2, 1)
    edited = each + sharing.copied
    if sharing.cached + edited > budget:
        rows = _even(budget // each, most)
        return Fit(rows, 0 if sharing.cached else min(items, rows))
    # the cache stays while edits run, and leaves at least half of the memory to them, or a row's
    clean = min(items, most)
    if sharing.cached:
        clean = min(clean, max(1, budget // 2 // sharing.cached), (budget - edited) // sharing.cached)
    rows = _even((budget - clean * sharing.cached) // edited, most)
    return Fit(rows, min(clean, rows))


def _even(rows: int, most: int) -> int:
    """A multiple of 8 where there are as many: kernels are made for them; at least a row."""
    if rows >= most:
        return most
    return max(1, rows // 8 * 8 if rows >= 8 else rows)


def measured_bytes(device: torch.device, call: Callable[[], Any]) -> int:
    """The memory that a call takes: the peak on a GPU, on a CPU the sum of all it makes, which is more."""
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
    """True if memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


class Rows:
    """How many rows go through at once: halved whenever memory runs out.

    Args:
        most: of a forward.
        clean: of a clean forward whose outputs are cached; as many as of any other by default.
        release: gives memory back that is held to be used again.
    """

    def __init__(self, most: int, clean: int | None = None, release: Callable[[], None] = lambda: None) -> None:
        self.most = most
        self.clean = most if clean is None else clean
        self._release = release

    def run(self, count: int, compute: Callable[[range], None]) -> None:
        """Call `compute` for all of range(count), piece by piece; a piece for which memory runs out is done again in
        halves.

        Raises:
            torch.OutOfMemoryError or the like: not even one row fits.
        """
        start = 0
        while start < count:
            piece = range(start, min(start + self.most, count))
            if self._fits(piece, compute):
                start = piece.stop
            else:
                self.most = max(1, len(piece) // 2)

    def run_clean(self, count: int, compute: Callable[[range], None]) -> None:
        """The same for clean forwards, whose outputs are cached while `compute` runs edited ones through `run`."""
        start = 0
        while start < count:
            most = self.most
            piece = range(start, min(start + min(self.clean, most), count))
            if self._fits(piece, compute):
                start = piece.stop
            else:
                # edited rows were halved until one didn't fit: the cache takes too much, not they
                self.clean, self.most = max(1, len(piece) // 2), most

    def _fits(self, piece: range, compute: Callable[[range], None]) -> bool:
        """Compute a piece; False where memory ran out and a smaller one may do."""
        try:
            compute(piece)
        except Exception as error:
            if not is_out_of_memory(error) or len(piece) == 1:
                raise
        else:
            return True
        # outside of the handler: the traceback holds the tensors of the failed piece
        self._release()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return False
