"""Sampling steps before an edit begins: the clean run's predictions are the edited run's, too."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from headscope.sweep.compute.calls import replaced_forward


class EarlierSteps:
    """Caches a denoiser's answers in its first `count` forwards, and returns them when the same items are sampled
    again.

    Args:
        items: how many items the clean run has; under guidance the denoiser's batch is a multiple of it, branch by
            branch.
    """

    def __init__(self, denoiser: nn.Module, count: int, items: int) -> None:
        self._denoiser = denoiser
        self._count = count
        self._items = items
        self._answers: list[Any] = []

    @contextmanager
    def cached(self) -> Iterator[None]:
        """Cache the answers of the run made inside."""
        self._answers = []

        def cache(forward: Callable[..., Any], index: int, args: tuple, kwargs: dict) -> Any:
            answer = forward(*args, **kwargs)
            if index < self._count:
                self._answers.append(answer)
            return answer

        with self._replaced(cache):
            yield
        sizes = {leaf.shape[0] % self._items for leaf in tree_leaves(self._answers) if isinstance(leaf, Tensor)}
        if sizes - {0}:
            # not one part for each item: nothing is known of whose answer is whose
            self._answers = []

    @contextmanager
    def repeated(self, members: Sequence[int]) -> Iterator[None]:
        """In the run made inside, of these items of the clean run, the first forwards give the cached answers."""

        def repeat(forward: Callable[..., Any], index: int, args: tuple, kwargs: dict) -> Any:
            if index >= len(self._answers):
                return forward(*args, **kwargs)
            return tree_map(lambda leaf: self._rows(leaf, members), self._answers[index])

        with self._replaced(repeat):
            yield

    def _rows(self, leaf: Any, members: Sequence[int]) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        index = torch.tensor(members, device=leaf.device)
        return leaf.unflatten(0, (-1, self._items)).index_select(1, index).flatten(0, 1)

    @contextmanager
    def _replaced(self, through: Callable[[Callable[..., Any], int, tuple, dict], Any]) -> Iterator[None]:
        if not self._count:
            yield
            return
        forwards = 0

        def run(forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
            nonlocal forwards
            forwards += 1
            return through(forward, forwards - 1, args, kwargs)

        with replaced_forward(self._denoiser, run):
            yield
