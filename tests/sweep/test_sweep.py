"""A sweep's rows are the plain loop's numbers, and a killed run ends as an undisturbed one."""

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

from headscope.models import Scope
from headscope.sweep import Run, SweepConfig, run_sweep
from headscope.sweep.plan.items import load_task, open_items
from headscope.sweep.work import worker
from headscope.zoo import MODELS


def text_columns(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(pl.col(pl.Categorical).cast(pl.String))


def ordered(run: Run, kind: str) -> pl.DataFrame:
    frame = text_columns(run.table(kind).collect())
    keys = [name for name in frame.columns if frame[name].dtype not in (pl.Float32, pl.Float64)]
    return frame.sort(keys, nulls_last=True)


def zeroed_by_hand(unet, site, head):
    """Stock diffusers with the head's slice zeroed before the output projection."""
    width = slice(head * site.head_dim, (head + 1) * site.head_dim)

    def zero(module, args):
        hidden = args[0].clone()
        hidden[..., width] = 0
        return (hidden, *args[1:])

    return unet.get_submodule(site.name).to_out[0].register_forward_pre_hook(zero)


@pytest.mark.parametrize("pipeline", ["pixeldit", "unet", "ddpm_directory"])
def test_ablations_equal_the_plain_loop(pipeline, tmp_path, request):
    """Every head of models in pixel space: batched and with shared clean work. (Other families: test_families.)"""
    model = pipeline if pipeline in MODELS else request.getfixturevalue(pipeline)
    config = SweepConfig(
        model=model, groups=("faces",), splits=("confirm",), items=1, timesteps=(60, 500), fills=("zero",)
    )
    table = ordered(run_sweep(config, tmp_path / "run", progress=False, batch=5), "ablations")
    task = load_task(config)
    (group,) = open_items(config, task)
    sites = Scope(task.denoiser).sites
    assert len(table) == 2 * sum(site.heads for site in sites)
    with torch.inference_mode():
        for item in group.swept:
            for timestep in (60, 500):
                inputs = task.noisy_inputs(task.prepare([item]), timestep)
                clean = float(task.loss(inputs))
                for site in sites:
                    for head in range(site.heads):
                        handle = zeroed_by_hand(task.denoiser, site, head)
                        edited = float(task.loss(inputs))
                        handle.remove()
                        row = table.filter(
                            (pl.col("item") == item.index)
                            & (pl.col("timestep") == timestep)
                            & (pl.col("site") == site.name)
                            & (pl.col("head") == head)
                        )
                        assert len(row) == 1
                        assert row["clean"][0] == pytest.approx(clean, rel=1e-5)
                        assert row["edited"][0] == pytest.approx(edited, rel=1e-5)


def test_tables_have_the_columns_of_every_item(ddpm_directory, tmp_path):
    config = SweepConfig(
        model=ddpm_directory,
        groups=("faces", "lfw"),
        items=2,
        timesteps=(60,),
        fills=("mean", "zero"),
        reference_items=8,
    )
    run = run_sweep(config, tmp_path / "run", progress=False)
    for kind in ("observations", "ablations"):
        frame = text_columns(run.table(kind).collect())
        expected = {"item", "source_id", "group", "split", "timestep", "replicate", "site", "head"}
        assert expected <= set(frame.columns)
        assert frame.select("group", "split").unique().height == 4
    observed = run.table("observations").collect()
    assert observed.height == 8 * 8
    assert observed["entropy_mean"].is_between(0, np.log(256) + 1e-5).all()
    ablated = run.table("ablations").collect()
    assert ablated.height == 8 * 8 * 2
    assert ablated.select(pl.struct("item", "group", "head", "site", "fill").n_unique()).item() == ablated.height


def test_the_mean_fill_is_the_mean_over_reference_items(ddpm_directory, tmp_path):
    config = SweepConfig(
        model=ddpm_directory, groups=("lfw",), items=1, timesteps=(60,), fills=("mean",), reference_items=3
    )
    table = ordered(run_sweep(config, tmp_path / "run", progress=False), "ablations")
    task = load_task(config)
    (group,) = open_items(config, task)
    assert not {item.source_id for item in group.reference} & {item.source_id for item in group.swept}
    scope = Scope(task.denoiser)
    with torch.inference_mode():
        with scope.record("head_output") as reference:
            task.predict(task.noisy_inputs(task.prepare(list(group.reference)), 60))
        inputs = task.noisy_inputs(task.prepare([group.swept[0]]), 60)
        for site in scope.sites:
            with scope.edit({site.name: [1]}, fill=reference):
                edited = float(task.loss(inputs))
            row = table.filter(
                (pl.col("item") == group.swept[0].index) & (pl.col("site") == site.name) & (pl.col("head") == 1)
            )
            assert row["edited"][0] == pytest.approx(edited, rel=1e-5)


def test_batch_changes_rounding_only(ddpm_directory, tmp_path):
    config = SweepConfig(model=ddpm_directory, groups=("faces",), items=2, timesteps=(60,), reference_items=4)
    first = ordered(run_sweep(config, tmp_path / "a", progress=False, batch=64), "ablations")
    second = ordered(run_sweep(config, tmp_path / "b", progress=False, batch=3), "ablations")
    assert_frame_equal(first, second, rel_tol=1e-5, abs_tol=0.0)


def test_prompts_and_images_through_stable_diffusion(diffusion_directory, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red fox\na blue boat\na house\na tree\n")
    scope = Scope(load_task(SweepConfig(model=diffusion_directory, groups=("lfw",))).denoiser)
    heads = tuple((site.name, 0) for site in scope.sites)
    config = SweepConfig(
        model=diffusion_directory,
        prompts=str(tmp_path / "prompts.txt"),
        groups=("lfw",),
        items=1,
        timesteps=(100,),
        scores=("loss", "generate"),
        generate_steps=2,
        heads=heads,
        reference_items=2,
    )
    run = run_sweep(config, tmp_path / "run", progress=False)
    for kind in ("observations", "ablations", "generations"):
        frame = text_columns(run.table(kind).collect())
        assert set(frame["group"]) == {"prompts", "lfw"}
    generated = run.table("generations").collect()
    assert generated.height == 4 * len(heads) * 2
    assert (generated["distance"] >= 0).all()
    assert (generated["distance"] > 0).any()
    again = run_sweep(config, tmp_path / "again", progress=False)
    for kind in ("observations", "ablations", "generations"):
        assert_frame_equal(ordered(run, kind), ordered(again, kind), check_exact=True)


class Stop(BaseException):
    """Stands for whatever ends a run, as Ctrl-C does."""


@pytest.mark.parametrize("units", [0, 2])
def test_a_stopped_run_goes_on_where_it_was(ddpm_directory, tmp_path, units, monkeypatch):
    config = SweepConfig(
        model=ddpm_directory, groups=("faces",), items=3, timesteps=(60, 500), fills=("mean",), reference_items=8
    )
    expected = run_sweep(config, tmp_path / "whole", progress=False)
    run_unit = worker.compute_unit
    finished = []

    def stop_after(unit, context, advance):
        if len(finished) == units:
            raise Stop
        results = run_unit(unit, context, advance)
        finished.append(unit.id)
        return results

    monkeypatch.setattr(worker, "compute_unit", stop_after)
    with pytest.raises(Stop):
        run_sweep(config, tmp_path / "run", progress=False)
    done = list(finished)

    def count(unit, context, advance):
        assert unit.id not in done
        return run_unit(unit, context, advance)

    monkeypatch.setattr(worker, "compute_unit", count)
    run = run_sweep(config, tmp_path / "run", progress=False)
    for kind in ("observations", "ablations"):
        assert_frame_equal(ordered(run, kind), ordered(expected, kind), check_exact=True)
