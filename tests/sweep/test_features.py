"""Features in sweeps: their table, losses over their pixels alone, and those of the user's own."""

import importlib
import math
import sys
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from typer.testing import CliRunner

import headscope
from headscope.cli import app
from headscope.features import feature_maps, on_tokens, pixels_of, resolved
from headscope.study.further import further_scores
from headscope.sweep import Execution, HeadSet, Run, SweepConfig, run_sweep
from headscope.sweep.compute.opened import Opened
from headscope.sweep.plan.items import load_task, open_items

COLUMNS = [
    *("item", "group", "source_id", "split", "replicate"),
    *("feature", "grid_height", "grid_width", "map", "resolved"),
]
ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1"
OWN = """
def dark(item):
    return {scale} * item.image.astype(float).sum(2) < 200

def reddest(item):
    return item.image[..., 0]

def narrow(item):
    return item.image[..., 0, :1]

def broken(item):
    return item.nothing
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a module of the user's, and let Python forget the one that it has imported."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(scale: int = 1) -> None:
        (tmp_path / "my_features.py").write_text(OWN.format(scale=scale))
        sys.modules.pop("my_features", None)
        importlib.invalidate_caches()

    write()
    yield write
    sys.modules.pop("my_features", None)


@pytest.fixture
def config(ddpm_directory):
    return SweepConfig(
        model=ddpm_directory,
        groups=("twins", "lfw"),
        items=2,
        timesteps=(60, 500),
        observe=False,
        fills=(),
        draws=2,
        kinds=("features",),
    )


def rows_of(run: Run, kind: str = "features") -> pl.DataFrame:
    table = run.table(kind).collect().with_columns(pl.col(pl.Categorical).cast(pl.String))
    return table.sort([name for name in table.columns if name != "map" and not table[name].dtype.is_float()])


def test_a_row_for_every_item_grid_and_feature(config, tmp_path, write):
    """Without a forward; of the first draw alone."""
    config = replace(config, features=("my_features:dark", "my_features:reddest"))
    run = run_sweep(config, tmp_path / "run", progress=False)
    assert run.status().units == {"features": (2, 2)}
    assert run.status().forwards == (0, 0)
    assert run.complete
    table = rows_of(run)
    assert run.table("features").collect().columns == COLUMNS
    rows = {(row["group"], row["item"], row["feature"]): row for row in table.to_dicts()}
    assert len(rows) == len(table)
    own = {"dark": sys.modules["my_features"].dark, "reddest": sys.modules["my_features"].reddest}
    compared = 0
    for group in open_items(config, load_task(config)):
        for item in group.swept:
            for name, values in feature_maps(item, own).items():
                row = rows[group.name, item.index, name]
                assert (row["source_id"], row["split"], row["replicate"]) == (item.source_id, item.split, 0)
                assert (row["grid_height"], row["grid_width"]) == (16, 16)
                # tokens are blocks of 2 x 2 pixels
                blocks = values.reshape(16, 2, 16, 2).mean((1, 3))
                np.testing.assert_allclose(row["map"], blocks.ravel(), rtol=1e-6, atol=1e-7)
                if values.min() == values.max():
                    assert row["resolved"] is None
                else:
                    assert row["resolved"] == pytest.approx(blocks.var() / values.var(), rel=1e-6)
                compared += 1
    assert compared == len(table) == 4 * (7 + 6 + 2) + 4 * (7 + 2)
    # grey images have no colour, and no parts
    grey = table.filter(pl.col("group") == "lfw")
    assert set(grey.filter(pl.col("resolved").is_null())["feature"]) == {
        *("red against green", "yellow against blue", "saturation")
    }
    min((run.path / "features").glob("*.parquet")).unlink()
    assert Run.open(run.path).status().units == {"features": (1, 2)}
    assert not Run.open(run.path).complete
    assert_frame_equal(rows_of(run_sweep(config, run.path, progress=False)), table, check_exact=True)


def test_every_grid_of_a_model(diffusion_directory, tmp_path):
    """Of latents: the grids divide the image, whatever its size."""
    config = SweepConfig(
        model=diffusion_directory, groups=("faces",), items=1, splits=("confirm",), timesteps=(100,), observe=False,
        fills=(), kinds=("features", "key_mass"),
    )  # fmt: skip
    run = run_sweep(config, tmp_path / "run", progress=False)
    table, masses = rows_of(run), run.table("key_mass").collect()
    grids = set(masses.select("grid_height", "grid_width").unique().rows())
    assert set(table.select("grid_height", "grid_width").unique().rows()) == grids
    (group,) = open_items(config, load_task(config))
    (item,) = group.swept
    for grid in grids:
        values = feature_maps(item)["edge"]
        (row,) = table.filter(
            pl.col("feature") == "edge", pl.col("grid_height") == grid[0], pl.col("grid_width") == grid[1]
        ).to_dicts()
        np.testing.assert_allclose(row["map"], on_tokens(values, grid).ravel(), rtol=1e-6)
        assert row["resolved"] == pytest.approx(resolved(values, grid), rel=1e-6)


def test_images_of_prompts_have_features(diffusion_directory, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red fox\na house\n")
    config = SweepConfig(
        model=diffusion_directory, prompts=str(tmp_path / "prompts.txt"), splits=("confirm",), items=1, observe=False,
        timesteps=(100,), fills=("zero",), scores=("loss", "on edge"), heads=((ATTENTION, 0),),
        generate_steps=1, kinds=("features", "key_mass"),
    )  # fmt: skip
    run = run_sweep(config, tmp_path / "run", progress=False)
    assert len(rows_of(run)) > 0
    assert rows_of(run, "ablations")["edited_on_edge"].is_finite().all()


def test_damaged_rows_are_named_and_computed_again(config, tmp_path):
    config = replace(config, groups=("twins",))
    run = run_sweep(config, tmp_path / "run", progress=False)
    whole = rows_of(run)
    (file,) = (run.path / "features").glob("*.parquet")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)
    assert len(Run.open(run.path).verify().torn) == 1
    with pytest.raises(ValueError, match=file.stem[:12]):
        Run.open(run.path).table("features").collect()
    Run.open(run.path).mend()
    assert_frame_equal(rows_of(run_sweep(config, run.path, progress=False)), whole, check_exact=True)


# losses over a feature's pixels

SITE = "mid_block.attentions.0"
SCORED = ("loss", "on edge", "on part glyph 1", "on counterpart", "on dark", "on saturation")


@pytest.fixture
def ablating(config, write):
    return replace(
        config,
        items=1,
        fills=("zero", "uniform"),
        scores=SCORED,
        heads=((SITE, 0), (SITE, 2)),
        sets=(HeadSet("two", heads=((SITE, 1), (SITE, 3))),),
        kinds=(),
        features=("my_features:dark",),
    )


def test_losses_over_the_pixels_of_features(ablating, tmp_path):
    """Of single heads and sets, against a plain loop; NaN, and a share of 0, where an item has no such pixel."""
    run = run_sweep(ablating, tmp_path / "run", progress=False, batch=3)
    task = load_task(ablating)
    scope = headscope.Scope(task.denoiser)
    dark = {"dark": sys.modules["my_features"].dark}
    tables = {"ablations": rows_of(run, "ablations"), "set_ablations": rows_of(run, "set_ablations")}
    edits = {"ablations": {0: [0], 2: [2]}, "set_ablations": {"two": [1, 3]}}
    compared = 0
    for group in open_items(ablating, task):
        for item in group.swept:
            inside = {name.removeprefix("on "): pixels_of(item, name.removeprefix("on "), dark) for name in SCORED[1:]}
            assert inside["part glyph 1"].any() == (group.name == "twins")
            assert not (inside["saturation"].any() and group.name == "lfw")
            prepared = task.prepare([item])
            for timestep in (60, 500):
                for replicate in (0, 1):
                    inputs = task.noisy_inputs(prepared, timestep, replicate)

                    def errors(inputs=inputs) -> np.ndarray:
                        with torch.inference_mode():
                            found = task.predict(inputs).double() - inputs.target.double()
                        return found.square().mean(1)[0].numpy()

                    clean = errors()
                    for kind, table in tables.items():
                        for edit, heads in edits[kind].items():
                            for fill, removed in (("zero", None), ("uniform", "uniform")):
                                with scope.edit({SITE: heads}, fill=removed):
                                    edited = errors()
                                (row,) = table.filter(
                                    pl.col("head" if kind == "ablations" else "edit") == edit,
                                    pl.col("group") == group.name,
                                    pl.col("item") == item.index,
                                    pl.col("fill") == fill,
                                    pl.col("timestep") == timestep,
                                    pl.col("replicate") == replicate,
                                ).to_dicts()
                                for name, mask in inside.items():
                                    column = name.replace(" ", "_")
                                    assert row[f"share_on_{column}"] == mask.mean()
                                    for what, error in (("clean", clean), ("edited", edited)):
                                        found = row[f"{what}_on_{column}"]
                                        if mask.any():
                                            assert found == pytest.approx(error[mask].mean(), rel=1e-5)
                                        else:
                                            assert math.isnan(found)
                                        compared += 1
    assert compared == 4 * 2 * 2 * (4 + 2) * 5 * 2
    # what a feature's pixels lose is part of what all do
    whole = tables["ablations"]["clean"].to_numpy()
    parts = tables["ablations"]
    inside = (parts["clean_on_edge"] * parts["share_on_edge"]).to_numpy()
    assert (inside <= whole * (1 + 1e-12)).all()
    # they are no scores of the user's own
    assert [score.name for score in further_scores(tables)] == []


def test_places_of_latents(diffusion_directory, tmp_path):
    """The error is of 8 x 8 latents, of each of which the features say what they say of its pixels."""
    config = SweepConfig(
        model=diffusion_directory, groups=("twins",), items=1, splits=("confirm",), timesteps=(100,), observe=False,
        fills=("zero",), scores=("on luminance", "on object"),
        heads=((ATTENTION, 0),),
    )  # fmt: skip
    run = run_sweep(config, tmp_path / "run", progress=False)
    (row,) = run.table("ablations").collect().to_dicts()
    task = load_task(config)
    (group,) = open_items(config, task)
    (item,) = group.swept
    inputs = task.noisy_inputs(task.prepare([item]), 100)
    height, width = inputs.target.shape[2:]
    assert (height, width) != (task.image_size, task.image_size)
    with torch.inference_mode():
        error = (task.predict(inputs).double() - inputs.target.double()).square().mean(1)[0].numpy()
    for name in ("luminance", "object"):
        mask = pixels_of(item, name, grid=(height, width))
        assert row[f"share_on_{name}"] == mask.mean() > 0
        assert row[f"clean_on_{name}"] == pytest.approx(error[mask].mean(), rel=1e-5)


def test_an_error_elsewhere_is_none_of_a_feature_s(ablating):
    """Selected, not weighted: 0 times infinity would be NaN."""
    from headscope.sweep.compute.features import FeatureErrors

    (group, _) = open_items(ablating, load_task(ablating))
    item = group.swept[0]
    target = torch.zeros(1, 3, 32, 32)
    inside = torch.from_numpy(pixels_of(item, "object"))
    prediction = torch.where(inside, 2.0, math.inf).expand(1, 3, 32, 32)
    (found,) = FeatureErrors([item], ["object"], {}, target).of(prediction, target, [0]).values()
    assert found.tolist() == [4.0]
    assert found.dtype == torch.float64
    assert FeatureErrors([item], [], {}, target).of(prediction, target, [0]) == {}


# features of the user's own, and what is refused


def test_changed_code_is_another_run(config, tmp_path, write):
    config = replace(config, features=("my_features:dark",), groups=("lfw",))
    run_sweep(config, tmp_path / "run", progress=False)
    write(2)
    with pytest.raises(ValueError, match=r"code of my_features:dark: changed since"):
        run_sweep(config, tmp_path / "run", progress=False)
    write(1)
    run_sweep(config, tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("narrow", r"features: narrow gave of 'lfw/.*' an array \[32, 1\], expected \[32, 32\], as the image has"),
        ("broken", "features: my_features:broken raised AttributeError: .*nothing"),
    ],
)
def test_a_function_that_gives_no_map_fails_its_unit_by_name(config, tmp_path, write, function, said):
    config = replace(config, features=(f"my_features:{function}",), groups=("lfw",))
    with pytest.raises((ValueError, RuntimeError), match=said):
        run_sweep(config, tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"scores": ("on edges",)}, "scores: got 'on edges', expected on and one of edge, edge orientation"),
        ({"scores": ("on ",)}, "scores: got 'on ', expected on and one of edge"),
        ({"scores": ("on part ",)}, "scores: got 'on part ', expected on and one of edge"),
        ({"scores": ("on part a b", "on part a_b")}, "scores: got on part a b, part a_b, expected features whose"),
        ({"scores": ("on edge", "on edge")}, "scores: got on edge, edge, expected features whose columns differ"),
        ({"features": ("my_features:dark",), "kinds": ()}, "features: got 'dark', expected the kind 'features'"),
        ({"features": ("dark",)}, "features: got 'dark', expected module:function"),
        ({"features": ("my_features:edge",)}, "features: got 'my_features:edge', expected module:function, of another"),
        ({"features": ("a:dark", "b:dark")}, "features: got 'a:dark', expected a function whose name isn't taken"),
        ({"features": ("my_features",)}, "features: got 'my_features', expected module:function"),
        ({"scores": ("my_scores:clean_on_edge",)}, "scores: got 'my_scores:clean_on_edge', expected a function whose"),
    ],
)
def test_what_can_not_be_is_refused(config, fields, said):
    with pytest.raises(ValueError, match=said):
        replace(config, **{"fills": ("zero",), **fields})


def test_features_that_nothing_has_are_refused_before_work_starts(config, tmp_path):
    for name in ("part nose", "object", "counterpart"):
        asked = replace(config, kinds=(), fills=("zero",), scores=(f"on {name}",), groups=("lfw",))
        with pytest.raises(ValueError, match=f"scores: got 'on {name}', which no item of lfw has anything of"):
            run_sweep(asked, tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match=r"features: got 'my_nothing:dark', expected an importable module:function"):
        run_sweep(replace(config, features=("my_nothing:dark",)), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_runs_are_known_by_what_they_look_at(config, write):
    """By masks where features are looked at; and those without any are what they were before."""
    plain = replace(config, kinds=(), observe=True)
    assert "features" not in plain.as_dict()
    assert "parts" not in Opened(plain, Execution()).plan.identity
    assert "twins" in Opened(config, Execution()).plan.identity["parts"]
    scored = replace(plain, fills=("zero",), scores=("on edge",))
    assert "twins" in Opened(scored, Execution()).plan.identity["parts"]
    own = replace(config, features=("my_features:dark",))
    assert "code of my_features:dark" in Opened(own, Execution()).plan.identity
    assert SweepConfig.from_json(own.as_dict()) == own


def test_on_the_command_line(ddpm_directory, tmp_path, write):
    arguments = [
        *(
            "sweep",
            "--model",
            ddpm_directory,
            "--group",
            "twins",
            "--items",
            "1",
            "--timesteps",
            "60",
            "--fill",
            "zero",
        ),
        *("--score", "on edge", "--score", "on dark", "--feature", "my_features:dark", "--kind", "features"),
        *("--out", str(tmp_path / "run"), "--quiet"),
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    run = Run.open(tmp_path / "run")
    assert {"edited_on_edge", "share_on_dark"} <= set(run.table("ablations").collect().columns)
    assert "dark" in run.table("features").collect()["feature"].unique().to_list()
