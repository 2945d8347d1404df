"""The causal clause: does removing a role's heads hurt its feature's pixels more than others?"""

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import stdev
from typing import NamedTuple

import polars as pl

from headscope.counter import counter_permutation
from headscope.study.ablation import ROUNDING, headline_fill
from headscope.study.inference import (
    degradation_differences,
    degradations,
    means,
    plain_text,
    ratios,
    settings,
    with_holm,
)
from headscope.study.roles.rows import HEAD

CONTROLS = 8
# of the further sets of a role's heads, which stand beside its own
FEWER_CONTROLS = 3
# a role's set: at most so many heads, those with the largest excess; all of a larger role are removed, too
STRONGEST = 5
CAUSAL = (
    "Inside: the mean squared error over the feature's pixels (of a continuous feature the item's top quartile), with"
    " the heads removed and without; outside: over all others, (loss − share × inside) / (1 − share). Items without"
    " pixels of one of both are left out and counted. Either is given as relative degradation, in percent of its own"
    " clean error: at a timestep the sum of edited − clean over that of clean, sums over sources, then the mean over"
    " timesteps. Tested is the difference of both, inside minus outside: 0 for damage in proportion to the error that"
    " is there anyway, however strong the heads are. Both parts of a source are drawn together; bootstrap-t, Holm over"
    " the sets of a group. A role is confirmed where that difference is above 0 (p_holm) and larger than the mean of"
    " the control sets, with an interval of the paired difference clear of 0, which holds that other control sets could"
    f" have been drawn: the standard deviation between them (up to {CONTROLS}) times the square root of 1 + 1 / their"
    " number, by its own degrees of freedom. A control set has as many heads of the same"
    " sites, drawn at random from those that were not chosen for the feature, to look at it or to avoid it; where a"
    " site has too few, of other sites: column elsewhere. The heads are those that the discover split chose, at most"
    " the five with the largest excess; where there are more, all of them make another set. The added error per pixel,"
    " inside over outside, stands beside it as a description: pixels on which the model errs more gain more error by"
    " any damage, so that this ratio means something only beside that of the control sets. The mean fill's own bias is"
    " in all of them, inside and outside. Caveat: where any damage is out of proportion to the clean error, stronger"
    " heads exceed weaker control sets without being specific."
)
_PLACES = ("inside", "outside")
_CHANGES = tuple(f"change_{place}" for place in _PLACES)
_ITEM = ("source_id", "item", "replicate", "timestep")


class RoleSet(NamedTuple):
    """Heads to be removed together.

    Attributes:
        name: the set's.
        group: of images, in which the heads have the role.
        feature: the role's.
        heads: (site, head) pairs.
        control_of: the name of the set that this one is a control of; "" for a role's own.
    """

    name: str
    group: str
    feature: str
    heads: tuple[tuple[str, int], ...]
    control_of: str = ""


def sets_of(
    names: pl.DataFrame,
    *,
    controls: int = CONTROLS,
    strongest: int = STRONGEST,
    each_head: bool = False,
    seed: int = 0,
) -> list[RoleSet]:
    """The heads of each role and group, to be removed together, and control sets: see `CAUSAL`.

    Only heads with the name of a feature that they look at (sign 1) make a set: other roles have no pixels. A role's
    own set, "X heads of G", holds its strongest heads; where it has more, all of them make another, "X heads of G: all
    N". A control has as many heads of every site, none of them chosen for that feature, to look at it or to avoid it;
    where a site has too few others the rest is of other sites, and where all have there is no control. Never the same
    control twice.

    Args:
        names: `Roles.chosen`, so that the confirm split, on which the sets are to be removed, has had no part in the
            choice; all heads of a site have to be there. Columns: group, site, head, feature, sign, discover.
        controls: how many control sets for each role's own set, at most; of further sets no more than 3.
        strongest: how many heads a role's own set has at most: those with the largest excess on discover.
        each_head: whether every head of a role of several makes a set of its own besides.
        seed: of the controls.

    Raises:
        ValueError: where `controls` is below 0 or `strongest` below 1.
    """
    for name, number, least in (("controls", controls, 0), ("strongest", strongest, 1)):
        if number < least:
            raise ValueError(f"{name}: got {number}, expected at least {least}")
    named = names.filter(pl.col("feature").is_not_null(), pl.col("sign") > 0).sort("group", "feature", *HEAD)
    found = []
    for (group, feature), rows in named.group_by("group", "feature", maintain_order=True):
        heads = tuple(rows.select(HEAD).iter_rows())
        largest = rows.sort("discover", *HEAD, descending=[True, False, False]).head(strongest).sort(HEAD)
        # whatever its sign: a head that avoids the feature is no head that has nothing to do with it
        other = (pl.col("group") == group) & pl.col("feature").ne_missing(feature)
        others = list(names.filter(other).sort(HEAD).select(HEAD).iter_rows())
        own = f"{feature} heads of {group}"
        sets = {own: tuple(largest.select(HEAD).iter_rows())}
        if len(heads) > strongest:
            sets[f"{own}: all {len(heads)}"] = heads
        if each_head and len(heads) > 1:
            sets |= {f"{own}: {site} h{head}": ((site, head),) for site, head in heads}
        for name, chosen in sets.items():
            found.append(RoleSet(name, str(group), str(feature), chosen))
            # what confirms a role is its own set
            drawn = _controls(name, chosen, others, controls if name == own else min(controls, FEWER_CONTROLS), seed)
            found += [
                RoleSet(f"{name}, control {number}", str(group), str(feature), control, name)
                for number, control in enumerate(drawn, start=1)
            ]
    return found


def _controls(
    name: str, heads: Sequence[tuple[str, int]], others: Sequence[tuple[str, int]], count: int, seed: int
) -> list[tuple[tuple[str, int], ...]]:
    needed = Counter(site for site, _ in heads)
    if len(others) < len(heads):
        return []
    found: dict[tuple[tuple[str, int], ...], None] = {}
    # more draws than controls, as few heads make few different sets
    for draw in range(10 * count):
        order = counter_permutation("role control", name, seed, draw, count=len(others))
        drawn = [others[at] for at in order]
        of_site = {site: [head for head in drawn if head[0] == site][:number] for site, number in needed.items()}
        taken = [head for chosen in of_site.values() for head in chosen]
        taken += [head for head in drawn if head not in taken][: len(heads) - len(taken)]
        found.setdefault(tuple(sorted(taken)))
        if len(found) == count:
            break
    return list(found)


def causal(set_ablations: pl.DataFrame, sets: Iterable[RoleSet], *, seed: int = 0) -> pl.DataFrame:
    """The causal clause for every role's set: see `CAUSAL`.

    Args:
        set_ablations: a sweep's table of that kind, with the scores "on FEATURE"; only the split confirm counts, of
            each set only its own group, and only the headline fill (the mean one).
        sets: see `sets_of`.
        seed: of the draws.

    Returns:
        One row a set: group, role, feature, set, heads (their number), fill, inside, inside_low, inside_high, outside,
        outside_low, outside_high (fractions of their clean loss), difference, low, high, p_value, p_holm (inside minus
        outside, of these fractions), absolute, absolute_low, absolute_high (added error per pixel inside minus outside,
        in units of the loss), ratio, ratio_low, ratio_high (added error inside over outside; null where there is no
        interval, as where they differ in sign), control_ratio (the same of all control sets together), share (of the
        pixels), controls (their number), elsewhere (how many heads of a control are of other sites, mean),
        control_difference (the mean over control sets), beyond, beyond_low, beyond_high (difference minus that),
        confirmed, standard_error, sources, exploratory, void, left_out (rows of items without such pixels, or with no
        others).

    Raises:
        ValueError: where the table lacks a column, or the rows of a set.
    """
    sets = list(sets)
    rows = _checked(set_ablations, sets)
    found = []
    own = [one for one in sets if not one.control_of]
    for group in dict.fromkeys(one.group for one in own):
        mine = rows.filter(pl.col("group") == group)
        parts, beside = [], []
        for one in own:
            if one.group == group:
                errors, left_out = _errors(mine, one)
                controls = [other for other in sets if other.control_of == one.name]
                of_controls = [_errors(mine, control)[0] for control in controls]
                parts.append(errors.with_columns(set=pl.lit(one.name)))
                elsewhere = [_elsewhere(one, control) for control in controls]
                counted = {"left_out": left_out, "elsewhere": sum(elsewhere) / len(elsewhere) if elsewhere else None}
                beside.append(_of_set(one, errors, of_controls, seed) | counted)
        found.append(_tested(pl.concat(parts), pl.DataFrame(beside, _BESIDE), seed))
    return pl.concat(found) if found else pl.DataFrame(schema=_schema())


def _elsewhere(one: RoleSet, control: RoleSet) -> int:
    """How many heads of a control are of other sites than the set's."""
    return (Counter(site for site, _ in control.heads) - Counter(site for site, _ in one.heads)).total()


_COUNTS = {"heads": pl.Int64, "fill": pl.String}
_ENDS = ("", "_low", "_high")
_NUMBERS = [f"{name}{end}" for name in ("inside", "outside", "absolute", "ratio", "beyond") for end in _ENDS]
_BESIDE = {"group": pl.String, "role": pl.String, "feature": pl.String, "set": pl.String} | _COUNTS
_BESIDE |= dict.fromkeys([*_NUMBERS, "control_ratio", "share", "elsewhere", "control_difference"], pl.Float64) | {
    "controls": pl.Int64,
    "left_out": pl.Int64,
}
_COLUMNS = ["group", "role", "feature", "set", "heads", "fill", *_NUMBERS[:6]]
_COLUMNS += ["difference", "low", "high", "p_value", "p_holm", *_NUMBERS[6:12], "control_ratio", "share", "controls"]
_COLUMNS += ["elsewhere", "control_difference", *_NUMBERS[12:], "confirmed", "standard_error", "sources"]
_COLUMNS += ["exploratory", "void", "left_out"]


def _schema() -> dict[str, type[pl.DataType]]:
    special = {"confirmed": pl.Boolean, "exploratory": pl.Boolean, "sources": pl.Int64, "void": pl.Int64}
    return {name: (_BESIDE | special).get(name, pl.Float64) for name in _COLUMNS}


def _column(feature: str) -> str:
    return feature.replace(" ", "_")


def _checked(table: pl.DataFrame, sets: Sequence[RoleSet]) -> pl.DataFrame:
    """The rows of the sets on the confirm split with the headline fill."""
    scores = [f"{part}_on_{_column(one.feature)}" for one in sets for part in ("clean", "edited", "share")]
    needed = [
        "group",
        "split",
        "source_id",
        "item",
        "replicate",
        "timestep",
        "edit",
        "fill",
        "clean",
        "edited",
        *scores,
    ]
    missing = [name for name in dict.fromkeys(needed) if name not in table.columns]
    if missing:
        raise ValueError(f"set_ablations: lacks {', '.join(missing)}; it has {', '.join(table.columns)}")
    rows = plain_text(table).filter(pl.col("split") == "confirm")
    there = set(rows.select("group", "edit").unique().iter_rows())
    absent = [one.name for one in sets if (one.group, one.name) not in there]
    if absent:
        raise ValueError(f"set_ablations: got no row of the confirm split for {', '.join(absent)}")
    return rows.filter(pl.col("fill") == headline_fill(rows)) if len(rows) else rows


def _errors(rows: pl.DataFrame, one: RoleSet) -> tuple[pl.DataFrame, int]:
    """Clean and edited errors of every item that has pixels inside and outside; and how many rows were left out."""
    name = _column(one.feature)
    columns = {"_clean": f"clean_on_{name}", "_edited": f"edited_on_{name}", "clean": "clean", "edited": "edited"}
    numbers = {new: pl.col(old).cast(pl.Float64) for new, old in columns.items()}
    mine = rows.filter(pl.col("edit") == one.name).select(*_ITEM, "fill", **numbers)
    # what any edit has a row of: one that this set lacks makes it void
    every = rows.group_by(_ITEM, maintain_order=True).agg(_share=pl.col(f"share_on_{name}").cast(pl.Float64).max())
    share, losses = pl.col("_share"), {}
    both = every.filter((share > 0) & (share < 1)).join(mine, on=list(_ITEM), how="left", maintain_order="left")
    for kind in ("clean", "edited"):
        losses[f"{kind}_inside"] = pl.col(f"_{kind}")
        losses[f"{kind}_outside"] = (pl.col(kind).cast(pl.Float64) - share * pl.col(f"_{kind}")) / (1 - share)
    both = both.select(*_ITEM, "fill", share=share, **losses)
    change = {f"change_{place}": pl.col(f"edited_{place}") - pl.col(f"clean_{place}") for place in _PLACES}
    both = both.with_columns(**change)
    return both.with_columns(absolute=pl.col("change_inside") - pl.col("change_outside")), len(every) - len(both)


def _of_set(one: RoleSet, errors: pl.DataFrame, controls: list[pl.DataFrame], seed: int) -> dict:
    """What stands beside the test of a set, see `causal`."""
    found = {"group": one.group, "role": one.feature, "feature": one.feature, "set": one.name, "heads": len(one.heads)}
    found |= {"fill": errors["fill"].first(), "share": errors["share"].mean(), "controls": len(controls)}
    if not len(errors):
        return found
    for place in _PLACES:
        losses = errors.select(*_ITEM, clean=f"clean_{place}", edited=f"edited_{place}")
        found |= _bounds(place, degradations(losses, (), "timestep", seed, test=False)[0])
    found |= _bounds("absolute", means(errors, "absolute", (), "timestep", seed))
    found |= _ratio("ratio", errors, seed)
    if controls:
        mean = _mean_of(controls)
        found["control_ratio"] = _ratio("control_ratio", mean, seed).get("control_ratio")
        # the same items, hence the same clean errors: the difference of a mean change is the mean of differences
        cleans = errors.select(*_ITEM, *(f"clean_{place}" for place in _PLACES))
        paired = cleans.join(mean, on=list(_ITEM), how="left", maintain_order="left")
        found["control_difference"] = _difference(paired)
        own = errors.select(*_ITEM, *(pl.col(name).alias(f"_{name}") for name in _CHANGES))
        beyond = paired.join(own, on=list(_ITEM), how="left", maintain_order="left")
        beyond = beyond.with_columns((pl.col(f"_{name}") - pl.col(name)).alias(name) for name in _CHANGES)
        spread = _spread(controls)
        if spread is not None:
            found |= _bounds("beyond", degradation_differences(beyond, _PLACES, (), "timestep", seed, added=spread))
    return found


def _spread(controls: list[pl.DataFrame]) -> pl.DataFrame | None:
    """What the choice of control sets adds to the error of a difference to their mean; None of fewer than two.

    That a set is one more draw of them is the hypothesis: their standard deviation * sqrt(1 + 1 / number).
    """
    parts = [_difference(one) for one in controls]
    if len(parts) < 2 or None in parts:
        return None
    between = stdev(parts) * (1 + 1 / len(parts)) ** 0.5
    return pl.DataFrame({"added_error": [max(between, ROUNDING)], "added_freedom": [float(len(parts) - 1)]})


def _difference(rows: pl.DataFrame) -> float | None:
    """The relative degradation inside minus that outside, without an interval; None where it is void."""
    return degradation_differences(rows, _PLACES, (), "timestep", interval=False)["value"][0]


def _bounds(name: str, table: pl.DataFrame) -> dict:
    """An estimate and its interval, under a name."""
    return {f"{name}{end}": table[column][0] for end, column in zip(_ENDS, ("value", "low", "high"), strict=True)}


def _ratio(name: str, errors: pl.DataFrame, seed: int) -> dict:
    """Added error inside over outside; nothing where there is no ratio."""
    parts = [errors.select(*_ITEM, value=column) for column in _CHANGES]
    # where nothing changes there is none
    if not all((part["value"].abs() > 0).any() for part in parts):
        return {}
    ratio = ratios(*parts, "value", (), "timestep", seed, paired=True)
    return {} if ratio["low"][0] is None else _bounds(name, ratio)


def _mean_of(controls: list[pl.DataFrame]) -> pl.DataFrame:
    """By item, the mean change over control sets; null where one of them has no number."""
    whole = [pl.when(pl.col(name).count() == len(controls)).then(pl.col(name).mean()) for name in _CHANGES]
    return pl.concat(controls).group_by(_ITEM, maintain_order=True).agg(whole)


def _tested(rows: pl.DataFrame, beside: pl.DataFrame, seed: int) -> pl.DataFrame:
    """The tests of the sets of one group, a family; rows of all of them, with a column set."""
    tests = [
        degradation_differences(part, _PLACES, ["set"], "timestep", seed, test=True, added=_rounding(part, ["set"]))
        for part in rows.partition_by("set", maintain_order=True)
    ]
    numbers = dict.fromkeys(("difference", "low", "high", "p_value", "p_holm", "standard_error"), pl.Float64)
    schema = {"set": pl.String} | numbers | {"sources": pl.Int64, "exploratory": pl.Boolean, "void": pl.Int64}
    tests = with_holm(pl.concat(tests).rename({"value": "difference"})) if tests else pl.DataFrame(schema=schema)
    table = beside.join(tests, on="set", how="left", maintain_order="left")
    # a set without an item that has both kinds of pixels
    empty = {"sources": pl.col("sources").fill_null(0), "void": pl.col("void").fill_null(0)}
    empty |= {"exploratory": pl.col("exploratory").fill_null(True)}
    confirmed = (pl.col("p_holm") < settings.SIGNIFICANT) & (pl.col("difference") > 0) & (pl.col("beyond_low") > 0)
    return table.with_columns(confirmed=confirmed.fill_null(False), **empty).select(_COLUMNS)


def _rounding(rows: pl.DataFrame, by: Sequence[str]) -> pl.DataFrame:
    """What single precision may leave of a difference that is 0, for `inference.degradation_differences`.

    `ablation.ROUNDING` of the clean loss for the loss and for what is inside; what is outside is a difference of both.
    """
    inside, outside, share = pl.col("clean_inside"), pl.col("clean_outside"), pl.col("share")
    subtracted = (2 * share * inside + (1 - share) * outside) / (1 - share)
    size = ROUNDING * (1 + subtracted.abs().mean() / outside.abs().mean())
    # where the clean error is 0 the set is void
    size = pl.when(size.is_finite()).then(size).otherwise(0.0).alias("added_error")
    frame = rows.group_by(by, maintain_order=True).agg(size) if by else rows.select(size)
    return frame.with_columns(added_freedom=pl.lit(float("inf")))
