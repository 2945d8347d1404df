"""Circuits on the confirm split: their numbers against closed forms, pairs of every kind named, what has to be void."""

from itertools import combinations
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy.stats import hypergeom

import headscope
from headscope.study.circuits import analyse_circuits, circuit_of, confirm_sets
from headscope.study.circuits.analysis import overlap_table
from headscope.study.circuits.sets import EVERY, planned_sets
from headscope.study.inference import settings, shares, smooth
from headscope.study.inference.intervals import infer
from headscope.sweep.compute.kinds.circuits import _table
from headscope.sweep.compute.search import search
from headscope.zoo.planted import load_planted

# (site, head) by what the head does
HEADS = {
    "large": ("one", 0), "small": ("one", 1), "either_1": ("one", 2), "duplicate_1": ("one", 3), "both_1": ("one", 4),
    "dead_1": ("two", 0), "either_2": ("two", 1), "duplicate_2": ("two", 2), "both_2": ("two", 3), "dead_2": ("two", 4),
}  # fmt: skip
NAMES = list(HEADS)
TIMESTEPS = (100, 500)
SOURCES = 24


def damage(removed) -> float:
    """What removing heads of these names costs, as a fraction of the clean loss."""
    gone = set(removed)
    duplicates = len(gone & {"duplicate_1", "duplicate_2"})
    return (
        0.30 * ("large" in gone)
        + 0.05 * ("small" in gone)
        + 0.20 * (gone >= {"either_1", "either_2"})
        + 0.04 * duplicates**2
        + 0.15 * bool(gone & {"both_1", "both_2"})
    )


def names_of(heads):
    known = {head: name for name, head in HEADS.items()}
    return [known[head] for head in heads]


def analysed(*args, **options) -> Any:
    """Of whose tables those that are looked at are there."""
    return analyse_circuits(*args, **options)


def trace_of(group="faces", target=0.999):
    def costs(removed):
        found = [damage(NAMES[place] for place in heads) for heads in removed]
        return np.array([(cost, cost) for cost in found])

    count = len(NAMES)
    alone = [damage([name]) for name in NAMES]
    order = np.argsort(-np.array(alone), kind="stable").tolist()
    orders = {"attribution": order, "integrated": order, "magnitude": order[::-1], "random 1": list(range(count))}
    every = frozenset(range(count))
    steps = search(count, orders, costs, 0, target)
    # in the order of execution, as the heads of a model are
    return pl.from_arrow(_table(group, "mean", steps, list(HEADS.values()), costs([every])[0]))


def removed_on(sets, group="faces", seed=0, distance=False):
    """A table set_ablations: every source's own clean loss, and damage that is larger for some sources."""
    generator = np.random.default_rng(seed)
    rows = []
    for source in range(SOURCES):
        factor = generator.lognormal(0, 0.3)
        for timestep in TIMESTEPS:
            clean = generator.gamma(20, 0.01) * (1 + timestep / 1000)
            for one in sets:
                change = clean * factor * damage(names_of(one.heads))
                rows.append((source, timestep, one.name, clean, clean + change, change * change))
    schema = ["source_id", "timestep", "edit", "clean", "edited", "distance"]
    table = pl.DataFrame(rows, schema=schema, orient="row").with_columns(
        pl.col("source_id").cast(pl.String), item=pl.col("source_id"), group=pl.lit(group), split=pl.lit("confirm"),
        fill=pl.lit("mean"), replicate=0,
    )  # fmt: skip
    return table if distance else table.drop("distance")


@pytest.fixture(scope="module", autouse=True)
def fewer_draws():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "RESAMPLES", 999)
        yield


@pytest.fixture(scope="module")
def trace():
    return trace_of()


@pytest.fixture(scope="module")
def found(trace):
    sets = confirm_sets(trace, "faces", paired=len(NAMES))
    return analysed(removed_on(sets), None, trace, target=0.95)


def test_the_circuit(trace):
    """All that matters, one of the pair of which either suffices, in the order of execution."""
    heads = names_of(circuit_of(trace, "faces"))
    assert len({"either_1", "either_2"} & set(heads)) == 1
    rest = {"large", "small", "duplicate_1", "duplicate_2", "both_1", "both_2"}
    assert set(heads) - {"either_1", "either_2"} == rest
    assert heads == sorted(heads, key=NAMES.index)


def test_sets_of_a_circuit(trace):
    """Names are different, what is removed is what the name says, and the model's heads are all there are."""
    planned = planned_sets(trace, "faces")
    assert len({one.name for one in planned}) == len(planned)
    every, circuit = set(HEADS.values()), set(circuit_of(trace, "faces"))
    for one in planned:
        removed = set(one.removed)
        assert removed <= every
        if one.kind == "empty":
            assert removed == every
        if one.kind in ("circuit", "curve", "complement"):
            assert len(every - removed) == one.size
        if one.kind == "circuit":
            assert every - removed == circuit
        if one.kind == "without":
            assert every - removed == circuit - set(one.part)
            assert set(one.part) <= circuit
        if one.kind in ("part", "pair"):
            assert removed == set(one.part)
    kinds = [one.kind for one in planned]
    assert kinds.count("empty") == kinds.count("circuit") == kinds.count("complement") == 1
    # each alone, and four halves
    assert kinds.count("without") == len(circuit) + 4
    fewer = confirm_sets(trace, "faces", sizes=(), beside=0, halves=0, paired=0)
    assert {one.name for one in fewer} < {one.name for one in planned}


def test_faithfulness_is_the_closed_form(trace, found):
    """The sources' factors cancel, as clean loss and factor are in numerator and denominator alike."""
    planned = {one.name: one for one in planned_sets(trace, "faces", sizes=range(20), beside=20)}
    every = damage(NAMES)
    row = found.faithfulness.row(0, named=True)
    assert (row["set"], row["kind"], row["metric"]) == ("the circuit", "circuit", "loss")
    assert row["value"] == pytest.approx(1.0, abs=1e-12)
    assert row["reaches"] == "clearly"
    assert row["sources"] == SOURCES
    assert not row["exploratory"]
    (rest,) = found.faithfulness.filter(pl.col("kind") == "complement").to_dicts()
    (complement,) = (one for one in planned.values() if one.kind == "complement")
    assert rest["value"] == pytest.approx(1 - damage(names_of(complement.removed)) / every, abs=1e-12)
    assert rest["reaches"] == "no"
    curves = {(one.method, one.size): one for one in planned.values() if one.kind == "curve"}
    assert len(found.curves) > 15
    for row in found.curves.iter_rows(named=True):
        one = curves.get((row["method"], row["size"]))
        expected = 1.0 if one is None else 1 - damage(names_of(one.removed)) / every
        assert row["value"] == pytest.approx(expected, abs=1e-12)


def test_completeness_and_minimality(trace, found):
    circuit, every = set(names_of(circuit_of(trace, "faces"))), damage(NAMES)
    (either,) = circuit & {"either_1", "either_2"}
    without = {name: (damage(set(NAMES) - circuit | {name}) - damage(set(NAMES) - circuit)) / every for name in circuit}
    assert len(found.minimality) == len(circuit)
    for row in found.minimality.iter_rows(named=True):
        (name,) = names_of([(row["site"], row["head"])])
        assert row["value"] == pytest.approx(without[name], abs=1e-12)
        # every head of it is needed
        assert row["p_maxt"] < 0.01
        assert row["needed"]
    parts = {one.part: one for one in planned_sets(trace, "faces") if one.kind == "part"}
    texts = {", ".join(f"{site} h{head}" for site, head in part): set(names_of(part)) for part in parts}
    compared = found.completeness.filter(pl.col("measure") == "circuit − model")
    assert len(compared) == len(circuit) + 4
    for row in compared.iter_rows(named=True):
        part = texts[row["set"]]
        expected = (damage(part) - damage(set(NAMES) - circuit | part)) / every
        assert row["value"] == pytest.approx(expected, abs=1e-12)
        # the other of the pair stands in for it in the whole model
        assert (row["value"] < -0.1) == (either in part)


def test_pairs_are_named(found):
    kinds = {}
    for row in found.pairs.iter_rows(named=True):
        pair = frozenset(names_of([(row["first_site"], row["first_head"]), (row["second_site"], row["second_head"])]))
        kinds[pair] = row["kind"]
        assert row["joint"] - row["sum"] == pytest.approx(row["value"], abs=1e-12)
    expected = {
        frozenset({"either_1", "either_2"}): "either suffices",
        frozenset({"duplicate_1", "duplicate_2"}): "duplicate",
        frozenset({"both_1", "both_2"}): "both are needed",
    }
    assert {pair: kind for pair, kind in kinds.items() if pair in expected} == expected
    assert {kind for pair, kind in kinds.items() if pair not in expected} == {"independent"}
    # every two heads of the circuit, and the one that stands in
    assert len(kinds) == 7 * 6 // 2 + 1


def test_sets_beside_the_circuit_hold_one_another():
    """The smallest of them that reaches a target on confirm is marked, whatever the search chose."""
    trace = trace_of(target=0.6)
    planned = planned_sets(trace, "faces")
    every = set(HEADS.values())
    kept = {one.size: every - set(one.removed) for one in planned if one.kind == "circuit" or one.method == "greedy"}
    circuit = set(circuit_of(trace, "faces"))
    sizes = sorted(kept)
    assert sizes == list(range(sizes[0], len(circuit) + 4))
    assert sizes[0] < len(circuit)
    for size in sizes[1:]:
        assert kept[size - 1] < kept[size]
    rows = removed_on(confirm_sets(trace, "faces"))
    for target in (0.5, 0.6, 0.8, 2.0):
        table = analysed(rows, None, trace, target=target).faithfulness
        reached = [size for size in sizes if 1 - damage(names_of(every - kept[size])) / damage(NAMES) >= target]
        assert table.filter("smallest")["size"].to_list() == reached[:1]


def test_few_sources_decide_nothing(trace):
    sets = confirm_sets(trace, "faces")
    rows = removed_on(sets).filter(pl.col("source_id").cast(pl.Int64) < 12)
    found = analysed(rows, None, trace)
    assert set(found.pairs["kind"]) == {"undecided"}
    assert found.faithfulness["exploratory"].all()
    assert found.minimality["p_maxt"].null_count() == len(found.minimality)
    assert not found.minimality["needed"].any()


def test_what_is_missing_is_void(trace):
    sets = confirm_sets(trace, "faces")
    rows = removed_on(sets)
    (circuit,) = (one.name for one in sets if one.name == "all but the circuit of faces")
    gone = (pl.col("edit") == circuit) & (pl.col("source_id") == "3") & (pl.col("timestep") == 100)
    found = analysed(rows.filter(~gone), None, trace)
    row = found.faithfulness.filter(pl.col("kind") == "circuit").row(0, named=True)
    assert row["value"] is None
    assert row["low"] is None
    assert row["void"] == 1
    # what the head's loss is measured by
    assert (found.minimality["void"] == 1).all()
    # others are whole
    assert found.curves.filter(pl.col("method") == "magnitude")["void"].to_list() == [0] * 4
    broken = rows.with_columns(edited=pl.when(gone).then(float("inf")).otherwise("edited"))
    again = analysed(broken, None, trace)
    assert again.faithfulness.filter(pl.col("kind") == "circuit")["void"].to_list() == [1]
    with pytest.raises(ValueError, match="set_ablations: got sets of 'faces' without 'every head', expected those of"):
        analysed(rows.filter(pl.col("edit") != EVERY), None, trace)
    # another group's rows, another split's and another fill's are none of this circuit's
    for column in ("group", "split", "fill"):
        assert analysed(rows.with_columns(pl.lit("other").alias(column)), None, trace).faithfulness is None


def test_a_circuit_of_nothing_is_refused(trace):
    """On confirm removing everything helps as often as it harms: no number is given."""
    rows = removed_on(confirm_sets(trace, "faces"))
    sign = pl.when(pl.col("item") % 2 == 0).then(1).otherwise(-1)
    rows = rows.with_columns(edited=pl.col("clean") + sign * (pl.col("edited") - pl.col("clean")))
    found = analysed(rows, None, trace)
    for table in (found.faithfulness, found.curves, found.minimality, found.completeness):
        assert table["value"].null_count() == len(table)
        assert (table["void"] == 0).all()
    assert found.refused.rows() == [("faces", "removing all heads does not clearly cost anything on the confirm split")]


def test_a_circuit_of_every_head_is_no_circuit():
    """Where nothing smaller is enough there is nothing to remove, and nothing to say."""
    steps = search(4, {"attribution": [0, 1, 2, 3], "integrated": [0, 1, 2, 3]}, _each_counts, 0, 0.9)
    heads = [("one", 0), ("one", 1), ("two", 0), ("two", 1)]
    trace = pl.from_arrow(_table("faces", "mean", steps, heads, _each_counts([frozenset(range(4))])[0]))
    assert circuit_of(trace, "faces") == heads
    assert confirm_sets(trace, "faces") == []
    found = analysed(None, None, trace)
    assert found.faithfulness is None
    assert found.refused.rows() == [("faces", "no smaller set of heads than all of them is enough on discover")]


def _each_counts(removed):
    return np.array([(len(heads) / 4, len(heads) / 4) for heads in removed])


def test_heads_that_are_better_gone_do_not_suffice(trace):
    """Removing either, or both, helps as much: above the sum of the two, and nothing that one suffices for."""
    sets = confirm_sets(trace, "faces", paired=len(NAMES))
    rows = removed_on(sets)
    pair = {HEADS["either_1"], HEADS["either_2"]}
    helped = [one.name for one in sets if set(one.heads) <= pair and one.heads]
    change = pl.when(pl.col("edit").is_in(helped)).then(-0.2 * pl.col("clean"))
    rows = rows.with_columns(edited=pl.col("clean") + change.otherwise(pl.col("edited") - pl.col("clean")))
    found = analysed(rows, None, trace).pairs
    kinds = {
        frozenset({(row["first_site"], row["first_head"]), (row["second_site"], row["second_head"])}): row["kind"]
        for row in found.iter_rows(named=True)
    }
    assert kinds[frozenset(pair)] == "redundant"


def test_by_the_prediction(trace):
    sets = confirm_sets(trace, "faces")
    rows = removed_on(sets, distance=True)
    found = analysed(rows, None, trace)
    both = found.faithfulness.filter(pl.col("set") == "all but the circuit")
    assert both["metric"].to_list() == ["loss", "prediction"]
    assert both["kind"].to_list() == ["complement", "complement, by prediction"]
    means = rows.group_by("edit", "timestep").agg(pl.col("distance").sum() / pl.col("clean").sum())
    means = dict(means.group_by("edit").agg(pl.col("distance").mean()).iter_rows())
    expected = 1 - means["the circuit of faces"] / means[EVERY]
    assert both["value"][1] == pytest.approx(expected, rel=1e-12)


def test_edges_and_a_group_without_its_sets(trace):
    """Edges of every head; one changes the loss, the others don't."""
    sets = confirm_sets(trace, "faces", paired=0)
    rows = removed_on(sets[:1])
    edges = []
    for part, change in (("q", 0.0), ("k", 0.02), ("v", 0.0)):
        edges.append(rows.with_columns(part=pl.lit(part), edited=pl.col("clean") * (1 + change)))
    edges.append(rows.with_columns(part=pl.lit("output")))
    receiver = pl.when(pl.col("part") != "output")
    paths = pl.concat(edges).with_columns(
        sender_site=pl.lit("one"), sender_head=pl.lit(0), receiver_site=receiver.then(pl.lit("two")),
        receiver_head=receiver.then(pl.lit(3)),
    )  # fmt: skip
    found = analysed(None, paths.drop("edit"), trace)
    assert found.faithfulness is None
    table = {row["part"]: row for row in found.edges.iter_rows(named=True)}
    assert table["k"]["value"] == pytest.approx(0.02, abs=1e-12)
    assert table["k"]["p_maxt"] < 0.01
    assert table["q"]["value"] == 0
    assert table["q"]["p_maxt"] > 0.5
    assert table["output"]["receiver_site"] is None
    assert table["output"]["value"] > 0.3


def test_overlap_is_what_chance_gives():
    trace = pl.concat([trace_of("faces", 0.999), trace_of("lfw", 0.5)])
    table = overlap_table(trace, ["faces", "lfw"])
    one, two = set(circuit_of(trace, "faces")), set(circuit_of(trace, "lfw"))
    assert table is not None
    (row,) = table.to_dicts()
    assert (row["first"], row["second"], row["shared"]) == ("faces", "lfw", len(one & two))
    assert row["jaccard"] == pytest.approx(len(one & two) / len(one | two))
    # every set of the second's size
    drawn = [set(chosen) for chosen in combinations(HEADS.values(), len(two))]
    assert row["expected"] == pytest.approx(np.mean([len(one & other) / len(one | other) for other in drawn]))
    assert row["p_value"] == pytest.approx(np.mean([len(one & other) >= len(one & two) for other in drawn]))
    assert row["expected_shared"] == pytest.approx(hypergeom(10, len(one), len(two)).mean())
    assert overlap_table(trace, ["faces"]) is None


# one degradation by another


def test_the_slope_of_a_share():
    generator = np.random.default_rng(0)
    means = generator.uniform(0.5, 1.5, (9, 1, 4))
    value, (slopes,) = smooth.share(means)
    part, whole, clean = means[:3, 0], means[3:6, 0], means[6:, 0]
    np.testing.assert_allclose(value[0], (part / clean).mean(0) / (whole / clean).mean(0), rtol=1e-14)
    for column in range(9):
        step = np.zeros((9, 1, 1))
        step[column] = 1e-6
        (above, _), (below, _) = smooth.share(means + step), smooth.share(means - step)
        np.testing.assert_allclose(slopes[column], (above - below) / 2e-6, rtol=1e-6)


def test_there_is_no_share_of_next_to_nothing():
    generator = np.random.default_rng(1)
    count = 24
    rows = pl.DataFrame(
        {
            "source_id": [str(number) for number in range(count)] * 2,
            "edit": ["clear"] * count + ["unclear"] * count,
            "clean": generator.uniform(0.9, 1.1, 2 * count),
            "part": generator.normal(0.1, 0.1, 2 * count),
            "whole": np.concatenate([generator.normal(1, 0.1, count), generator.normal(0, 1, count)]),
        }
    )
    table = {row["edit"]: row for row in shares(rows, ["edit"], test=True, family=True).iter_rows(named=True)}
    assert table["clear"]["value"] == pytest.approx(0.1, abs=0.1)
    assert table["clear"]["low"] < table["clear"]["value"] < table["clear"]["high"]
    for name in ("value", "low", "high", "p_value", "p_maxt", "standard_error"):
        assert table["unclear"][name] is None
    assert table["unclear"]["void"] == 0


@pytest.mark.full
def test_shares_cover():
    """Skewed damage, shared between timesteps: intervals hold the truth, a difference of 0 is rarely found."""
    generator = np.random.default_rng(1)

    def drawn(sources, trials, skew=0.6):
        def noise(*shape):
            return np.exp(skew * generator.normal(size=shape) - skew**2 / 2)

        clean = np.array([0.02, 0.1, 0.4])[:, None, None] * generator.gamma(4, 0.25, (3, sources, trials))
        whole = np.array([0.3, 0.8, 0.5])[:, None, None] * clean * noise(3, sources, trials)
        part = 0.1 * noise(1, sources, trials) * whole + 0.02 * clean * generator.normal(size=clean.shape)
        return part, whole, clean

    part, whole, clean = drawn(300_000, 1)
    truth = (part.mean(1) / clean.mean(1)).mean(0) / (whole.mean(1) / clean.mean(1)).mean(0)
    for sources in (20, 40):
        part, whole, clean = drawn(sources, 600)
        found = infer([np.concatenate([part, whole, clean])], smooth.share, seed=3)
        covered = ((found.low <= truth) & (truth <= found.high)).mean()
        # five standard errors of 600 trials below 95 %
        assert covered >= 0.95 - 5 * np.sqrt(0.05 * 0.95 / 600)
        nothing = 0.05 * clean * generator.normal(size=clean.shape)
        found = infer([np.concatenate([nothing, whole, clean])], smooth.share, seed=3)
        assert (found.p_value < 0.05).mean() <= 0.05 + 4 * np.sqrt(0.05 * 0.95 / 600)


@pytest.mark.full
def test_a_planted_model_from_search_to_pairs(tmp_path):
    """`pairs` on 40 sources: the circuit is whole on confirm, every head of it needed, and the pairs are what they
    are."""
    pipeline = load_planted("pairs")
    truth = pipeline.unet.truth
    names = {head.key: head.name for head in truth.heads}
    asked = {"groups": ("twins",), "timesteps": (132,), "fills": ("zero",), "observe": False, "progress": False}
    searched = headscope.sweep(
        tmp_path / "search", model=pipeline, splits=("discover",), items=6, scores=(), kinds=("circuits",),
        faithfulness=1 - 1e-6, circuit_metric="prediction", **asked,
    )  # fmt: skip
    trace = searched.table("circuits").collect()
    sets = tuple(confirm_sets(trace, "twins", paired=7))
    tested = headscope.sweep(
        tmp_path / "confirm", model=pipeline, splits=("confirm",), items=40, scores=("loss", "distance"), heads=(),
        sets=sets, **asked,
    )  # fmt: skip
    found = analysed(tested.table("set_ablations").collect(), None, trace)
    whole = found.faithfulness.filter(pl.col("set") == "the circuit")
    np.testing.assert_allclose(whole["value"], [1.0, 1.0], rtol=0, atol=1e-6)
    assert found.minimality["needed"].all()
    for row in found.pairs.iter_rows(named=True):
        heads = {(row["first_site"], row["first_head"]), (row["second_site"], row["second_head"])}
        kinds = [pair.kind for pair in truth.pairs if set(pair.heads) == heads]
        assert row["kind"] == (kinds[0] if kinds else "independent"), {names[head] for head in heads}
