"""Statistics as a caller asks for them, and as an operator knows them."""

from collections.abc import Iterable, Sequence

from headscope._shapes import StatisticTensor
from headscope.ops.statistics.statistic import CLASSES, STATISTICS, Statistic, restore


def requested_statistics(
    statistics: Sequence[str | Statistic] | str | Statistic, others: Sequence[str] = ()
) -> tuple[Statistic, ...]:
    """The statistics asked for, in that order.

    Args:
        others: names that the caller takes besides, to be listed in errors.

    Raises:
        TypeError: an entry is neither a name nor a Statistic.
        ValueError: a name is unknown, needs arguments, or comes twice.
    """
    if isinstance(statistics, (str, Statistic)):
        statistics = (statistics,)
    if not isinstance(statistics, (list, tuple)) and not isinstance(statistics, Iterable):
        raise TypeError(
            f"statistics: got {'None' if statistics is None else type(statistics).__name__}, expected names or"
            " Statistics; () for none"
        )
    chosen: list[Statistic] = []
    names: list[str] = []
    for entry in statistics:
        if isinstance(entry, Statistic):
            statistic = entry
        elif not isinstance(entry, str):
            raise TypeError(f"statistics: got an entry of type {type(entry).__name__}, expected names or Statistics")
        elif entry in STATISTICS:
            statistic = STATISTICS[entry]
        elif entry in CLASSES:
            raise ValueError(
                f"statistics: {entry!r} needs arguments, expected a {CLASSES[entry].__name__}(...) in place of its name"
            )
        else:
            with_arguments = [f"{cls.__name__}(...)" for key, cls in CLASSES.items() if key not in STATISTICS]
            expected = ", ".join([*sorted(STATISTICS), *sorted(with_arguments), *others])
            raise ValueError(f"statistics: got {entry!r}, expected some of {expected}")
        if statistic.name in names:
            raise ValueError(
                f"statistics: {statistic.name!r} is asked for twice, expected each name once"
                " (two of one kind take name=...)"
            )
        names.append(statistic.name)
        chosen.append(statistic)
    return tuple(chosen)


def restore_statistics(specs: Sequence[str], tensors: Sequence[StatisticTensor]) -> list[Statistic]:
    """The statistics that an operator was asked for: `specs` name them, `tensors` are those of all of them in turn."""
    restored = []
    first = 0
    for spec in specs:
        count = CLASSES[spec.partition("(")[0]].tensor_count
        restored.append(restore(spec, tensors[first : first + count]))
        first += count
    return restored
