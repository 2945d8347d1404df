"""Gluon kernels for Hopper, executed without a GPU to find what is wrong with their synchronisation.

`run` executes the Python source of a `gluon.jit` kernel on NumPy, program after program. What a card does
asynchronously (warp-specialised partitions, TMA copies, wgmma) is interleaved by a seed and a mode, so that the same
call always gives the same execution. It raises `EmulationError` for

- a deadlock: nobody can go on; the message says who waits for which phase of which mbarrier, and its state;
- a race in shared memory, in whatever order things happened in this execution: two accesses, one of them a write,
  that no chain of mbarriers, waits for wgmma and waits for stores puts in order (vector clocks);
- a TMA copy or wgmma that reads or overwrites what `store` wrote with no `fence_async_shared` in between;
- shared memory read before it was written, tokens of wgmma used before `warpgroup_mma_wait` let them;
- an mbarrier with more arrivals in a phase than its count, with bytes that nobody expected, with a waiter that lags two
  phases behind (its parity would be mistaken for the wrong phase), or used before `init`;
- global memory out of bounds, blocks of unlike layouts or ranks, integers that overflow;
- a partition that ends with a wgmma or a TMA store it hasn't waited for, a program that hasn't waited for a TMA load.

Not modelled: registers (their number, their spilling, operands that the compiler moves), the order in which the
compiler schedules instructions, warps of one partition that diverge, memory order beyond these rules (none in global
memory), races between programs, clusters, swizzling, the shapes and sizes that wgmma, TMA and shared memory accept, the
tensor cores' truncation. wgmma and TMA stores read their operands when they are waited for, the latest time they may:
an earlier one gives the same numbers unless there is a race, which is an error. Speed can't be learned here.
"""

import inspect
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import CellType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import ConstexprFunction

from hopper.memory import Descriptor, Shared
from hopper.program import MODES, RUNNING, Event, Program, Stopped, current
from hopper.values import STAND_INS, Buffer, EmulationError, Tensor, maximum, minimum, stand_in, tensor

__all__ = ["MODES", "EmulationError", "Event", "Statistics", "Tensor", "run"]


@stand_in("warp_specialize")
def warp_specialize(functions_and_args: Any, worker_num_warps: Any, worker_num_regs: Any = None) -> Any:
    caller = sys._getframe(1)  # the kernel's variables give the allocations their names
    for name, value in sorted(caller.f_locals.items(), key=lambda item: isinstance(item[1], Shared)):
        for i, one in enumerate(value if isinstance(value, tuple | list) else [value]):
            if isinstance(one, Shared):
                one.memory.name = name if one is value else f"{name}[{i}]"
    return current().specialize(functions_and_args, worker_num_warps)


@stand_in("range")
def _range(*bounds: Any, **hints: Any) -> Any:
    """Triton's range: its variable is an int32 of the run time."""
    return (tensor(i) for i in range(*(int(tensor(bound).data) for bound in bounds)))


@stand_in("static_assert")
@stand_in("device_assert")
@stand_in("assume")
def _assert(condition: Any, message: str = "", *rest: Any, **options: Any) -> None:
    if not np.all(condition.data if isinstance(condition, Tensor) else condition):
        raise EmulationError(f"assertion failed: {message}")


stand_in("static_range")(range)
stand_in("constexpr")(lambda value: value)
stand_in("static_print")(print)
stand_in("device_print")(print)
stand_in("program_id")(lambda axis: tensor(current().program[axis]))
stand_in("num_programs")(lambda axis: tensor(current().grid[axis]))
stand_in("num_warps")(lambda: current().running.warps)
stand_in("num_ctas")(lambda: 1)
# of one partition, whose warps don't diverge here
stand_in("barrier")(lambda **scope: None)
stand_in("thread_barrier")(lambda: None)


def _log_exponentials(name: str) -> None:
    """The exponentials of a softmax (on blocks of two axes) are events."""
    exponential = STAND_INS[id(getattr(gl, name))]

    def logged(value: Tensor) -> Tensor:
        if len(value.shape) == 2:
            current().log(name, "")
        return exponential(value)

    stand_in(name)(logged)


_log_exponentials("exp2")
_log_exponentials("exp")


class _Names:
    """A module of Triton's as the kernel sees it."""

    def __init__(self, module: ModuleType, loader: "_Loader") -> None:
        self._module, self._loader = module, loader

    def __getattr__(self, name: str) -> Any:
        value = self._loader.translated(getattr(self._module, name), name)
        setattr(self, name, value)
        return value


class _Loader:
    """Functions of one kernel with stand-ins for the names they use."""

    def __init__(self, replace: Mapping[Any, Any]) -> None:
        self.stand_ins = {**STAND_INS, **{id(old): new for old, new in replace.items()}}
        self.kept: list[Any] = [*replace]  # so that no id is given twice

    def translated(self, value: Any, name: str = "") -> Any:
        if id(value) in self.stand_ins:
            return self.stand_ins[id(value)]
        if isinstance(value, gl.constexpr):
            return self.translated(value.value, name)
        if type(value) in (tuple, list, gl.tuple):
            return tuple(self.translated(item, name) for item in value)
        if isinstance(value, ModuleType) and value.__name__.startswith("triton"):
            result = _Names(value, self)
        elif isinstance(value, ConstexprFunction):
            return value
        elif hasattr(value, "fn") and isinstance(value.fn, FunctionType):
            result = self._function(value.fn, value)
        elif getattr(value, "__triton_builtin__", False):
            result = _unmodelled(name)
        else:
            return value
        self.stand_ins[id(value)] = result
        self.kept.append(value)
        return result

    def _function(self, function: FunctionType, original: Any) -> Callable:
        names: dict[str, Any] = {}
        rebuilt = FunctionType(function.__code__, names, function.__name__, None, self._cells(function))
        signature = inspect.signature(function)
        constexprs = {name for name, p in signature.parameters.items() if "constexpr" in str(p.annotation)}
        defaults = {n: self.translated(p.default) for n, p in signature.parameters.items() if p.default is not p.empty}

        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs).arguments
            for name in constexprs & bound.keys():
                if isinstance(bound[name], Tensor):
                    raise EmulationError(f"{function.__name__}: {name} is a constexpr, got {bound[name]!r}")
            return rebuilt(**{**defaults, **bound})

        call.__name__ = function.__name__
        self.stand_ins[id(original)] = call  # before its globals: functions may call each other
        names |= {"range": _range, "min": minimum, "max": maximum}
        names |= {"__builtins__": function.__globals__["__builtins__"]}
        codes = [function.__code__]
        for code in codes:
            codes += [constant for constant in code.co_consts if isinstance(constant, type(code))]
            for name in code.co_names:
                if name in function.__globals__:
                    names[name] = self.translated(function.__globals__[name], name)
        return call

    def _cells(self, function: FunctionType) -> tuple | None:
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        return tuple(CellType(self.translated(cell.cell_contents, name)) for name, cell in cells) or None


def _unmodelled(name: str) -> Callable:
    def unmodelled(*args: Any, **kwargs: Any) -> Any:
        raise EmulationError(f"{name} isn't modelled")

    return unmodelled


@dataclass
class Statistics:
    steps: int = 0
    events: list[Event] = field(default_factory=list)

    def of(self, kind: str, partition: str = "") -> list[Event]:
        """Events of one kind, of partitions whose name starts with `partition`."""
        return [e for e in self.events if e.kind == kind and e.partition.startswith(partition)]


def _argument(value: Any, name: str, loader: _Loader) -> Any:
    if isinstance(value, TensorDescriptor):
        return Descriptor(value, name)
    if isinstance(value, torch.Tensor | np.ndarray):
        buffer = Buffer(value, name)
        return Tensor(np.int64(0), gl.pointer_type(buffer.dtype), None, buffer)
    if isinstance(value, bool | int | float):
        return tensor(value)
    if type(value) in (tuple, list):
        return tuple(_argument(item, f"{name}[{i}]", loader) for i, item in enumerate(value))
    return loader.translated(value, name)


def run(
    kernel: Any,
    grid: Sequence[int],
    arguments: Mapping[str, Any],
    *,
    seed: int = 0,
    mode: str = "random",
    starve: str = "",
    num_warps: int = 4,
    replace: Mapping[Any, Any] | None = None,
    step_limit: int = 1_000_000,
) -> Statistics:
    """Execute a `gluon.jit` kernel; its outputs are written into the tensors given.

    arguments: by parameter. A torch CPU tensor or NumPy array is a pointer, a `TensorDescriptor` (Gluon's, over a CPU
    tensor) a TMA descriptor, numbers are int32, int64 or float32, tuples hold any of these; a parameter annotated
    constexpr gets its value unchanged.
    mode: one of MODES. starve: partitions whose name starts with this ("producer 2": the function's name and its
    place in warp_specialize) go on only when nobody else can.
    replace: Python functions on `Tensor` for functions of the kernel's that can't be emulated.
    Raises EmulationError as the module says, with the program, seed and mode in a note.
    """
    if mode not in MODES:
        raise ValueError(f"mode: one of {MODES} was expected, got {mode!r}")
    loader = _Loader(replace or {})
    function = loader.translated(kernel)
    annotations = {n: str(p.annotation) for n, p in inspect.signature(kernel.fn).parameters.items()}
    values = {
        name: loader.translated(value) if "constexpr" in annotations[name] else _argument(value, name, loader)
        for name, value in arguments.items()
    }
    grid = (*grid, 1, 1)[:3]
    statistics = Statistics()
    for place in itertools.product(*(range(size) for size in reversed(grid))):
        program = Program(place[::-1], grid, seed, mode, starve, num_warps, step_limit)
        RUNNING.append(program)
        try:
            with np.errstate(all="ignore"):
                function(**values)
            program.finish()
        except BaseException as error:
            cause = program.error if isinstance(error, Stopped) and program.error is not None else error
            cause.add_note(f"program {program.program}, seed {seed}, mode {mode!r}, starve {starve!r}")
            raise cause from None
        finally:
            RUNNING.pop()
        statistics.steps += program.steps
        statistics.events += program.events
    return statistics
