"""Roles that the form of attention makes, whatever the image shows: uniform, sink, local."""

import numpy as np
import polars as pl
from scipy.stats import t as student

from headscope.study.inference import means, with_holm
from headscope.study.roles.rows import HEAD

# nats of ln K - H below which a head is called uniform
UNIFORM = 0.05
# mass on one key, and how many times its share under uniform attention, from which a head is called a sink
SINK, SINK_TIMES = 0.3, 3.0
# mean distance over that of uniform attention below which a head is called local
LOCAL = 0.5
# how much of that ratio an image moved by half its size may change, and what counts as nothing where it is small
SAME, SAME_FLOOR = 0.1, 0.01
FORMS = {
    "uniform": (
        f"ln K − H is below {UNIFORM} nats, averaged over queries, draws and timesteps: a one-sided test of equivalence"
        " of the mean over sources."
    ),
    "sink": (
        f"One key, the same for all items, gets more than {SINK} of the head's mass in the mean (and more than"
        f" {SINK_TIMES:g} times what uniform attention would give it). The key is chosen on discover."
    ),
    "local": (
        f"The mean distance from a query to its keys is below {LOCAL} of that of uniform attention, on the image and on"
        " the image rolled by half its height and width, and on both the same within 10 % (equivalence: two one-sided"
        " tests). A head that looks at what lies in the middle fails it. p is the largest of the four."
    ),
}
FORM_TESTS = (
    "Chosen on discover and tested on confirm, each time with Holm's correction: over all heads there, over the chosen"
    " ones here. One-sided tests: p is that of Student's t over sources, and 1 where the bootstrap-t interval doesn't"
    " lie beyond the bound."
)
_COLUMNS = (*HEAD, "value", "low", "high", "p_value", "standard_error", "sources", "exploratory", "void")


def uniform_heads(rows: pl.DataFrame, seed: int) -> pl.DataFrame:
    """ln K - H of every head in nats and the p-value that it is below `UNIFORM`: see `FORMS`.

    rows: of one group and split in the table "key_mass", of images that aren't translated. Returns a table: site, head,
    value, low, high, p_value, p_holm, standard_error, sources, exploratory, void.
    """
    keys = pl.col("grid_height").cast(pl.Float64) * pl.col("grid_width").cast(pl.Float64)
    rows = rows.with_columns(_value=keys.log() - pl.col("entropy").cast(pl.Float64))
    return _below(rows, "_value", UNIFORM, seed)


def sink_heads(on_sink: pl.DataFrame, sinks: pl.DataFrame, seed: int) -> pl.DataFrame:
    """The mass on every head's key and the p-value that it is above `SINK`: see `FORMS`; tables of `Measured`.

    Returns the columns of `uniform_heads`.
    """
    bound = pl.max_horizontal(pl.lit(SINK), SINK_TIMES / pl.col("keys"))
    rows = on_sink.join(sinks.select(*HEAD, _bound=bound), on=list(HEAD), maintain_order="left")
    rows = rows.with_columns(_beyond=pl.col("_bound") - pl.col("value"))
    found = _below(rows, "_beyond", 0.0, seed, bands=None)
    mass = means(rows, "value", HEAD, seed=seed).select(*HEAD, "value", "low", "high")
    found = found.drop("value", "low", "high").join(mass, on=list(HEAD), maintain_order="left")
    return found.select(*_COLUMNS, "p_holm")


def local_heads(rows: pl.DataFrame, seed: int) -> pl.DataFrame | None:
    """Distance over that of uniform attention, and the p-value that the head is local: see `FORMS`.

    rows: of one group and split, of images as they are and translated. Returns the columns of `uniform_heads`; None
    where there are no translated images.
    """
    keys = ["source_id", "item", "replicate", "timestep", *HEAD, "call"]
    ratio = (pl.col("distance") / pl.col("distance_uniform")).cast(pl.Float64)
    parts = [rows.filter(pl.col("translated") == moved).select(*keys, _ratio=ratio) for moved in (False, True)]
    if not len(parts[1]):
        return None
    # a row that one of both lacks has no number, which makes the head void
    both = parts[0].join(parts[1], on=keys, how="full", coalesce=True, suffix="_moved", maintain_order="left_right")
    slack = SAME * pl.col("_ratio") + SAME_FLOOR
    change = pl.col("_ratio_moved") - pl.col("_ratio")
    both = both.with_columns(_up=change - slack, _down=-change - slack)
    conditions = (("_ratio", LOCAL), ("_ratio_moved", LOCAL), ("_up", 0.0), ("_down", 0.0))
    tables = [_below(both, column, bound, seed) for column, bound in conditions]
    p_values = [table["p_value"].alias(str(number)) for number, table in enumerate(tables)]
    worst = pl.DataFrame(p_values).select(pl.max_horizontal(pl.all())).to_series().rename("p_value")
    absent = pl.DataFrame(p_values).select(pl.any_horizontal(pl.all().is_null())).to_series()
    p_value = pl.DataFrame({"p": worst, "no": absent}).select(pl.when(~pl.col("no")).then("p")).to_series()
    return with_holm(tables[0].drop("p_holm").with_columns(p_value=p_value))


def _below(rows: pl.DataFrame, column: str, bound: float, seed: int, bands: str | None = "timestep") -> pl.DataFrame:
    """The mean of a column with its interval, and the p-value of the hypothesis that it is at or above a bound."""
    found = means(rows.with_columns(_distance=pl.col(column) - bound), "_distance", HEAD, bands, seed)
    value, error, high = (found[name].cast(pl.Float64).to_numpy() for name in ("value", "standard_error", "high"))
    with np.errstate(invalid="ignore", divide="ignore"):
        p_value = student.cdf(np.where(value == 0, 0.0, value / error), found["sources"].to_numpy() - 1)
    # an interval that reaches the bound, as skewed numbers have it, or none
    p_value = np.where(high < 0, p_value, 1.0)
    p_value = np.where(np.isnan(value) | found["exploratory"].to_numpy(), np.nan, p_value)
    found = found.with_columns(
        pl.Series("p_value", p_value, nan_to_null=True), *(pl.col(name) + bound for name in ("value", "low", "high"))
    )
    return with_holm(found.select(_COLUMNS))
