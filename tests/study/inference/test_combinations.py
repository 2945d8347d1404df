"""Joint effects against sums of effects: by hand, equal to what the parts say, and what is refused."""

import numpy as np
import polars as pl
import pytest

from headscope.study.inference import combined, degradations
from study.inference.rows import losses

BEYOND = {"beyond": {"both": 1.0, "one": -1.0, "two": -1.0}}


@pytest.fixture
def rows():
    """Of three edits."""
    names = pl.DataFrame({"head": [0, 1, 2], "edit": ["one", "two", "both"]})
    return losses(np.random.default_rng(0), draws=2).join(names, on="head").drop("head")


def test_a_combination_s_degradation_is_that_of_its_parts(rows):
    parts, whole = degradations(rows, ["edit"], "timestep"), degradations(combined(rows, BEYOND), ["edit"], "timestep")
    for part, table in zip(parts, whole, strict=True):
        value = dict(part.select("edit", "value").iter_rows())
        assert table["edit"].to_list() == ["beyond"]
        assert table["value"].item() == pytest.approx(value["both"] - value["one"] - value["two"])
        assert table["low"].item() < table["value"].item() < table["high"].item()
    alone = degradations(combined(rows, {"one again": {"one": 1.0}}), ["edit"], "timestep")[0]
    expected = parts[0].filter(edit="one")
    assert alone.select("value", "low", "high").row(0) == pytest.approx(expected.select("value", "low", "high").row(0))


@pytest.mark.parametrize("broken", ["missing", None, np.nan, np.inf])
def test_an_edit_that_is_lacking_voids_the_combination(rows, broken):
    here = (pl.col("edit") == "two") & (pl.col("item") == 3) & (pl.col("timestep") == 100) & (pl.col("replicate") == 0)
    if broken == "missing":
        worse = rows.filter(~here)
    else:
        worse = rows.with_columns(pl.when(here).then(pl.lit(broken, pl.Float64)).otherwise("edited").alias("edited"))
    table = degradations(combined(worse, BEYOND), ["edit"], "timestep")[0]
    assert table.select("value", "void").row(0) == (None, 1)


def test_what_does_not_fit_is_refused(rows):
    with pytest.raises(ValueError, match="three, which edit"):
        combined(rows, {"x": {"one": 1.0, "three": 1.0}})
    with pytest.raises(ValueError, match="an edit of 'beyond' twice"):
        combined(pl.concat([rows, rows]), BEYOND)
    other = rows.with_columns(pl.when(edit="two").then(pl.col("clean") * 1.01).otherwise("clean").alias("clean"))
    with pytest.raises(ValueError, match="clean loss differs"):
        combined(other, BEYOND)
