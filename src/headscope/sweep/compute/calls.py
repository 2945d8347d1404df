"""The calls that a denoiser's forward is made of, learned by watching it run.

Which module runs inside which, in what order, when each site's attention runs, how outputs depend on the rows, and
which code uses them. Nothing here knows a class of model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from itertools import zip_longest
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

# the same for every row, in `Call.parts`
SHARED = 0

# what a module's forward goes through: its name, the forward, args and kwargs
Through = Callable[[str, Callable[..., Any], tuple, dict], Any]


class Diverged(RuntimeError):
    """A forward called its modules in another order than the one that was learned."""


@dataclass
class Call:
    """One call of a module within a forward.

    Attributes:
        name: the module's path.
        parent: the call it ran inside of; None for the denoiser's call.
        children: the calls inside it, in order.
        start, finish: when it began and ended, on one clock of calls and attentions.
        parts: for each tensor of its output how many leading entries a row has, or SHARED; None where they
            can't be assigned to rows.
        pure: it changed nothing but its output, and its output stayed as it was.
        uses: for each tensor of its output, the calls whose code (not a called module's) it went into.
    """

    name: str
    parent: Call | None
    start: int
    children: list[Call] = field(default_factory=list)
    finish: int = 0
    parts: list[int] | None = None
    pure: bool = True
    uses: list[set[int]] = field(default_factory=list)

    def path(self) -> Iterator[Call]:
        """This call and those it is inside of, innermost first."""
        call: Call | None = self
        while call is not None:
            yield call
            call = call.parent


class Watch(TorchFunctionMode):
    """Learns the calls of one forward."""

    def __init__(self, sites: tuple[str, ...]) -> None:
        super().__init__()
        self._names = frozenset(sites)
        self._stack: list[Call] = []
        self._clock = 0
        # everything a module took or returned stays alive until the end: an identity is then one tensor's alone
        self._outputs: list[tuple[Call, list[Tensor], list[int]]] = []
        self._producers: dict[int, list[tuple[Call, int]]] = {}
        self.root: Call | None = None
        self.shapes: dict[int, list[tuple[int, ...]]] = {}
        self.attention_at: dict[str, int] = {}

    def __call__(self, name: str, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        parent = self._stack[-1] if self._stack else None
        call = Call(name, parent, self._tick())
        if parent is None:
            if self.root is not None:
                raise Diverged("the denoiser runs more than once in a forward")
            self.root = call
        else:
            parent.children.append(call)
        given = [(tensor, tensor._version) for tensor in tensors_of((args, kwargs))]
        self._stack.append(call)
        try:
            output = forward(*args, **kwargs)
        finally:
            self._stack.pop()
        call.finish = self._tick()
        # what a module changes in what it was given, it would have to change again
        call.pure = all(tensor._version == version for tensor, version in given)
        tensors = tensors_of(output)
        self._outputs.append((call, tensors, [tensor._version for tensor in tensors]))
        self.shapes[call.start] = [tuple(tensor.shape) for tensor in tensors]
        call.uses = [set() for _ in tensors]
        for index, tensor in enumerate(tensors):
            self._producers.setdefault(id(tensor), []).append((call, index))
        return output

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        # reading a shape or dtype is no use of the values
        described = getattr(function, "__name__", "") == "__get__" and not isinstance(result, Tensor)
        if self._stack and not described:
            for tensor in tensors_of((args, kwargs or {})):
                for call, index in self._producers.get(id(tensor), ()):
                    call.uses[index].add(self._stack[-1].start)
        return result

    @contextmanager
    def attention(self) -> Iterator[None]:
        """Notes when each site's attention first runs."""
        stock = functional.scaled_dot_product_attention

        def noted(*args: Any, **kwargs: Any) -> Tensor:
            site = next((call.name for call in reversed(self._stack) if call.name in self._names), None)
            if site is not None:
                self.attention_at.setdefault(site, self._tick())
            return stock(*args, **kwargs)

        functional.scaled_dot_product_attention = noted
        try:
            yield
        finally:
            functional.scaled_dot_product_attention = stock

    def conclude(self) -> None:
        for call, tensors, versions in self._outputs:
            call.pure &= all(tensor._version == then for tensor, then in zip(tensors, versions, strict=True))
        # the root's answer is used by whoever asked for it
        for call in all_calls(self.root):
            if call.name in self._names:
                # attention that doesn't come by torch's function is cut before the whole module
                self.attention_at.setdefault(call.name, call.start)
        missing = sorted(self._names - set(self.attention_at))
        if missing:
            raise Diverged(f"site {missing[0]!r} didn't run")
        self._outputs.clear()
        self._producers.clear()

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


def all_calls(call: Call | None) -> Iterator[Call]:
    if call is not None:
        yield call
        for child in call.children:
            yield from all_calls(child)


def merged(one: Watch, two: Watch) -> Call:
    """The tree of the forward of two rows, with how its outputs depend on the number of rows.

    Raises:
        Diverged: the two forwards called different modules.
    """
    assert one.root is not None
    assert two.root is not None
    for single, double in zip_longest(all_calls(one.root), all_calls(two.root)):
        if (
            single is None
            or double is None
            or (single.name, len(single.children)) != (double.name, len(double.children))
        ):
            raise Diverged("which modules run depends on the number of rows")
        shapes = list(zip_longest(one.shapes[single.start], two.shapes[double.start]))
        parts = [_parts(*pair) for pair in shapes]
        double.parts = None if None in parts else parts
        double.pure &= single.pure
    return two.root


def _parts(single: tuple[int, ...] | None, double: tuple[int, ...] | None) -> int | None:
    """How many leading entries belong to a row, from a tensor's shapes in forwards of one and of two rows."""
    if single is None or double is None:
        return None
    if single == double:
        return SHARED
    folded = single[1:] == double[1:] and double[0] == 2 * single[0]
    return single[0] if folded else None


def tensors_of(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, Tensor)]


@contextmanager
def called_through(denoiser: nn.Module, through: Through) -> Iterator[None]:
    """Every module's forward goes through a function of (name, forward, args, kwargs); restored exactly."""
    changed: list[tuple[nn.Module, Any]] = []

    def led(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            return through(name, forward, args, kwargs)

        return run

    try:
        for name, module in denoiser.named_modules():
            replaced = module.__dict__.get("forward")
            changed.append((module, replaced))
            module.__dict__["forward"] = led(name, module.forward)
        yield
    finally:
        for module, replaced in changed:
            if replaced is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = replaced


@contextmanager
def replaced_forward(module: nn.Module, through: Callable[[Callable[..., Any], tuple, dict], Any]) -> Iterator[None]:
    """A module's forward goes through a function of (forward, args, kwargs); restored exactly."""
    replaced = module.__dict__.get("forward")
    forward = module.forward
    module.__dict__["forward"] = lambda *args, **kwargs: through(forward, args, kwargs)
    try:
        yield
    finally:
        if replaced is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = replaced
