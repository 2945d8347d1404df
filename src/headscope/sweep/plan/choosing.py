"""Which items of a group a sweep takes: as many as were asked for, or an error that says how many there are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from headscope.sweep.plan.config import SweepConfig

# where a configuration names no number: up to so many
ITEMS, REFERENCE_ITEMS = 20, 16


@dataclass(frozen=True)
class Choice:
    """Items of one group, by their positions in it.

    Attributes:
        swept: those that are observed and edited.
        reference: those that the mean fill is taken over, none of them swept.
        note: what a person should know before work starts, where there is less than a sweep takes by itself; else "".
    """

    swept: tuple[int, ...]
    reference: tuple[int, ...]
    note: str


def choose_items(
    config: SweepConfig,
    name: str,
    by_split: Mapping[str, Sequence[int]],
    train: Sequence[int],
    every: Sequence[int],
    pick: Callable[[Sequence[int], int], Sequence[int]],
) -> Choice:
    """Choose the items that a sweep takes of a group.

    Args:
        name: the group's.
        by_split: the items of each of the configuration's splits.
        train: the training items, which the reference is taken from where there are some.
        every: all of the group's items.
        pick: at most so many of some items.

    Raises:
        ValueError: fewer than were asked for, or none at all; names what there is.
    """
    counts = {split: len(members) for split, members in by_split.items()}
    if not any(counts.values()):
        raise ValueError(f"groups: {name!r} has no items in the splits {', '.join(counts)}")
    least = min(counts.values())
    if config.items is not None and config.items > least:
        expected = f"at most {least}" if least else "splits that have some"
        raise ValueError(
            f"items: got {config.items} of each split, and {name!r} has {_listed(counts)}; expected {expected}"
        )
    chosen = {split: pick(members, config.items or ITEMS) for split, members in by_split.items()}
    swept = [index for members in chosen.values() for index in members]
    reference: Sequence[int] = ()
    if "mean" in config.fills:
        taken = set(swept)
        others = train or [index for index in every if index not in taken]
        reference = _reference(config, name, swept, others, least, pick)
    left = [index for index in swept if index not in set(reference)]
    counted = {split: sum(index in set(left) for index in members) for split, members in chosen.items()}
    notes = []
    if config.items is None and min(counted.values()) < ITEMS:
        notes.append(f"{_listed(counted)} are all that it has (by default up to {ITEMS} of each are taken)")
    if "mean" in config.fills and len(reference) < (config.reference_items or REFERENCE_ITEMS):
        notes.append(f"the mean fill is taken over {len(reference)} items (by default up to {REFERENCE_ITEMS})")
    return Choice(tuple(left), tuple(reference), f"{name}: {'; '.join(notes)}" if notes else "")


def _reference(
    config: SweepConfig,
    name: str,
    swept: Sequence[int],
    others: Sequence[int],
    least: int,
    pick: Callable[[Sequence[int], int], Sequence[int]],
) -> Sequence[int]:
    """Items for the mean fill: of those that aren't swept, or where none is left a quarter of those that were."""
    wanted = config.reference_items or REFERENCE_ITEMS
    if others:
        if config.reference_items is not None and len(others) < wanted:
            raise ValueError(
                f"reference_items: got {wanted}, and {name!r} has {len(others)} beside the swept ones; expected at most"
                f" {len(others)}, or fewer items"
            )
        return pick(others, wanted)
    if config.items is not None or config.reference_items is not None:
        fewer = f"at most {least - 1} items of each split" if least > 1 else "more of them"
        raise ValueError(
            f"items: all that {name!r} has are swept, and the mean fill needs some beside them; expected {fewer}, or"
            " fills without mean"
        )
    if len(swept) < 2:
        raise ValueError(f"groups: {name!r} has 1 item, expected at least 2 for the mean fill's reference")
    return pick(swept, max(1, min(len(swept) // 4, wanted)))


def _listed(counts: Mapping[str, int]) -> str:
    return " and ".join(f"{count} in {split}" for split, count in counts.items())
