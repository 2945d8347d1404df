"""Forwards of the denoiser, computed as they come or replayed from CUDA graphs.

A small model's forward is over before Python has launched its kernels. A graph launches them all at once and runs no
Python, so there is one for each kind of forward: the clean one, and one for every edited site and number of rows. What
differs from use to use (inputs, edits, which rows they belong to) are tensors, which are copied into the graph's before
it is replayed.

The first use of a kind captures it. The second, and the first at every other timestep, are computed twice, replayed
and as they come, and compared, so that a model which makes a constant of what should be an input is found out:
`Graphs.reason` says so, and from then on nothing is replayed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from headscope.sweep.compute.calls import Diverged, replaced_forward
from headscope.sweep.compute.fitting import is_out_of_memory

# by how much a replay may differ, relative to the largest value, in roundings of its dtype: it is the same kernels on
# the same numbers, but a library may choose others while it is captured
REPLAY_ROUNDINGS = 8

# runs a function once or more, and returns what repeats its work on the same memory
Capture = Callable[[Callable[[], None]], Callable[[], None]]
# from what differs from use to use, the context in which the denoiser runs
Inside = Callable[[Any], AbstractContextManager[Any]]


class Forwards:
    """Forwards computed as they come.

    Attributes:
        reason: why that is so though graphs were asked for; None otherwise.
    """

    reason: str | None = None

    def run(
        self, key: Hashable, timestep: int, given: Any, inside: Inside, call: Callable[[], Tensor]
    ) -> tuple[Tensor, Any]:
        """Run a forward inside of a context; returns its answer and what the context gave.

        Args:
            key: what decides, beside tensors, which kind of forward it is.
            timestep: of the forward.
            given: tensors, in dicts and tuples, that the forward depends on beside its arguments.
            inside: makes the context from `given`.
            call: makes one forward of the denoiser.
        """
        with inside(given) as product:
            return call(), product

    def release(self) -> None:
        """Give memory back."""


@dataclass(eq=False)
class _Graph:
    """A captured kind of forward.

    Attributes:
        replay: repeats it.
        inputs: the tensors it reads.
        answer, structure: its output's leaves, tensors of the graph, and how they hang together.
        product: what the context gave while it was captured.
        timesteps: those at which it was used.
        uses: how often.
    """

    replay: Callable[[], None]
    inputs: list[Tensor]
    answer: list[Any]
    structure: Any
    product: Any
    timesteps: set[int] = field(default_factory=set)
    uses: int = 0

    def to_be_checked(self, timestep: int) -> bool:
        """True if this use is computed twice, replayed and as it comes."""
        return self.uses == 1 or (self.uses > 1 and timestep not in self.timesteps)


class Graphs(Forwards):
    """Forwards replayed from CUDA graphs.

    Args:
        denoiser: on a CUDA device.
        capture: another way to capture than CUDA's.
    """

    def __init__(self, denoiser: nn.Module, capture: Capture | None = None) -> None:
        self._denoiser = denoiser
        self._device = next(denoiser.parameters()).device
        self._capture = capture or CudaCapture(self._device)
        self._graphs: dict[Hashable, _Graph] = {}
        # by place, shape and layout: graphs are replayed one after the other, so they can have their inputs in common
        self._buffers: dict[Hashable, Tensor] = {}

    def run(
        self, key: Hashable, timestep: int, given: Any, inside: Inside, call: Callable[[], Tensor]
    ) -> tuple[Tensor, Any]:
        products: list[Any] = []

        def replayed(forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
            # a denoiser that runs twice in a call does so in the same order every time
            answer, product = self._forward((key, len(products)), timestep, forward, (args, kwargs, given), inside)
            products.append(product)
            return answer

        with replaced_forward(self._denoiser, replayed):
            answer = call()
        return answer, products[-1]

    def release(self) -> None:
        self._graphs.clear()
        self._buffers.clear()

    def _forward(
        self, key: Hashable, timestep: int, forward: Callable[..., Any], values: tuple, inside: Inside
    ) -> tuple[Any, Any]:
        if self.reason is not None:
            return _plain(forward, values, inside)
        leaves, structure = tree_flatten(values)
        kind = (key, str(structure), *(self._looks(leaf) for leaf in leaves))
        graph = self._graphs.get(kind)
        if graph is None:
            try:
                graph = self._graphs[kind] = self._captured(forward, leaves, structure, inside)
            except RuntimeError as error:
                if isinstance(error, Diverged) or is_out_of_memory(error):
                    raise
                self._refuse(f"a forward couldn't be captured: {error}")
                return _plain(forward, values, inside)
        tensors = [leaf for leaf in leaves if self._varies(leaf)]
        if graph.to_be_checked(timestep):
            expected = _plain(forward, values, inside)
            answer = self._replay(graph, tensors)
            if not _agree(answer, expected[0]):
                self._refuse("a replay differs from the forward: the model makes a constant of one of its inputs")
                return expected
        else:
            answer = self._replay(graph, tensors)
        graph.uses += 1
        graph.timesteps.add(timestep)
        return answer, graph.product

    def _varies(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.device == self._device

    def _looks(self, leaf: Any) -> Hashable:
        """The traits of an input by which graphs are chosen: of a tensor on the device all but its numbers."""
        if not isinstance(leaf, Tensor):
            return leaf if isinstance(leaf, Hashable) else id(leaf)
        shape = (leaf.dtype, leaf.shape, leaf.stride())
        return shape if self._varies(leaf) else (*shape, leaf.cpu().flatten().view(torch.uint8).numpy().tobytes())

    def _captured(self, forward: Callable[..., Any], leaves: list[Any], structure: Any, inside: Inside) -> _Graph:
        inputs = [self._buffer(place, leaf) if self._varies(leaf) else leaf for place, leaf in enumerate(leaves)]
        graph = _Graph(lambda: None, [leaf for leaf in inputs if self._varies(leaf)], [], None, None)
        for buffer, leaf in zip(graph.inputs, filter(self._varies, leaves), strict=True):
            buffer.copy_(leaf)
        values = tree_unflatten(inputs, structure)

        def compute() -> None:
            answer, graph.product = _plain(forward, values, inside)
            parts, graph.structure = tree_flatten(answer)
            graph.answer = [self._kept(place, part) for place, part in enumerate(parts)]

        graph.replay = self._capture(compute)
        return graph

    def _kept(self, place: int, part: Any) -> Any:
        if not isinstance(part, Tensor):
            return part
        return self._buffer(-1 - place, part).copy_(part)

    def _buffer(self, place: int, tensor: Tensor) -> Tensor:
        """A tensor like this one, the same for every graph with such a one in this place."""
        key = (place, tensor.dtype, tensor.shape, tensor.stride())
        if key not in self._buffers:
            self._buffers[key] = torch.empty_like(tensor)
        return self._buffers[key]

    def _replay(self, graph: _Graph, tensors: list[Tensor]) -> Any:
        for buffer, tensor in zip(graph.inputs, tensors, strict=True):
            buffer.copy_(tensor)
        graph.replay()
        # the next replay writes into the graph's tensors
        return tree_map_only(Tensor, Tensor.clone, tree_unflatten(graph.answer, graph.structure))

    def _refuse(self, reason: str) -> None:
        self.reason = reason
        self.release()
        warnings.warn(f"graphs: forwards are not replayed: {reason}", stacklevel=2)


class CudaCapture:
    """Captures CUDA graphs, which have their memory in common: they are replayed one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            aside = torch.cuda.Stream()
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                # compiles kernels and makes workspaces, which can't be captured
                compute()
            current.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            try:
                # threads that read items and write results go on meanwhile
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    compute()
            except BaseException:
                # torch leaves the capturing stream the current one when a capture fails
                torch.cuda.set_stream(current)
                raise
        return graph.replay


def _plain(forward: Callable[..., Any], values: tuple, inside: Inside) -> tuple[Any, Any]:
    args, kwargs, given = values
    with inside(given) as product:
        return forward(*args, **kwargs), product


def _agree(answer: Any, expected: Any) -> bool:
    """True if two outputs are the same but for rounding."""
    for one, other in zip(tree_leaves(answer), tree_leaves(expected), strict=True):
        if isinstance(other, Tensor) and other.numel():
            rounding = torch.finfo(other.dtype).eps if other.is_floating_point() else 0.0
            tolerance = REPLAY_ROUNDINGS * rounding * float(other.nan_to_num().abs().max())
            if not torch.allclose(one, other, rtol=0.0, atol=tolerance, equal_nan=True):
                return False
    return True
