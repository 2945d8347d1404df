"""Part masks in sweeps: the table of where each part attends to, own scores, and which runs are known by masks."""

import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from typer.testing import CliRunner

import headscope
from headscope.cli import app
from headscope.sweep import Execution, Run, SweepConfig, run_sweep
from headscope.sweep.compute.opened import Opened
from headscope.sweep.plan import items as plan_items
from headscope.sweep.plan.items import load_task, open_items
from headscope.zoo import Item, open_group
from headscope.zoo.groups import ImageGroup
from sweep.faults import ordered
from sweep.softmax import attention_of, part_of_each_token

TIMESTEPS = (60, 500)
# means of float32 numbers, which err by 1e-5 and a few roundings of logits below 20; batches round differently
CLOSE = 3e-5


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
        kinds=("regions",),
    )


def expected_rows(item, probabilities: torch.Tensor) -> dict[tuple[int, str, str], tuple]:
    """(tokens, entropy, mass, share) by head, part of the queries and part of the keys."""
    names, mask, ties = item.part_names, item.part_mask, item.counterparts
    edge = round(probabilities.shape[2] ** 0.5)
    token = part_of_each_token(mask, edge, len(names))
    pairs = set()
    if ties is not None:
        for row, column, which in np.argwhere(ties >= 0):
            pairs.add((int(mask[row, column]), int(mask.ravel()[ties[row, column, which]])))
    found = {}
    for head, p in enumerate(probabilities[0].numpy()):
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy = -np.nansum(p * np.log(p), -1)
        for own, queries in enumerate(names):
            rows = np.flatnonzero(token == own)
            keys = {name: token == number for number, name in enumerate(names)}
            related = [other for one, other in pairs if one == own]
            if ties is not None:
                keys["counterparts"] = np.isin(token, related)
            for name, inside in keys.items():
                number = None if not len(rows) else entropy[rows].mean()
                mass = None if not len(rows) else p[rows][:, inside].sum(-1).mean()
                share = inside.mean()
                if name == "counterparts" and not related:
                    mass = share = None
                found[head, queries, name] = (len(rows), number, mass, share)
    return found


def strings(table: pl.DataFrame) -> pl.DataFrame:
    return table.with_columns(pl.col(pl.Categorical).cast(pl.String))


def assert_close(found: float | None, expected: float | None, tolerance: float = CLOSE) -> None:
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert abs(found - expected) <= tolerance


def check_table(config: SweepConfig, table: pl.DataFrame, every: int = 1) -> None:
    """Compare with a plain loop, one item at a time."""
    task = load_task(config)
    sites = [site.name for site in headscope.Scope(task.denoiser).sites]
    rows = {
        (row["group"], row["item"], row["timestep"], row["site"], row["head"], row["queries"], row["keys"]): row
        for row in table.iter_rows(named=True)
    }
    assert len(rows) == len(table)
    compared = 0
    for group in open_items(config, task):
        for item in group.swept[::every]:
            prepared = task.prepare([item])
            for timestep in TIMESTEPS:
                inputs = task.noisy_inputs(prepared, timestep)
                for site, p in zip(sites, attention_of(task, inputs), strict=True):
                    for (head, queries, keys), (tokens, entropy, mass, share) in expected_rows(item, p).items():
                        row = rows[group.name, item.index, timestep, site, head, queries, keys]
                        assert row["tokens"] == tokens
                        assert (row["source_id"], row["split"], row["replicate"]) == (item.source_id, item.split, 0)
                        assert_close(row["entropy"], entropy)
                        assert_close(row["mass"], mass)
                        assert_close(row["share"], share, 1e-7)
                        compared += 1
    assert compared == (len(rows) if every == 1 else compared) > 0


def test_the_table_is_that_of_a_plain_loop(config, tmp_path):
    """And goes on after a file is gone; batches don't matter."""
    run = run_sweep(config, tmp_path / "run", progress=False, batch=8)
    assert run.tables == ("regions",)
    assert run.status().units == {"regions": (2, 2)}
    assert run.status().forwards == (44, 44)
    table = strings(run.table("regions").collect())
    assert table.columns == [
        *("item", "group", "source_id", "split", "replicate", "timestep", "site", "call", "head", "frame"),
        *("queries", "tokens", "entropy", "keys", "mass", "share"),
    ]
    assert len(table) == 22 * 2 * 2 * 4 * 5 * 6
    check_table(config, table, every=7)
    # the background has no counterparts
    tied = table.filter(pl.col("keys") == "counterparts")
    assert set(tied.filter(pl.col("mass").is_null())["queries"]) == {"background"}

    victim = min((run.path / "regions").glob("*.parquet"))
    whole = ordered(run, "regions")
    victim.unlink()
    assert Run.open(run.path).status().units == {"regions": (1, 2)}
    shown = CliRunner().invoke(app, ["sweep", "status", str(run.path)]).output
    line = next(line for line in shown.splitlines() if "regions" in line)
    assert [part for part in line.split() if part.isdecimal()] == ["1", "2"]
    again = run_sweep(config, tmp_path / "run", progress=False, batch=8)
    assert again.complete
    assert_frame_equal(ordered(again, "regions"), whole, check_exact=True)


@pytest.mark.parametrize("group", ["faces", "mirrored", "tiled", "odd_eyes"])
def test_every_kind_of_parts(config, tmp_path, group):
    """Parts without a token at 16 x 16, regions that are their own counterparts, and groups without ties."""
    config = replace(config, groups=(group,), items=1)
    run = run_sweep(config, tmp_path / "run", progress=False, batch=3)
    table = strings(run.table("regions").collect())
    assert ("counterparts" in set(table["keys"])) == (group != "faces")
    check_table(config, table)


@pytest.mark.full
def test_the_bundled_model_at_both_grids(config, tmp_path):
    bundled = SweepConfig(groups=("twins",)).model
    config = replace(config, model=bundled, groups=("twins", "eyes"), items=1)
    run = run_sweep(config, tmp_path / "run", progress=False)
    check_table(config, strings(run.table("regions").collect()))


def test_attention_to_a_text_has_entropies_and_no_masses(diffusion_directory, tmp_path):
    """Masks are brought to the model's size; sites whose keys are no image have a row for each part."""
    config = SweepConfig(
        model=diffusion_directory, groups=("twins",), items=1, splits=("confirm",), timesteps=(100,), observe=False,
        fills=(), kinds=("regions",),
    )  # fmt: skip
    run = run_sweep(config, tmp_path / "run", progress=False)
    table = strings(run.table("regions").collect())
    cross = table.filter(pl.col("site").str.ends_with("attn2"))
    assert cross["keys"].null_count() == cross["mass"].null_count() == cross["share"].null_count() == len(cross) > 0
    assert len(cross) == cross.select("site", "head", "queries").n_unique()
    there = cross.filter(pl.col("tokens") > 0)
    assert there["entropy"].null_count() == 0
    own = table.filter(pl.col("site").str.ends_with("attn1"), pl.col("keys") != "counterparts", pl.col("tokens") > 0)
    sums = own.group_by("site", "head", "queries").agg(pl.col("mass", "share").sum())
    # every pixel is of some part
    np.testing.assert_allclose(sums["mass"], 1, atol=1e-5)
    np.testing.assert_allclose(sums["share"], 1, atol=1e-6)
    (group,) = open_items(config, load_task(config))
    item = group.swept[0]
    assert item.image is not None
    assert item.image.shape == (16, 16, 3)
    mask, ties = item.part_mask, item.counterparts
    source = open_group("twins").item(item.index)
    # each of 16 x 16 pixels is the one at its middle: of pixels 0 and 1 the second
    assert source.part_mask is not None
    assert source.counterparts is not None
    assert mask is not None
    assert ties is not None
    assert np.array_equal(mask, source.part_mask[1::2, 1::2])
    for place in ((3, 4), (9, 2), (15, 15)):
        old = source.counterparts[2 * place[0] + 1, 2 * place[1] + 1]
        expected = [(number // 32 // 2) * 16 + number % 32 // 2 if number >= 0 else -1 for number in old]
        assert ties[place].tolist() == expected


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"groups": ("twins", "lfw")}, "'lfw/.*' of the group 'lfw' has none; expected groups with masks alone"),
        ({"groups": ("photographs",), "splits": ("discover",)}, "'photographs/.*' of the group 'photographs' has none"),
        ({"groups": ("mine=IMAGES",), "items": None}, "'mine/0' of the group 'mine' has none"),
    ],
)
def test_groups_without_masks_are_refused_by_name(config, tmp_path, options, named):
    from PIL import Image

    (tmp_path / "images").mkdir()
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{number}.png")
    groups = tuple(text.replace("IMAGES", str(tmp_path / "images")) for text in options["groups"])
    with pytest.raises(ValueError, match=f"kinds: got 'regions', which needs the part mask of every item, and {named}"):
        run_sweep(replace(config, **{"items": 1, **options, "groups": groups}), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_prompts_are_refused_too(diffusion_directory, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red fox\na house\n")
    config = SweepConfig(
        model=diffusion_directory, prompts=str(tmp_path / "prompts.txt"), splits=("confirm",), items=1, observe=False,
        timesteps=(100,), fills=(), generate_steps=1, kinds=("regions",),
    )  # fmt: skip
    with pytest.raises(ValueError, match="of the group 'prompts' has none"):
        run_sweep(config, tmp_path / "run", progress=False)


class Redrawn(ImageGroup):
    """The twins with masks that may change, of images that don't."""

    name, description = "twins", "twins"
    part_names = open_group("twins").part_names

    def __init__(self) -> None:
        super().__init__(2000)
        self.group = open_group("twins")
        self.moved = False

    def _source(self, index):
        return self.group._source(index)

    def _load(self, index):
        item = self.group.item(index)
        mask = np.roll(item.part_mask, self.moved, 0)
        return Item(
            item.group, index, item.source_id, item.split, item.image, item.caption, None, mask, item.counterparts
        )


@pytest.fixture
def redrawn(monkeypatch):
    group = Redrawn()
    monkeypatch.setattr(plan_items, "open_group", lambda *_: group)
    return group


def identity(config: SweepConfig) -> tuple[dict, set[str]]:
    plan = Opened(config, Execution()).plan
    return plan.identity, {unit.id for unit in plan.units}


SCORE = """
import math
from headscope.models import part_means

def glyph(edited, clean, target, inputs):
    assert len(inputs.items) == len(edited)
    return part_means((edited - target).square(), inputs.items, "glyph 1", missing=math.nan)

def keys(edited, clean, target, inputs):
    for item in inputs.items:
        if item.part_mask is not None:
            # a copy: what a score does to it, no other sees
            item.part_mask[:] = 1
    return [float(item.index) for item in inputs.items]
"""


@pytest.fixture
def scores(tmp_path, monkeypatch):
    (tmp_path / "part_scores.py").write_text(SCORE)
    monkeypatch.syspath_prepend(tmp_path)
    yield ("part_scores:keys", "part_scores:glyph")
    import sys

    sys.modules.pop("part_scores", None)


@pytest.mark.parametrize("looks", ["kind", "score", "neither"])
def test_runs_that_look_at_masks_are_known_by_them(config, redrawn, scores, tmp_path, looks):
    config = replace(config, items=1)
    options = {
        "kind": {},
        "score": {"kinds": (), "fills": ("zero",), "scores": (scores[1],)},
        "neither": {"kinds": (), "observe": True},
    }
    config = replace(config, **options[looks])
    before, ids = identity(config)
    assert ("parts" in before) == (looks != "neither")
    if looks == "kind":
        run_sweep(config, tmp_path / "run", progress=False)
    redrawn.moved = True
    after, others = identity(config)
    assert (before == after) == (ids == others) == (looks == "neither")
    assert before["groups"] == after["groups"]
    if looks == "kind":
        with pytest.raises(ValueError, match="parts"):
            run_sweep(config, tmp_path / "run", progress=False)


def test_masks_that_change_while_a_run_is_open_are_an_error(config, redrawn):
    (group,) = open_items(replace(config, items=1), load_task(config))
    item = group.swept[0]
    whole = item.part_mask
    assert whole is not None
    item._masks._kept.clear()
    assert np.array_equal(item.part_mask, whole)
    redrawn.moved = True
    item._masks._kept.clear()
    for name in ("part_mask", "counterparts"):
        with pytest.raises(ValueError, match=r"groups: the part mask of 'twins-.*' of 'twins' has changed since"):
            getattr(item, name)


def test_few_masks_stay_in_memory(config, monkeypatch):
    monkeypatch.setattr("headscope.sweep.plan.parts.KEPT_BYTES", 2 * (1024 + 3 * 4 * 1024))
    (group,) = open_items(replace(config, items=2), load_task(config))
    masks = group.swept[0]._masks
    source = open_group("twins")
    for item in (*group.swept, *group.swept):
        assert np.array_equal(item.part_mask, source.item(item.index).part_mask)
        assert len(masks._kept) == 2


def test_own_scores_see_every_row_s_item(ddpm_directory, tmp_path, scores):
    """One of them is the mean over a glyph's pixels, of a plain loop; another changes what it is given."""
    heads = [("mid_block.attentions.0", 1), ("mid_block.attentions.0", 3)]
    config = SweepConfig(
        model=ddpm_directory, groups=("twins", "lfw"), splits=("confirm",), items=3, timesteps=(100,), observe=False,
        fills=("zero",), scores=("loss", *scores), heads=tuple(heads),
    )  # fmt: skip
    run = run_sweep(config, tmp_path / "run", progress=False, batch=4)
    table = strings(run.table("ablations").collect())
    assert table["keys"].to_list() == table["item"].cast(pl.Float64).to_list()
    assert table.filter(pl.col("group") == "lfw")["glyph"].is_nan().all()
    task = load_task(config)
    scope = headscope.Scope(task.denoiser)
    twins, _ = open_items(config, task)
    for item in twins.swept:
        inputs = task.noisy_inputs(task.prepare([item]), 100)
        for site, head in heads:
            with torch.inference_mode(), scope.edit({site: [head]}):
                edited = task.predict(inputs)
            squared = (edited - inputs.target).double().square()[0].numpy()
            row = table.filter(pl.col("group") == "twins", pl.col("item") == item.index, pl.col("head") == head)
            expected = squared[:, item.part_mask == 1].mean()
            assert math.isclose(row["glyph"][0], expected, rel_tol=1e-5)
