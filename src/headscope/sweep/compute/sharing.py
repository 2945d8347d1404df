"""Work that edited forwards share with the clean one.

An edit of one site leaves everything that ran before that site's attention as it was. So the clean forward caches what
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
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from headscope.sweep.compute.calls import (
    SHARED,
    Call,
    Diverged,
    Through,
    Watch,
    all_calls,
    called_through,
    merged,
    tensors_of,
)

# how much forwards of different numbers of rows may differ, in any dtype; in a coarse one by one rounding of each call,
# which add up as their square root
ROW_TOLERANCE = 1e-3
# an unedited replay repeats the whole forward's arithmetic after a prefix from another number of rows: how much it may
# differ at least, and in units of what forwards of different numbers of rows differ by
REPLAY_TOLERANCE, REPLAY_NOISE = 1e-5, 4.0
# how many sites the check after learning replays
CHECKED_SITES = 8


@dataclass(eq=False)
class Cache:
    """The outputs of modules in one clean forward, for `Prefix.replay`.

    Attributes:
        used: of the calls whose outputs are stored, by their start, which tensors of their output a replay may read.
        values: their outputs.
    """

    used: dict[int, list[bool]]
    values: dict[int, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """The memory that the outputs hold, each once."""
        storages = {leaf.untyped_storage()._cdata: leaf.untyped_storage() for leaf in tensors_of(self.values)}
        return sum(storage.nbytes() for storage in storages.values())


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
            one, two = Watch(prefix._sites), Watch(prefix._sites)
            # version counters, which tell of changes in place, exist outside inference mode only
            with torch.inference_mode(False), torch.no_grad():
                for watch, rows in ((one, [0]), (two, [0, 1])):
                    with watch.attention(), called_through(denoiser, watch), watch:
                        forward(rows)
                    watch.conclude()
            prefix._root = merged(one, two)
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
        leaves = [call for call in all_calls(self._root) if not call.children]
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
            with called_through(self._denoiser, through):
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
    def clean(self, edited: Iterable[frozenset[str]]) -> Iterator[Cache]:
        """Cache what modules return in the one forward made inside, for `replay`.

        Args:
            edited: the sets of sites that later forwards will edit.
        """
        used: dict[int, list[bool]] = {}
        for sites in edited:
            for start, own in self._skips(sites).items():
                before = used.get(start, [False] * len(own))
                used[start] = [one or other for one, other in zip(before, own, strict=True)]
        cache = Cache(used)
        with self._led(_Caching(self._root, cache)):
            yield cache

    @contextmanager
    def replay(self, cache: Cache, edited: frozenset[str], rows: Tensor) -> Iterator[None]:
        """In the forward made inside, modules that finished before the first of the edited sites' attention return
        what they returned in the clean forward.

        Args:
            cache: the clean forward's.
            rows: [rows of the forward], the clean forward's row that each belongs to.
        """
        with self._led(_Replay(self._root, cache, self._skips(edited), rows)):
            yield

    def copied_bytes(self, cache: Cache, edited: frozenset[str]) -> int:
        """The bytes of its outputs that a replay of as many rows as the clean forward's copies."""
        copied: dict[int, int] = {}
        for start, used in self._skips(edited).items():
            read = (tensor for tensor, one in zip(tensors_of(cache.values[start]), used, strict=True) if one)
            copied |= {id(tensor): tensor.nbytes for tensor in read}
        return sum(copied.values())

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
        left_out = {call.start for outermost in skipped for call in all_calls(outermost)}
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
        with self.clean(frozenset([site]) for site in chosen) as cache:
            clean = forward([0, 1])
        order = [1, 0, 0]
        beside_itself, whole = forward([0, 0])[:1], forward(order)
        # last before the replays: what the model itself keeps aside is then of other rows than theirs
        alone = forward([0])
        rounding = _rounding([clean, *self._denoiser.parameters()])
        calls = sum(not call.children for call in all_calls(self._root))
        most = max(ROW_TOLERANCE, rounding * calls**0.5)
        noise = [
            _compare(alone, clean[:1], most, "a row alone differs from the same row beside another"),
            _compare(whole, clean[order], most, "rows differ from the same rows in another order"),
        ]
        same = REPLAY_NOISE * rounding
        _compare(beside_itself, clean[:1], same, "a row beside itself differs from the same row beside another")
        tolerance = min(most, max(REPLAY_TOLERANCE, REPLAY_NOISE * max(*noise, rounding)))
        for site in chosen:
            with self.replay(cache, frozenset([site]), torch.tensor(order, device=clean.device)):
                replayed = forward(order)
            _compare(replayed, whole, tolerance, f"a forward that begins at {site!r} differs from the whole one")


class _Follow:
    """Walks the learned tree along a running forward."""

    def __init__(self, root: Call | None) -> None:
        assert root is not None
        self._root = root
        self._stack: list[tuple[Call, int]] = []
        self._finished = False

    def _next(self, name: str) -> Call:
        if not self._stack:
            call = self._root
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


class _Caching(_Follow):
    """Caches what the calls return that a later replay skips."""

    def __init__(self, root: Call | None, cache: Cache) -> None:
        super().__init__(root)
        self._cache = cache

    def __call__(self, name: str, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        call = self._next(name)
        output = self._run(call, forward, args, kwargs)
        if call.start in self._cache.used:
            self._cache.values[call.start] = self._needed(call, output)
        return output

    def _needed(self, call: Call, output: Any) -> Any:
        """The output, with tensors that no replay will read in name only: they are most of the memory."""
        leaves, structure = tree_flatten(output)
        assert call.parts is not None
        tensors = iter(zip(call.parts, self._cache.used[call.start], strict=True))
        needed = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                parts, used = next(tensors)
                leaf = leaf if used or parts == SHARED else _filler(leaf, leaf.shape[0])
            needed.append(leaf)
        return tree_unflatten(needed, structure)


class _Replay(_Follow):
    """Returns cached outputs, to each row its part of them."""

    def __init__(self, root: Call | None, cache: Cache, skipped: dict[int, list[bool]], rows: Tensor) -> None:
        super().__init__(root)
        self._cache = cache
        self._skipped = skipped
        self._rows = rows
        # a block's output is often its last skip connection too: one tensor, copied once
        self._copies: dict[tuple[int, int], Tensor] = {}

    def __call__(self, name: str, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        call = self._next(name)
        if call.start not in self._skipped:
            return self._run(call, forward, args, kwargs)
        leaves, structure = tree_flatten(self._cache.values[call.start])
        assert call.parts is not None
        tensors = iter(zip(call.parts, self._skipped[call.start], strict=True))
        spread = [self._spread(leaf, *next(tensors)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return tree_unflatten(spread, structure)

    def _spread(self, tensor: Tensor, parts: int, used: bool) -> Tensor:
        """A cached tensor, with the part of each row of the replay."""
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


def _straight(name: str, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    return forward(*args, **kwargs)
