"""The table of the attention on counterparts, against loops over queries and keys."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

import headscope
from headscope.models import Task
from headscope.sweep import Run, SweepConfig, run_sweep
from headscope.sweep.compute.kinds import counterparts
from headscope.sweep.plan.items import load_task, open_items
from headscope.sweep.work.launch import SweepFailed
from sweep.softmax import attention_of

TIMESTEPS = (60, 500)
# means of float32 numbers, which err by 1e-5 and a few roundings of logits below 20; batches round differently
CLOSE = 3e-5
COLUMNS = [
    *("item", "group", "source_id", "split", "replicate", "timestep", "site", "call", "head", "donor", "donor_source"),
    *("tokens", "attention", "mass", "share"),
]


@pytest.fixture
def config(ddpm_directory):
    """22 items of one group, of which a unit holds 20."""
    return SweepConfig(
        model=ddpm_directory,
        groups=("twins",),
        items=11,
        timesteps=TIMESTEPS,
        observe=False,
        fills=(),
        kinds=("counterparts",),
    )


def rows_of(run: Run) -> pl.DataFrame:
    table = run.table("counterparts").collect()
    return table.with_columns(pl.col(pl.Categorical).cast(pl.String)).sort(COLUMNS[:11])


def related_tokens(donor, edge: int) -> tuple[list[set[int]], list[int]]:
    """Of each token the tokens that are its counterparts, and the part of most of its pixels that have some."""
    mask, ties, side = donor.part_mask, donor.counterparts, 32 // edge

    def token(row: int, column: int) -> int:
        return row // side * edge + column // side

    pixels: list[Counter] = [Counter() for _ in range(edge * edge)]
    parts: list[Counter] = [Counter() for _ in range(edge * edge)]
    for row, column in np.ndindex(mask.shape):
        places = {token(*divmod(int(other), 32)) for other in ties[row, column] if other >= 0}
        own = token(row, column)
        pixels[own].update(places - {own})
        if ties[row, column, 0] >= 0:
            parts[own][int(mask[row, column])] += 1
    own = [{key for key, count in found.items() if 2 * count >= side * side} for found in pixels]
    return own, [min(found, key=lambda part: (-found[part], part)) if found else 0 for found in parts]


def expected(p: np.ndarray, donor) -> tuple[int, float, float, float] | None:
    """Of attention [queries, keys]: tokens, attention, mass and share; None where no token counts."""
    own, part = related_tokens(donor, round(len(p) ** 0.5))
    found = []
    for query, keys in enumerate(own):
        if not keys:
            continue
        for alike in (lambda one, query=query: part[one] == part[query], lambda one, keys=keys: one not in keys):
            others = Counter(
                key
                for one, theirs in enumerate(own)
                if one != query and alike(one)
                for key in theirs
                if key not in keys and key != query
            )
            if others:
                break
        else:
            continue
        total = sum(others.values())
        elsewhere = sum(count * p[query, key] for key, count in others.items()) * len(keys) / total
        attention = sum(p[query, key] for key in keys)
        found.append((attention, attention - elsewhere, len(keys) / len(p)))
    return (len(found), *np.mean(found, axis=0)) if found else None


def check(config: SweepConfig, table: pl.DataFrame, every: int, donors: int) -> None:
    rows = {
        (row["item"], row["timestep"], row["site"], row["head"], row["donor"]): row
        for row in table.iter_rows(named=True)
    }
    assert len(rows) == len(table)
    task = load_task(config)
    sites = [site.name for site in headscope.Scope(task.denoiser).sites]
    (group,) = open_items(config, task)
    compared = 0
    for item in group.swept[::every]:
        others = [other for other in group.swept if other.split == item.split]
        place = others.index(item)
        prepared = task.prepare([item])
        for timestep in TIMESTEPS:
            for site, p in zip(sites, attention_of(task, task.noisy_inputs(prepared, timestep)), strict=True):
                for head in range(p.shape[1]):
                    mine = p[0, head].numpy()
                    found = [(other, expected(mine, other)) for other in (*others[place:], *others[:place])]
                    known = [(other, numbers) for other, numbers in found if numbers is not None]
                    if found[0][1] is None:
                        assert (item.index, timestep, site, head, 0) not in rows
                        continue
                    for number, (donor, (tokens, *numbers)) in enumerate(known[: donors + 1]):
                        row = rows[item.index, timestep, site, head, number]
                        assert (row["source_id"], row["donor_source"]) == (item.source_id, donor.source_id)
                        assert row["tokens"] == tokens
                        for name, value in zip(("attention", "mass", "share"), numbers, strict=True):
                            assert abs(row[name] - value) < CLOSE, name
                        compared += 1
    assert compared > 0


@pytest.mark.full
def test_the_table_is_that_of_a_plain_loop(config, tmp_path):
    run = run_sweep(config, tmp_path / "run", progress=False, batch=8)
    assert run.table("counterparts").collect().columns == COLUMNS
    # one forward of each item, whatever number of donors
    assert run.status().units == {"counterparts": (2, 2)}
    assert run.status().forwards == (44, 44)
    table = rows_of(run)
    check(config, table, 7, 7)
    # every item is as often the k-th donor as any other
    assert set(Counter(table.select("donor", "donor_source", "site", "head", "timestep").rows()).values()) == {1}
    assert table.group_by("item", "site").agg(pl.col("donor").n_unique())["donor"].unique().to_list() == [8]

    assert_frame_equal(rows_of(run_sweep(config, tmp_path / "other", progress=False, batch=3)), table, abs_tol=CLOSE)
    min((run.path / "counterparts").glob("*.parquet")).unlink()
    again = run_sweep(config, tmp_path / "run", progress=False, batch=8)
    assert again.complete
    assert_frame_equal(rows_of(again), table, check_exact=True)


@pytest.mark.parametrize(
    "group", ["twins", *(pytest.param(name, marks=pytest.mark.full) for name in ("tiled", "mirrored"))]
)
def test_fewer_items_are_fewer_donors(config, tmp_path, group):
    config = replace(config, groups=(group,), items=3, timesteps=TIMESTEPS)
    table = rows_of(run_sweep(config, tmp_path / "run", progress=False, batch=4))
    assert table["donor"].unique().sort().to_list() == [0, 1, 2]
    check(config, table, 2, 2)


def test_items_in_which_nothing_can_be_told_apart_have_no_rows(config, tmp_path):
    """The counterparts of a pixel of one eye are all of the other's: there are no others to hold them against."""
    run = run_sweep(replace(config, groups=("eyes",), items=2), tmp_path / "run", progress=False)
    assert run.complete
    assert rows_of(run).height == 0


def test_donors_are_of_other_sources():
    """Several crops of one picture would tell the same thing as often."""
    known = {}
    for index in range(30):
        item = SimpleNamespace(
            index=index, split="discover" if index % 2 else "confirm", source_id=f"picture {index // 6}"
        )
        known[index] = item
    swept = list(known.values())
    for item in swept:
        found = counterparts._relations(swept, item, lambda other: None if other.index in (4, 5) else other)
        if item.index in (4, 5):
            assert found == []
            continue
        sources = [source for source, _ in found]
        assert sources[0] == item.source_id
        assert found[0][1] is item
        # of five pictures, in the order of the sweep, each once
        assert sorted(sources) == [f"picture {number}" for number in range(5)]
        assert {other.split for _, other in found} == {item.split}


def test_attention_that_is_not_what_q_and_k_say_is_refused(config, tmp_path, monkeypatch):
    # no two computations agree so well
    monkeypatch.setattr(counterparts, "_ALIKE", -1.0)
    with pytest.raises(SweepFailed, match="attends otherwise"):
        run_sweep(replace(config, items=2), tmp_path / "run", progress=False)


@pytest.mark.full
def test_the_bundled_model_finds_counterparts_where_there_are_some(config, tmp_path):
    """Beside other images' places of counterparts, which it hardly looks at; in controls such heads find none."""
    groups = "twins", "distinct", "tiled", "untiled", "unmirrored"
    config = replace(config, model=SweepConfig(groups=groups).model, groups=groups, timesteps=(132,))
    table = rows_of(run_sweep(config, tmp_path / "run", progress=False))
    own = pl.col("mass").filter(pl.col("donor") == 0).mean()
    excess = table.group_by("group", "site", "head").agg(own - pl.col("mass").filter(pl.col("donor") > 0).mean())
    wide = excess.pivot("group", index=["site", "head"], values="mass")
    twins, distinct, tiled, untiled, unmirrored = (wide[name].to_numpy() for name in groups)
    assert twins.max() > 0.5
    assert tiled.max() > 0.4
    # glyphs of a control begin at one place within a patch: patches of one place hold as much background
    assert distinct.max() < 0.15
    assert abs(untiled).max() < 0.02
    assert abs(unmirrored).max() < 0.02


def test_numbers_that_are_not_finite_stay(config, tmp_path, monkeypatch):
    predict = Task.predict

    def overflowed(self, inputs):
        return predict(self, replace(inputs, sample=inputs.sample * (torch.nan if inputs.timestep == 500 else 1)))

    monkeypatch.setattr(Task, "predict", overflowed)
    table = rows_of(run_sweep(replace(config, items=2), tmp_path / "run", progress=False))
    broken, sound = table.filter(pl.col("timestep") == 500), table.filter(pl.col("timestep") == 60)
    assert len(broken) == len(sound) > 0
    assert broken["mass"].null_count() == 0
    assert broken["mass"].is_nan().all()
    assert sound["mass"].is_finite().all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"groups": ("faces",)}, "'faces/.*' of the group 'faces' has none; expected tied groups alone, such as twins"),
        ({"groups": ("twins", "lfw")}, "'lfw/.*' of the group 'lfw' has none"),
        ({"items": 1}, "'twins' has 1 of 'discover'; expected at least 2"),
    ],
)
def test_groups_that_it_cannot_be_of_are_refused(config, tmp_path, options, said):
    with pytest.raises(ValueError, match=f"kinds: got 'counterparts', which .*{said}"):
        run_sweep(replace(config, **{"items": 2, **options}), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
