"""Circuits: the search against every set there is, and against planted models whose smallest circuits are known."""

import itertools
import math

import numpy as np
import polars as pl
import pytest

import headscope
from headscope import Task
from headscope.demonstration import report_sweep
from headscope.study.circuits import analyse_circuits, circuit_of, confirm_sets
from headscope.study.circuits.trace import every_head, states_of
from headscope.sweep import HeadSet, SweepConfig
from headscope.sweep.compute.search import GREEDY, REPLACE, search
from headscope.sweep.plan.items import open_items
from headscope.zoo.planted import load_planted

# keeps every prediction, but for the rounding of float32
WHOLE = 1 - 1e-6
TIMESTEP = 132


@pytest.fixture(scope="module")
def pipelines():
    return {name: load_planted(name) for name in ("roles", "pairs", "gated", "all")}


def swept(pipeline, out, group="twins", **fields):
    """A search's table, with plain strings."""
    asked = {"items": 4, "timesteps": (TIMESTEP,), "fills": ("zero",), "scores": (), "kinds": ("circuits",), **fields}
    if {"mean", "resample"} & set(asked["fills"]):
        asked["reference_items"] = 16
    asked = {"groups": (group,), "splits": ("discover",), "observe": False, **asked}
    run = headscope.sweep(out, model=pipeline, progress=False, **asked)
    return run.table("circuits").with_columns(pl.col(pl.Categorical).cast(pl.String)).collect()


# the search by itself


def toy(heads, seed, either=()):
    """Costs of removing sets: heads add up, of a pair either suffices."""
    worth = np.random.default_rng(seed).exponential(size=heads) + 0.05
    asked = []

    def costs(removed):
        asked.extend(removed)
        found = []
        for gone in removed:
            total = sum(worth[head] for head in gone if head not in either)
            total += sum(worth[head] for head in either) if either and gone.issuperset(either) else 0.0
            found.append((total, 2 * total))
        return np.array(found)

    return worth, costs, asked


def orders_of(worth, heads):
    generator = np.random.default_rng(0)
    return {
        "attribution": np.argsort(-worth, kind="stable").tolist(),
        "integrated": np.argsort(-worth, kind="stable").tolist(),
        "random 1": generator.permutation(heads).tolist(),
    }


def kept_at_last(steps):
    """The circuit by the steps of the greedy search up to the chosen one."""
    kept = set()
    for step in steps:
        if step.method != GREEDY or not step.kept or step.action == REPLACE:
            continue
        if step.head is not None:
            kept = kept - {step.head} if step.action == "prune" else kept | {step.head}
        assert step.size == len(kept)
        if step.chosen:
            return frozenset(kept)
    raise AssertionError("nothing was chosen")


@pytest.mark.parametrize("either", [(), (1, 4)])
@pytest.mark.parametrize("target", [0.5, 0.9, WHOLE])
def test_the_smallest_of_all_sets(either, target):
    """Where effects add up, or one of a pair suffices, no set of fewer heads reaches the target."""
    heads = 9
    for seed in range(6):
        worth, costs, asked = toy(heads, seed, either)
        steps = search(heads, orders_of(worth, heads), costs, 0, target)
        every = frozenset(range(heads))
        (whole, _), *_ = costs([every])
        found = kept_at_last(steps)
        assert 1 - costs([every - found])[0, 0] / whole >= target
        smaller = (
            1 - costs([every - frozenset(kept)])[0, 0] / whole
            for size in range(len(found))
            for kept in itertools.combinations(range(heads), size)
        )
        assert max(smaller) < target
        # nothing was measured twice
        measured = asked[: asked.index(every, 1)]
        assert len(set(measured)) == len(measured)


def test_a_stand_in_is_found():
    worth, costs, _ = toy(6, 3, (0, 5))
    worth[[0, 5]] = 2.0
    orders = {name: [0, 1, 2, 3, 4, 5] for name in ("attribution", "integrated")}
    steps = search(6, orders, costs, 0, 0.9)
    kept = kept_at_last(steps)
    replaced = [step for step in steps if step.action == REPLACE and step.kept]
    assert len({0, 5} & kept) == 1
    assert {(step.head, step.partner) for step in replaced} == {tuple({0, 5} - kept) + tuple({0, 5} & kept)}


def test_what_is_not_finite_is_never_chosen():
    """Removing a certain head gives NaN: it stays."""
    worth, costs, _ = toy(6, 1)

    def broken(removed):
        return np.array(
            [(np.nan, np.nan) if 2 in gone and len(gone) < 6 else tuple(costs([gone])[0]) for gone in removed]
        )

    worth[2] = 0.001
    found = kept_at_last(search(6, orders_of(worth, 6), broken, 0, 0.5))
    assert 2 in found
    every = frozenset(range(6))
    assert 1 - costs([every - found])[0, 0] / costs([every])[0, 0] >= 0.5


def test_a_single_head():
    worth, costs, _ = toy(1, 0)
    assert kept_at_last(search(1, orders_of(worth, 1), costs, 0, 0.9)) == {0}


# planted models


@pytest.mark.parametrize(
    ("name", "fill", "metric"),
    [
        ("pairs", "zero", "prediction"),
        ("gated", "mean", "prediction"),
        pytest.param("pairs", "zero", "loss", marks=pytest.mark.full),
        pytest.param("pairs", "mean", "prediction", marks=pytest.mark.full),
        pytest.param("roles", "mean", "prediction", marks=pytest.mark.full),
        pytest.param("all", "zero", "prediction", marks=pytest.mark.full),
        pytest.param("all", "mean", "prediction", marks=pytest.mark.full),
    ],
)
def test_the_planted_circuit(pipelines, tmp_path, name, fill, metric):
    """What keeps every prediction is one of the smallest circuits of the truth; and so is what keeps the loss where
    every head helps, as those of `pairs` do on `twins`."""
    truth = pipelines[name].unet.truth
    trace = swept(
        pipelines[name], tmp_path / "run", fills=(fill,), faithfulness=WHOLE, circuit_metric=metric, cotangents=2
    )
    found = circuit_of(trace, "twins")
    assert tuple(found) in {tuple(one) for one in truth.circuits(TIMESTEP, fill)}
    # random orders need more: they have to go on until the last head of the circuit
    random = [len(circuit_of(trace, "twins", method=f"random {number}")) for number in range(1, 5)]
    assert min(random) >= len(found)
    if name == "all":
        assert max(random) > len(found)


def test_a_circuit_at_several_timesteps(pipelines, tmp_path):
    """Where either gated head acts at some timestep, both are in it."""
    trace = swept(
        pipelines["gated"], tmp_path / "run", items=2, timesteps=(132, 858), faithfulness=WHOLE,
        circuit_metric="prediction", cotangents=1,
    )  # fmt: skip
    truth = pipelines["gated"].unet.truth
    expected = set(truth.circuits(132)[0]) | set(truth.circuits(858)[0])
    assert len(expected) == 3
    assert set(circuit_of(trace, "twins")) == expected


def test_costs_are_those_of_the_truth(pipelines, tmp_path):
    """Degradation and distance of every measured set, from the float64 truth."""
    pipeline = pipelines["pairs"]
    trace = swept(pipeline, tmp_path / "run", group="faces", items=2, faithfulness=0.9, cotangents=1)
    task = Task.of(pipeline)
    (group,) = open_items(SweepConfig(groups=("faces",), splits=("discover",), items=2), task)
    items = group.swept
    inputs = task.noisy_inputs(task.prepare(items), TIMESTEP)
    truth = pipeline.unet.truth.at(inputs.sample.numpy(), TIMESTEP)
    target = inputs.target.numpy().astype(np.float64)
    clean, whole = truth.loss(target), truth.prediction()
    every = [head.key for head in pipeline.unet.truth.heads]

    def costs(kept):
        removed = [head for head in every if head not in kept]
        edited = truth.loss(target, removed)
        distance = np.square(truth.prediction(removed) - whole).reshape(len(items), -1).mean(1)
        return (edited - clean).sum() / clean.sum(), distance.sum() / clean.sum()

    compared = 0
    for method, states in states_of(trace, "faces").items():
        rows = trace.filter((pl.col("method") == method) & pl.col("kept") & (pl.col("action") != "replace"))
        assert len(rows) == len(states)
        for state, row in zip(states, rows.iter_rows(named=True), strict=True):
            assert row["size"] == len(state.heads)
            if row["cost"] is not None:
                cost, distance = costs(state.heads)
                assert row["cost"] == pytest.approx(cost, abs=2e-6)
                assert row["distance"] == pytest.approx(distance, abs=2e-6)
                empty = costs(())[0]
                assert row["faithfulness"] == pytest.approx(1 - cost / empty, abs=4e-6 / empty)
                compared += 1
    assert compared > 15


def test_the_batch_changes_nothing(pipelines, tmp_path):
    first = swept(pipelines["pairs"], tmp_path / "one", items=3, faithfulness=0.9, cotangents=1)
    second = swept(pipelines["pairs"], tmp_path / "two", items=3, faithfulness=0.9, cotangents=1, batch=5)
    columns = ["method", "step", "action", "site", "head", "size", "kept", "chosen"]
    assert first.select(columns).equals(second.select(columns))
    for name in ("faithfulness", "faithfulness_prediction", "cost"):
        one, two = (table[name].fill_null(math.inf).to_numpy() for table in (first, second))
        finite = np.isfinite(one)
        np.testing.assert_array_equal(finite, np.isfinite(two))
        np.testing.assert_allclose(one[finite], two[finite], rtol=0, atol=1e-5)


def test_where_nothing_costs_anything_there_is_no_circuit(pipelines, tmp_path):
    """The dead head of a site of its own."""
    trace = swept(pipelines["roles"], tmp_path / "run", items=2, sites=("blocks.1.*",), cotangents=1)
    assert len(trace) == 1
    assert not trace["chosen"].any()
    with pytest.raises(ValueError, match="removing all heads doesn't clearly cost anything"):
        circuit_of(trace, "twins")
    assert confirm_sets(trace, "twins") == []
    found = analyse_circuits(None, None, trace)
    assert found.refused is not None
    assert found.refused["group"].to_list() == ["twins"]
    assert list(found.tables()) == ["refused"]
    with pytest.raises(ValueError, match="group: got 'faces', expected one that was searched: twins"):
        circuit_of(trace, "faces")


def test_a_model_that_overflows_has_no_circuit(tmp_path):
    pipeline = load_planted("pairs")
    pipeline.unet.shrinkage.fill_(float("inf"))
    trace = swept(pipeline, tmp_path / "run", items=2, cotangents=1)
    assert len(trace) == 1
    assert trace["cost"].to_list() == [None]
    assert confirm_sets(trace, "twins") == []


def test_sites_that_are_left_out_are_never_removed(pipelines, tmp_path):
    trace = swept(
        pipelines["pairs"], tmp_path / "run", items=2, sites=("blocks.1.*",), faithfulness=WHOLE, cotangents=1
    )
    assert set(trace["site"].drop_nulls()) == {"blocks.1.attn"}
    sets = confirm_sets(trace, "twins")
    assert {site for one in sets for site, _ in one.heads} == {"blocks.1.attn"}


GROUP = {"groups": ("faces",)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"faithfulness": 0.8}, "faithfulness: got 0.8 without the kind circuits"),
        ({"circuit_metric": "prediction"}, "circuit_metric: got 'prediction' without the kind circuits"),
        ({"kinds": ("circuits",), "faithfulness": 1.0}, "faithfulness: got 1.0, expected a number above 0 and below 1"),
        ({"kinds": ("circuits",), "circuit_metric": "x0"}, "circuit_metric: got x0, expected some of loss, prediction"),
        ({"kinds": ("circuits",), "splits": ("confirm",)}, "splits: got confirm with the kind circuits"),
        ({"kinds": ("circuits",), "fills": ()}, "fills: got none with the kind circuits"),
        ({"kinds": ("circuits",), "compile": True}, "compile: got true with the kind circuits"),
        ({"kinds": ("paths",)}, "paths: got none with the kind paths"),
        ({"paths": (HeadSet("faces", sites=("*",)),)}, "paths: got .* without the kind paths"),
        (
            {"kinds": ("paths",), "paths": (HeadSet("lfw", sites=("*",)),)},
            "paths: got a set 'lfw', expected the names of groups: faces",
        ),
        (
            {"kinds": ("paths",), "paths": (HeadSet("faces", sites=("*",), keep=0.5),)},
            "paths: 'faces': got an edit of its heads",
        ),
    ],
)
def test_a_configuration_that_can_t_be(fields, message):
    with pytest.raises(ValueError, match=message):
        SweepConfig(**{**GROUP, **fields})


def test_fills_that_a_search_can_t_use(pipelines, tmp_path):
    with pytest.raises(ValueError, match="fills: got 'resample' with the kind circuits, expected some of mean, zero"):
        swept(pipelines["pairs"], tmp_path / "run", fills=("resample",))


def test_other_sweeps_are_what_they_were():
    """Fields that came later leave plans alone."""
    assert not {"faithfulness", "circuit_metric", "paths"} & set(SweepConfig(**GROUP).as_dict())
    config = SweepConfig(**GROUP, kinds=("circuits",), faithfulness=0.8)
    assert SweepConfig.from_json(config.as_dict()) == config


@pytest.mark.full
def test_a_page_of_circuits_and_paths(tmp_path):
    """A plain run's page says that it doesn't show them; the ablations beside them are there."""
    run = headscope.sweep(
        tmp_path / "run", model="planted:pairs", groups=("twins",), items=2, timesteps=(TIMESTEP,), fills=("zero",),
        observe=False, kinds=("circuits", "paths"), paths=(HeadSet("twins", sites=("*",)),), cotangents=1,
        progress=False,
    )  # fmt: skip
    assert run.tables == ("ablations", "circuits", "paths")
    text = report_sweep(run.path).read_text()
    assert "Tables of the run that this page doesn&#39;t show: circuits, paths (headscope.study.circuits reads" in text
    # heads are no scores
    assert "sender_head" not in text


@pytest.mark.full
@pytest.mark.parametrize("family", ["stable_diffusion", "flux"])
def test_a_search_of_every_kind_of_attention(family_directory, tmp_path, family):
    """Its numbers are those of the same sets removed by the kind that tests them, on the same images."""
    asked = {
        "model": family_directory(family), "groups": ("lfw",), "splits": ("discover",), "items": 3,
        "timesteps": (60, 500), "fills": ("mean",), "reference_items": 4, "observe": False, "progress": False,
    }  # fmt: skip
    searched = headscope.sweep(
        tmp_path / "search", scores=(), kinds=("circuits",), circuit_metric="prediction", cotangents=1, **asked
    )
    trace = searched.table("circuits").with_columns(pl.col(pl.Categorical).cast(pl.String)).collect()
    sets = confirm_sets(trace, "lfw", paired=0)
    again = headscope.sweep(tmp_path / "again", scores=("loss", "distance"), heads=(), sets=tuple(sets), **asked)
    rows = again.table("set_ablations").with_columns(pl.col(pl.Categorical).cast(pl.String)).collect()
    totals = rows.group_by("edit", "timestep").agg(
        cost=(pl.col("edited") - pl.col("clean")).sum() / pl.col("clean").sum(),
        distance=pl.col("distance").sum() / pl.col("clean").sum(),
    )
    measured = {
        edit: numbers for edit, *numbers in totals.group_by("edit").agg(pl.col("cost", "distance").mean()).iter_rows()
    }
    every = every_head(trace, "lfw")
    removed = {frozenset(one.heads): measured[one.name] for one in sets}
    compared = 0
    for method, states in states_of(trace, "lfw").items():
        steps = trace.filter((pl.col("method") == method) & pl.col("kept") & (pl.col("action") != "replace"))
        for state, row in zip(states, steps.iter_rows(named=True), strict=True):
            numbers = removed.get(frozenset(every) - set(state.heads))
            if numbers and row["cost"] is not None:
                np.testing.assert_allclose([row["cost"], row["distance"]], numbers, rtol=1e-4, atol=2e-6)
                compared += 1
    assert compared > 8
