"""Launching the forward as Triton specialises it for Hopper: four warps load, two groups of four compute.

Triton cuts the tile of queries in two and the code in three by itself. What it is known to get right of this kernel is
what schedules.py lets through: the query comes through a descriptor that the kernel makes (for which it needs memory),
its tile's first row is used nowhere else, and nothing but tiles of keys and values is loaded in the loop.
"""

from collections.abc import Callable
from contextvars import copy_context
from typing import Any

import torch
import triton
from torch import Tensor

LOADING_WARPS, COMPUTING_WARPS = 4, 8


def refuse_unspecialised(compiled: Any) -> None:
    """Looks whether Triton specialised a binary: it says nothing where it didn't.

    Raises:
        RuntimeError: it didn't.
    """
    warps = compiled.metadata.num_warps
    if warps != LOADING_WARPS + COMPUTING_WARPS:
        raise RuntimeError(
            f"Triton {triton.__version__} did not specialise {compiled.name}: it has {warps} warps, expected "
            f"{LOADING_WARPS + COMPUTING_WARPS}; use schedule 'plain'"
        )


class SpecialisedKernel:
    """A jit function, or a binary of it, whose launches find memory for descriptors, and which must be specialised.

    Args:
        launched: what is launched.
    """

    def __init__(self, launched: Any) -> None:
        self._launched = launched

    def __getattr__(self, name: str) -> Any:
        return getattr(self._launched, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        launch = self._launched[grid]

        def launched(*args: Any, **kwargs: Any) -> Any:
            # the caller's own allocator stays as it is
            compiled = copy_context().run(_with_memory, launch, args, kwargs)
            # a binary returns nothing, and neither does the interpreter
            if compiled is None:
                return None
            refuse_unspecialised(compiled)
            return SpecialisedKernel(compiled)

        return launched


def _with_memory(launch: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    triton.set_allocator(_memory)
    return launch(*args, **kwargs)


def _memory(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")
