"""Parts of the mean fill's reference, ablated beside the whole: which items they are, and what their rows say."""

import re
from collections import Counter

import numpy as np
import polars as pl
import pytest
import torch

from headscope.models import Scope
from headscope.sweep import Execution, HeadSet, SweepConfig, run_sweep
from headscope.sweep.compute import means
from headscope.sweep.compute.opened import Opened
from headscope.sweep.plan.choosing import dealt
from headscope.sweep.plan.config import FILLS, fold_of
from headscope.sweep.plan.items import load_task, open_items
from headscope.sweep.store.store import RunStore
from sweep.faults import ordered

SITE = "mid_block.attentions.0"
PAIR = HeadSet("two", heads=((SITE, 0), (SITE, 2)))
FLAT = HeadSet("flat", heads=((SITE, 0),), temperature=2.0)


@pytest.fixture
def fields(ddpm_directory):
    return {
        "model": ddpm_directory,
        "groups": ("lfw",),
        "items": 1,
        "timesteps": (60, 500),
        "fills": ("mean", "zero"),
        "heads": ((SITE, 1),),
        "sets": (PAIR, FLAT),
        "reference_items": 7,
        "reference_folds": 3,
    }


def test_names_of_folds_are_known():
    assert SweepConfig(groups=("lfw",), reference_folds=2).fold_fills == ("mean 1/2", "mean 2/2")
    assert [fold_of(f"mean {fold}/4") for fold in range(1, 5)] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    others = (*FILLS, "mean 0/4", "mean 5/4", "mean 1/1", "mean 01/4", "mean 1/4 ", "mean1/4", "a mean 1/4")
    assert [fold_of(name) for name in others] == [None] * len(others)


@pytest.mark.parametrize(("sources", "folds"), [(60, 4), (7, 3), (5, 5), (2, 2), (1200, 7)])
def test_folds_are_of_equal_size(sources, folds):
    names = [f"source-{index}" for index in range(sources)]
    found = dealt("lfw", names, folds)
    sizes = Counter(found)
    assert set(sizes) == set(range(folds))
    assert max(sizes.values()) - min(sizes.values()) <= 1
    # whatever the order, and not in the order of the sources
    back = dealt("lfw", names[::-1], folds)[::-1]
    assert found == back
    if sources > 50:
        assert found != [index % folds for index in range(sources)]
        assert found != dealt("faces", names, folds)


def test_a_source_is_in_one_fold():
    """Sources of many items count once."""
    sources = ["a"] * 10 + ["b", "c", "d"]
    found = dealt("mine", sources, 2)
    assert len(set(found[:10])) == 1
    assert sorted(Counter(dict(zip(sources, found, strict=True)).values()).values()) == [2, 2]
    with pytest.raises(ValueError, match=r"reference_folds: got 5, and the reference items of 'mine' are of 4 source"):
        dealt("mine", sources, 5)


def test_rows_are_the_plain_loop_s(fields, tmp_path):
    """Every fold's mean over its own items and the whole one's over all, on the same noisy inputs."""
    config = SweepConfig(**fields, draws=2)
    run = run_sweep(config, tmp_path / "run", progress=False, batch=2)
    task = load_task(config)
    (group,) = open_items(config, task)
    scope = Scope(task.denoiser)
    folds = dealt("lfw", [item.source_id for item in group.reference], 3)
    members = {
        f"mean {k + 1}/3": [i for i, own in zip(group.reference, folds, strict=True) if own == k] for k in range(3)
    }
    members["mean"] = list(group.reference)
    singles, sets = ordered(run, "ablations"), ordered(run, "set_ablations")
    for timestep in config.timesteps or ():
        with torch.inference_mode():
            recorded = {}
            for fill, some in members.items():
                with scope.record("head_output") as recorded[fill]:
                    task.predict(task.noisy_inputs(task.prepare(some), timestep, config.seed))
            for item in group.swept:
                inputs = task.noisy_inputs(task.prepare([item]), timestep, config.seed)
                clean = float(task.loss(inputs))
                here = (pl.col("item") == item.index) & (pl.col("timestep") == timestep) & (pl.col("replicate") == 0)
                for fill, recording in recorded.items():
                    for table, heads in ((singles, [1]), (sets.filter(pl.col("edit") == "two"), [0, 2])):
                        with scope.edit({SITE: heads}, fill=recording):
                            edited = float(task.loss(inputs))
                        (row,) = table.filter(here & (pl.col("fill") == fill)).iter_rows(named=True)
                        assert row["clean"] == pytest.approx(clean, rel=1e-5)
                        assert row["edited"] == pytest.approx(edited, rel=1e-5)
    # fills that differ by a fold's mean differ in their numbers
    assert (
        singles.filter(pl.col("replicate") == 0)
        .group_by("item", "timestep")
        .agg(pl.col("edited").n_unique())["edited"]
        .to_list()
        == [5] * 4
    )
    assert set(singles.filter(pl.col("replicate") == 1)["fill"]) == {"mean", "zero"}


def test_the_whole_mean_is_the_mean_over_items(fields, tmp_path):
    """In one pass: the folds' sums, of 3, 2 and 2 items, added up in float64."""
    config = SweepConfig(**fields)
    run = run_sweep(config, tmp_path / "run", progress=False, batch=2)
    plain = run_sweep(SweepConfig(**{**fields, "reference_folds": 0}), tmp_path / "plain", progress=False, batch=2)

    def read(run):
        (unit,) = (unit for unit in run.units if unit["kind"] == "reference")
        return unit, means.read(RunStore.read_tensors(_Store(run.path), "reference", unit["id"]))

    (unit, folded), (alone, whole) = read(run), read(plain)
    assert list(whole) == ["mean"]
    assert list(folded) == ["mean", "mean 1/3", "mean 2/3", "mean 3/3"]
    # no more forwards than without folds
    assert unit["forwards"] == alone["forwards"] == 7 * 2
    for key in whole["mean"].tensors.kept():
        place = key[1:5]
        expected = whole["mean"].mean_head_output(*place).double()
        found = folded["mean"].mean_head_output(*place).double()
        # forwards in other batches round differently
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
        parts = [folded[f"mean {fold}/3"].mean_head_output(*place).double() for fold in (1, 2, 3)]
        together = (3 * parts[0] + 2 * parts[1] + 2 * parts[2]) / 7
        torch.testing.assert_close(found, together, rtol=0, atol=2.0**-23 * float(expected.abs().max()))


class _Store:
    """As much of a run's store as reading takes."""

    def __init__(self, path):
        self.path = path


def test_every_forward_is_counted_and_none_is_repeated(fields, tmp_path, advanced):
    """A set whose fills change nothing runs once; the folds run in the first draw alone."""
    config = SweepConfig(**fields, draws=2)
    run = run_sweep(config, tmp_path / "run", progress=False, batch=4)
    assert advanced == {unit["id"]: unit["forwards"] for unit in run.units}
    rows = {unit["replicate"]: unit["forwards"] for unit in run.units if unit["kind"] == "set_ablations"}
    # two items: clean, the pair with every fill, the flat one
    assert rows == {0: 2 * (1 + 5 + 1), 1: 2 * (1 + 2 + 1)}
    flat = ordered(run, "set_ablations").filter(pl.col("edit") == "flat", pl.col("replicate") == 0)
    assert len(flat) == 2 * 2 * 5
    assert flat.group_by("item", "timestep").agg(pl.col("edited").n_unique())["edited"].to_list() == [1] * 4


def test_generations_have_no_folds(fields, tmp_path):
    asked = {**fields, "scores": ("loss", "generate"), "generate_steps": 2, "timesteps": (60,), "sets": ()}
    run = run_sweep(SweepConfig(**asked), tmp_path / "run", progress=False)
    assert set(ordered(run, "generations")["fill"]) == {"mean", "zero"}
    assert len(set(ordered(run, "ablations")["fill"])) == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reference_folds": 1}, "reference_folds: got 1, expected at least 2, or 0 for none"),
        ({"reference_folds": -2}, "reference_folds: got -2, expected at least 2"),
        ({"reference_folds": 4, "fills": ("zero",)}, "reference_folds: got 4, expected the fill mean, whose error"),
        (
            {"reference_folds": 4, "scores": ("generate",)},
            "reference_folds: got 4, expected the fill mean, whose error",
        ),
        ({"fills": ("mean 1/4",)}, "fills: got mean 1/4, expected some of mean, zero"),
    ],
)
def test_folds_that_can_t_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SweepConfig(groups=("faces",), **fields)


def test_a_group_of_too_few_sources_is_refused_before_work_starts(ddpm_directory):
    config = SweepConfig(
        model=ddpm_directory, groups=("photographs",), items=1, timesteps=(60,), reference_items=9, reference_folds=4
    )
    with pytest.raises(
        ValueError, match=r"reference_folds: got 4, and .* 'photographs' are of 3 source\(s\); expected"
    ):
        Opened(config, Execution())


def test_a_fold_of_one_item_is_that_item(ddpm_directory, tmp_path):
    config = SweepConfig(
        model=ddpm_directory, groups=("lfw",), items=1, splits=("confirm",), timesteps=(60,), fills=("mean",),
        heads=((SITE, 1),), observe=False, reference_items=2, reference_folds=2,
    )  # fmt: skip
    run = run_sweep(config, tmp_path / "run", progress=False)
    edited = ordered(run, "ablations").sort("fill")["edited"].to_numpy()
    assert len(np.unique(edited)) == 3
