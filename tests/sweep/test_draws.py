"""Several noise draws of every item: units and rows of their own, the numbers of sweeps of one draw each."""

import json
import re

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from typer.testing import CliRunner

from headscope.cli import app
from headscope.counter import LARGEST_SEED
from headscope.models import PixelTask
from headscope.sweep import Execution, HeadSet, Run, SweepConfig, run_sweep
from headscope.sweep.compute.estimate import estimate_sweep
from headscope.sweep.compute.opened import Opened
from headscope.sweep.store.sheet import write_contact_sheets
from sweep.faults import ordered

SITE = "mid_block.attentions.0"


@pytest.fixture
def fields(ddpm_directory):
    return {
        "model": ddpm_directory,
        "groups": ("twins",),
        "items": 3,
        "timesteps": (60, 500),
        "fills": ("mean", "zero"),
        "scores": ("loss", "generate"),
        "heads": ((SITE, 1),),
        "sets": (HeadSet("two", heads=((SITE, 0), (SITE, 2))),),
        "reference_items": 2,
        "generate_steps": 2,
        "attribute": True,
        "cotangents": 1,
        "kinds": ("regions",),
    }


REPEATED = ("observations", "attributions", "ablations", "set_ablations", "generations", "set_generations", "regions")


def test_draws_are_the_sweeps_of_their_seeds(fields, tmp_path):
    """But for the reference of the mean fill, which is the first draw's."""
    fields |= {"items": 1, "timesteps": (60,)}
    both = run_sweep(SweepConfig(**fields, seed=5, draws=2), tmp_path / "both", progress=False, batch=8)
    assert both.verify().sound
    assert set(both.tables) == set(REPEATED)
    for seed in (5, 6):
        alone = run_sweep(SweepConfig(**fields, seed=seed), tmp_path / str(seed), progress=False, batch=8)
        for kind in REPEATED:
            found, expected = (ordered(run, kind) for run in (both, alone))
            assert set(expected["replicate"]) == {seed}
            found = found.filter(pl.col("replicate") == seed)
            assert len(found) == len(expected)
            if seed == 6 and "fill" in found.columns:
                found, expected = (frame.filter(pl.col("fill") == "zero") for frame in (found, expected))
            assert_frame_equal(found, expected, check_exact=True)
    draws = ordered(both, "ablations").partition_by("replicate")
    assert not (draws[0]["clean"] == draws[1]["clean"]).any()


def test_one_draw_is_what_it_was(fields):
    """Its configuration and identity don't mention draws, whose units come between those of the first."""
    one, three = (Opened(SweepConfig(**fields, seed=4, draws=draws), Execution()).plan for draws in (1, 3))
    assert "draws" not in one.config.as_dict()
    assert "draws" not in one.identity
    assert three.identity["draws"] == 3
    assert SweepConfig.from_json(json.loads(json.dumps(three.config.as_dict()))) == three.config
    assert SweepConfig.from_json(json.loads(json.dumps(one.config.as_dict()))) == one.config
    assert {unit.replicate for unit in one.units} == {4}
    assert len({unit.id for unit in three.units}) == len(three.units)
    for kind in ("reference", *REPEATED):
        alone, drawn = ([unit for unit in plan.units if unit.kind == kind] for plan in (one, three))
        replicates = (4, 5, 6) if kind in REPEATED else (4,)
        assert [unit.replicate for unit in drawn] == list(replicates) * len(alone)
        assert [unit.items for unit in drawn[:: len(replicates)]] == [unit.items for unit in alone]
    # references are read by units of all draws
    assert all(three.needs(unit) for unit in three.units if unit.kind == "ablations")


def test_estimates_and_status_count_every_draw(fields, tmp_path):
    plain = {**fields, "scores": ("loss",), "attribute": False, "kinds": (), "generate_steps": 10, "sets": ()}
    del plain["cotangents"]
    one, two = (estimate_sweep(SweepConfig(**plain, draws=draws), Execution(rows=4)) for draws in (1, 2))
    for kind, (units, forwards) in one.units.items():
        assert two.units[kind] == ((units, forwards) if kind == "reference" else (2 * units, 2 * forwards))
    run = run_sweep(SweepConfig(**plain, draws=2), tmp_path / "run", progress=False, batch=4)
    status = run.status()
    assert status.units == {kind: (units, units) for kind, (units, _) in two.units.items()}
    assert status.forwards == (two.forwards, two.forwards)
    victim = next((run.path / "ablations").glob("*.parquet"))
    before = ordered(run, "ablations")
    victim.unlink()
    assert not Run.open(run.path).complete
    assert_frame_equal(
        ordered(run_sweep(SweepConfig(**plain, draws=2), run.path, progress=False, batch=4), "ablations"), before
    )


def test_items_are_encoded_once_for_all_draws(fields, tmp_path, monkeypatch):
    """One process, units in their order: each unit's items once, whatever the timesteps and draws."""
    encoded = []
    prepare = PixelTask.prepare

    def counted(self, items):
        encoded.append(tuple(item.key for item in items))
        return prepare(self, items)

    monkeypatch.setattr(PixelTask, "prepare", counted)
    config = SweepConfig(
        model=fields["model"], groups=("twins",), items=3, timesteps=(60, 500), observe=False, fills=("zero",),
        heads=((SITE, 1),), draws=3,
    )  # fmt: skip
    run_sweep(config, tmp_path / "run", progress=False, batch=4)
    # 6 items in units of 4 and 2, each at two timesteps and three draws; the first also as an example to learn from
    assert len(encoded) == len(set(encoded)) <= 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"draws": 0}, "draws: got 0, expected at least 1"),
        ({"draws": 2.0}, "draws: got 2.0, expected a whole number"),
        (
            {"seed": LARGEST_SEED, "draws": 2},
            f"draws: got 2 from the seed {LARGEST_SEED} on, expected at most 1:",
        ),
    ],
)
def test_draws_that_can_t_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SweepConfig(groups=("faces",), **fields)
    assert SweepConfig(groups=("faces",), seed=LARGEST_SEED).replicates == range(LARGEST_SEED, LARGEST_SEED + 1)


def test_the_command_takes_draws(ddpm_directory, tmp_path):
    arguments = ["sweep", "--model", ddpm_directory, "--group", "lfw", "--items", "1", "--timesteps", "60"]
    result = CliRunner().invoke(
        app, [*arguments, "--no-ablation", "--draws", "2", "--seed", "7", "--quiet", "--out", str(tmp_path / "run")]
    )
    assert result.exit_code == 0, result.output
    assert set(Run.open(tmp_path / "run").table("observations").collect()["replicate"]) == {7, 8}


def test_contact_sheets_show_the_first_draw(fields, tmp_path):
    asked = {**fields, "scores": ("generate",), "attribute": False, "kinds": (), "observe": False, "fills": ("zero",)}
    del asked["cotangents"], asked["reference_items"]
    one, two = (run_sweep(SweepConfig(**asked, draws=draws), tmp_path / str(draws), progress=False) for draws in (1, 2))
    for before, after in zip(write_contact_sheets(one), write_contact_sheets(two), strict=True):
        assert before.name == after.name
        assert before.read_bytes() == after.read_bytes()
