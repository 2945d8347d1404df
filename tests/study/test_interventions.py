"""Heads removed alone, together, more and more of them, by degrees, and the error of the mean fill: against numpy."""

import numpy as np
import polars as pl
import pytest

from headscope.study import analyse, analyse_sweep
from headscope.study.ablation import effects, ranked_heads, select_heads
from headscope.study.curves import LEAST, MOST, RANDOM, curve_losses, curve_sets, dose_name, dose_of, step_of
from headscope.study.edits import Edited, edits_of, head_name, heads_in, losses
from headscope.study.fill_error import fill_errors, without_bias, without_folds
from headscope.study.interventions import curve_effects, dose_effects, effects_by_timestep, joint_effects
from study import simulated

SITES = {"a": 2, "b": 2, "c": 1}
STEPS, DRAWS, SOURCES = (100, 500), 2, 24
EVERY = [(site, head) for site, count in SITES.items() for head in range(count)]


@pytest.fixture(scope="module", autouse=True)
def quick():
    with simulated.fewer_draws(499):
        yield


def chosen(name, sites=(), heads=(), **fields):
    return {"name": name, "sites": list(sites), "heads": [list(head) for head in heads]} | fields


def paired(edit, effect, *, kind="head", group="g", fill="mean", split="confirm", seed=0, draws=DRAWS):
    """Losses of an edit: clean ones that all edits share, edited = clean + effect [sources, draws, steps] * clean."""
    clean = np.random.default_rng([seed, len(group)]).lognormal(0, 0.4, (SOURCES, draws, len(STEPS)))
    edited = clean * (1 + np.broadcast_to(effect, clean.shape))
    source, draw, step = (part.ravel() for part in np.indices(clean.shape))
    return pl.DataFrame(
        {
            "kind": kind,
            "edit": edit,
            "group": group,
            "split": split,
            "source_id": [f"{group}{number}" for number in source],
            "item": source,
            "replicate": draw,
            "timestep": np.take(STEPS, step),
            "fill": fill,
            "clean": clean.ravel(),
            "edited": edited.ravel(),
        }
    )


def degradation(table):
    """Sum of changes over sum of clean losses at each timestep, then the mean: every source has as many rows."""
    steps = table.partition_by("timestep")
    return np.mean([((t["edited"] - t["clean"]).sum()) / t["clean"].sum() for t in steps])


def test_the_kind_of_an_edit_is_told_from_its_heads():
    sets = [
        chosen("whole", ["a"]),
        chosen("by heads", heads=[("a", 1), ("a", 0)]),
        chosen("two sites", ["a", "b"]),
        chosen("everything", ["*"]),
        chosen("pair", heads=[("a", 0), ("b", 0)]),
        chosen("one", heads=[("a", 0)]),
        chosen("half", ["a"], keep=0.5),
        chosen("removed", ["a"], keep=0.0),
        chosen("warm", ["a"], keep=None, temperature=2.0, key_bias=[], key_scale=[]),
        chosen("warm and removed", ["a"], keep=0.0, temperature=2.0),
    ]
    found = edits_of(sets, SITES)
    assert [(edit.name, edit.kind) for edit in found[: len(EVERY)]] == [(head_name(*one), "head") for one in EVERY]
    kinds = {edit.name: edit.kind for edit in found[len(EVERY) :]}
    assert kinds == {
        "whole": "site", "by heads": "site", "two sites": "level", "everything": "all", "pair": "set", "one": "set",
        "half": "dose", "removed": "site", "warm": "other", "warm and removed": "other",
    }  # fmt: skip
    by_name = {edit.name: edit for edit in found}
    assert by_name["half"].gate == 0.5
    assert by_name["warm"].gate == 1.0
    assert by_name["everything"].heads == tuple(EVERY)
    assert edits_of([chosen("site alone", ["x"])], {"x": 3})[-1].kind == "all"
    # of a site that the run doesn't have
    assert edits_of([chosen("foreign", heads=[("y", 0)])], {"x": 3})[-1].kind == "set"


def test_losses_are_one_table():
    heads = simulated.ablations(timesteps=STEPS, heads=1).with_columns(pl.col("site", "fill").cast(pl.Categorical))
    edits = [*heads_in(heads), Edited("pair", "set", (("x", 0), ("x", 1)))]
    sets = heads.filter(pl.col("site") == simulated.SITES[0][0]).drop("site", "head").with_columns(edit=pl.lit("pair"))
    table = losses(edits, heads, sets)
    assert table is not None
    assert len(table) == len(heads) + len(sets)
    assert set(table.filter(kind="set")["edit"]) == {"pair"}
    assert set(table.filter(kind="head")["edit"]) == {f"{site} h0" for site, _ in simulated.SITES}
    assert losses(edits, None, heads.clear()) is None


def test_joint_minus_sum_by_hand():
    """On the same images; of a set whose heads weren't all removed alone nothing is said, a hole makes it void."""
    generator = np.random.default_rng(1)
    shape = SOURCES, DRAWS, len(STEPS)
    alone = {head: generator.normal(0.1, 0.02, shape) for head in EVERY}
    together = alone["a", 0] + alone["a", 1] + 0.5
    table = pl.concat(
        [
            *(paired(head_name(*head), effect) for head, effect in alone.items() if head != ("c", 0)),
            paired("a", together, kind="site"),
            # called as a head is
            paired("a h0", alone["a", 0] + alone["b", 0] - 0.3, kind="set"),
            paired("with c", 1.0, kind="set"),
        ]
    )
    edits = edits_of(
        [chosen("a", ["a"]), chosen("a h0", heads=[("a", 0), ("b", 0)]), chosen("with c", ["c", "b"])], SITES
    )
    found = joint_effects(table, edits)
    assert found is not None
    rows = {row["edit"]: row for row in found.iter_rows(named=True)}
    assert set(rows) == {"a", "a h0"}
    one, two = (degradation(table.filter(edit=head_name("a", number), kind="head")) for number in (0, 1))
    assert rows["a"]["sum"] == pytest.approx(one + two, rel=1e-12)
    assert rows["a"]["joint"] == pytest.approx(degradation(table.filter(edit="a")), rel=1e-12)
    assert rows["a"]["value"] == pytest.approx(0.5, rel=1e-9)
    assert rows["a h0"]["value"] == pytest.approx(-0.3, rel=1e-9)
    assert rows["a"]["heads"] == 2
    assert rows["a"]["sources"] == SOURCES
    assert rows["a"]["p_maxt"] < 0.05
    hole = table.filter(~((pl.col("edit") == "a h1") & (pl.col("item") == 3) & (pl.col("timestep") == 500)))
    void = joint_effects(hole, edits)
    assert void is not None
    assert void.filter(edit="a").select("value", "low", "p_value").row(0) == (None, None, None)
    assert void.filter(edit="a")["void"].item() > 0
    assert void.filter(edit="a h0")["value"].item() == pytest.approx(-0.3, rel=1e-9)
    assert joint_effects(table.filter(kind="head"), edits) is None


def test_additive_heads_have_no_interaction():
    generator = np.random.default_rng(2)
    effects_of = [generator.normal(0.2, 0.1, (SOURCES, DRAWS, len(STEPS))) for _ in range(2)]
    table = pl.concat(
        [paired(f"a h{number}", effect) for number, effect in enumerate(effects_of)]
        + [paired("a", sum(effects_of), kind="site")]
    )
    found = joint_effects(table, edits_of([chosen("a", ["a"])], SITES))
    assert found is not None
    row = found.row(0, named=True)
    assert abs(row["value"]) < 1e-12
    # nothing but what single precision rounds
    assert max(abs(row[name]) for name in ("low", "high")) < 1e-6


def test_curves_remove_what_they_say():
    sets = curve_sets(EVERY, (1, 2, 4, 8), orders=3)
    orders = ("most", "least", "random 1:", "random 2:", "random 3:")
    assert set(sets) == {f"{order} {count}" for order in orders for count in (1, 2, 4)}
    assert sets["most 2"] == tuple(EVERY[:2])
    assert sets["least 2"] == (EVERY[-1], EVERY[-2])
    for number in (1, 2, 3):
        assert sets[f"random {number}: 4"][:2] == sets[f"random {number}: 2"]
        assert len(set(sets[f"random {number}: 4"])) == 4
    assert len({sets[f"random {number}: 4"] for number in (1, 2, 3)}) > 1
    assert curve_sets(EVERY, (1, 2, 4, 8), orders=3) == sets
    assert step_of("most 2") == (MOST, 0, 2)
    assert step_of("least 4") == (LEAST, 0, 4)
    assert step_of("random 3: 4") == (RANDOM, 3, 4)
    assert step_of("almost 2") is None
    assert dose_of(dose_name("all heads", 0.25)) == ("all heads", 0.25)
    assert dose_of("all heads") is None


def test_the_random_curve_is_the_mean_over_orders_image_by_image():
    generator = np.random.default_rng(3)
    shape = SOURCES, DRAWS, len(STEPS)
    table = pl.concat(
        [paired(f"random {number}: 2", generator.normal(0.1 * number, 0.05, shape), kind="set") for number in (1, 2, 3)]
        + [paired("most 2", 0.7, kind="set"), paired("other", 9.0, kind="set")]
    )
    found = curve_effects(table)
    assert found is not None
    rows = {(row["order"], row["number"]): row for row in found.iter_rows(named=True)}
    assert set(rows) == {(MOST, 0), *((RANDOM, number) for number in range(4))}
    each = [degradation(table.filter(edit=f"random {number}: 2")) for number in (1, 2, 3)]
    assert [rows[RANDOM, number]["value"] for number in (1, 2, 3)] == pytest.approx(each, rel=1e-12)
    assert rows[RANDOM, 0]["value"] == pytest.approx(np.mean(each), rel=1e-12)
    assert rows[MOST, 0]["value"] == pytest.approx(0.7, rel=1e-9)
    # a loss that isn't there in one order leaves no mean there
    lost = pl.when((pl.col("edit") == "random 2: 2") & (pl.col("item") == 0)).then(None).otherwise(pl.col("edited"))
    assert curve_losses(table.with_columns(edited=lost)).filter(number=0, order=RANDOM)["edited"].is_nan().sum() == 4
    assert curve_effects(table.filter(edit="other")) is None


def test_doses_are_read_by_gate():
    table = pl.concat([paired(dose_name("some", gate), 1 - gate, kind="dose") for gate in (0.0, 0.5, 1.5)])
    found = dose_effects(table)
    assert found is not None
    assert found.select("edit", "gate").rows() == [("some", 0.0), ("some", 0.5), ("some", 1.5)]
    assert found["value"].to_list() == pytest.approx([1.0, 0.5, -0.5], rel=1e-9)


@pytest.fixture(scope="module")
def folded():
    """A degradation 2 e + 3 e^2 by a fill that is off by e, the folds off by errors that average to e."""
    errors = np.array([0.04, -0.02, 0.03, -0.01])
    errors = errors - errors.mean() + 0.004
    harm = lambda error: 0.1 + 2 * error + 3 * error**2  # noqa: E731
    tables = [paired("a h0", harm(errors.mean()))]
    tables += [
        paired("a h0", harm(error), fill=f"mean {number + 1}/4").filter(pl.col("replicate") == 0)
        for number, error in enumerate(errors)
    ]
    return pl.concat([*tables, paired("a h0", 0.5, fill="zero")]), errors


def test_the_bias_of_the_mean_fill_is_that_of_its_square(folded):
    table, errors = folded
    assert set(without_folds(table)["fill"]) == {"mean", "zero"}
    corrected = without_bias(table)
    bias = 3 * (np.mean(errors**2) - errors.mean() ** 2) / 3
    assert corrected.filter(fill="mean")["fill_bias"].to_list() == pytest.approx(
        [bias] * (SOURCES * DRAWS * 2), rel=1e-9
    )
    assert corrected.filter(fill="zero")["fill_bias"].is_null().all()
    found = {row["fill"]: row for row in effects(table).iter_rows(named=True)}
    whole = 0.1 + 2 * errors.mean() + 3 * errors.mean() ** 2
    assert found["mean"]["value"] == pytest.approx(whole - bias, rel=1e-9)
    assert found["mean"]["fill_bias"] == pytest.approx(bias, rel=1e-9)
    assert found["zero"]["value"] == pytest.approx(0.5, rel=1e-9)
    # the folds aren't fills of their own
    assert set(found) == {"mean", "zero"}


def test_the_error_of_the_mean_fill_widens_its_interval(folded):
    table, errors = folded
    by_fold = 0.1 + 2 * errors + 3 * errors**2
    expected = by_fold.std(ddof=1) / 2
    row = fill_errors(table).row(0, named=True)  # type: ignore[union-attr]
    assert row["added_relative"] == pytest.approx(expected, rel=1e-9)
    assert row["added_freedom"] == 3
    found = effects(table).filter(fill="mean").row(0, named=True)
    assert found["fill_error"] == pytest.approx(expected, rel=1e-9)
    # all images lose the same share: the reference images are all that is uncertain, t of 3 degrees of freedom
    assert (found["high"] - found["low"]) / 2 == pytest.approx(3.182446 * expected, rel=1e-4)
    assert fill_errors(without_folds(table)) is None
    alone = effects(without_folds(table)).filter(fill="mean").row(0, named=True)
    assert alone["fill_error"] is None
    assert alone["fill_bias"] is None
    # but for the rounding of single precision
    assert (alone["high"] - alone["low"]) / 2 == pytest.approx(1.96 * 5e-7, rel=1e-3)


def test_what_single_precision_rounds_is_no_effect():
    """Joint minus sum of heads that add, where every image's losses are rounded to one side."""
    generator = np.random.default_rng(5)
    one, two = generator.normal(0.1, 0.03, (2, SOURCES, 1, 1))
    rounded = 1e-8 * (1 + generator.random((SOURCES, 1, 1)))
    rows = [paired("a h0", one), paired("a h1", two), paired("both", one + two + rounded, kind="site")]
    rows.append(paired("b h0", rounded))
    edits = [Edited("both", "site", (("a", 0), ("a", 1)))]
    joint = joint_effects(pl.concat(rows), edits)
    assert joint is not None
    alone = effects(pl.concat(rows)).filter(edit="b h0")
    at = effects_by_timestep(pl.concat(rows)).filter(edit="b h0")
    for row in (*joint.iter_rows(named=True), *alone.iter_rows(named=True), *at.iter_rows(named=True)):
        assert row["value"] == pytest.approx(1.5e-8, rel=0.3)
        assert row["p_value"] > 0.9
        assert row["p_maxt"] > 0.9
        assert row["low"] < 0 < row["high"]
        assert row["fill_error"] is None


def test_the_error_of_the_mean_fill_is_in_every_timestep(folded):
    """An effect of nothing but the fill's error isn't told from 0 at any timestep, with all images alike."""
    table, errors = folded
    by_fold = 0.1 + 2 * errors + 3 * errors**2
    found = effects_by_timestep(table)
    assert found["fill_error"].to_list() == pytest.approx([by_fold.std(ddof=1) / 2] * 2, rel=1e-9)
    half = (found["high"] - found["low"]) / 2
    assert half.to_list() == pytest.approx([3.182446 * by_fold.std(ddof=1) / 2] * 2, rel=1e-4)
    overall = effects(table).filter(fill="mean")["value"].item()
    assert found["value"].mean() == pytest.approx(overall, rel=1e-12)
    shift = 0.1 - overall + 0.001
    clean = pl.col("clean")
    none = table.with_columns(edited=pl.col("edited") + clean * (shift - 0.1))
    found = effects_by_timestep(none)
    assert found["value"].to_list() == pytest.approx([0.001] * 2, rel=1e-6)
    assert (found["p_maxt"] > 0.05).all()
    assert ((found["low"] < 0) & (found["high"] > 0)).all()
    assert effects_by_timestep(without_folds(table))["fill_error"].is_null().all()


def test_folds_are_no_fills_of_a_plain_sweep(folded):
    table, _ = folded
    heads = table.with_columns(site=pl.lit("a"), head=0, distance=0.1).drop("kind", "edit")
    result = analyse_sweep(ablations=heads)
    assert result.ablation_ranking is not None
    assert result.ablation_timesteps is not None
    assert result.ablation_ranking["fill"].to_list() == ["mean", "zero"]
    assert set(result.ablation_timesteps["fill"]) == {"mean", "zero"}
    (distance,) = result.further
    assert set(distance.values["fill"]) == {"mean", "zero"}


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_a_fold_that_diverges_makes_its_edit_void_and_no_other(folded, value):
    """A mean would leave out null; the error of a fill that isn't known isn't 0."""
    table, _ = folded
    table = pl.concat([table, table.with_columns(edit=pl.lit("a h1"))])
    one = (pl.col("edit") == "a h0") & (pl.col("fill") == "mean 2/4") & (pl.col("item") == 3)
    broken = table.with_columns(edited=pl.when(one).then(pl.lit(value)).otherwise("edited"))
    absent = table.filter(~(one & (pl.col("timestep") == STEPS[0])))
    for lacking, steps in ((broken, 2), (absent, 1)):
        rows = {row["edit"]: row for row in effects(lacking).filter(fill="mean").iter_rows(named=True)}
        assert [rows["a h0"][name] for name in ("value", "low", "high", "p_value", "p_maxt")] == [None] * 5
        assert rows["a h0"]["void"] == SOURCES * DRAWS * steps
        for name in ("value", "low", "high", "fill_error", "fill_bias"):
            assert rows["a h1"][name] == pytest.approx(effects(table).filter(fill="mean")[name][0], rel=1e-9)
        at = effects_by_timestep(lacking).filter(edit="a h0")
        assert at["value"].is_null().sum() == steps


def test_a_random_order_that_lacks_an_image_makes_the_mean_void():
    table = pl.concat(
        [paired(f"random {number}: 2", 0.1 * number, kind="set", split="confirm") for number in (1, 2, 3)]
    )
    lacking = table.filter(~((pl.col("edit") == "random 2: 2") & (pl.col("item") == 4)))
    found = curve_effects(lacking)
    assert found is not None
    values = dict(found.select("number", "value").iter_rows())
    assert (values[0], values[2]) == (None, None)
    assert values[1] == pytest.approx(0.1, rel=1e-9)
    whole = curve_effects(table)
    assert whole is not None
    assert whole.filter(number=0)["value"].item() == pytest.approx(0.2, rel=1e-9)


def test_sets_of_another_split_have_no_part_in_what_is_tested():
    """Selected on discover, a set's losses there would make its effect too large."""
    confirm, discover = paired("some", 0.1, kind="set"), paired("some", 0.9, kind="set", split="discover")
    both = pl.concat([confirm, discover]).drop("kind")
    found = analyse(None, confirm_sets=both, discover_sets=both, edits=[Edited("some", "set", (("a", 0), ("b", 0)))])
    assert found.interventions is not None
    row = found.interventions.effects.row(0, named=True)
    assert row["value"] == pytest.approx(0.1, rel=1e-9)
    assert row["discover"] == pytest.approx(0.9, rel=1e-9)
    assert row["sources"] == SOURCES


def test_selection_is_two_sided_and_ranking_is_not():
    table = pl.concat(
        [
            paired(f"h{number}", effect, split="discover").with_columns(site=pl.lit("a"), head=number)
            for number, effect in enumerate((0.1, -0.5, 0.3, 0.0))
        ]
    )
    assert select_heads(table, 2) == [("a", 1), ("a", 2)]
    assert ranked_heads(table, "g") == [("a", 2), ("a", 0), ("a", 3), ("a", 1)]
    other = table.with_columns(group=pl.lit("h"), edited=pl.when(pl.col("head") == 2).then("edited").otherwise("clean"))
    assert ranked_heads(pl.concat([table, other]), "g", beyond="h")[0] == ("a", 0)


def test_a_diverging_edit_is_void_and_counted():
    table = pl.concat([paired("a h0", 0.1), paired("a h1", 0.2)])
    diverged = pl.when((pl.col("edit") == "a h0") & (pl.col("item") == 2)).then(np.inf).otherwise(pl.col("edited"))
    rows = {row["edit"]: row for row in effects(table.with_columns(edited=diverged)).iter_rows(named=True)}
    assert [rows["a h0"][name] for name in ("value", "low", "high", "p_value", "p_maxt")] == [None] * 5
    assert rows["a h0"]["void"] == DRAWS * len(STEPS)
    assert rows["a h1"]["value"] == pytest.approx(0.2, rel=1e-9)
    assert rows["a h1"]["void"] == 0
