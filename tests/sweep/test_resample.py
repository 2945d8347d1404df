"""A removed head's output replaced by that of another item: which one it is, and the plain loop's numbers."""

from collections import Counter

import numpy as np
import polars as pl
import pytest
import torch

from headscope import HeadEdit
from headscope.models import Scope
from headscope.sweep import HeadSet, SweepConfig, run_sweep
from headscope.sweep.compute.donors import donor_of
from headscope.sweep.plan.config import SCORES
from headscope.sweep.plan.items import load_task, open_items
from sweep.faults import ordered

SITE = "mid_block.attentions.0"
PAIR = HeadSet("two", heads=((SITE, 0), (SITE, 2)))
HALF = HeadSet("half", heads=((SITE, 3),), keep=0.5)
FLAT = HeadSet("flat", heads=((SITE, 0),), temperature=2.0)


@pytest.fixture
def config(ddpm_directory):
    return SweepConfig(
        model=ddpm_directory,
        groups=("lfw",),
        items=3,
        timesteps=(60, 500),
        observe=False,
        fills=("zero", "resample"),
        heads=((SITE, 1), ("down_blocks.1.attentions.0", 2)),
        sets=(PAIR, HALF, FLAT),
        reference_items=5,
        seed=2,
        draws=2,
    )


def test_donors_are_drawn_by_item_and_draw():
    drawn = Counter(donor_of(f"faces/{index}", 0, 5) for index in range(1000))
    assert set(drawn) == set(range(5))
    # 1000 draws of 1 in 5: 200 and a standard deviation of 12.6
    assert max(abs(count - 200) for count in drawn.values()) < 5 * 12.7
    by_draw = [[donor_of(f"faces/{index}", draw, 60) for index in range(20)] for draw in (0, 1)]
    assert by_draw[0] != by_draw[1]
    assert donor_of("faces/3", 0, 1) == 0


@pytest.mark.parametrize("batch", [2, pytest.param(16, marks=pytest.mark.full)])
def test_rows_are_the_plain_loop_s(config, tmp_path, batch):
    run = run_sweep(config, tmp_path / "run", progress=False, batch=batch)
    task = load_task(config)
    (group,) = open_items(config, task)
    scope = Scope(task.denoiser)
    singles, sets = ordered(run, "ablations"), ordered(run, "set_ablations")
    checked = 0
    with torch.inference_mode():
        for item in group.swept:
            for replicate in (2, 3):
                donor = group.reference[donor_of(item.key, replicate, 5)]
                assert donor.source_id != item.source_id
                for timestep in config.timesteps:
                    with scope.record("head_output", reduce=None) as recorded:
                        task.predict(task.noisy_inputs(task.prepare([donor]), timestep, replicate))
                    inputs = task.noisy_inputs(task.prepare([item]), timestep, replicate)
                    here = (
                        (pl.col("item") == item.index)
                        & (pl.col("timestep") == timestep)
                        & (pl.col("replicate") == replicate)
                        & (pl.col("fill") == "resample")
                    )
                    rows = {
                        (site, (head,), 0.0): singles.filter(here, pl.col("site") == site, pl.col("head") == head)
                        for site, head in config.heads
                    }
                    rows[SITE, (0, 2), 0.0] = sets.filter(here, pl.col("edit") == "two")
                    rows[SITE, (3,), 0.5] = sets.filter(here, pl.col("edit") == "half")
                    for (site, heads, keep), found in rows.items():
                        gate = torch.ones(1, scope.site(site).heads)
                        gate[0, list(heads)] = keep
                        # of one sample, [1, heads, tokens, dim]
                        fill = recorded.samples("head_output", site, 0, float(timestep))
                        with scope.edit({site: HeadEdit(gate, fill=fill)}):
                            edited = float(task.loss(inputs))
                        assert found["edited"].to_list() == pytest.approx([edited], rel=1e-5)
                        checked += 1
    assert checked == 6 * 2 * 2 * 4
    both = singles.pivot("fill", index=["item", "timestep", "replicate", "site", "head"], values="edited")
    assert (both["zero"] != both["resample"]).all()


def test_forwards_of_donors_are_counted(config, tmp_path, advanced):
    """One for each item, draw and timestep, whatever the edits; none where nothing is replaced."""
    run = run_sweep(config, tmp_path / "run", progress=False, batch=4)
    assert advanced == {unit["id"]: unit["forwards"] for unit in run.units}
    rows = {unit["kind"]: unit["forwards"] // unit["items"] for unit in run.units}
    # the clean one, the donor's, two heads or two sets with two fills, and the set that fills leave as it is
    assert rows == {"ablations": 1 + 1 + 2 * 2, "set_ablations": 1 + 1 + 2 * 2 + 1}
    flat = SweepConfig(**{**config.as_dict(), "heads": (), "sets": (FLAT,)})
    run = run_sweep(flat, tmp_path / "flat", progress=False, batch=4)
    assert {unit["forwards"] // unit["items"] for unit in run.units} == {2}


def test_attributions_are_to_the_donor_s_output(config, tmp_path):
    """g and c of the scope with the donor's outputs as fill, item by item."""
    asked = {**config.as_dict(), "items": 2, "draws": 1, "attribute": True, "cotangents": 2, "sets": ()}
    config = SweepConfig(**{**asked, "scores": (), "fills": ("resample",)})
    run = run_sweep(config, tmp_path / "run", progress=False, batch=3)
    found = ordered(run, "attributions")
    assert all(unit["forwards"] == unit["items"] * 2 * (3 + 2 * 2 + 1) for unit in run.units)
    task = load_task(config)
    (group,) = open_items(config, task)
    scope = Scope(task.denoiser)
    for item in group.swept:
        donor = group.reference[donor_of(item.key, 2, 5)]
        with torch.no_grad(), scope.record("head_output", reduce=None) as recorded:
            for timestep in config.timesteps or ():
                task.predict(task.noisy_inputs(task.prepare([donor]), timestep, 2))
        expected = scope.attribute(
            task, [item], config.timesteps, sites=[SITE, "down_blocks.1.attentions.0"], cotangents=2,
            fill=recorded.take([0]), replicate=2,
        )  # fmt: skip
        for row, (site, head) in enumerate(expected.heads):
            for column, timestep in enumerate(config.timesteps):
                (one,) = found.filter(
                    pl.col("item") == item.index,
                    pl.col("timestep") == timestep,
                    pl.col("site") == site,
                    pl.col("head") == head,
                ).iter_rows(named=True)
                for name in ("g", "c"):
                    number = getattr(expected, name)[0, column, row]
                    scale = np.abs(getattr(expected, name)).max()
                    assert one[name] == pytest.approx(number, abs=1e-4 * scale)


def test_prompts_take_the_outputs_of_other_prompts(diffusion_directory, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red fox\na blue boat\na house\na tree\n")
    site = "mid_block.attentions.0.transformer_blocks.0.attn2"
    config = SweepConfig(
        model=diffusion_directory, prompts=str(tmp_path / "prompts.txt"), items=1, timesteps=(100,), observe=False,
        fills=("resample", "mean"), heads=((site, 1),), generate_steps=1, scores=("loss",),
    )  # fmt: skip
    run = run_sweep(config, tmp_path / "run", progress=False)
    found = ordered(run, "ablations")
    assert len(found) == 4
    assert found["edited"].is_finite().all()
    assert (found["edited"] != found["clean"]).any()


def test_generations_are_refused():
    assert "generate" in SCORES
    with pytest.raises(ValueError, match="fills: got resample with the score generate, expected another fill"):
        SweepConfig(groups=("faces",), fills=("resample",), scores=("loss", "generate"))
