"""The excess on counterparts, and its test, against loops."""

import numpy as np
import polars as pl
import pytest

from headscope.study.inference import settings
from headscope.study.inference.draws import picked
from headscope.study.roles.counterparts import ROUNDING, counterparts_of, least_share
from headscope.study.roles.rows import sources_of

STEPS = [100, 500]


def rows(array, per_source=1, share=0.05, gone=()):
    """Rows of the table "counterparts"; array [heads, items, regions, timesteps]; gone: items without counterparts."""
    heads, items, regions, steps = array.shape
    found = []
    for head, item, donor, step in np.ndindex(heads, items, regions, steps):
        of = (item + donor) % items
        tokens = 0 if item in gone or of in gone else 4
        found.append(
            {
                "item": item,
                "source_id": f"s{item // per_source:02}",
                "replicate": 0,
                "timestep": STEPS[step],
                "site": "a",
                "call": 0,
                "head": head,
                "donor": donor,
                "donor_source": f"s{of // per_source:02}",
                "tokens": tokens,
                "mass": float(array[head, item, donor, step]) if tokens else None,
                "share": share if tokens else None,
            }
        )
    return pl.DataFrame(found)


def measured(table):
    found = counterparts_of(table, sources_of(table), STEPS)
    assert found is not None
    return found


def test_own_minus_donors_less_what_rows_and_columns_say():
    generator = np.random.default_rng(0)
    array = generator.normal(size=(2, 9, 4, 2))
    found = measured(rows(array))
    # each region serves as often, so the mean is that of own minus donors
    own = array[:, :, 0].mean(axis=1) - array[:, :, 1:].mean(axis=(1, 2))
    np.testing.assert_allclose(found.own().mean(axis=0), own.T, atol=1e-12)
    # what an item gives whichever regions, and regions get from whichever item, changes nothing
    leaning, wanted = generator.normal(size=(2, 9, 1, 2)), generator.normal(size=(2, 9, 2))
    region = np.stack([np.roll(wanted, -donor, axis=1) for donor in range(4)], axis=2)
    np.testing.assert_allclose(measured(rows(array + leaning + region)).values, found.values, atol=1e-12)


def test_t_in_every_draw_is_that_of_a_loop(monkeypatch):
    monkeypatch.setattr(settings, "RESAMPLES", 19)
    array = np.random.default_rng(1).normal(size=(3, 6, 4, 2))
    found = measured(rows(array))
    table = found.values.mean(axis=3)
    picks = picked(5, (4,) * 6, 19)
    assert picks[:, 0].tolist() == [0] * 6
    t = found.exchanged(5)
    for draw, pick in enumerate(picks.T):
        taken = table[np.arange(6), pick]
        error = np.sqrt(taken.var(axis=0) / 5 + ROUNDING**2)
        np.testing.assert_allclose(t[draw], taken.mean(axis=0) / error, rtol=1e-9)


def test_items_without_counterparts_and_donors_without_are_left_out():
    array = np.random.default_rng(2).normal(size=(1, 8, 3, 2))
    found = measured(rows(array, gone=(2,)))
    assert found.sources == ["s00", "s01", "s03", "s04", "s05", "s06", "s07"]
    assert found.void.tolist() == [0]
    # item 2 is a donor of 1 and of 0
    assert np.isfinite(found.values[..., 0, 0]).sum(axis=1).tolist() == [2, 2, 3, 3, 3, 3, 3]


@pytest.mark.full
@pytest.mark.parametrize(
    ("items", "per_source", "donors", "gone"), [(24, 1, 7, ()), (24, 1, 3, (3, 9)), (44, 2, 7, ())]
)
def test_the_test_holds_its_level(items, per_source, donors, gone, monkeypatch):
    """Own regions no better than donors': 400 heads, of which 5 % and 3 standard errors at most are below 0.05."""
    monkeypatch.setattr(settings, "RESAMPLES", 399)
    generator = np.random.default_rng(items)
    p_values = []
    for seed in range(4):
        array = generator.normal(size=(100, items, donors + 1, 2)) + 2 * generator.normal(size=(100, items, 1, 1))
        wanted = 2 * generator.normal(size=items)
        for donor in range(donors + 1):
            array[:, :, donor] += np.roll(wanted, -donor)[:, None]
        t = np.abs(measured(rows(array, per_source, gone=gone)).exchanged(seed))
        p_values.append((1 + (t[1:] >= t[0]).sum(axis=0)) / 400)
    assert np.mean(np.concatenate(p_values) < 0.05) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)


def test_a_donor_of_the_same_source_is_none():
    found = measured(rows(np.random.default_rng(3).normal(size=(1, 8, 3, 2)), per_source=2))
    assert found.sources == ["s00", "s01", "s02", "s03"]
    # of two items of a source the first's first donor is the second, and the second's of another source
    assert np.isfinite(found.values).all()
    only = measured(rows(np.random.default_rng(3).normal(size=(1, 8, 2, 2)), per_source=2))
    assert np.isfinite(only.values).all()


@pytest.mark.parametrize("wrong", ["missing", "nan"])
def test_a_row_that_lacks_or_isnt_finite_voids_its_head(wrong):
    table = rows(np.random.default_rng(4).normal(size=(2, 6, 3, 2)))
    one = (pl.col("head") == 1) & (pl.col("item") == 3) & (pl.col("donor") == 1) & (pl.col("timestep") == 500)
    if wrong == "missing":
        table = table.filter(~one)
    else:
        table = table.with_columns(mass=pl.when(one).then(float("nan")).otherwise("mass"))
    found = measured(table)
    assert found.void.tolist() == [0, 1]
    assert np.isfinite(found.values[:, :, 0]).all()


def test_no_counterparts_or_no_donors_are_no_test():
    array = np.zeros((1, 4, 3, 2))
    table = rows(array, gone=(0, 1, 2, 3))
    assert counterparts_of(table, sources_of(table), STEPS) is None
    table = rows(array[:, :, :1])
    assert counterparts_of(table, sources_of(table), STEPS) is None


@pytest.mark.parametrize(("share", "least"), [(0.001, 0.02), (0.05, 0.1)])
def test_the_least_excess_follows_what_uniform_attention_would_give(share, least):
    found = measured(rows(np.zeros((1, 5, 3, 2)), share=share))
    assert least_share(found) == pytest.approx(least)


def test_a_donor_of_a_source_that_isnt_there_is_refused():
    table = rows(np.zeros((1, 5, 3, 2)))
    strange = table.with_columns(donor_source=pl.col("donor_source").replace("s03", "elsewhere"))
    with pytest.raises(ValueError, match=r"^counterparts: got donor_source elsewhere, expected the source"):
        counterparts_of(strange.filter((pl.col("donor") > 0) | (pl.col("item") != 3)), sources_of(table), STEPS)
