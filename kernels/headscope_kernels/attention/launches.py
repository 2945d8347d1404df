"""Calls that look like an earlier one go straight to the driver.

Working out a kernel's arguments and asking Triton which binary they mean takes several times longer than starting it
(bench/NOTES.md), and a small model's step waits for the CPU. Both depend on how the tensors lie in memory, never on
where exactly or on what is in them: so they are worked out once for each layout.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from headscope_kernels.attention.host import float32_precision
from headscope_kernels.attention.operands import refuse_misplaced
from headscope_kernels.attention.statistics import BoundStatistic

# layouts to remember; a model has some tens of them, varying lengths may make more without end
CAPACITY = 1024

# what a kernel's parameter gets: a tensor, several, or nothing
Pointers = Mapping[str, Tensor | Sequence[Tensor] | None]


def layout(tensor: Tensor | None) -> Hashable:
    """All that a launch depends on of a tensor: Triton and the tensor descriptors look at addresses modulo 16."""
    return None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16)


def layouts(pointers: Pointers) -> Hashable:
    """The layouts of everything that pointers name."""
    # `layout` written out, and a list: at every call
    return tuple(
        [
            None
            if value is None
            else (value.dtype, value.shape, value.stride(), value.data_ptr() % 16)
            if isinstance(value, Tensor)
            else tuple(map(layout, value))
            for value in pointers.values()
        ]
    )


def call_key(
    pointers: Pointers,
    query: Tensor,
    statistics: Sequence[BoundStatistic],
    is_causal: bool,
    scale: float,
    configuration: Hashable,
) -> Hashable:
    """All that a call of attention's kernels depends on but for what is in its tensors, `query` among them."""
    return (
        layouts(pointers),
        tuple((bound.statistic, len(bound.tensors)) for bound in statistics),
        is_causal,
        scale,
        query.device,
        float32_precision() if query.dtype == torch.float32 else None,
        configuration,
    )


def remember(known: dict[Hashable, Any], key: Hashable, value: Any) -> None:
    """Adds to what is known; beyond CAPACITY everything older is forgotten."""
    if len(known) >= CAPACITY:
        known.clear()
    known[key] = value


@dataclass(frozen=True)
class _Launch:
    """A launch without its tensors, which it must not keep alive.

    Attributes:
        start: the binary, loaded, with the number of its programs; takes the values.
        values: the kernel's arguments in order; None where a tensor goes.
        pointers: (position, name) of the tensors.
        described: (position, name, class, attributes but the tensor) of the tensor descriptors.
    """

    start: Callable[..., None]
    values: list[Any]
    pointers: list[tuple[int, str]]
    described: list[tuple[int, str, type, dict[str, Any]]]


class Launches:
    """The launches of one kernel, remembered by what they depend on.

    Args:
        kernel: the jit function.
        described: parameter that takes a tensor descriptor, of whatever class: the one that takes the same tensor's
            pointer.
    """

    def __init__(self, kernel: Any, described: Mapping[str, str]) -> None:
        self.kernel = kernel
        self.described = described
        self._known: dict[Hashable, _Launch] = {}

    def repeat(self, key: Hashable, pointers: Pointers) -> bool:
        """Launch as the call with this key did, on other tensors; False if there was none."""
        launch = self._known.get(key)
        if launch is None:
            return False
        values = launch.values.copy()
        for position, name in launch.pointers:
            values[position] = pointers[name]
        for position, name, kind, attributes in launch.described:
            # what its class checks was right the first time, and depends on the layout alone
            descriptor = values[position] = object.__new__(kind)
            descriptor.__dict__.update(attributes, base=pointers[name])
        launch.start(*values)
        return True

    def first(
        self,
        key: Hashable,
        pointers: Pointers,
        programs: int,
        arguments: dict[str, Any],
        options: dict[str, Any],
        kernel: Any = None,
    ) -> None:
        """Launch with these arguments, and remember it. `kernel`: what is launched if not the jit function itself.

        Args:
            key: whatever the launch depends on: the layouts of pointers, and all that arguments, programs and options
                come from.
            pointers: the tensors by parameter.
            programs: how many start.
            arguments: the kernel's, by name.
            options: Triton's: num_warps and the like.

        Raises:
            RuntimeError: the binary is one that the assembler got wrong (operands.py).
        """
        kernel = kernel or self.kernel
        compiled = kernel[(programs,)](**arguments, **options)
        if triton.knobs.runtime.interpret:
            return
        refuse_misplaced(compiled)
        values: list[Any] = []
        placed: list[tuple[int, str]] = []
        described: list[tuple[int, str, type, dict[str, Any]]] = []
        for position, parameter in enumerate(kernel.params):
            name, value = parameter.name, arguments[parameter.name]
            if value is not None and name in self.described:
                described.append((position, self.described[name], type(value), {**vars(value), "base": None}))
                value = None
            elif value is not None and name in pointers:
                placed.append((position, name))
                value = None
            values.append(value)
        remember(self._known, key, _Launch(compiled[(programs, 1, 1)], values, placed, described))
