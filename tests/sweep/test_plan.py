"""What is asked, from Python or TOML, and the units it becomes."""

import json
import math
import tarfile
from functools import wraps

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from headscope import HeadEdit
from headscope.models import Scope
from headscope.sweep import Execution, HeadSet, Run, SweepConfig, run_sweep
from headscope.sweep.compute.estimate import estimate_sweep
from headscope.sweep.compute.opened import Opened
from headscope.sweep.plan.items import load_task, open_items
from headscope.sweep.plan.units import UNITS_PER_GROUP, chunks
from headscope.sweep.store.sheet import write_contact_sheets
from headscope.sweep.work.executors.member import Silent
from headscope.sweep.work.worker import work

PLAN = """
model = {model!r}
groups = ["faces"]
items = 2
timesteps = [60, 500]
fills = ["zero"]
scores = ["loss", "distance", "x0"]
sites = ["mid_block.*"]

[[sets]]
name = "middle"
sites = ["mid_block.*"]
keep = 0.5

[[sets]]
name = "flat"
sites = ["mid_block.*"]
temperature = 2
key_bias = [-inf, 0.5]
key_scale = [1, 0]
"""


def test_a_toml_file_is_a_configuration(ddpm_directory, tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN.format(model=ddpm_directory))
    config = SweepConfig.from_toml(tmp_path / "plan.toml")
    assert config == SweepConfig(
        model=ddpm_directory,
        groups=("faces",),
        items=2,
        timesteps=(60, 500),
        fills=("zero",),
        scores=("loss", "distance", "x0"),
        sites=("mid_block.*",),
        sets=(
            HeadSet("middle", sites=("mid_block.*",), keep=0.5),
            HeadSet("flat", sites=("mid_block.*",), temperature=2.0, key_bias=(-np.inf, 0.5), key_scale=(1.0, 0.0)),
        ),
    )
    assert [chosen.gate for chosen in config.sets] == [0.5, 1.0]
    assert SweepConfig.from_json(json.loads(json.dumps(config.as_dict()))) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "groups = ['faces']\nitemz = 3",
            r"plan\.toml: itemz: unknown key, expected 'items', or another of model, groups",
        ),
        (
            "groups = ['faces']\n[[sets]]\nname = 'a'\nsites = ['*']\nkeeps = 1",
            r"sets\.0\.keeps: unknown key, expected 'keep', or another of name",
        ),
        ("groups = ['faces']\nitems = 'many'", r"plan\.toml: items: got 'many', expected a whole number"),
        ("groups = ['faces']\nitems = 0", "items: got 0, expected at least 1"),
        ("groups = ['faces']\ntimesteps = [5, 'six']", r"timesteps\.1: got 'six'"),
        ("groups = ['faces']\n[[sets]]\nname = 'a'\nsites = ['*']\ntemperature = 0", "'a': temperature: got 0.0"),
        ("groups = ['faces']\n[[sets]]\nname = 'a'\nsites = ['*']\nkey_bias = [inf]", "'a': key_bias: got inf"),
        (
            "groups = ['faces']\n[[sets]]\nname = 'a'\nsites = ['*']\nkey_scale = ['x']",
            r"sets\.0\.key_scale\.0: got 'x'",
        ),
        ("groups = ['faces']\n[[sets]]\nname = 'a'\nsites = ['*']\nkeep = nan", "'a': keep: got nan"),
        ("groups = ['cats']", "groups: got 'cats'"),
        ("groups = 'faces'", r"plan\.toml: groups: got 'faces', expected a list"),
        ("groups = ['faces']\nheads = [3]", r"plan\.toml: heads\.0: got 3, expected a list"),
        ("groups = ['faces']\nitems = -4", "items: got -4, expected at least 1"),
        ("groups = ", "isn't TOML"),
    ],
)
def test_mistakes_in_a_file_are_named(text, message, tmp_path):
    (tmp_path / "plan.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        SweepConfig.from_toml(tmp_path / "plan.toml")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sites": ("nowhere.*",)}, r"sites: got 'nowhere\.\*', expected a pattern of"),
        ({"sets": (HeadSet("a", sites=("nowhere",)),)}, "sets: 'a': sites: got 'nowhere'"),
        ({"sets": (HeadSet("a", heads=(("mid_block.attentions.0", 99),)),)}, "sets: 'a': heads: got"),
        ({"sets": (HeadSet("a", sites=("mid_block.*",), key_bias=(0.0,) * 999),)}, "'a': key_bias: got 999 numbers"),
        ({"scores": ("generate",), "image_scores": ("nomodule:f",)}, "image_scores: got 'nomodule:f'"),
        ({"scores": ("loss", "nomodule:f")}, "scores: got 'nomodule:f'"),
        ({"scores": ("math:pi",)}, "scores: got 'math:pi', which is float, expected a function"),
        (
            {"heads": (("mid_block.attentions.0", 4),)},
            r"heads: got \('mid_block\.attentions\.0', 4\), expected heads of",
        ),
        (
            {"heads": (("mid_block.attentions.0", 1),), "sites": ("down_blocks.*",)},
            r"heads: got \('mid_block\.attentions\.0', 1\), whose site isn't among the sites down_blocks",
        ),
        ({"timesteps": (1000,)}, "timesteps: got 1000, expected 0 to 999"),
        ({"bands": 999}, r"bands: got 999, whose middles are nearest to \d+ different timesteps"),
        ({"scores": ("generate",), "generate_steps": 1001}, "generate_steps: got 1001, expected at most 1000"),
        ({"device": "gpu"}, "device: got 'gpu', expected one that torch sees"),
        ({"device": "meta"}, "device: got 'meta', expected one that computes"),
        ({"groups": ("mine=nowhere",)}, "groups: got 'mine=nowhere': .*expected an existing folder"),
        ({"groups": ("mine=texts",)}, "groups: got 'mine=texts': .*holds no image, expected files ending in"),
        ({"groups": ("mine=broken",)}, "the file '[ab].png' of the group 'mine' can't be read"),
        ({"groups": ("mine=dataset",)}, "groups: got 'mine=dataset': .*lists no data files, expected what"),
        ({"groups": ("mine=texts.tar",)}, "groups: got 'mine=texts.tar': .*holds no image, expected members ending in"),
        ({"groups": ("mine=torn.tar",)}, "groups: got 'mine=torn.tar': .*can't be read as a tar"),
        ({"groups": ("mine=shard-{0..3}.tar",)}, "groups: got 'mine=shard-.*expected existing tar files"),
    ],
)
def test_what_cannot_be_run_is_named(fields, message, ddpm_directory, tmp_path, monkeypatch):
    """By the argument, what came and what was expected, and before anything is written."""
    monkeypatch.chdir(tmp_path)
    for folder in ("texts", "broken", "dataset"):
        (tmp_path / folder).mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    for name in ("a", "b"):
        (tmp_path / "broken" / f"{name}.png").write_text("no image")
    (tmp_path / "dataset" / "state.json").write_text("{}")
    (tmp_path / "torn.tar").write_text("no tar")
    with tarfile.open(tmp_path / "texts.tar", "w") as archive:
        archive.add(tmp_path / "texts" / "a.txt", "a.txt")
    config = SweepConfig(**{"model": ddpm_directory, "groups": ("faces",), "items": 1, "fills": ("zero",), **fields})
    with pytest.raises(ValueError, match=message):
        run_sweep(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "names no pipeline, expected what diffusers' save_pretrained writes"),
        ("{}", "names no pipeline"),
        ('{"_class_name": ["a", "b"]}', "names no pipeline"),
        ("{", "can't be read"),
        ('{"_class_name": "NoSuchPipeline"}', "names 'NoSuchPipeline', which diffusers [0-9.]+ doesn't have"),
        ('{"_class_name": "DDPMPipeline"}', "can't be loaded: "),
        ('{"_class_name": "DDPMPipeline", "unet": 3}', "can't be loaded: "),
    ],
)
def test_what_is_no_pipeline_is_named(content, message, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model_index.json").write_text(content)
    with pytest.raises(ValueError, match=rf"model: '{model}.*{message}"):
        run_sweep(SweepConfig(model=str(model), groups=("faces",)), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_cross_attention_has_no_value_of_its_own(diffusion_directory, tmp_path):
    config = SweepConfig(model=diffusion_directory, groups=("faces",), items=1, fills=("identity",))
    with pytest.raises(ValueError, match=r"fills: got identity for '.*attn2'"):
        run_sweep(config, tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"generate_window": (3, 3)}, "generate_window: got 3, 3"),
        ({"generate_window": (0, 99)}, "generate_window: got 0, 99"),
        ({"generate_window": (-1, 3)}, "generate_window: got -1, 3"),
        ({"generate_window": (1, 3)}, "generate_window: got one without the score generate"),
        ({"groups": ("=folder",)}, "groups: got '=folder', expected a name and a path"),
        ({"groups": ("mine=",)}, "groups: got 'mine=', expected a name and a path"),
        ({"scores": (), "sets": (HeadSet("a", sites=("*",)),)}, "sets: got some without fills or without scores"),
        ({"image_scores": ("psnr",)}, "without the score generate"),
        ({"image_scores": ("fid",), "scores": ("generate",)}, "image_scores: got 'fid'"),
        ({"scores": ("loss", "some module:f")}, "scores: got 'some module:f', expected module:function"),
        ({"scores": ("loss", "a:clean")}, "scores: got 'a:clean', expected a function whose name isn't taken"),
        ({"scores": ("loss", "a:_source")}, "scores: got 'a:_source', expected a function whose name isn't taken"),
        ({"scores": ("a:f", "b:f")}, "scores: got 'a:f', expected a function whose name isn't taken"),
        ({"sets": (HeadSet("a", sites=("*",)),) * 2}, "sets: got the names a, a"),
        ({"seed": 2**31}, "seed: got 2147483648, expected 0 to 2147483647"),
        ({"seed": -1}, "seed: got -1, expected 0 to 2147483647"),
        ({"groups": ("m\udcfe=folder",)}, r"groups\.0: got b'm\\xfe=folder', whose name isn't UTF-8"),
        ({"prompts": "p\udcfe"}, r"prompts: got b'p\\xfe', whose name isn't UTF-8"),
    ],
)
def test_impossible_values_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        SweepConfig(**{"groups": ("faces",), **fields})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("keep", 1e39),
        ("keep", math.nan),
        ("temperature", 1e-50),
        ("temperature", 1e39),
        ("temperature", math.nan),
        ("key_bias", (0.0, 1e39)),
        ("key_bias", (-1e39,)),
        ("key_scale", (-1e39,)),
    ],
)
def test_numbers_that_float32_does_not_hold_are_refused(field, value):
    """They would be applied as infinite ones, or as 0."""
    with pytest.raises(ValueError, match=f"sets: 'a': {field}: got .*, expected"):
        HeadSet("a", sites=("*",), **{field: value})


def test_a_set_needs_a_name_and_heads():
    with pytest.raises(ValueError, match=r"sets\.name: got an empty name"):
        HeadSet("", sites=("*",))
    with pytest.raises(ValueError, match="'a' has neither sites nor heads"):
        HeadSet("a")


def test_large_groups_have_larger_units():
    assert [len(chunk) for chunk in chunks(10, 4)] == [4, 4, 2]
    found = chunks(1000, 4, of_each=50)
    assert len(found) * 50 <= UNITS_PER_GROUP
    assert [index for chunk in found for index in chunk] == list(range(1000))


def test_sets_and_scores_equal_scope_by_hand(ddpm_directory, tmp_path):
    """A set of two sites, halved; and the distance and x0 error of every score."""
    sites = ("down_blocks.1.attentions.0", "mid_block.attentions.0")
    chosen = HeadSet("both", sites=sites, keep=0.5)
    config = SweepConfig(
        model=ddpm_directory,
        groups=("lfw",),
        splits=("confirm",),
        items=2,
        timesteps=(300,),
        fills=("zero",),
        scores=("loss", "distance", "x0"),
        heads=(),
        sets=(chosen,),
        observe=False,
    )
    run = run_sweep(config, tmp_path / "run", progress=False)
    assert run.tables == ("set_ablations",)
    table = run.table("set_ablations").with_columns(pl.col("edit").cast(pl.String)).sort("item").collect()
    assert table["edit"].to_list() == ["both", "both"]
    task = load_task(config)
    (group,) = open_items(config, task)
    items = sorted(group.swept, key=lambda item: item.index)
    inputs = task.noisy_inputs(task.prepare(items), 300)
    handles = [
        task.denoiser.get_submodule(site).to_out[0].register_forward_pre_hook(lambda _, args: (args[0] * 0.5,))
        for site in sites
    ]
    with torch.inference_mode():
        edited = task.predict(inputs)
        for handle in handles:
            handle.remove()
        clean = task.predict(inputs)
    loss = (edited - inputs.target).square().flatten(1).mean(1)
    distance = (edited - clean).square().flatten(1).mean(1)
    np.testing.assert_allclose(table["edited"], loss, rtol=1e-5)
    np.testing.assert_allclose(table["distance"], distance, rtol=1e-4)
    alpha = float(1 / (1 + np.exp(-task.log_snr(300))))
    noise = inputs.sample - alpha**0.5 * task.prepare(items).clean
    implied = (inputs.sample - (1 - alpha) ** 0.5 * edited) / alpha**0.5
    actual = (inputs.sample - noise) / alpha**0.5
    np.testing.assert_allclose(table["x0_edited"], (implied - actual).square().flatten(1).mean(1), rtol=1e-4)


def largest_error(edited, clean, target, inputs):
    """A score of the user's own, of predictions."""
    assert edited.shape == clean.shape == target.shape == inputs.sample.shape
    return (edited - clean).abs().flatten(1).amax(1) + inputs.timestep


def test_every_field_of_an_edit_equals_scope_by_hand(ddpm_directory, tmp_path):
    """Sets of the same heads share a batch; with fills and a score of the user's own."""
    site, heads = "mid_block.attentions.0", (1, 3)
    chosen = tuple((site, head) for head in heads)
    sets = (
        HeadSet("removed", heads=chosen),
        HeadSet("flat", heads=chosen, temperature=3.0),
        HeadSet("biased", heads=chosen, key_bias=(-np.inf, 2.0)),
        HeadSet("scaled", heads=chosen, key_scale=(0.0, 1.0, 4.0), keep=0.5),
    )
    config = SweepConfig(
        model=ddpm_directory,
        groups=("lfw",),
        splits=("confirm",),
        items=2,
        timesteps=(300,),
        fills=("zero", "identity"),
        scores=(f"{__name__}:largest_error",),
        heads=(),
        sets=sets,
        observe=False,
    )
    run = run_sweep(config, tmp_path / "run", progress=False)
    table = run.table("set_ablations").with_columns(pl.col(pl.Categorical).cast(pl.String)).collect()
    assert len(table) == 4 * 2 * 2
    task = load_task(config)
    (group,) = open_items(config, task)
    inputs = task.noisy_inputs(task.prepare(list(group.swept)), 300)
    scope = Scope(task.denoiser)
    with torch.inference_mode(), scope.record("entropy", sites=[site]) as recording:
        clean = task.predict(inputs)
    keys = recording.to_polars()["keys"][0]

    def per_head(value, neutral=1.0):
        whole = torch.full((1, 4), neutral)
        whole[:, heads] = value
        return whole

    def per_key(values, neutral):
        whole = torch.full((1, 4, keys), neutral)
        whole[:, heads, : len(values)] = torch.tensor(values)
        return whole

    edits = {
        "removed": HeadEdit(per_head(0.0)),
        "flat": HeadEdit(temperature=per_head(3.0)),
        "biased": HeadEdit(key_bias=per_key([-np.inf, 2.0], 0.0)),
        "scaled": HeadEdit(per_head(0.5), key_scale=per_key([0.0, 1.0, 4.0], 1.0)),
    }
    seen = []
    for name, edit in edits.items():
        for fill in ("zero", "identity"):
            with torch.inference_mode(), scope.edit({site: edit}, fill=None if fill == "zero" else fill):
                edited = task.predict(inputs)
            rows = table.filter(pl.col("edit") == name, pl.col("fill") == fill)
            loss = (edited - inputs.target).square().flatten(1).mean(1)
            np.testing.assert_allclose(rows["edited"], loss, rtol=1e-5)
            np.testing.assert_allclose(
                rows["largest_error"] - 300, (edited - clean).abs().flatten(1).amax(1), atol=1e-4
            )
            seen.append(tuple(rows["edited"]))
    # of edits that keep all of a head, fills change nothing; all others differ
    assert len(set(seen)) == len(seen) - 2


def brightness(clean, edited):
    """A score of the user's own."""
    return edited.astype(np.float64).mean((1, 2, 3)) - clean.astype(np.float64).mean((1, 2, 3))


def test_generations_in_a_window(ddpm_directory, tmp_path):
    """Steps before the window are taken over from the clean run; images and scores are those of the plain loop."""
    head = ("mid_block.attentions.0", 1)
    config = SweepConfig(
        model=ddpm_directory,
        groups=("faces",),
        splits=("confirm",),
        items=3,
        timesteps=(300,),
        fills=("zero",),
        scores=("generate",),
        heads=(head,),
        sets=(HeadSet("middle", sites=("mid_block.*",)),),
        observe=False,
        generate_steps=4,
        generate_window=(2, 4),
        image_scores=("mse", "psnr", "ssim", f"{__name__}:brightness"),
    )
    run = run_sweep(config, tmp_path / "run", progress=False)
    assert run.tables == ("generations", "set_generations")
    task = load_task(config)
    (group,) = open_items(config, task)
    scope = Scope(task.denoiser)
    clean = task.generate(group.swept, steps=4)
    for kind, heads in (("generations", [1]), ("set_generations", list(range(4)))):
        with scope.edit({head[0]: heads}, steps=range(2, 4)):
            edited = task.generate(group.swept, steps=4)
        table = run.table(kind).collect()
        expected = np.square((edited.astype(float) - clean) / 255).mean((1, 2, 3))
        # a rounding of the denoiser's may turn a level of a pixel
        np.testing.assert_allclose(table["distance"], expected, rtol=1e-2, atol=1e-7)
        np.testing.assert_allclose(table["mse"], table["distance"], rtol=1e-9)
        np.testing.assert_allclose(table["psnr"], -10 * np.log10(table["mse"]), rtol=1e-6)
        assert table["ssim"].is_between(-1, 1).all()
        np.testing.assert_allclose(table["brightness"], brightness(clean, edited), atol=0.1)
        assert table["first_step"].to_list() == [2] * 3
    assert scope.site(head[0]).heads == 4


def test_dry_runs_write_nothing_and_count_what_a_run_does(ddpm_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = SweepConfig(model=ddpm_directory, groups=("faces",), items=2, timesteps=(60,), fills=("zero",))
    estimate = estimate_sweep(config, Execution(rows=8))
    assert list(tmp_path.iterdir()) == []
    assert estimate.seconds > 0
    assert estimate.rows == 8
    run = run_sweep(config, tmp_path / "run", progress=False)
    assert estimate.forwards == run.manifest["forwards"]
    assert sum(units for units, _ in estimate.units.values()) == len(run.units)


class Advances(Silent):
    """Adds up the forwards that were reported."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards = 0

    def advance(self, forwards: int) -> None:
        self.forwards += forwards


@pytest.mark.parametrize("family", ["unconditional", "guided"])
def test_the_plan_counts_the_rows_that_run(family, ddpm_directory, diffusion_directory, tmp_path, monkeypatch):
    """Under guidance two for each step, without it one; fewer in a window; one where fills change nothing."""
    (tmp_path / "prompts.txt").write_text("a red fox\na blue boat\n")
    guided = family == "guided"
    site = "mid_block.attentions.0" + ".transformer_blocks.0.attn1" * guided
    config = SweepConfig(
        model=diffusion_directory if guided else ddpm_directory,
        groups=() if guided else ("lfw",),
        prompts=str(tmp_path / "prompts.txt") if guided else None,
        items=None if guided else 2,
        splits=("discover", "confirm") if guided else ("confirm",),
        timesteps=(300,),
        fills=("zero", "mean"),
        scores=("loss", "generate"),
        heads=((site, 1),),
        sets=(HeadSet("removed", heads=((site, 0),)), HeadSet("flat", heads=((site, 0),), temperature=2.0)),
        reference_items=None if guided else 1,
        generate_steps=3,
        generate_window=(2, 3),
    )
    opened = Opened(config, Execution(rows=4, share=False))
    context = opened.context(opened.store(tmp_path / "run"))
    denoiser = opened.task.denoiser
    forward = type(denoiser).forward
    rows = 0

    @wraps(forward)
    def counted(self, sample, *args, **kwargs):
        nonlocal rows
        rows += len(sample)
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(type(denoiser), "forward", counted)
    advances = Advances()
    work(context, "", advances)
    planned = sum(unit.forwards for unit in opened.plan.units)
    assert rows == advances.forwards == planned
    run = Run.open(tmp_path / "run")
    assert run.complete
    for kind, number in (("set_ablations", "edited"), ("set_generations", "distance")):
        table = run.table(kind).with_columns(pl.col("edit", "fill").cast(pl.String)).sort("item").collect()
        zero, mean = (table.filter(fill=fill) for fill in ("zero", "mean"))
        same = zero[number].to_numpy() == mean[number].to_numpy()
        np.testing.assert_array_equal(same[(zero["edit"] == "flat").to_numpy()], True)
        # images are rounded to 8 bits, in which a single head's fill may not show
        assert kind == "set_generations" or not same[(zero["edit"] == "removed").to_numpy()].any()


def test_duckdb_reads_what_polars_reads(ddpm_directory, tmp_path):
    config = SweepConfig(model=ddpm_directory, groups=("faces",), items=2, timesteps=(60,), fills=("zero",))
    run = run_sweep(config, tmp_path / "run", progress=False)
    sums = run.duckdb().sql("select count(*), sum(edited) from ablations").fetchall()[0]
    table = run.table("ablations").select(pl.len(), pl.col("edited").sum()).collect()
    assert sums[0] == table.row(0)[0]
    assert sums[1] == pytest.approx(table.row(0)[1])


def test_attributions_are_those_of_the_scope(ddpm_directory, tmp_path):
    """Beside exact ablations, with both fills."""
    config = SweepConfig(
        model=ddpm_directory,
        groups=("lfw",),
        splits=("confirm",),
        items=3,
        timesteps=(60, 500),
        fills=("mean", "zero"),
        scores=("loss",),
        observe=False,
        attribute=True,
        cotangents=2,
    )
    run = run_sweep(config, tmp_path / "run", progress=False)
    assert run.tables == ("ablations", "attributions")
    text = pl.col(pl.Categorical).cast(pl.String)
    table = run.table("attributions").with_columns(text).collect()
    ablations = run.table("ablations").with_columns(text).collect()
    key = ["item", "timestep", "site", "head", "fill"]
    both = table.join(ablations, on=key)
    assert len(both) == len(table) == len(ablations)
    # the clean loss of the two is one number
    np.testing.assert_allclose(both["loss"], both["clean"], rtol=1e-5)
    task = load_task(config)
    (group,) = open_items(config, task)
    found = Scope(task.denoiser).attribute(task, list(group.swept), (60, 500), cotangents=2)
    expected = found.to_polars().with_columns(text)
    zero = table.filter(pl.col("fill") == "zero").with_columns(key=pl.format("lfw/{}", "item"))
    joined = zero.join(expected, left_on=["key", "timestep", "site", "head"], right_on=["item", *key[1:4]])
    assert len(joined) == len(expected)
    for name in ("g", "c"):
        scale = float(expected[name].abs().max())
        np.testing.assert_allclose(joined[name], joined[f"{name}_right"], rtol=1e-4, atol=1e-5 * scale)


def test_attributions_alone_are_of_the_sites_asked_for(ddpm_directory):
    """Without an ablation beside them, too."""
    config = SweepConfig(
        model=ddpm_directory, groups=("lfw",), items=1, fills=("zero",), scores=(), observe=False, attribute=True,
        sites=("mid_block.*",),
    )  # fmt: skip
    plan = Opened(config, Execution()).plan
    assert {unit.kind for unit in plan.units} == {"attributions"}
    assert {site for site, _ in plan.heads} == {"mid_block.attentions.0"}


def test_contact_sheets_show_the_images_that_were_kept(ddpm_directory, tmp_path):
    config = SweepConfig(
        model=ddpm_directory,
        groups=("faces",),
        splits=("confirm",),
        items=5,
        timesteps=(300,),
        fills=("zero",),
        scores=("generate",),
        sites=("mid_block.*",),
        observe=False,
        generate_steps=1,
    )
    run = run_sweep(config, tmp_path / "run", progress=False)
    (path,) = write_contact_sheets(run, edits=2, items=3)
    sheet = np.asarray(Image.open(path))
    task = load_task(config)
    (group,) = open_items(config, task)
    clean = task.generate([group.swept[2]], steps=1)[0]
    # rows of 64 pixels and a label, columns of 64 and a margin; images twice as large as they are
    left, top = 4 + 2 * 68, 4 + 14
    shown = sheet[top : top + 64 : 2, left : left + 64 : 2]
    assert np.abs(shown.astype(int) - clean).max() <= 1
    assert sheet.shape[0] == 3 * 82 + 4
