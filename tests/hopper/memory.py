"""Shared memory of an emulated kernel, and what works on it: mbarriers, TMA and wgmma."""

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import torch
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper as gluon_hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier as gluon_mbarrier
from triton.experimental.gluon.language.nvidia.hopper import tma as gluon_tma

from hopper.program import Access, Clock, Partition, current, learn
from hopper.values import DTYPES, EmulationError, Tensor, rounded, stand_in, tensor


class Allocation:
    """What one `allocate_shared_memory` returned."""

    def __init__(self, name: str, dtype: Any, shape: Sequence[int]) -> None:
        self.name, self.dtype = name, dtype
        # 8-bit and 16-bit floats are held in float32; NaN shows up in results if it is read
        self.data = np.full(tuple(shape), np.nan, np.float64 if dtype == gl.float64 else np.float32)
        if not dtype.is_floating():
            self.data = np.zeros(tuple(shape), np.int64)
        self.written = np.zeros(tuple(shape), bool)
        self.accesses: list[Access] = []
        self.barriers: dict[int, Barrier] = {}


@stand_in("shared_memory_descriptor")
class Shared:
    """A view of an allocation: `box` is the part it may touch, `axes` the allocation's axis of each of its own."""

    def __init__(
        self, memory: Allocation, data: np.ndarray, written: np.ndarray, box: tuple, axes: tuple, layout: Any
    ) -> None:
        self.memory, self.data, self.written = memory, data, written
        self.box, self.axes, self.layout = box, axes, layout

    dtype = property(lambda self: self.memory.dtype)
    shape = property(lambda self: list(self.data.shape))
    rank = property(lambda self: self.data.ndim)
    numel = property(lambda self: self.data.size)
    type = property(lambda self: SimpleNamespace(**{n: getattr(self, n) for n in ("dtype", "shape", "layout")}))

    def __str__(self) -> str:
        whole = zip(self.box, self.memory.data.shape, strict=True)
        cuts = [(f"{a}" if b == a + 1 else f"{a}:{b}") if (a, b) != (0, size) else ":" for (a, b), size in whole]
        while cuts and cuts[-1] == ":":
            cuts.pop()
        return self.memory.name + (f"[{', '.join(cuts)}]" if cuts else "")

    def _cut(self, axis: int, start: int, stop: int) -> tuple:
        if not 0 <= start < stop <= self.data.shape[axis]:
            raise EmulationError(f"{self}: {start}:{stop} of axis {axis} isn't within shape {self.shape}")
        box, at = list(self.box), self.axes[axis]
        if at is not None:
            box[at] = (self.box[at][0] + start, self.box[at][0] + stop)
        return tuple(box)

    def index(self, index: Any) -> "Shared":
        at = int(tensor(index).data)
        return Shared(
            self.memory, self.data[at], self.written[at], self._cut(0, at, at + 1), self.axes[1:], self.layout
        )

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        box, cut = self._cut(dim, start, start + length), (*[slice(None)] * dim, slice(start, start + length))
        return Shared(self.memory, self.data[cut], self.written[cut], box, self.axes, self.layout)

    def permute(self, order: Sequence[int]) -> "Shared":
        data, written = self.data.transpose(order), self.written.transpose(order)
        return Shared(self.memory, data, written, self.box, tuple(self.axes[i] for i in order), self.layout)

    def reshape(self, shape: Sequence[int]) -> "Shared":
        data, written = self.data.view(), self.written.view()
        data.shape = written.shape = tuple(shape)  # refuses to copy
        # axes of size 1 come and go; where others change, later slices count as touching all of this view
        axes: tuple = (None,) * len(shape)
        if [n for n in shape if n > 1] == [n for n in self.shape if n > 1]:
            rest = iter([axis for axis, size in zip(self.axes, self.shape, strict=True) if size > 1])
            axes = tuple(next(rest) if size > 1 else None for size in shape)
        return Shared(self.memory, data, written, self.box, axes, self.layout)

    def _reinterpret(self, dtype: Any, shape: Sequence[int], layout: Any) -> "Shared":
        if dtype != self.dtype:
            raise EmulationError(f"{self}: reinterpreting {self.dtype} as {dtype} isn't modelled")
        view = self.reshape(shape)
        view.layout = layout
        return view

    def load(self, layout: Any) -> Tensor:
        partition = current().step()
        partition.access(self, "load", write=False, generic=True)
        return Tensor(self.data.copy(), self.dtype, layout)

    def store(self, value: Tensor) -> None:
        partition = current().step()
        if not isinstance(value, Tensor) or value.shape != self.shape or value.dtype != self.dtype:
            raise EmulationError(f"{self}: {self.dtype} of shape {self.shape} was expected, got {value!r}")
        partition.access(self, "store", write=True, generic=True)
        self.data[...], self.written[...] = value.data, True

    def _keep_alive(self) -> None:
        pass


@stand_in("allocate_shared_memory")
def allocate_shared_memory(element_ty: Any, shape: Sequence[int], layout: Any, value: Any = None) -> Shared:
    memory = Allocation(f"shared memory {len(current().allocations)}", element_ty, shape)
    current().allocations.append(memory)
    box = tuple((0, size) for size in shape)
    shared = Shared(memory, memory.data, memory.written, box, tuple(range(len(shape))), layout)
    if value is not None:
        shared.store(value)
    return shared


@stand_in("fence_async_shared", gluon_hopper)
def fence_async_shared(cluster: bool = False) -> None:
    partition = current().step()
    for access in (access for memory in current().allocations for access in memory.accesses):
        if access.write and access.generic and partition.knows(access.key, access.time):
            access.fences.append((partition.key, partition.clock[partition.key]))


class Barrier:
    def __init__(self, shared: Shared, count: int) -> None:
        self.shared, self.count, self.pending = shared, count, count
        self.bytes = self.completed = 0
        self.arriving: Clock = {}  # what those who arrived in this phase knew
        self.known: Clock = {}  # what whoever has waited for a completed phase knows

    @property
    def name(self) -> str:
        return str(self.shared)

    def __str__(self) -> str:
        return (
            f"{self.name} ({self.completed} phases completed; in the current one {self.count - self.pending} of "
            f"{self.count} arrivals, {self.bytes} bytes still expected)"
        )

    def arrive(self, count: int, clock: Clock, expected: int = 0) -> None:
        if count > self.pending:
            raise EmulationError(f"{self}: {count} arrivals are more than its count leaves in this phase")
        self.pending -= count
        self.bytes += expected
        learn(self.arriving, clock)
        completed = self.completed
        self._complete()
        if self.count == 1 and self.completed > completed:  # whoever arrives alone knows that it ends the phase
            clock[self] = self.completed

    def receive(self, count: int, clock: Clock) -> None:
        self.bytes -= count
        if self.bytes < 0:
            raise EmulationError(f"{self}: {count} bytes came that no expect() has counted")
        learn(self.arriving, clock)
        self._complete()

    def _complete(self) -> None:
        if self.pending or self.bytes:
            return
        self.completed += 1
        self.pending = self.count
        learn(self.known, {**self.arriving, self: self.completed})
        self.arriving = {}
        for partition in current().partitions:
            if partition.awaited is self:
                self.check_waiter(partition)

    def check_waiter(self, partition: "Partition") -> None:
        known = partition.clock.get(self, 0)
        if self.completed - known > 1:
            raise EmulationError(
                f"{self}: {partition} waits for a phase when all it can know of is {known} completed phases; "
                "parity can't tell phases apart that are two apart"
            )


def _barrier(shared: Shared, used: bool = True) -> tuple["Partition", Barrier]:
    partition = current().step()
    if shared.dtype != gl.int64 or shared.numel != 1:
        raise EmulationError(f"{shared}: an mbarrier (one int64) was expected, got {shared.dtype} {shared.shape}")
    place = shared.data.__array_interface__["data"][0]
    if used and place not in shared.memory.barriers:
        raise EmulationError(f"{shared}: an mbarrier used before its init()")
    if not used:
        shared.memory.barriers[place] = Barrier(shared, 0)
    return partition, shared.memory.barriers[place]


@stand_in("init", gluon_mbarrier)
def barrier_init(mbarrier: Shared, count: int) -> None:
    _, barrier = _barrier(mbarrier, used=False)
    barrier.count = barrier.pending = count


@stand_in("invalidate", gluon_mbarrier)
def barrier_invalidate(mbarrier: Shared) -> None:
    _barrier(mbarrier)
    del mbarrier.memory.barriers[mbarrier.data.__array_interface__["data"][0]]


@stand_in("expect", gluon_mbarrier)
def barrier_expect(mbarrier: Shared, bytes: int | None = None, pred: Any = True, *, bytes_per_cta: Any = None) -> None:
    """One arrival, and bytes to come before the phase completes (mbarrier.arrive.expect_tx)."""
    if pred:
        partition, barrier = _barrier(mbarrier)
        count = bytes if bytes_per_cta is None else bytes_per_cta
        if not isinstance(count, int):
            raise EmulationError(f"{barrier}: expect() takes a constexpr number of bytes, got {count!r}")
        barrier.arrive(1, partition.clock, expected=count)
        partition.released("expect", barrier.name)


@stand_in("arrive", gluon_mbarrier)
def barrier_arrive(mbarrier: Shared, *, count: int = 1, pred: Any = True) -> None:
    if pred:
        partition, barrier = _barrier(mbarrier)
        barrier.arrive(count, partition.clock)
        partition.released("arrive", barrier.name)


@stand_in("wait", gluon_mbarrier)
def barrier_wait(mbarrier: Shared, phase: Any, pred: Any = True, deps: Sequence[Any] = ()) -> None:
    if not pred:
        return
    partition, barrier = _barrier(mbarrier)
    parity = int(tensor(phase).data)
    if parity not in (0, 1):
        raise EmulationError(f"{barrier}: a phase's parity (0 or 1) was expected, got {parity}")
    barrier.check_waiter(partition)
    partition.awaited = barrier
    current().step(lambda: (barrier.completed - 1) % 2 == parity, f"waits for parity {parity} of {barrier.name}")
    partition.awaited = None
    learn(partition.clock, barrier.known)
    current().log("wait", barrier.name)


class Descriptor:
    """A host's TensorDescriptor as a kernel sees it."""

    def __init__(self, host: Any, name: str) -> None:
        self.name, self.layout, self.padding = name, host.layout, host.padding
        self.block_shape, self.dtype = list(host.block_shape), DTYPES[host.base.dtype]
        self.block_type = tl.block_type(self.dtype, self.block_shape)
        self.nbytes_per_cta = self.block_type.nbytes
        self.memory = host.base.detach().as_strided(tuple(host.shape), tuple(host.strides))
        self.shape = [tensor(int(size)) for size in host.shape]
        self.strides = [tensor(int(stride)) for stride in host.strides]

    def place(self, coordinates: Sequence[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The part of the tensor at `coordinates` that exists, and its part of the block."""
        if len(coordinates) != len(self.block_shape):
            raise EmulationError(f"{self.name}: {len(self.block_shape)} coordinates expected, got {coordinates}")
        inside, block = [], []
        for coordinate, length, size in zip(coordinates, self.block_shape, self.memory.shape, strict=True):
            start = int(tensor(coordinate).data)
            first, last = (min(max(edge, 0), size) for edge in (start, start + length))
            inside.append(slice(first, last))
            block.append(slice(first - start, last - start))
        return tuple(inside), tuple(block if all(s.stop > s.start for s in inside) else [slice(0, 0)] * len(block))

    def matches(self, shared: Shared) -> None:
        if [n for n in shared.shape if n > 1] != [n for n in self.block_shape if n > 1] or shared.dtype != self.dtype:
            raise EmulationError(
                f"{self.name}: {self.dtype} of shape {self.block_shape} expected in shared memory, got {shared} of "
                f"{shared.dtype} {shared.shape}"
            )
        if shared.rank == len(self.block_shape) and shared.layout != self.layout:
            raise EmulationError(f"{shared}: the layout of {self.name}, {self.layout}, expected, got {shared.layout}")


class Copy:
    """A TMA load that has been issued: it lands in pieces, in any order."""

    def __init__(self, tile: np.ndarray, shared: Shared, barrier: Barrier, access: Access, name: str) -> None:
        self.tile, self.shared, self.barrier, self.access, self.name = tile, shared, barrier, access, name
        cut = next((axis for axis, size in enumerate(tile.shape) if size > 1), 0)
        edges = np.linspace(0, tile.shape[cut], min(3, tile.shape[cut]) + 1).astype(int).tolist()
        self.pieces = [(*[slice(None)] * cut, slice(*edge)) for edge in itertools.pairwise(edges)]
        current().random.shuffle(self.pieces)

    def land(self) -> None:
        piece = self.pieces.pop()
        self.shared.data[piece], self.shared.written[piece] = self.tile[piece], True
        knowledge = {}
        if not self.pieces:
            self.access.time = current().counters[self.access.key]
            knowledge = {self.access.key: self.access.time}
            current().copies.remove(self)
            current().log("landed", self.name, by="TMA")
        size = self.tile[piece].size * self.shared.dtype.primitive_bitwidth // 8
        self.barrier.receive(size, knowledge)


@stand_in("async_copy_global_to_shared", gluon_tma)
def copy_global_to_shared(
    tensor_desc: Descriptor, coord: Sequence[Any], barrier: Shared, result: Shared, pred: Any = True, **options: Any
) -> None:
    if not pred:
        return
    partition, mbarrier = _barrier(barrier)
    tensor_desc.matches(result)
    inside, block = tensor_desc.place(coord)
    tile = np.full(tensor_desc.block_shape, np.nan if tensor_desc.padding == "nan" else 0.0)
    part = tensor_desc.memory[inside]
    tile[block] = part.double().numpy() if part.numel() else 0.0
    access = partition.access(result, f"TMA load of {tensor_desc.name}", write=True, generic=False, pending=True)
    access.key = (id(result.memory), access.box)
    current().counters[access.key] += 1
    result.written[...], result.data[...] = False, np.nan
    tile = rounded(tile, result.dtype).reshape(result.shape)
    current().copies.append(Copy(tile, result, mbarrier, access, str(result)))
    current().log("copy", str(result))


@stand_in("async_copy_shared_to_global", gluon_tma)
def copy_shared_to_global(tensor_desc: Descriptor, coord: Sequence[Any], src: Shared) -> None:
    partition = current().step()
    tensor_desc.matches(src)
    inside, block = tensor_desc.place(coord)
    access = partition.access(src, f"TMA store to {tensor_desc.name}", write=False, generic=False, pending=True)

    def finish() -> None:
        part = torch.from_numpy(src.data.reshape(tensor_desc.block_shape)[block])
        if part.numel():
            tensor_desc.memory[inside] = part.to(tensor_desc.memory.dtype)

    partition.stores.append((access, finish))
    current().log("store", str(src))


@stand_in("store_wait", gluon_tma)
def store_wait(outstanding: int) -> None:
    partition = current().step()
    while len(partition.stores) > outstanding:
        access, finish = partition.stores.pop(0)
        finish()
        access.time = partition.clock[partition.key]


class Accumulator:
    """An asynchronous wgmma's token: no value before `warpgroup_mma_wait`."""

    def __init__(self, name: str, accumulator: Any, operands: tuple, use_acc: bool, accesses: list[Access]) -> None:
        self.name, self.accumulator, self.operands = name, accumulator, operands
        self.use_acc, self.accesses = use_acc, accesses
        self.result: Any = None  # a Tensor, once it has been waited for
        self.shape, self.dtype, self.type = accumulator.shape, accumulator.dtype, accumulator.type

    def __getattr__(self, name: str) -> Any:
        _refuse(self)

    def finish(self, partition: "Partition") -> None:
        a, b = (operand.data.astype(np.float32) for operand in self.operands)
        product = a @ b
        if self.use_acc:
            start = self.accumulator
            product = product + (start.result if isinstance(start, Accumulator) else start).data
        self.result = Tensor(product, self.dtype, self.type.layout)
        self.accumulator = self.operands = ()
        for access in self.accesses:
            access.time = partition.clock[partition.key]


def _refuse(self: Accumulator, *others: Any) -> NoReturn:
    raise EmulationError(f"{self.name}: used before warpgroup_mma_wait(deps=[...]) returned its result")


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "neg", "getitem", "lt", "gt"):
    setattr(Accumulator, f"__{_name}__", _refuse)


@stand_in("warpgroup_mma", gluon_hopper)
def warpgroup_mma(
    a: Any, b: Shared, acc: Any, *, use_acc: Any = True, is_async: bool = False, **precision: Any
) -> Tensor | Accumulator:
    partition = current().step()
    name = f"{a if isinstance(a, Shared) else 'registers'} @ {b}"
    layout = acc.type.layout
    if not isinstance(layout, gl.NVMMADistributedLayout) or list(layout.version) != [3, 0]:
        raise EmulationError(f"{name}: an accumulator of NVMMADistributedLayout [3, 0] expected, got {layout}")
    if not isinstance(b, Shared) or a.dtype != b.dtype:
        raise EmulationError(f"{name}: operands of one dtype, b in shared memory, expected, got {a.dtype} and {b}")
    if len(a.shape) != 2 or len(b.shape) != 2 or [a.shape[0], b.shape[1]] != acc.shape or a.shape[1] != b.shape[0]:
        raise EmulationError(f"{name}: shapes {a.shape} @ {b.shape} + {acc.shape} don't go together")
    if isinstance(a, Tensor):
        wanted = gl.DotOperandLayout(0, layout, 32 // a.dtype.primitive_bitwidth)
        if a.layout != wanted:
            raise EmulationError(f"{name}: {wanted} expected of the operand in registers, got {a.layout}")
    shared = [operand for operand in (a, b) if isinstance(operand, Shared)]
    accesses = [partition.access(x, f"wgmma {name}", write=False, generic=False, pending=True) for x in shared]
    token = Accumulator(name, acc, (a, b), bool(use_acc), accesses)
    partition.wgmmas.append(token)
    current().log("wgmma", name)
    return token if is_async else warpgroup_mma_wait(0, [token])


@stand_in("warpgroup_mma_wait", gluon_hopper)
def warpgroup_mma_wait(num_outstanding: int = 0, deps: Sequence[Any] | None = None) -> Any:
    partition = current().step()
    if not deps:
        raise EmulationError("warpgroup_mma_wait: deps must be given")
    while len(partition.wgmmas) > num_outstanding:
        token = partition.wgmmas.pop(0)
        token.finish(partition)
        current().log("retired", token.name)
    for dep in deps:
        if isinstance(dep, Accumulator) and dep.result is None:
            raise EmulationError(f"{dep.name}: still in flight after warpgroup_mma_wait({num_outstanding})")
    results = tuple(dep.result if isinstance(dep, Accumulator) else dep for dep in deps)
    return results[0] if len(results) == 1 else results


@stand_in("warpgroup_mma_init", gluon_hopper)
def warpgroup_mma_init(value: Tensor) -> Tensor:
    return value
