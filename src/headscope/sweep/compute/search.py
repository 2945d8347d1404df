"""The search for a small set of heads that is enough: growth and pruning from orders, beside baselines.

Nothing here knows a model: sets are given by the places of their heads, and a function says what removing sets costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

# the search for a circuit, and the sets that it grows from there
GREEDY, LARGER = "greedy", "greedy, larger"
START, ADD, PRUNE, REPLACE = "start", "add", "prune", "replace"
# heads that a round of growth or pruning looks at first: those that matter least by what was measured last
CANDIDATES = 3
# of the swap round: heads of the circuit that may leave, two at once, and heads that may come
LEAVING, COMING = 3, 4
# how many heads below the circuit's size the pruning goes on, and above it growth, for the sets beside it
BEYOND, ABOVE = 4, 3
# heads of the circuit for which another one is looked for that could stand in, and how many are tried for each
REPLACED, REPLACEMENTS = 2, 16
# decimals of a faithfulness in which a difference is told from rounding
DECIMALS = 6

# what the removal of sets costs, [sets, 2]: by the loss, by distance; see `Removals.costs`
Costs = Callable[[Sequence[frozenset[int]]], np.ndarray]


@dataclass(frozen=True)
class Step:
    """A row of the trace.

    Attributes:
        head: the place of the head that comes or goes; None where none does.
        partner: of `REPLACE`, the place of the head that it stands in for.
        size: of the set that the step gives.
        costs: of removing all others: by the loss, by distance; NaN where they weren't measured.
        faithfulness: by the metric of the search.
        kept: the step was taken; of `REPLACE`, the head brings back half of what is lost without the other.
        chosen: the set after the step is its method's circuit.
    """

    method: str
    action: str
    head: int | None
    size: int
    costs: tuple[float, float] = (np.nan, np.nan)
    faithfulness: float = np.nan
    kept: bool = True
    chosen: bool = False
    partner: int | None = None


def likely_sets(heads: int, orders: int) -> int:
    """How many sets a search measures, about, where the circuit is half of the heads; less where it is smaller."""
    halving = orders * int(np.ceil(np.log2(max(heads, 2))))
    growing = CANDIDATES * heads // 4
    pruning = heads + CANDIDATES * heads // 2
    beside = CANDIDATES * (BEYOND + ABOVE)
    return 1 + halving + growing + pruning + LEAVING * COMING + beside + REPLACED * REPLACEMENTS


def search(heads: int, orders: Mapping[str, Sequence[int]], costs: Costs, metric: int, target: float) -> list[Step]:
    """Search for the smallest sets that reach a faithfulness.

    Of every order the smallest prefix that reaches it, by halving, as if faithfulness grew along the order. Then, from
    the better of the first two: growth from half of it, at each step the best of the next few of the order; the smaller
    of both results; pruning, at each step the head whose removal costs least; a swap of two heads for another one; and
    pruning again. No single head can then be left out. Beyond the circuit pruning goes on for a few steps, which gives
    smaller sets; and a few heads are added to it, each the best of the next few, which gives larger ones. Last, heads
    are looked for that could stand in for those that the circuit needs and the whole model doesn't.

    Args:
        heads: how many there are.
        orders: by name, all places, the most important first; the first two seed the greedy search.
        costs: what removing sets costs.
        metric: which of the costs counts: 0 or 1.
        target: of the faithfulness.
    """
    return _Search(heads, orders, costs, metric, target).run()


class _Search:
    def __init__(
        self, heads: int, orders: Mapping[str, Sequence[int]], costs: Costs, metric: int, target: float
    ) -> None:
        self._every = frozenset(range(heads))
        self._orders = {name: list(order) for name, order in orders.items()}
        self._measure, self._metric, self._target = costs, metric, target
        # removing nothing costs nothing
        self._known: dict[frozenset[int], tuple[float, float]] = {frozenset(): (0.0, 0.0)}
        self._empty = self._costs([self._every])[0][metric]
        self._steps: list[Step] = []
        # of the greedy search: the order that it follows
        self._order: list[int] = []

    def run(self) -> list[Step]:
        sizes = self._prefixes()
        for name, order in self._orders.items():
            self._steps.append(self._step(name, START, None, frozenset()))
            for size in range(1, len(order) + 1):
                chosen = size == sizes[name]
                self._steps.append(self._step(name, ADD, order[size - 1], frozenset(order[:size]), chosen=chosen))
        seed = min(list(self._orders)[:2], key=lambda name: sizes[name])
        self._order = self._orders[seed]
        circuit = self._grown(self._order[: sizes[seed]])
        circuit = self._pruned(circuit)
        swapped = self._swapped(circuit)
        if swapped != circuit:
            circuit = self._pruned(swapped)
        self._choose()
        self._beyond(circuit)
        self._larger(circuit)
        self._replacements(circuit)
        return self._steps

    def faithfulness(self, kept: Sequence[frozenset[int]]) -> np.ndarray:
        """1 - (cost of removing all others) / (cost of removing all), [sets]; of the whole model 1."""
        costs = self._costs([self._every - heads for heads in kept])
        return 1.0 - np.array([cost[self._metric] for cost in costs]) / self._empty

    def _costs(self, removed: Sequence[frozenset[int]]) -> list[tuple[float, float]]:
        """Each set is measured once."""
        asked = [heads for heads in dict.fromkeys(removed) if heads not in self._known]
        if asked:
            found = self._measure(asked)
            self._known |= {heads: (float(one), float(two)) for heads, (one, two) in zip(asked, found, strict=True)}
        return [self._known[heads] for heads in removed]

    def _reaches(self, faithfulness: float) -> bool:
        """False of NaN, too."""
        return faithfulness >= self._target

    def _prefixes(self) -> dict[str, int]:
        """The size of the smallest prefix of every order that reaches the target, all orders in step."""
        bounds = {name: (0, len(order)) for name, order in self._orders.items()}
        while open_ := {name: (low + high) // 2 for name, (low, high) in bounds.items() if high - low > 1}:
            found = self.faithfulness([frozenset(self._orders[name][:middle]) for name, middle in open_.items()])
            for (name, middle), value in zip(open_.items(), found, strict=True):
                low, high = bounds[name]
                bounds[name] = (low, middle) if self._reaches(value) else (middle, high)
        return {name: high for name, (_, high) in bounds.items()}

    def _grown(self, prefix: list[int]) -> list[int]:
        """A set that reaches the target, from half of a prefix that does by adding the best of the next few each time;
        the prefix itself where that isn't smaller."""
        grown = prefix[: len(prefix) // 2]
        added: list[Step] = []
        while len(grown) < len(prefix) - 1 and not self._reaches(self.faithfulness([frozenset(grown)])[0]):
            head = self._best_added(grown)
            grown = [*grown, head]
            added.append(self._step(GREEDY, ADD, head, frozenset(grown)))
        reached = self._reaches(self.faithfulness([frozenset(grown)])[0])
        start = prefix[: len(prefix) // 2] if reached else prefix
        self._steps.append(self._step(GREEDY, START, None, frozenset()))
        for size in range(1, len(start) + 1):
            self._steps.append(self._step(GREEDY, START, start[size - 1], frozenset(start[:size])))
        if reached:
            self._steps += added
        return grown if reached else prefix

    def _pruned(self, circuit: list[int]) -> list[int]:
        """The set without heads that it can do without, one after the other."""
        last: dict[int, float] = {}
        while len(circuit) > 1:
            head, value = self._least(circuit, last)
            if not self._reaches(value):
                break
            circuit = [other for other in circuit if other != head]
            self._steps.append(self._step(GREEDY, PRUNE, head, frozenset(circuit)))
        if len(circuit) > 1:
            # what the next step would have been, and wasn't taken
            self._steps.append(self._step(GREEDY, PRUNE, head, frozenset(circuit) - {head}, kept=False))
        return circuit

    def _least(self, circuit: list[int], last: dict[int, float]) -> tuple[int, float]:
        """The head whose removal leaves most, and what that leaves: among those that left most when they were last
        measured; where none of these reaches the target, among all.

        Args:
            last: by head, what its removal left last; brought up to date.
        """
        # of equals the least important first
        ranked = [head for head in reversed(self._order) if head in circuit]
        first = sorted(ranked, key=lambda head: -np.nan_to_num(last.get(head, np.inf), nan=-np.inf))
        some = ranked if len(last) < len(circuit) else first[:CANDIDATES]
        head, value = self._best_without(circuit, some, last)
        if not self._reaches(value) and len(some) < len(circuit):
            head, value = self._best_without(circuit, ranked, last)
        return head, value

    def _best_without(self, circuit: list[int], some: list[int], last: dict[int, float]) -> tuple[int, float]:
        whole = frozenset(circuit)
        found = self.faithfulness([whole - {head} for head in some])
        last |= {head: float(value) for head, value in zip(some, found, strict=True)}
        best = _best(found)
        return some[best], float(found[best])

    def _swapped(self, circuit: list[int]) -> list[int]:
        """The set with two of its heads swapped for another one, where that reaches the target; else the set."""
        outside = [head for head in self._order if head not in circuit][:COMING]
        if len(circuit) < 2 or not outside:
            return circuit
        whole = frozenset(circuit)
        left = np.round(self.faithfulness([whole - {head} for head in circuit]), DECIMALS)
        # NaN comes last
        leaving = [circuit[place] for place in np.argsort(-left, kind="stable")[:LEAVING]]
        swaps = [(pair, head) for pair in combinations(leaving, 2) for head in outside]
        found = self.faithfulness([whole - set(pair) | {head} for pair, head in swaps])
        best = _best(found)
        if not self._reaches(found[best]):
            return circuit
        (one, other), head = swaps[best]
        for action, moved, after in (
            (PRUNE, one, whole - {one}),
            (PRUNE, other, whole - {one, other}),
            (ADD, head, whole - {one, other} | {head}),
        ):
            self._steps.append(self._step(GREEDY, action, moved, after))
        return [*(kept for kept in circuit if kept not in (one, other)), head]

    def _choose(self) -> None:
        """Mark the last step that was taken, which led to the circuit."""
        place = max(place for place, step in enumerate(self._steps) if step.method == GREEDY and step.kept)
        self._steps[place] = replace(self._steps[place], chosen=True)

    def _beyond(self, circuit: list[int]) -> None:
        """A few smaller sets."""
        last: dict[int, float] = {}
        for _ in range(min(BEYOND, len(circuit) - 1)):
            ranked = [head for head in reversed(self._order) if head in circuit]
            first = sorted(ranked, key=lambda head: -np.nan_to_num(last.get(head, np.inf), nan=-np.inf))
            head, _ = self._best_without(circuit, first[:CANDIDATES] if last else ranked, last)
            circuit = [other for other in circuit if other != head]
            self._steps.append(self._step(GREEDY, PRUNE, head, frozenset(circuit)))

    def _larger(self, circuit: list[int]) -> None:
        """A few larger sets, as a method of their own that starts with the circuit."""
        self._steps.append(self._step(LARGER, START, None, frozenset()))
        for size in range(1, len(circuit) + 1):
            self._steps.append(self._step(LARGER, START, circuit[size - 1], frozenset(circuit[:size])))
        for _ in range(min(ABOVE, len(self._every) - len(circuit))):
            head = self._best_added(circuit)
            circuit = [*circuit, head]
            self._steps.append(self._step(LARGER, ADD, head, frozenset(circuit)))

    def _best_added(self, heads: list[int]) -> int:
        """Of the next few heads of the order the one that adds most."""
        rest = [head for head in self._order if head not in heads][:CANDIDATES]
        return rest[_best(self.faithfulness([frozenset([*heads, head]) for head in rest]))]

    def _replacements(self, circuit: list[int]) -> None:
        """Of heads that the circuit needs and the whole model doesn't, others that could stand in for them."""
        whole = frozenset(circuit)
        outside = [head for head in self._order if head not in whole][:REPLACEMENTS]
        if not outside:
            return
        here = self.faithfulness([whole])[0] - self.faithfulness([whole - {head} for head in circuit])
        there = 1.0 - self.faithfulness([self._every - {head} for head in circuit])
        spare = np.nan_to_num(here - np.maximum(there, 0.0), nan=-np.inf)
        # half of what the circuit loses without it would have to be missing in the whole model
        needy = [place for place in np.argsort(-spare, kind="stable") if spare[place] > max(here[place] / 2, 1e-4)]
        for place in needy[:REPLACED]:
            found = self.faithfulness([whole - {circuit[place]} | {head} for head in outside])
            best = _best(found)
            after = whole - {circuit[place]} | {outside[best]}
            regained = found[best] - (self.faithfulness([whole])[0] - here[place])
            self._steps.append(
                self._step(
                    GREEDY,
                    REPLACE,
                    outside[best],
                    after,
                    # it stands in for the other if it brings back half of what was lost
                    kept=bool(regained > here[place] / 2),
                    partner=circuit[place],
                )
            )

    def _step(
        self,
        method: str,
        action: str,
        head: int | None,
        after: frozenset[int],
        *,
        kept: bool = True,
        chosen: bool = False,
        partner: int | None = None,
    ) -> Step:
        """A row of the trace, with what is known of the set that the step gives."""
        costs = self._known.get(self._every - after, (np.nan, np.nan))
        faithfulness = 1.0 - costs[self._metric] / self._empty
        return Step(method, action, head, len(after), costs, faithfulness, kept, chosen, partner)


def _best(faithfulness: np.ndarray) -> int:
    """The place of the largest, NaN last; of those that differ by rounding alone the first."""
    return int(np.argmax(np.nan_to_num(np.round(faithfulness, DECIMALS), nan=-np.inf)))
