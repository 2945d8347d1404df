"""Attributions and sweeps of planted models find their truths: every head and pair, whatever takes their place."""

import itertools

import numpy as np
import polars as pl
import pytest
import torch

import headscope
from headscope import Scope, Task
from headscope.counter import counter_uniform
from headscope.sweep import HeadSet, SweepConfig
from headscope.sweep.compute.context import learned_prefix
from headscope.sweep.plan.items import open_items
from headscope.zoo import open_group
from headscope.zoo.planted import load_planted
from zoo.planted_tolerance import (
    entropy_tolerance,
    gradient_tolerance,
    loss_tolerance,
    projected_tolerance,
)

TIMESTEPS = (132, 495, 858)
# of equal effect at a log-SNR of 3, by what takes their place
TIES = {
    None: [{"duplicate_1", "duplicate_2"}, {"both_1", "both_2"}, {"dead", "either_1", "either_2", "below"}],
    "mean": [{"duplicate_1", "duplicate_2"}, {"dead", "either_1", "either_2", "below", "one_hot"}],
}


@pytest.fixture(scope="module")
def pipelines():
    return {name: load_planted(name) for name in ("pairs", "gated", "all")}


def items_of(group, count, split="confirm"):
    found = open_group(group)
    return [found.item(index) for index in found.indices(split)[:count]]


def truth_of(task, items, timestep):
    inputs = task.noisy_inputs(task.prepare(items), timestep)
    return task.denoiser.truth.at(inputs.sample.numpy(), timestep), inputs.target.numpy().astype(np.float64)


def means_of(task, items, timestep):
    return truth_of(task, items, timestep)[0].outputs.mean(0)


def projections(derivative, keys, timestep, count):
    """sum over outputs of v d, [cotangents, items, heads], of the cotangents that attribution draws."""
    shape = derivative.shape[2:]
    drawn = [
        [counter_uniform("cotangent", key, timestep, 0, index, shape=shape) < 0.5 for key in keys]
        for index in range(count)
    ]
    return np.einsum("kicyx,ihcyx->kih", np.where(drawn, 1.0, -1.0), derivative)


@pytest.mark.parametrize("fill", [None, "mean"])
@pytest.mark.parametrize("name", ["pairs", pytest.param("all", marks=pytest.mark.full)])
def test_attribution(pipelines, name, fill):
    """Loss, g, and c of the cotangents that were drawn; g and the expected c are exactly what each removal costs."""
    task = Task.of(pipelines[name])
    scope, items = Scope(task.denoiser), items_of("faces", 3)
    reference = items_of("faces", 8, "train")
    means = None
    if fill == "mean":
        with torch.no_grad(), scope.record("head_output") as means:
            for timestep in TIMESTEPS:
                task.predict(task.noisy_inputs(task.prepare(reference), timestep))
    found = scope.attribute(task, items, TIMESTEPS, fill=means, cotangents=4)
    assert found.heads == tuple(head.key for head in task.denoiser.truth.heads)
    for column, timestep in enumerate(TIMESTEPS):
        truth, target = truth_of(task, items, timestep)
        given = None if fill is None else means_of(task, reference, timestep)
        loss = truth.loss(target)
        assert (np.abs(found.loss[:, column] - loss) <= loss_tolerance(truth, loss)).all()
        derivative = truth.derivative(given)
        g, c = truth.importance(target, given)
        assert (np.abs(found.g[:, column] - g) <= gradient_tolerance(truth, target, derivative)).all()
        along = projections(derivative, found.items, timestep, 4)
        error = projected_tolerance(truth, derivative)
        tolerance = (2 * np.abs(along) * error + error**2).mean(0) / 3072
        assert (np.abs(found.c[:, column] - np.square(along).mean(0) / 3072) <= tolerance).all()
        effects = np.stack([truth.effect(target, [head.key], given) for head in truth.heads], 1)
        np.testing.assert_allclose(g + c, effects, rtol=0, atol=1e-14)
        assert np.abs(effects).max() > 20 * loss_tolerance(truth, loss).max()


@pytest.mark.full
@pytest.mark.parametrize("fill", [None, "mean"])
def test_ranking(pipelines, fill):
    """By g + c as by the exact effects, but for ties: those that are stated, and what c's estimate can't tell apart.

    c is the mean of squares whose variance over cotangents is at most 2 c^2, for each item.
    """
    task = Task.of(pipelines["all"])
    scope, items, timestep, cotangents = Scope(task.denoiser), items_of("twins", 4), 132, 32
    reference = items_of("twins", 8, "train")
    means = None
    if fill == "mean":
        with torch.no_grad(), scope.record("head_output") as means:
            task.predict(task.noisy_inputs(task.prepare(reference), timestep))
    found = scope.attribute(task, items, [timestep], fill=means, cotangents=cotangents)
    truth, target = truth_of(task, items, timestep)
    given = None if fill is None else means_of(task, reference, timestep)
    exact = np.stack([truth.effect(target, [head.key], given) for head in truth.heads], 1).mean(0)
    _, c = truth.importance(target, given)
    variance = 2 * np.square(c).sum(0) / (cotangents * len(items) ** 2)
    order = [found.heads.index(key) for key in found.ranking()]
    names = [head.name for head in truth.heads]
    compared = 0
    for before, after in itertools.combinations(order, 2):
        if any({names[before], names[after]} <= tie for tie in TIES[fill]):
            assert exact[before] == pytest.approx(exact[after], abs=1e-12)
        elif abs(exact[before] - exact[after]) > 5 * np.sqrt(variance[before] + variance[after]):
            assert exact[before] > exact[after], (names[before], names[after])
            compared += 1
    # of 136 pairs
    assert compared > 100
    np.testing.assert_allclose((found.g + found.c).mean((0, 1)), exact, rtol=0, atol=5 * np.sqrt(variance).max() + 1e-7)


def exhaustive(truth):
    """Every pair of heads as a set."""
    pairs = itertools.combinations(truth.heads, 2)
    return [HeadSet(f"{one.name} {other.name}", heads=(one.key, other.key)) for one, other in pairs]


def check_ablations(pipeline, run, config):
    """Every row of a run's single heads and sets against the truth.

    Returns:
        By (group, timestep, names, fill) and item what the removal adds to the loss, and what that may err by.
    """
    task = Task.of(pipeline)
    truth = task.denoiser.truth
    names = {head.key: (head.name,) for head in truth.heads}
    keys = {head.name: head.key for head in truth.heads}
    tables = {
        kind: run.table(kind).with_columns(pl.col(pl.Categorical).cast(pl.String)).collect()
        for kind in ("ablations", "set_ablations")
    }
    rows = [
        *((names[row["site"], row["head"]], row) for row in tables["ablations"].iter_rows(named=True)),
        *((tuple(row["edit"].split()), row) for row in tables["set_ablations"].iter_rows(named=True)),
    ]
    units = {}
    for group in open_items(config, task):
        for timestep in config.timesteps:
            forward, target = truth_of(task, group.swept, timestep)
            means = means_of(task, group.reference, timestep) if group.reference else None
            places = {item.index: number for number, item in enumerate(group.swept)}
            clean = forward.loss(target)
            units[group.name, timestep] = forward, target, means, places, clean, loss_tolerance(forward, clean)
    effects, expected = {}, {}
    for removed, row in rows:
        forward, target, means, places, clean, clean_tolerance = units[row["group"], row["timestep"]]
        key, item = (row["group"], row["timestep"], removed, row["fill"]), places[row["item"]]
        if key not in expected:
            fill = {"zero": None, "mean": means}.get(row["fill"], row["fill"])
            # with anything but zeros in the place of both, the pair of which either suffices may be half way
            clamped = row["fill"] == "zero" or not any(name.startswith("either") for name in removed)
            loss = forward.loss(target, [keys[name] for name in removed], fill)
            expected[key] = loss, loss_tolerance(forward, loss, clamped=clamped)
        loss, tolerance = (values[item] for values in expected[key])
        assert abs(row["edited"] - loss) <= tolerance, (key, item)
        assert abs(row["clean"] - clean[item]) <= clean_tolerance[item]
        effects.setdefault(key, {})[item] = row["edited"] - row["clean"], tolerance + clean_tolerance[item]
    edits = len(truth.heads) * (len(truth.heads) + 1) // 2
    assert len(effects) == edits * len(config.fills) * len(units)
    for (group, timestep), (forward, target, means, places, *_) in units.items():
        for fill in config.fills:
            g, c = forward.importance(target, {"zero": None, "mean": means}.get(fill, fill))
            for item in places.values():

                def effect(*removed, unit=(group, timestep), fill=fill, item=item):
                    return effects[(*unit, removed, fill)][item]

                check_pairs(truth, effect, fill, g[item], c[item])
    return effects


def check_pairs(truth, effect, fill, g, c):
    """The closed forms of the pairs' joint effects.

    Args:
        effect: of the heads of these names, and what it may err by.
        g, c: of each head.
    """
    names = {head.key: head.name for head in truth.heads}
    for pair in truth.pairs:
        one, other = (names[key] for key in pair.heads)
        (first, error), (second, _), (joint, joint_error) = effect(one), effect(other), effect(one, other)
        number = list(names.values()).index(one)
        if pair.kind == "duplicate":
            assert abs(joint - 2 * g[number] - 4 * c[number]) <= joint_error
        elif pair.kind == "either suffices" and fill in ("zero", "mean"):
            assert max(abs(first), abs(second)) <= error
        elif pair.kind == "both are needed" and fill == "zero":
            assert max(abs(first - second), abs(joint - first)) <= 2 * error


def swept(pipeline, out, **fields):
    """A run and its configuration; the truth of all training items would take long."""
    if "mean" in fields.get("fills", ("mean",)):
        fields["reference_items"] = 16
    run = headscope.sweep(out, model=pipeline, progress=False, **fields)
    return run, SweepConfig.from_dict(fields)


@pytest.mark.parametrize("fills", [("zero", "mean"), pytest.param(("uniform", "identity"), marks=pytest.mark.full)])
def test_every_head_and_pair(pipelines, tmp_path, fills):
    """Of the small model, with zeros, means, uniform attention and own values in the place of heads."""
    pipeline = pipelines["pairs"]
    run, config = swept(
        pipeline,
        tmp_path / "run",
        groups=("faces", "twins"),
        splits=("confirm",),
        timesteps=(132, 858),
        items=1,
        fills=fills,
        sets=exhaustive(pipeline.unet.truth),
        observe=False,
    )
    effects = check_ablations(pipeline, run, config)
    # there is something to find: pairs that matter where neither of their heads does
    if "zero" in fills:
        joint = effects["twins", 132, ("either_1", "either_2"), "zero"]
        assert max(effect for effect, _ in joint.values()) > 1e-3


@pytest.mark.full
def test_every_head_and_pair_of_the_whole_model(pipelines, tmp_path):
    pipeline = pipelines["all"]
    run, config = swept(
        pipeline,
        tmp_path / "run",
        groups=("faces", "distinct"),
        timesteps=TIMESTEPS,
        items=1,
        fills=("zero", "mean"),
        sets=exhaustive(pipeline.unet.truth),
        observe=False,
    )
    check_ablations(pipeline, run, config)


@pytest.mark.full
def test_a_sweep_of_several_groups(pipelines, tmp_path):
    """As a study asks for it: entropies, single heads with both fills, attributions, and the default timesteps."""
    pipeline = pipelines["gated"]
    run, config = swept(
        pipeline, tmp_path / "run", groups=("faces", "lfw", "twins"), items=1, attribute=True, cotangents=1
    )
    task = Task.of(pipeline)
    truth = task.denoiser.truth
    observed, attributed = (
        run.table(kind).with_columns(pl.col(pl.Categorical).cast(pl.String)).collect()
        for kind in ("observations", "attributions")
    )
    assert sorted(set(observed["timestep"])) == list(TIMESTEPS)
    for group in open_items(config, task):
        for timestep in TIMESTEPS:
            forward, target = truth_of(task, group.swept, timestep)
            g, _ = forward.importance(target)
            tolerance = entropy_tolerance(forward).mean(-1)
            gradient = gradient_tolerance(forward, target, forward.derivative())
            for (place, item), (number, head) in itertools.product(enumerate(group.swept), enumerate(truth.heads)):
                mine = {"group": group.name, "item": item.index, "timestep": timestep, "head": head.head}
                (row,) = observed.filter(**mine).iter_rows(named=True)
                expected = forward.entropy[place, number].mean()
                assert abs(row["entropy_mean"] - expected) <= tolerance[place, number]
                (row,) = attributed.filter(**mine, fill="zero").iter_rows(named=True)
                assert abs(row["g"] - g[place, number]) <= gradient[place, number]


def test_edited_forwards_take_over_what_ran_before(pipelines):
    for pipeline in pipelines.values():
        task = Task.of(pipeline)
        inputs = task.noisy_inputs(task.prepare(items_of("faces", 2)), 132)
        prefix = learned_prefix(task, Scope(task.denoiser), inputs)
        assert prefix.shares, prefix.reason
