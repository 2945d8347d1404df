"""Which items of a group a sweep takes: as many as were asked for, or an error that says how many there are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from headscope.counter import counter_permutation
from headscope.sweep.plan.config import SweepConfig

# where a configuration names no number: up to so many; of the reference, of groups with training items, and of others
ITEMS = 20
TRAINING_REFERENCE, OTHER_REFERENCE = 2000, 200


@dataclass(frozen=True)
class Choice:
    """Items of one group, by their positions in it.

    Attributes:
        swept: those that are observed and edited.
        reference: those that the fills mean and resample are made of; none of them swept.
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
        train: the training items, which the reference is taken from where there are some, all of them by default.
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
    if config.referenced:
        reference = _reference(config, name, swept, train, every, least, pick)
    left = [index for index in swept if index not in set(reference)]
    counted = {split: sum(index in set(left) for index in members) for split, members in chosen.items()}
    notes = []
    if config.items is None and min(counted.values()) < ITEMS:
        notes.append(f"{_listed(counted)} are all that it has (by default up to {ITEMS} of each are taken)")
    # of training items all are taken, and nothing is amiss
    if config.referenced and not train and len(reference) < (config.reference_items or OTHER_REFERENCE):
        notes.append(f"the reference has {len(reference)} items (by default up to {OTHER_REFERENCE})")
    return Choice(tuple(left), tuple(reference), f"{name}: {'; '.join(notes)}" if notes else "")


def _reference(
    config: SweepConfig,
    name: str,
    swept: Sequence[int],
    train: Sequence[int],
    every: Sequence[int],
    least: int,
    pick: Callable[[Sequence[int], int], Sequence[int]],
) -> Sequence[int]:
    """Items for the mean and resample fills: of the training items that aren't swept; in a group without any of the
    others that aren't, or where none is left a quarter of those that were."""
    taken = set(swept)
    others = [index for index in train or every if index not in taken]
    wanted = config.reference_items or (TRAINING_REFERENCE if train else OTHER_REFERENCE)
    if others:
        if config.reference_items is not None and len(others) < wanted:
            raise ValueError(
                f"reference_items: got {wanted}, and {name!r} has {len(others)} beside the swept ones; expected at most"
                f" {len(others)}, or fewer items"
            )
        return pick(others, wanted)
    if train:
        raise ValueError(
            f"items: all training items of {name!r} are swept, and the fills mean and resample need some beside them;"
            " expected fewer items, or other fills"
        )
    if config.items is not None or config.reference_items is not None:
        fewer = f"at most {least - 1} items of each split" if least > 1 else "more of them"
        raise ValueError(
            f"items: all that {name!r} has are swept, and the fills mean and resample need some beside them; expected"
            f" {fewer}, or other fills"
        )
    if len(swept) < 2:
        raise ValueError(
            f"groups: {name!r} has 1 item, expected at least 2, one for the reference of the fills mean and resample"
        )
    return pick(swept, max(1, min(len(swept) // 4, wanted)))


def dealt(name: str, sources: Sequence[str], folds: int) -> list[int]:
    """The fold, from 0, of each reference item of a group: all items of a source in one, as many sources in each.

    Args:
        name: the group's.
        sources: the items'.

    Raises:
        ValueError: more folds than sources.
    """
    different = sorted(set(sources))
    if folds > len(different):
        raise ValueError(
            f"reference_folds: got {folds}, and the reference items of {name!r} are of {len(different)} source(s);"
            f" expected at most as many folds, or another group"
        )
    order = counter_permutation("reference folds", name, count=len(different))
    fold = {different[place]: rank % folds for rank, place in enumerate(order.tolist())}
    return [fold[source] for source in sources]


def _listed(counts: Mapping[str, int]) -> str:
    return " and ".join(f"{count} in {split}" for split, count in counts.items())
