"""Work that edited forwards share with the clean one.

An edit of one site leaves everything that ran before that site's attention as it was. So the clean forward keeps what
modules returned, and an edited forward, whose rows are edits of the same items, gets those values back from every
module that had finished by then: down blocks whose outputs travel on as skip connections, transformer blocks, the
projections of the edited site itself. What remains is run. Nothing here knows a class of model: all of it is read
from the order in which modules start and finish.

`Prefix.learn` watches two forwards, of one row and of two, and finds out
- the tree of calls: which module ran inside which, in what order, and when each site's attention ran;
- how each output depends on the rows: one part for every row (frames and pixels may be folded into it), or the same
  for all;
- which calls can't be left out: those that change a tensor in place that others see;
- which returned values later code uses, so that the others need not be copied.

It then repeats a forward for several sites with nothing edited and rows in another order, and compares, within the
rounding that the model shows between forwards of one, two and three rows. A model that fails is swept without sharing,
and `Prefix.reason` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

# how much forwards of different numbers of rows may differ, in any dtype; in a coarse one by one rounding of each call,
# which add up as their square root
ROW_TOLERANCE = 1e-3
# an unedited replay repeats the whole forward's arithmetic after a prefix from another number of rows: how much it may
# differ at least, and in units of what forwards of different numbers of rows differ by
REPLAY_TOLERANCE, REPLAY_NOISE = 1e-5, 4.0
# how many sites the check after learning replays
CHECKED_SITES = 8
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
        parent: the call it ran inside of; None for the denoiser's own.
        children: the calls inside it, in order.
        start, finish: when it began and ended, on one clock of calls and attentions.
        parts: for each tensor of its output how many leading entries a row has, or SHARED; None where rows can't be
            told apart.
        pure: it changed nothing but its output, and its output stayed as it was.
        uses: for each tensor of its output, the calls whose own code (not a called module's) it went into.
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


class Prefix:
    """The calls of a denoiser's forward, and which of them an edit leaves as they were.

    Attributes:
        reason: why nothing is shared with this model; None where something is.
    """

    def __init__(self, denoiser: nn.Module, sites: Iterable[str]) -> None:
        self._denoiser = denoiser
        self._sites = tuple(sites)
        self._root: Call | None = None
        self._attention_at: dict[str, int] = {}
        self._skipped: dict[frozenset[str], dict[int, list[bool]]] = {}
        self._kept: dict[int, list[bool]] = {}
        self._values: dict[int, Any] = {}
        self._through: Through | None = None
        self.reason: str | None = None

    @classmethod
    def learn(cls, denoiser: nn.Module, sites: Iterable[str], forward: Callable[[list[int]], Tensor]) -> Prefix:
        """Watch a denoiser.

        Args:
            sites: names of the attention sites that will be edited.
            forward: runs the denoiser on some example rows, numbered 0 and 1 (repeats allowed), and returns its answer.
        """
        prefix = cls(denoiser, sites)
        try:
            one, two = _Watch(prefix._sites), _Watch(prefix._sites)
            # version counters, which tell of changes in place, exist outside inference mode only
            with torch.inference_mode(False), torch.no_grad():
                for watch, rows in ((one, [0]), (two, [0, 1])):
                    with watch.attention(), _called_through(denoiser, watch), watch:
                        forward(rows)
                    watch.conclude()
            prefix._root = _merged(one, two)
            prefix._attention_at = two.attention_at
            with torch.inference_mode():
                prefix._check(forward)
        except Diverged as error:
            prefix.reason = str(error)
        return prefix

    @property
    def shares(self) -> bool:
        return self.reason is None

    def fraction_left(self, sites: Iterable[str]) -> float:
        """How much of the forward's module calls (leaves) an edit of these sites runs again."""
        skipped = self._skips(frozenset(sites))
        leaves = [call for call in _calls(self._root) if not call.children]
        run = [call for call in leaves if not any(above.start in skipped for above in call.path())]
        return len(run) / len(leaves)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Makes the contexts below quick to enter: the model's modules are wrapped once for all inside."""
        if self._through is not None:
            yield
            return
        self._through = _straight

        def through(name: str, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
            return (self._through or _straight)(name, forward, args, kwargs)

        try:
            with _called_through(self._denoiser, through):
                yield
        finally:
            self._through = None

    @contextmanager
    def _led(self, through: Through) -> Iterator[None]:
        with self.attached():
            before, self._through = self._through, through
            try:
                yield
            finally:
                self._through = before

    @contextmanager
    def clean(self, edited: Iterable[frozenset[str]]) -> Iterator[None]:
        """Keep what modules return in the one forward made inside, for `replay`.

        Args:
            edited: the sets of sites that later forwards will edit.
        """
        self._values = {}
        self._kept = {}
        for sites in edited:
            for start, used in self._skips(sites).items():
                before = self._kept.get(start, [False] * len(used))
                self._kept[start] = [one or other for one, other in zip(before, used, strict=True)]
        with self._led(_Keep(self)):
            yield

    @contextmanager
    def replay(self, edited: frozenset[str], rows: Tensor) -> Iterator[None]:
        """In the forward made inside, modules that finished before the first of the edited sites' attention return
        what they returned in the clean forward.

        Args:
            rows: [rows of the forward], the clean forward's row that each belongs to.
        """
        skipped = self._skips(edited)
        with self._led(_Replay(self, skipped, rows)):
            yield

    def forget(self) -> None:
        """Free what the clean forward kept."""
        self._values = {}

    def _skips(self, edited: frozenset[str]) -> dict[int, list[bool]]:
        """The outermost calls that an edit of these sites leaves as they were, by their start: for each tensor that
        they return, whether code that still runs uses it."""
        if edited in self._skipped:
            return self._skipped[edited]
        cut = min(self._attention_at[site] for site in edited)
        skipped: list[Call] = []

        def visit(call: Call) -> None:
            for child in call.children:
                if child.start > cut:
                    return
                if child.finish < cut and child.pure and child.parts is not None:
                    skipped.append(child)
                else:
                    visit(child)

        assert self._root is not None
        visit(self._root)
        left_out = {call.start for outermost in skipped for call in _calls(outermost)}
        self._skipped[edited] = {call.start: [bool(users - left_out) for users in call.uses] for call in skipped}
        return self._skipped[edited]

    def _check(self, forward: Callable[[list[int]], Tensor]) -> None:
        """Raises Diverged where what a row gives depends on the others, or an unedited replay isn't the whole forward.

        Kernels are chosen by the number of rows, so rounding differs between forwards of one, two and three; by how
        much depends on the model and its dtype and is measured. Forwards of as many rows are the same arithmetic.
        """
        ordered = sorted(self._sites, key=self._attention_at.__getitem__)
        count = min(CHECKED_SITES, len(ordered))
        chosen = [ordered[(index + 1) * len(ordered) // count - 1] for index in range(count)]
        with self.clean(frozenset([site]) for site in chosen):
            clean = forward([0, 1])
        order = [1, 0, 0]
        beside_itself, whole = forward([0, 0])[:1], forward(order)
        # last before the replays: what the model keeps aside of its own is then of other rows than theirs
        alone = forward([0])
        rounding = _rounding([clean, *self._denoiser.parameters()])
        calls = sum(not call.children for call in _calls(self._root))
        most = max(ROW_TOLERANCE, rounding * calls**0.5)
        noise = [
            _compare(alone, clean[:1], most, "a row alone differs from the same row beside another"),
            _compare(whole, clean[order], most, "rows differ from the same rows in another order"),
        ]
        _compare(beside_itself, clean[:1], rounding, "a row beside itself differs from the same row beside another")
        tolerance = min(most, max(REPLAY_TOLERANCE, REPLAY_NOISE * max(*noise, rounding)))
        for site in chosen:
            with self.replay(frozenset([site]), torch.tensor(order, device=clean.device)):
                replayed = forward(order)
            _compare(replayed, whole, tolerance, f"a forward that begins at {site!r} differs from the whole one")
        self.forget()


class _Watch(TorchFunctionMode):
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
        given = [(tensor, tensor._version) for tensor in _tensors((args, kwargs))]
        self._stack.append(call)
        try:
            output = forward(*args, **kwargs)
        finally:
            self._stack.pop()
        call.finish = self._tick()
        # what a module changes in what it was given, it would have to change again
        call.pure = all(tensor._version == version for tensor, version in given)
        tensors = _tensors(output)
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
            for tensor in _tensors((args, kwargs or {})):
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
        for call in _calls(self.root):
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


class _Follow:
    """Walks the learned tree along a running forward."""

    def __init__(self, prefix: Prefix) -> None:
        self._prefix = prefix
        self._stack: list[tuple[Call, int]] = []
        self._finished = False

    def _next(self, name: str) -> Call:
        if not self._stack:
            call = self._prefix._root
            assert call is not None
            if self._finished:
                raise Diverged("the denoiser runs more than once in a forward")
        else:
            parent, position = self._stack[-1]
            if position == len(parent.children):
                raise Diverged(f"{parent.name or 'the denoiser'} calls {name}, which it didn't when it was learned")
            call = parent.children[position]
            self._stack[-1] = (parent, position + 1)
        if call.name != name:
            raise Diverged(f"{name} runs where {call.name} ran when the model was learned")
        return call

    def _run(self, call: Call, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        self._stack.append((call, 0))
        try:
            return forward(*args, **kwargs)
        finally:
            self._stack.pop()
            self._finished = not self._stack


class _Keep(_Follow):
    """Keeps what the calls return that a later replay skips."""

    def __call__(self, name: str, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        call = self._next(name)
        output = self._run(call, forward, args, kwargs)
        if call.start in self._prefix._kept:
            self._prefix._values[call.start] = self._needed(call, output)
        return output

    def _needed(self, call: Call, output: Any) -> Any:
        """The output, with tensors that no replay will read in name only: they are most of the memory."""
        leaves, structure = tree_flatten(output)
        assert call.parts is not None
        tensors = iter(zip(call.parts, self._prefix._kept[call.start], strict=True))
        kept = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                parts, used = next(tensors)
                leaf = leaf if used or parts == SHARED else _filler(leaf, leaf.shape[0])
            kept.append(leaf)
        return tree_unflatten(kept, structure)


class _Replay(_Follow):
    """Returns what was kept, each row's own part of it."""

    def __init__(self, prefix: Prefix, skipped: dict[int, list[bool]], rows: Tensor) -> None:
        super().__init__(prefix)
        self._skipped = skipped
        self._rows = rows
        # a block's output is often its last skip connection too: one tensor, copied once
        self._copies: dict[tuple[int, int], Tensor] = {}

    def __call__(self, name: str, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        call = self._next(name)
        if call.start not in self._skipped:
            return self._run(call, forward, args, kwargs)
        leaves, structure = tree_flatten(self._prefix._values[call.start])
        assert call.parts is not None
        tensors = iter(zip(call.parts, self._skipped[call.start], strict=True))
        spread = [self._spread(leaf, *next(tensors)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return tree_unflatten(spread, structure)

    def _spread(self, tensor: Tensor, parts: int, used: bool) -> Tensor:
        """A kept tensor, with the part of each row of the replay."""
        if parts == SHARED:
            return tensor
        if not used:
            return _filler(tensor, parts * len(self._rows))
        key = (id(tensor), parts)
        if key not in self._copies:
            self._copies[key] = _take(tensor, parts, self._rows)
        return self._copies[key]


def _filler(tensor: Tensor, rows: int) -> Tensor:
    """A stand-in for a tensor that nothing reads, with so many leading entries; one number in memory."""
    value = torch.nan if tensor.is_floating_point() or tensor.is_complex() else 0
    return tensor.new_full((1,) * tensor.ndim, value).expand(rows, *tensor.shape[1:])


def _take(tensor: Tensor, parts: int, rows: Tensor) -> Tensor:
    """The parts of these rows, in the memory format of the original."""
    if parts > 1:
        rows = (rows[:, None] * parts + torch.arange(parts, device=rows.device)).flatten()
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        # index_select would lay it out anew
        return tensor.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
    return tensor.index_select(0, rows)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, Tensor)]


def _calls(call: Call | None) -> Iterator[Call]:
    if call is not None:
        yield call
        for child in call.children:
            yield from _calls(child)


def _merged(one: _Watch, two: _Watch) -> Call:
    """The tree of the forward of two rows, with how its outputs depend on the number of rows.

    Raises:
        Diverged: the two forwards called different modules.
    """
    assert one.root is not None
    assert two.root is not None
    for single, double in zip_longest(_calls(one.root), _calls(two.root)):
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


def _rounding(tensors: Iterable[Tensor]) -> float:
    """The relative rounding of the coarsest of the tensors' floating dtypes, those of a byte aside: none computes in
    them."""
    floating = {(t.dtype, t.is_cuda) for t in tensors if t.is_floating_point() and t.itemsize > 1}
    # a GPU's float32 products may be TF32's, of 10 bits
    return max(max(torch.finfo(dtype).eps, 2.0**-10 if on_gpu else 0.0) for dtype, on_gpu in floating)


def _compare(found: Tensor, expected: Tensor, tolerance: float, difference: str) -> float:
    """By how much two answers differ, relative to the largest value; raises Diverged beyond the tolerance."""
    error = float((found - expected).float().abs().max() / expected.float().abs().max().clamp_min(1e-30))
    # a value that was thought unused is NaN, so that a use that went unseen shows
    if not error <= tolerance:
        raise Diverged(f"{difference} by {error:.2g}, expected rounding of at most {tolerance:.2g}")
    return error


def _parts(single: tuple[int, ...] | None, double: tuple[int, ...] | None) -> int | None:
    """How many leading entries belong to a row, from a tensor's shapes in forwards of one and of two rows."""
    if single is None or double is None:
        return None
    if single == double:
        return SHARED
    folded = single[1:] == double[1:] and double[0] == 2 * single[0]
    return single[0] if folded else None


def _straight(name: str, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    return forward(*args, **kwargs)


@contextmanager
def _called_through(denoiser: nn.Module, through: Through) -> Iterator[None]:
    """Every module's forward goes through a function of (name, forward, args, kwargs); restored exactly."""
    changed: list[tuple[nn.Module, Any]] = []

    def led(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            return through(name, forward, args, kwargs)

        return run

    try:
        for name, module in denoiser.named_modules():
            own = module.__dict__.get("forward")
            changed.append((module, own))
            module.__dict__["forward"] = led(name, module.forward)
        yield
    finally:
        for module, own in changed:
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own
