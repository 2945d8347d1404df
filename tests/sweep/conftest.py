"""Tiny pipelines on disk, as `--model DIR` takes them, one of each family that sweeps know; and a finished run."""

from collections import Counter
from pathlib import Path

import pytest

import tiny
from headscope.sweep import SweepConfig, run_sweep
from headscope.sweep.plan.sets import HeadSet
from headscope.sweep.plan.units import KINDS
from headscope.sweep.work import worker

SITE = "mid_block.attentions.0.transformer_blocks.0.attn1"

FAMILIES = {
    "stable_diffusion": tiny.stable_diffusion,
    "stable_diffusion_xl": tiny.stable_diffusion_xl,
    "stable_diffusion_3": lambda: tiny.stable_diffusion_3(layers=3),
    "flux": lambda: tiny.flux(double=2, single=2, guidance=True),
}


@pytest.fixture(scope="session")
def family_directory(tmp_path_factory):
    """The directory of a family's pipeline, saved when it is first asked for."""
    saved = {}

    def directory(family: str) -> str:
        if family not in saved:
            path = tmp_path_factory.mktemp(family)
            FAMILIES[family]().save_pretrained(path)
            saved[family] = str(path)
        return saved[family]

    return directory


@pytest.fixture(scope="session")
def run_of_every_kind(diffusion_directory, tmp_path_factory) -> Path:
    """A finished run with a unit of every kind."""
    folder = tmp_path_factory.mktemp("damage")
    (folder / "prompts.txt").write_text("a red fox\na house\n")
    config = SweepConfig(
        model=diffusion_directory,
        prompts=str(folder / "prompts.txt"),
        splits=("confirm",),
        items=1,
        timesteps=(100,),
        fills=("mean",),
        scores=("loss", "generate"),
        heads=((SITE, 0),),
        sets=(HeadSet("two", heads=((SITE, 0), (SITE, 1))),),
        reference_items=1,
        generate_steps=1,
        attribute=True,
        cotangents=1,
    )
    run = run_sweep(config, folder / "run", progress=False)
    # a kind that runs without being named needs a setting above that makes it run
    assert {unit["kind"] for unit in run.units} == {name for name, kind in KINDS.items() if not kind.optional}
    return run.path


@pytest.fixture
def advanced(monkeypatch) -> Counter:
    """The forwards that units say they made while they were computed, by unit id."""
    made = Counter()
    compute = worker.compute_unit

    def counted(unit, context, advance):
        def add(forwards):
            made[unit.id] += forwards
            advance(forwards)

        return compute(unit, context, add)

    monkeypatch.setattr(worker, "compute_unit", counted)
    return made
