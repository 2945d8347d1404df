"""What a comparison of two groups is read against: comparisons in which little, or something else, should differ."""

from dataclasses import dataclass

import polars as pl

from headscope.counter import counter_permutation
from headscope.study.contrast.comparison import Comparison, compare, compare_groups

HELD_OUT = ("discover", "confirm")
TRAINED = "train"
COLOUR = ("faces", "faces_grey")
MATCHED = "_matched"
CONTROLS = {
    "main": "The comparison itself, which the controls are read against.",
    "halves": (
        "Two random halves of one group's held-out sources (discover and confirm: half of one split would be too few)."
        " Nothing but chance differs."
    ),
    "colour": "Colour and grey versions of the same drawings, in pairs: what colour and resolution alone change.",
    "matched": (
        "The same groups, each image's grey values put into one common histogram: what is left of the comparison"
        " cannot be brightness or contrast."
    ),
    "untrained": (
        "The same groups in the same architecture with random weights: what the images do to any network, learned or"
        " not."
    ),
    "training": (
        "A group's training images and its held-out ones (discover and confirm): what having been learned by heart"
        " changes."
    ),
}
_NO_UNTRAINED = "No model with untrained weights was observed."


@dataclass(frozen=True)
class Control:
    """One comparison among the controls.

    Attributes:
        kind: see `CONTROLS`.
        name: what is compared, in words.
        comparison: None where it can't be made.
        omitted: why not, else "".
    """

    kind: str
    name: str
    comparison: Comparison | None
    omitted: str = ""


def controls_of(
    items: pl.DataFrame, main: Comparison, *, untrained: pl.DataFrame | None = None, seed: int = 0
) -> list[Control]:
    """The main comparison, then every control of it; one without data says what it lacks.

    items: see `entropy.item_means`; of the splits discover, confirm and, for the last control, train. main: the
    comparison of two groups on the confirm split. untrained: `item_means` of the same groups in the model with random
    weights.
    """
    first, second = main.first, main.second
    found: list[tuple[str, str, Comparison | str]] = [("main", f"{first} against {second}", main)]
    found += [("halves", f"halves of {group}", split_halves(items, group, seed)) for group in (first, second)]
    found.append(("colour", " against ".join(COLOUR), compare_groups(items, *COLOUR, seed=seed)))
    matched = f"{first}{MATCHED}", f"{second}{MATCHED}"
    found.append(("matched", " against ".join(matched), compare_groups(items, *matched, seed=seed)))
    random = _NO_UNTRAINED if untrained is None else compare_groups(untrained, first, second, seed=seed)
    found.append(("untrained", f"{first} against {second}, untrained weights", random))
    for group in (first, second):
        found.append(("training", f"{group}, training against held-out items", _trained(items, group, seed)))
    return [
        Control(kind, name, None, outcome) if isinstance(outcome, str) else Control(kind, name, outcome)
        for kind, name, outcome in found
    ]


def controls_table(made: list[Control]) -> pl.DataFrame:
    """A row per control, in the same columns.

    Returns a table: kind, control, first, second, splits, paired, sources (of both), p_omnibus, energy,
    energy_null_mean, energy_null_high, heads, heads_different (max-t p below 0.05; null where no head was tested),
    ratio, ratio_low, ratio_high, omitted (why there are no numbers).
    """
    rows = []
    for control in made:
        row = {"kind": control.kind, "control": control.name, "omitted": control.omitted or None}
        if control.comparison is not None:
            found = control.comparison
            omnibus, ratio = found.omnibus, found.ratio
            tested = found.heads["p_maxt"].is_not_null().any()
            row |= {
                "first": found.first,
                "second": found.second,
                "splits": " and ".join(found.splits),
                "paired": found.paired,
                "sources": list(found.sources),
                "p_omnibus": omnibus["p_value"],
                "energy": omnibus["value"],
                "energy_null_mean": omnibus["null_mean"],
                "energy_null_high": omnibus["null_high"],
                "heads": len(found.heads),
                "heads_different": len(found.different) if tested else None,
                "ratio": ratio["value"],
                "ratio_low": ratio["low"],
                "ratio_high": ratio["high"],
            }
        rows.append(row)
    return pl.DataFrame(rows, schema=_COLUMNS)


_NUMBERS = ("p_omnibus", "energy", "energy_null_mean", "energy_null_high")
_RATIOS = ("ratio", "ratio_low", "ratio_high")
_COLUMNS = {
    **dict.fromkeys(("kind", "control", "first", "second", "splits"), pl.String),
    "paired": pl.Boolean,
    "sources": pl.List(pl.Int64),
    **dict.fromkeys(_NUMBERS, pl.Float64),
    **dict.fromkeys(("heads", "heads_different"), pl.Int64),
    **dict.fromkeys(_RATIOS, pl.Float64),
    "omitted": pl.String,
}


def split_halves(items: pl.DataFrame, group: str, seed: int = 0) -> Comparison | str:
    """Compare two random halves of a group's held-out sources; where there are too few, the reason in words."""
    rows = items.filter(pl.col("group") == group, pl.col("split").is_in(HELD_OUT))
    sources = sorted(rows["source_id"].unique())
    if len(sources) < 2:
        return f"{group} has {len(sources)} held-out sources, too few to halve."
    order = counter_permutation("halves", group, seed, count=len(sources))
    half = [sources[place] for place in order[: len(sources) // 2]]
    chosen = pl.col("source_id").is_in(half)
    return compare(rows.filter(chosen), rows.filter(~chosen), "first half", "second half", splits=HELD_OUT, seed=seed)


def _trained(items: pl.DataFrame, group: str, seed: int) -> Comparison | str:
    rows = items.filter(pl.col("group") == group)
    trained, held_out = rows.filter(pl.col("split") == TRAINED), rows.filter(pl.col("split").is_in(HELD_OUT))
    for part, what in ((trained, "training"), (held_out, "held-out")):
        if not len(part):
            return f"No {what} items of {group} were observed."
    splits = (TRAINED, *HELD_OUT)
    return compare(trained, held_out, f"{group}, training", f"{group}, held out", splits=splits, seed=seed)
