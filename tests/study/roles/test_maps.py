"""Residual maps of features, against least squares from numpy."""

import numpy as np
import polars as pl
import pytest

from headscope.study.roles.maps import residual_maps
from headscope.study.roles.rows import sources_of


def sources(items, per_source=1):
    names = [f"s{number // per_source:02}" for number in range(items)]
    return sources_of(pl.DataFrame({"source_id": names, "item": range(items)}))


def table(maps, names, resolved=0.9, grid=(2, 3), items=None):
    """Rows of the table "features"; maps [items, features, tokens]."""
    count, features, _ = maps.shape
    return pl.DataFrame(
        {
            "item": np.repeat(np.arange(count) if items is None else items, features),
            "feature": list(names) * count,
            "grid_height": [grid[0]] * (count * features),
            "grid_width": [grid[1]] * (count * features),
            "map": maps.reshape(count * features, -1).tolist(),
            "resolved": [resolved] * (count * features),
        }
    )


def drawn(items=24, features=3, tokens=6, seed=0):
    generator = np.random.default_rng(seed)
    maps = generator.normal(size=(items, features, tokens)) + 3 * generator.normal(size=(features, tokens))
    maps[:, 1] += 0.8 * maps[:, 0]
    return maps


def test_what_is_left_is_neither_place_nor_another_feature():
    maps, names = drawn(), ("a", "b", "c")
    found = residual_maps(table(maps, names), sources(24))
    assert found.names == ["a", "b", "c"]
    centred = maps - maps.mean(axis=2, keepdims=True)
    centred -= centred.mean(axis=0)
    for number in range(3):
        others = [other for other in range(3) if other != number]
        design = np.moveaxis(centred[:, others], 1, 2).reshape(-1, 2)
        target = centred[:, number].ravel()
        rest = target - design @ np.linalg.lstsq(design, target, rcond=None)[0]
        np.testing.assert_allclose(found.arrays[:, number].ravel(), rest / rest.std(), atol=1e-10)
        share = found.table["residual"][number]
        assert share == pytest.approx((rest**2).sum() / (target**2).sum(), rel=1e-10)
    np.testing.assert_allclose(found.arrays.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(found.arrays.mean(axis=2), 0, atol=1e-12)


def test_sources_count_alike_however_many_items_they_have():
    maps = drawn(22)
    # item 0 is there three times, as three items of one source
    thrice = np.concatenate([maps, maps[:1], maps[:1]])
    names = pl.DataFrame({"source_id": [f"s{number:02}" for number in [*range(22), 0, 0]], "item": range(24)})
    once, repeated = (
        residual_maps(table(maps, "abc"), sources(22)),
        residual_maps(table(thrice, "abc"), sources_of(names)),
    )
    order = sources_of(names).items
    np.testing.assert_allclose(repeated.arrays[order.index(0)], once.arrays[sources(22).items.index(0)], rtol=1e-9)


def test_of_two_features_that_say_the_same_the_preferred_stays():
    maps = drawn(features=2)
    same = np.stack([maps[:, 0], 1 - 2 * maps[:, 0], maps[:, 1]], axis=1)
    found = residual_maps(table(same, ("part ground", "luminance", "zebra")), sources(24))
    assert found.names == ["luminance", "zebra"]
    lost = found.table.filter(~pl.col("kept"))
    assert lost["feature"].to_list() == ["part ground"]
    assert lost["reason"].to_list() == ["other features say the same"]


@pytest.mark.parametrize(
    ("resolved", "grid", "kept"), [(0.2, (2, 3), 0), (0.3, (2, 3), 3), (0.2, (16, 16), 3), (None, (2, 3), 0)]
)
def test_small_grids_show_what_they_resolve(resolved, grid, kept):
    maps = drawn(tokens=grid[0] * grid[1])
    found = residual_maps(table(maps, "abc", resolved, grid), sources(24))
    assert len(found.names) == kept
    if not kept:
        assert found.table["reason"][0] == f"the grid resolves {100 * (resolved or 0):.0f} % of its variance"


def test_an_item_that_has_none_of_a_feature_has_zeros_and_no_part_in_the_others():
    maps = drawn(30)
    maps[20:, 2] = 1.5
    found = residual_maps(table(maps, "abc"), sources(30))
    assert found.table["with_sources"].to_list() == [30, 30, 20]
    np.testing.assert_array_equal(found.arrays[20:, 2], 0)
    # standardised over those that have it, and 30 sources / 20 that have it
    assert (found.arrays[:20, 2] ** 2).mean() == pytest.approx(1.5**2)
    assert (found.own[:20, 2] ** 2).mean() == pytest.approx(1.5**2)
    assert (found.arrays[:, 0] ** 2).mean() == pytest.approx(1)
    assert found.having == {"a": 30, "b": 30, "c": 20}
    # position, too, is that of those that have it
    np.testing.assert_allclose(found.arrays[:20, 2].mean(axis=0), 0, atol=1e-12)


def test_too_few_sources_with_a_feature_leave_it_out():
    maps = drawn(30)
    maps[19:, 2] = 0
    found = residual_maps(table(maps, "abc"), sources(30))
    assert found.names == ["a", "b"]
    assert found.table["reason"][2] == "19 sources have it"


def test_what_every_item_shows_alike_is_left_out():
    maps = drawn()
    maps[:, 2] = np.arange(6)
    found = residual_maps(table(maps, "abc"), sources(24))
    assert found.table["reason"][2] == "it is the same in every item"


@pytest.mark.parametrize("wrong", [np.nan, np.inf, "missing"])
def test_a_missing_map_and_one_that_isnt_finite_void_the_feature_alone(wrong):
    maps = drawn()
    rows = table(maps, "abc")
    if wrong == "missing":
        rows = rows.filter(~((pl.col("item") == 3) & (pl.col("feature") == "b")))
    else:
        maps[3, 1, 2] = wrong
        rows = table(maps, "abc")
    found = residual_maps(rows, sources(24))
    assert found.names == ["a", "c"]
    assert found.table["reason"][1] == "void: 1 maps are missing or hold numbers that aren't finite"
    assert found.table["void"].to_list() == [0, 1, 0]
    assert np.isfinite(found.arrays).all()
