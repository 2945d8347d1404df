"""One name a head, or none: chosen on discover, tested on confirm."""

import polars as pl

from headscope.study.inference import settings, with_holm
from headscope.study.roles.counterparts import ENOUGH, LEAST_TIMES, NAME
from headscope.study.roles.counterparts import LEAST as LEAST_SHARE
from headscope.study.roles.measures import CELL, LEAST
from headscope.study.roles.rows import HEAD

NONE = "none"
# what a head is called where several hold
PRECEDENCE = ("a feature", "uniform", "sink", "local", NONE)
NAMING = (
    f"Of the features on which a head's excess is significant on discover (p_maxt) and at least {LEAST} standard"
    f" deviations of the map (for counterparts {LEAST_TIMES:g} times what uniform attention would give them, but at"
    f" least {LEAST_SHARE} of attention, and {ENOUGH} is enough), the one with the largest |t| is chosen. On confirm it"
    " is tested alone: p_maxt among the cells that were chosen, the same sign, and an interval that lies beyond that"
    " least excess. On both splits the excess on the feature's own map, before other features are taken off, has to"
    " have the same sign and an interval clear of 0; other features aren't chosen: a residual points away from the map"
    " itself where others suppress it. And no feature that was left out, as others say as much, may explain more (a"
    " larger |t| on its own map): the two can't be told apart. Where the group has an untied control, a head is named"
    f" {NAME} only where its excess there exceeds that on the control, p_maxt over all heads, on discover to be chosen"
    " and on confirm to be named: a control's own heads can have a significant excess, as patches of like content"
    " resemble each other, tied or not. All other features of the head have no name. Of several"
    f" roles the first of {', '.join(PRECEDENCE)} stands. Below 20 sources in a split there are no names."
)
NOT_MORE = "not more than on its control"
_NUMBERS = ("value", "low", "high", "standard_error", "sources", "exploratory", "void")


def chosen_cells(discover: pl.DataFrame, ties: pl.DataFrame | None = None) -> pl.DataFrame:
    """A head's feature to test, from the table of `Measured.tested` of the discover split: see `NAMING`.

    ties: that of `ties.against_control` of the discover split; None: the group has no control. Returns a table: site,
    head, feature, sign, discover (the excess there), doubt (why it can't be a name; null where it can: only these are
    tested).
    """
    found = discover.filter(pl.col("p_maxt") < settings.SIGNIFICANT, pl.col("value").abs() >= pl.col("least"))
    # a value other than 0 without any error comes first
    t = (pl.col("value") / pl.col("standard_error")).abs()
    found = found.with_columns(_t=t, sign=pl.col("value").sign().cast(pl.Int64)).with_columns(_turns=_turns())
    best = found.sort([*HEAD, "_turns", "_t", "feature"], descending=[False, False, False, True, False])
    best = best.group_by(HEAD, maintain_order=True).first()
    best = _against_control(best, ties)
    return best.select(*CELL, "sign", discover=pl.col("value"), doubt=_doubt())


def _against_control(cells: pl.DataFrame, ties: pl.DataFrame | None) -> pl.DataFrame:
    """The cells with a column _like: of counterparts, and not established to be more than on the control."""
    if ties is None:
        return cells.with_columns(_like=pl.lit(False))
    more = ties.filter(pl.col("value") > 0, pl.col("p_maxt") < settings.SIGNIFICANT).select(*HEAD, _more=pl.lit(True))
    found = cells.join(more, on=list(HEAD), how="left", maintain_order="left")
    like = (pl.col("feature") == NAME) & pl.col("_more").is_null()
    return found.with_columns(_like=like).drop("_more")


def _turns() -> pl.Expr:
    """Whether the excess on the feature's own map doesn't have the sign of that on its residual, of a cell."""
    inner = pl.when(pl.col("sign") > 0).then("own_low").otherwise(-pl.col("own_high"))
    return ~(inner > 0).fill_null(False)


def _doubt() -> pl.Expr:
    """Why the feature of a cell can't be a head's name, as a text; null where it can."""
    turns = pl.format("its excess on {} is another when other features are taken off", "feature")
    rival = pl.format("{} or {}: these can't be told apart here", "feature", "rival")
    doubt = pl.when(_turns()).then(turns).when(pl.col("rival").is_not_null()).then(rival)
    doubt = doubt.when("_like").then(pl.lit(NOT_MORE))
    return doubt.otherwise(pl.lit(None, pl.String))


def confirmed_cells(chosen: pl.DataFrame, confirm: pl.DataFrame, ties: pl.DataFrame | None = None) -> pl.DataFrame:
    """The chosen cells with their numbers of the confirm split, and whether they hold there: column holds.

    ties: as in `chosen_cells`, of the confirm split.
    """
    found = chosen.join(confirm, on=list(CELL), how="left", maintain_order="left")
    found = _against_control(found, ties)
    inner = pl.when(pl.col("sign") > 0).then("low").otherwise(-pl.col("high"))
    holds = (pl.col("p_chosen") < settings.SIGNIFICANT) & (inner > pl.col("least"))
    # what was doubtful on discover isn't tested; what holds here may yet be doubtful here, and what has no numbers
    # here can't be said not to hold
    found = found.with_columns(holds=holds.fill_null(False))
    found = found.with_columns(doubt=pl.coalesce("doubt", pl.when("holds").then(_doubt()), _unmeasured()))
    return found.with_columns(holds=pl.col("holds") & pl.col("doubt").is_null()).drop("_like")


def _unmeasured() -> pl.Expr:
    """Why a chosen cell has no numbers on confirm, as a text; null where it has some."""
    absent = pl.format("void: {} has no numbers on confirm", "feature")
    return pl.when(pl.col("value").is_null()).then(absent)


def among(discover: pl.DataFrame | None, confirm: pl.DataFrame | None) -> pl.DataFrame | None:
    """The heads that the discover split calls uniform, a sink or local, on confirm, with p_holm among them."""
    if discover is None or confirm is None:
        return None
    return with_holm(confirm.join(_significant(discover), on=list(HEAD), how="semi", maintain_order="left"))


def chosen_roles(heads: pl.DataFrame, cells: pl.DataFrame, forms: dict[str, pl.DataFrame | None]) -> pl.DataFrame:
    """One row a head, of the discover split alone: site, head, role, feature, sign, discover.

    Args:
        heads: site, head.
        cells: see `chosen_cells`.
        forms: by role its table of the discover split; None: not measured.
    """
    cells = cells.filter(pl.col("doubt").is_null()).drop("doubt")
    found = heads.select(HEAD).join(cells, on=list(HEAD), how="left", maintain_order="left")
    role = pl.col("feature")
    for name in ("uniform", "sink", "local"):
        table = forms[name]
        if table is not None:
            held = _significant(table).with_columns(pl.lit(True).alias(f"_{name}"))
            found = found.join(held, on=list(HEAD), how="left", maintain_order="left")
            role = pl.coalesce(role, pl.when(f"_{name}").then(pl.lit(name)))
    return found.select(*HEAD, role.fill_null(NONE).alias("role"), "feature", "sign", "discover")


def _significant(table: pl.DataFrame) -> pl.DataFrame:
    return table.filter(pl.col("p_holm") < settings.SIGNIFICANT).select(HEAD)


def named(heads: pl.DataFrame, cells: pl.DataFrame, forms: dict[str, pl.DataFrame | None], few: bool) -> pl.DataFrame:
    """One row a head: site, head, role, feature, sign, unit, value, low, high, p_maxt, ..., local, discover, reason.

    Args:
        heads: site, head, void (rows of both splits that are missing or not finite), unseen (the features of which
            maps are missing or not finite on a split, as a text) and unseen_maps (how many).
        cells: see `confirmed_cells`.
        forms: by role, the heads that were chosen on discover in the confirm split, see `among`; None: not measured.
        few: whether a split has too few sources.
    """
    by_head = {(row["site"], row["head"]): row for row in cells.iter_rows(named=True)}
    of_form = {
        role: {} if table is None else {(row["site"], row["head"]): row for row in table.iter_rows(named=True)}
        for role, table in forms.items()
    }
    rows = []
    for site, head, void, unseen, maps in heads.select(*HEAD, "void", "unseen", "unseen_maps").iter_rows():
        cell = by_head.get((site, head))
        found = {role: table.get((site, head)) for role, table in of_form.items()}
        holding = {
            role: row
            for role, row in found.items()
            if row and row["p_holm"] is not None and row["p_holm"] < settings.SIGNIFICANT
        }
        row = {"site": site, "head": head, "role": NONE, "local": None if few else "local" in holding, "void": void}
        if few:
            rows.append(row | {"reason": f"fewer than {settings.FEWEST_SOURCES} sources in a split"})
            continue
        role = next((name for name in ("uniform", "sink", "local") if name in holding), None)
        if cell is not None and cell["holds"]:
            taken = {name: cell[name] for name in ("feature", "sign", "unit", "discover", *_NUMBERS)}
            row |= taken | {"role": cell["feature"], "p_maxt": cell["p_chosen"]}
        elif role is not None:
            row |= {name: holding[role][name] for name in _NUMBERS} | {"role": role, "unit": UNITS[role]}
            row["p_maxt"] = holding[role]["p_holm"]
        else:
            # what wasn't seen in whole can't be said to be none
            row |= {"void": void + maps, "reason": _why(void, unseen, cell, found)}
        rows.append(row)
    schema = {"site": pl.String, "head": pl.Int64, "role": pl.String, "feature": pl.String, "sign": pl.Int64}
    schema |= {"unit": pl.String} | dict.fromkeys(("value", "low", "high", "p_maxt", "standard_error"), pl.Float64)
    schema |= {"sources": pl.Int64, "exploratory": pl.Boolean, "void": pl.Int64, "local": pl.Boolean}
    return pl.DataFrame(rows, schema | {"discover": pl.Float64, "reason": pl.String}, orient="row")


UNITS = {"uniform": "nats", "sink": "share of attention", "local": "of the distance of uniform attention"}


def _why(void: int, unseen: str, cell: dict | None, found: dict[str, dict | None]) -> str:
    if void:
        return f"void: {void} rows are missing or not finite"
    if unseen:
        return f"void: maps of {unseen} are missing or not finite"
    chosen = [role for role, row in found.items() if row]
    if cell is None and not chosen:
        return "nothing was found on discover"
    if cell is not None and cell["doubt"] is not None:
        return cell["doubt"]
    tried = ([cell["feature"]] if cell else []) + chosen
    return f"not confirmed: {', '.join(tried)}"
