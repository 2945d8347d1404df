"""The table of the attention that each place receives, against softmax in float64."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

import headscope
from headscope.models import Task
from headscope.sweep import Execution, Run, SweepConfig, run_sweep
from headscope.sweep.compute.kinds.key_mass import uniform_distance
from headscope.sweep.compute.opened import Opened
from headscope.sweep.plan.items import load_task, open_items
from headscope.zoo import open_group
from headscope.zoo.planted import load_planted
from sweep.softmax import attention_of
from tiny import Picture
from zoo.planted_tolerance import entropy_tolerance, weight_tolerance

TIMESTEPS = (60, 500)
# means of float32 numbers, which err by 1e-5 and a few roundings of logits below 20; batches round differently
CLOSE = 3e-5
COLUMNS = [
    *("item", "group", "source_id", "split", "replicate", "timestep", "site", "call", "head", "translated"),
    *("grid_height", "grid_width", "entropy", "entropy_normalised", "distance", "distance_uniform", "key_mass"),
]
KEYS = COLUMNS[:10]


@pytest.fixture
def config(ddpm_directory):
    """22 items of one group, of which a unit holds 20; two draws."""
    return SweepConfig(
        model=ddpm_directory,
        groups=("twins",),
        items=11,
        timesteps=TIMESTEPS,
        observe=False,
        fills=(),
        draws=2,
        kinds=("key_mass",),
    )


def rows_of(run: Run) -> pl.DataFrame:
    table = run.table("key_mass").collect()
    return table.with_columns(pl.col(pl.Categorical).cast(pl.String)).sort(KEYS)


def rolled(item) -> Picture:
    """By half the image, row by row."""
    image = item.image
    height, width = image.shape[:2]
    moved = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            moved[(row + height // 2) % height, (column + width // 2) % width] = image[row, column]
    return Picture(item.key, moved)


def distances(edge: int) -> np.ndarray:
    rows, columns = np.divmod(np.arange(edge * edge), edge)
    return np.hypot(rows[:, None] - rows, columns[:, None] - columns)


def check(task: Task, table: pl.DataFrame, items: list, replicates=(0, 1)) -> int:
    """Compare rows with a plain loop, one item at a time; how many there were."""
    told_apart = [name for name in KEYS if name not in ("source_id", "split", "call")]
    rows = {tuple(row[name] for name in told_apart): row for row in table.to_dicts()}
    assert len(rows) == len(table)
    sites = [site.name for site in headscope.Scope(task.denoiser).sites if site.kind == "self"]
    compared = 0
    for item in items:
        for translated, picture in ((False, item), (True, rolled(item))):
            prepared = task.prepare([picture])
            for timestep in TIMESTEPS:
                for replicate in replicates:
                    found = attention_of(task, task.noisy_inputs(prepared, timestep, replicate))
                    assert len(found) == len(sites)
                    for site, p in zip(sites, found, strict=True):
                        edge = round(p.shape[2] ** 0.5)
                        for head, each in enumerate(p[0].numpy()):
                            row = rows[item.index, item.group, replicate, timestep, site, head, translated]
                            assert (row["source_id"], row["split"], row["call"]) == (item.source_id, item.split, 0)
                            assert (row["grid_height"], row["grid_width"]) == (edge, edge)
                            entropy = -(each * np.log(each)).sum(-1).mean()
                            assert abs(row["entropy"] - entropy) < CLOSE
                            assert abs(row["entropy_normalised"] - entropy / np.log(edge * edge)) < CLOSE
                            assert abs(row["distance"] - (each * distances(edge)).sum(-1).mean()) < CLOSE * edge
                            assert row["distance_uniform"] == pytest.approx(distances(edge).mean(), abs=1e-12)
                            np.testing.assert_allclose(row["key_mass"], each.mean(0), rtol=0, atol=CLOSE)
                            assert abs(sum(row["key_mass"]) - 1) < CLOSE
                            compared += 1
    return compared


def test_the_table_is_that_of_a_plain_loop(config, tmp_path):
    config = replace(config, items=1)
    table = rows_of(run_sweep(config, tmp_path / "run", progress=False))
    task = load_task(config)
    (group,) = open_items(config, task)
    assert check(task, table, list(group.swept)) == len(table) > 0


@pytest.mark.full
def test_several_units_and_draws(config, tmp_path):
    """Of images as they are and translated; other batches round differently, and a unit that is gone comes back."""
    run = run_sweep(config, tmp_path / "run", progress=False, batch=8)
    assert run.tables == ("key_mass",)
    # 22 items in two units for each draw, each twice at every timestep
    assert run.status().units == {"key_mass": (4, 4)}
    assert run.status().forwards == (176, 176)
    table = rows_of(run)
    assert run.table("key_mass").collect().columns == COLUMNS
    task = load_task(config)
    (group,) = open_items(config, task)
    assert len(table) == 22 * 2 * 2 * 2 * sum(site.heads for site in headscope.Scope(task.denoiser).sites)
    assert check(task, table, list(group.swept[::9])) > 0

    assert_frame_equal(rows_of(run_sweep(config, tmp_path / "other", progress=False, batch=3)), table, abs_tol=CLOSE)
    min((run.path / "key_mass").glob("*.parquet")).unlink()
    assert Run.open(run.path).status().units == {"key_mass": (3, 4)}
    again = run_sweep(config, tmp_path / "run", progress=False, batch=8)
    assert again.complete
    assert_frame_equal(rows_of(again), table, check_exact=True)


def test_damaged_rows_are_named_and_computed_again(config, tmp_path):
    config = replace(config, items=1, draws=1)
    run = run_sweep(config, tmp_path / "run", progress=False)
    whole = rows_of(run)
    (file,) = (run.path / "key_mass").glob("*.parquet")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    found = Run.open(run.path).verify()
    assert not found.sound
    assert [file.stem[:12] in name for name in found.torn] == [True]
    with pytest.raises(ValueError, match=file.stem[:12]):
        Run.open(run.path).table("key_mass").collect()
    Run.open(run.path).mend()
    assert_frame_equal(rows_of(run_sweep(config, tmp_path / "run", progress=False)), whole, check_exact=True)


def test_one_forward_of_each_image_as_it_is_and_one_translated(config, tmp_path, monkeypatch):
    rows = []
    predict = Task.predict

    def counted(self, inputs):
        rows.append((inputs.timestep, len(inputs.sample)))
        return predict(self, inputs)

    monkeypatch.setattr(Task, "predict", counted)
    run_sweep(replace(config, draws=1), tmp_path / "run", progress=False, batch=16)
    # the first is of a single row, and tells the sites' grids
    assert rows.pop(0) == (60, 1)
    expected = [(timestep, size) for size in (16, 4, 16, 4, 2, 2) for timestep in TIMESTEPS]
    assert sorted(rows) == sorted(expected)


@pytest.mark.full
def test_the_bundled_model(config, tmp_path):
    bundled = SweepConfig(groups=("twins",)).model
    config = replace(config, model=bundled, groups=("mirrored",), items=1, draws=1)
    run = run_sweep(config, tmp_path / "run", progress=False)
    task = load_task(config)
    (group,) = open_items(config, task)
    assert check(task, rows_of(run), list(group.swept), (0,)) == 2 * 2 * 2 * 48


def test_sites_that_attend_to_a_text_are_left_out(diffusion_directory, tmp_path):
    """Of latents: the image is rolled before it is encoded."""
    config = SweepConfig(
        model=diffusion_directory, groups=("twins",), items=1, splits=("confirm",), timesteps=TIMESTEPS, observe=False,
        fills=(), kinds=("key_mass",),
    )  # fmt: skip
    run = run_sweep(config, tmp_path / "run", progress=False)
    table = rows_of(run)
    task = load_task(config)
    scope = headscope.Scope(task.denoiser)
    assert {site.kind for site in scope.sites} == {"self", "cross"}
    assert set(table["site"]) == {site.name for site in scope.sites if site.kind == "self"}
    (group,) = open_items(config, task)
    item = group.swept[0]
    for translated, picture in ((False, item), (True, rolled(item))):
        inputs = task.noisy_inputs(task.prepare([Picture(item.key, picture.image, item.caption)]), 60)
        every = dict(zip([site.name for site in scope.sites], attention_of(task, inputs), strict=True))
        for row in table.filter(pl.col("translated") == translated, pl.col("timestep") == 60).to_dicts():
            p = every[row["site"]][0, row["head"]].numpy()
            np.testing.assert_allclose(row["key_mass"], p.mean(0), rtol=0, atol=CLOSE)


@pytest.mark.full
@pytest.mark.parametrize("family", ["flux", "stable_diffusion_3"])
def test_a_model_without_such_sites_is_refused(family_directory, tmp_path, family):
    config = SweepConfig(
        model=family_directory(family), groups=("twins",), items=1, timesteps=(100,), observe=False, fills=(),
        kinds=("key_mass",),
    )  # fmt: skip
    with pytest.raises(ValueError, match="kinds: got 'key_mass', which is of self-attention from an image's tokens"):
        run_sweep(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("edge", [(1, 1), (1, 4), (3, 2), (5, 7)])
def test_the_distance_of_uniform_attention(edge):
    rows, columns = np.divmod(np.arange(edge[0] * edge[1]), edge[1])
    expected = np.hypot(rows[:, None] - rows, columns[:, None] - columns).mean()
    assert uniform_distance(edge) == pytest.approx(expected, abs=1e-12)


def test_numbers_that_are_not_finite_stay(config, tmp_path, monkeypatch):
    """A model that overflowed gives NaN, and neither nulls nor missing rows."""
    predict = Task.predict

    def overflowed(self, inputs):
        if inputs.timestep == 500:
            inputs = replace(inputs, sample=inputs.sample * torch.nan)
        return predict(self, inputs)

    monkeypatch.setattr(Task, "predict", overflowed)
    run = run_sweep(replace(config, items=1, draws=1), tmp_path / "run", progress=False)
    table = rows_of(run)
    broken, sound = table.filter(pl.col("timestep") == 500), table.filter(pl.col("timestep") == 60)
    assert len(broken) == len(sound) > 0
    for name in ("entropy", "entropy_normalised", "distance"):
        assert broken[name].is_nan().all(), name
        assert broken[name].null_count() == 0, name
        assert sound[name].is_finite().all()
    assert broken["key_mass"].explode().is_nan().all()
    assert sound["key_mass"].explode().is_finite().all()


@pytest.mark.full
def test_planted_heads_have_their_truth(tmp_path):
    pipeline = load_planted("all")
    run = headscope.sweep(
        tmp_path / "run", model=pipeline, groups=["faces"], items=3, splits=["confirm"], timesteps=[132, 858],
        observe=False, fills=[], kinds=["key_mass"], progress=False,
    )  # fmt: skip
    table = rows_of(run)
    task, group = Task.of(pipeline), open_group("faces")
    compared = 0
    for item in [group.item(index) for index in table["item"].unique().sort()]:
        for translated, picture in ((False, item), (True, rolled(item))):
            for timestep in (132, 858):
                sample = task.noisy_inputs(task.prepare([picture]), timestep).sample.numpy()
                truth = task.denoiser.truth.at(sample, timestep)
                weights, entropies = weight_tolerance(truth).mean(2)[0], entropy_tolerance(truth).mean(-1)[0]
                for number, head in enumerate(truth.heads):
                    row = table.row(
                        by_predicate=(pl.col("item") == item.index)
                        & (pl.col("translated") == translated)
                        & (pl.col("timestep") == timestep)
                        & (pl.col("site") == head.site)
                        & (pl.col("head") == head.head),
                        named=True,
                    )
                    mass = truth.key_mass[0, number] / 256
                    assert (np.abs(np.array(row["key_mass"]) - mass) <= weights[number] + 1e-6).all(), head.name
                    assert abs(row["entropy"] - truth.entropy[0, number].mean()) <= entropies[number], head.name
                    compared += 1
    assert compared == len(table) == 3 * 2 * 2 * 17


def test_grids_are_those_of_the_model(config):
    """The same whoever opens the run; and no forward where no kind asks for them."""
    plan = Opened(config, Execution()).plan
    assert set(plan.grids.values()) == {(16, 16)}
    assert Opened(replace(config, kinds=(), observe=True), Execution()).plan.grids == {}
