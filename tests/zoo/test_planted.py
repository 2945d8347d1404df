"""Planted models do what their truth says: what Scope records and edits, in float32, against float64 without attention
code."""

import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention

from headscope import Distance, GroupMass, HeadEdit, Scope, Task
from headscope.models.structure.sites import find_sites
from headscope.zoo import open_group
from headscope.zoo.planted import PLANTED, load_planted, planted_truth
from headscope.zoo.planted.noise import log_snr, shrinkage
from headscope.zoo.planted.weights import projections
from rounding import UNIT
from zoo.planted_tolerance import (
    CARRIES,
    entropy_tolerance,
    mean_tolerance,
    output_tolerance,
    prediction_tolerance,
    weight_tolerance,
)

# log-SNRs of about 3, 0 and -3
TIMESTEPS = (132, 495, 858)


def items_of(group, count=2):
    found = open_group(group)
    return [found.item(index) for index in found.indices("confirm")[:count]]


def forward_of(task, items, timestep):
    """The inputs of a forward and the truth about it."""
    inputs = task.noisy_inputs(task.prepare(items), timestep)
    return inputs, task.denoiser.truth.at(inputs.sample.numpy(), timestep)


@pytest.fixture(scope="module")
def tasks():
    return {name: Task.of(load_planted(name)) for name in PLANTED}


def test_names():
    assert PLANTED == ("roles", "pairs", "gated", "all")
    with pytest.raises(ValueError, match="name: got 'rols', expected one of roles, pairs, gated, all"):
        load_planted("rols")
    with pytest.raises(ValueError, match="name: got 'rols'"):
        planted_truth("rols")


def test_bad_input(tasks):
    truth = planted_truth("pairs")
    sample = np.zeros((1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"sample: got \[1, 3, 16, 16\], expected \[items, 3, 32, 32\]"):
        truth.at(np.zeros((1, 3, 16, 16)), 0)
    with pytest.raises(ValueError, match="timestep: got 1000, expected 0 to 999"):
        truth.at(sample, 1000)
    with pytest.raises(ValueError, match=r"timestep: got 0\.5"):
        truth.at(sample, 0.5)
    with pytest.raises(ValueError, match=r"removed: got \('blocks.9.attn', 0\), expected some of"):
        truth.at(sample, 0).prediction([("blocks.9.attn", 0)])
    with pytest.raises(ValueError, match="fill: got 'none', expected None, uniform, identity or an array"):
        truth.at(sample, 0).prediction([truth.heads[0].key], "none")
    with pytest.raises(ValueError, match=r"fill: got \[7\], expected \[7, 256\] or \[1, 7, 256\]"):
        truth.at(sample, 0).prediction([truth.heads[0].key], np.zeros(7))
    with pytest.raises(ValueError, match="fill: got 'uniform', expected zero or mean"):
        truth.circuits(0, "uniform")
    with pytest.raises(KeyError, match="name: got 'edge', expected one of duplicate_1"):
        truth.head("edge")
    with pytest.raises(KeyError, match="name: got 'edges', expected one of both, duplicate, either"):
        truth.pair("edges")
    with pytest.raises(ValueError, match=r"got \(64, 3, 3, 2\), expected \(32, 3, 3, 2\)"):
        type(tasks["pairs"].denoiser)("pairs", sample_size=64)
    with pytest.raises(ValueError, match=r"sample: got \[1, 3, 8, 8\]"):
        tasks["pairs"].denoiser(torch.zeros(1, 3, 8, 8), 0)


def test_a_model_of_diffusers(tasks):
    """Called like any denoiser; every site is diffusers' Attention and is seen."""
    model = tasks["all"].denoiser
    assert type(model).from_config(model.config).truth is planted_truth("all")
    sample = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32))
    with torch.inference_mode():
        together = model(sample, torch.tensor(TIMESTEPS)).sample
        for row, timestep in enumerate(TIMESTEPS):
            (alone,) = model(sample[row : row + 1], timestep, return_dict=False)
            torch.testing.assert_close(alone, together[row : row + 1], rtol=0, atol=1e-6)
    for name in PLANTED:
        denoiser = tasks[name].denoiser
        sites, unseen = find_sites(denoiser)
        assert unseen == []
        assert {(site.name, head) for site in sites for head in range(site.heads)} == {
            head.key for head in denoiser.truth.heads
        }
        for site in sites:
            assert isinstance(denoiser.get_submodule(site.name), Attention)
            assert (site.kind, site.head_dim) == ("self", 16)


def test_a_saved_one_is_loaded_as_it_was(tmp_path):
    """As `--model DIR` takes it."""
    pipeline = load_planted("gated")
    pipeline.save_pretrained(tmp_path / "saved")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "saved", local_files_only=True)
    assert loaded.unet.truth is planted_truth("gated")
    before, after = pipeline.unet.state_dict(), loaded.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert loaded.scheduler.config.prediction_type == "sample"


def test_pipelines_sample():
    generator = torch.Generator().manual_seed(0)
    images = load_planted("all")(batch_size=2, num_inference_steps=3, generator=generator, output_type="np").images
    assert images.shape == (2, 32, 32, 3)


def test_weights_are_powers_of_two():
    for head in planted_truth("all").heads:
        for weight in projections(head.name):
            magnitudes = np.abs(weight[weight != 0])
            assert set(np.frexp(magnitudes)[0]) <= {0.5}


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("group", ["faces", "twins"])
def test_predictions(tasks, name, group):
    task = tasks[name]
    for timestep in TIMESTEPS:
        inputs, truth = forward_of(task, items_of(group), timestep)
        with torch.inference_mode():
            found = task.predict(inputs).numpy()
        expected = truth.prediction()
        assert np.abs(expected).max() > 0.01
        assert (np.abs(found - expected) <= prediction_tolerance(truth)).all()


def test_predictions_in_float64():
    """The same model in float64: what is left is the definition's and not the rounding's."""
    task = Task.of(load_planted("all"))
    task.denoiser.double()
    # the table is stored in float32
    task.denoiser.shrinkage.copy_(torch.from_numpy(shrinkage()))
    for timestep in TIMESTEPS:
        inputs, truth = forward_of(task, items_of("faces"), timestep)
        assert inputs.sample.dtype == torch.float64
        with torch.inference_mode():
            found = task.predict(inputs).numpy()
        np.testing.assert_allclose(found, truth.prediction(), rtol=0, atol=1e-12)


# the whole model has no head beside the others'
@pytest.mark.parametrize("name", ["roles", "pairs", "gated", pytest.param("all", marks=pytest.mark.full)])
def test_recorded_statistics(tasks, name):
    """Entropy, Distance, GroupMass, key mass and head outputs of every query."""
    task, scope = tasks[name], Scope(tasks[name].denoiser)
    keys = np.arange(256)
    groups = np.where(keys % 7 == 6, -1, keys % 7)
    distances = np.hypot(*(axis[:, None] - axis for axis in np.divmod(keys, 16)))
    statistics = ("entropy", Distance((16, 16)), GroupMass(torch.from_numpy(groups), 6), "key_mass")
    for group, timestep in zip(("faces", "distinct", "faces"), TIMESTEPS, strict=True):
        inputs, truth = forward_of(task, items_of(group), timestep)
        with torch.inference_mode(), scope.record(*statistics, "head_output", reduce=None) as recording:
            task.predict(inputs)
        # several numbers a query come in a row
        table = recording.to_polars()
        mass = truth.group_mass(groups, 6)
        apart, weights = mean_tolerance(truth, distances), weight_tolerance(truth)
        for number, head in enumerate(truth.heads):
            rows = table.filter((table["site"] == head.site) & (table["head"] == head.head)).sort("sample")
            image = rows.filter(rows["query_group"] == "image")
            assert set(image["grid_height"]) == set(image["grid_width"]) == {16}

            def column(name, of=image):
                return np.stack([np.asarray(values) for values in of[name].drop_nulls()])

            entropy, tolerance = truth.entropy[:, number], entropy_tolerance(truth)[:, number]
            assert (np.abs(column("entropy") - entropy) <= tolerance).all()
            if head.entropy is not None:
                np.testing.assert_allclose(entropy, head.entropy, rtol=0, atol=1e-12)
            assert (np.abs(column("distance") - truth.distance[:, number]) <= 32 * UNIT * 21.3 + apart[:, number]).all()
            found = column("group_mass").reshape(mass[:, number].shape)
            # a float32 result of up to 1 and a sum of up to 256 others
            tolerance = 32 * UNIT + np.stack([weights[:, number, :, groups == one].sum(0) for one in range(6)], -1)
            assert (np.abs(found - mass[:, number]) <= tolerance).all()
            every = rows.filter(rows["key_mass"].is_not_null())
            found = column("key_mass", every).reshape(truth.key_mass[:, number].shape)
            tolerance = weights[:, number].sum(1) + 32 * UNIT * truth.key_mass[:, number] + CARRIES
            assert (np.abs(found - truth.key_mass[:, number]) <= tolerance).all()
            outputs = recording.samples("head_output", head.site, 0, timestep)[:, head.head].numpy()
            assert (np.abs(outputs[..., 0] - truth.outputs[:, number]) <= output_tolerance(truth)[:, number]).all()
            assert not outputs[..., 1:].any()


def test_closed_forms(tasks):
    """Entropies and distances that can be counted, without the truth's own code."""
    inputs, truth = forward_of(tasks["all"], items_of("faces"), 132)
    by_name = {head.name: number for number, head in enumerate(truth.heads)}

    def mean(statistic, name):
        return getattr(truth, statistic)[:, by_name[name]].mean()

    assert mean("entropy", "uniform") == pytest.approx(math.log(256), abs=1e-12)
    assert mean("entropy", "ring") == pytest.approx(math.log(16), abs=1e-11)
    for name in ("one_hot", "previous", "duplicate_1", "either_2", "both_1", "both_2"):
        assert mean("entropy", name) == pytest.approx(0.0, abs=1e-11)
    # 15 of 16 columns have a token to their left
    assert mean("distance", "previous") == pytest.approx(15 / 16, abs=1e-11)
    rows, columns = np.divmod(np.arange(256), 16)
    fixed = np.hypot(rows - 8, columns - 8)
    np.testing.assert_allclose(truth.distance[0, by_name["one_hot"]], fixed, atol=1e-11)
    ring = [(r, c) for r in range(16) for c in range(16) if (2 * r - 15) ** 2 + (2 * c - 15) ** 2 == 130]
    assert len(ring) == 16
    there = [np.hypot(rows - r, columns - c) for r, c in ring]
    np.testing.assert_allclose(truth.distance[0, by_name["ring"]], np.mean(there, 0), atol=1e-9)
    # ln of how many tokens have each token's code
    codes = (inputs.sample[:, :, ::2, ::2, None] > torch.tensor([-0.5, 0.0, 0.5])).sum(-1).flatten(2).mT.tolist()
    for item, tokens in enumerate(codes):
        counts = Counter(map(tuple, tokens))
        expected = [math.log(counts[tuple(token)]) for token in tokens]
        for name in ("counterpart", "above"):
            np.testing.assert_allclose(truth.entropy[item, by_name[name]], expected, atol=1e-10)


def test_gates_follow_the_log_snr(tasks):
    task = tasks["gated"]
    scope = Scope(task.denoiser)
    above, below, dead = (task.denoiser.truth.head(name) for name in ("above", "below", "dead"))
    edges = [int(np.flatnonzero(log_snr() > 1.5)[-1]), int(np.flatnonzero(log_snr() < -1.5)[0])]
    for timestep in (*TIMESTEPS, edges[0], edges[0] + 1, edges[1] - 1, edges[1]):
        inputs, truth = forward_of(task, items_of("faces"), timestep)
        acts = {above.key: task.log_snr(timestep) > 1.5, below.key: task.log_snr(timestep) < -1.5}
        with torch.inference_mode():
            # an edited forward, too: torch's own attention may round otherwise
            with scope.edit({dead.site: [dead.head]}):
                clean = task.predict(inputs)
            with scope.record("entropy") as recording:
                task.predict(inputs)
            for head in (above, below):
                with scope.edit({head.site: [head.head]}):
                    changed = not torch.equal(task.predict(inputs), clean)
                assert changed == acts[head.key]
        table = recording.to_polars()
        for head in (above, below):
            number = truth.heads.index(head)
            found = table.filter(table["head"] == head.head).sort("sample")["entropy_mean"].to_numpy()
            uniform = np.isclose(found, math.log(256), atol=1e-4)
            assert uniform.all() != acts[head.key]
            np.testing.assert_allclose(found, truth.entropy[:, number].mean(-1), atol=5e-5)


def cells(item):
    """Of each token the cell of a glyph that it knows the colour of, and which glyph's it is; -1 outside of them."""
    cell, glyph = np.full((16, 16), -1), np.full((16, 16), -1)
    for number, (top, left) in enumerate(item.attributes["places"]):
        inside = np.s_[(top + 1) // 2 : (top + 1) // 2 + 3, (left + 1) // 2 : (left + 1) // 2 + 3]
        cell[inside] = np.arange(9).reshape(3, 3)
        glyph[inside] = number
    return cell.ravel(), glyph.ravel()


def test_the_counterpart_head_finds_the_counterparts(tasks):
    """Of `twins`, and not of its control: on tokens of a glyph, the mass on the same cell of the three others."""
    task = tasks["roles"]
    scope, head = Scope(task.denoiser), task.denoiser.truth.head("counterpart")
    found = {}
    for group in ("twins", "distinct"):
        items = items_of(group, 4)
        inputs, truth = forward_of(task, items, 20)
        placed = [cells(item) for item in items]
        for item, (cell, _) in zip(items, placed, strict=True):
            colours = item.image[::2, ::2].reshape(256, 3)
            for number in range(9):
                same = colours[cell == number]
                assert len(same) == 4
                assert (len(np.unique(same, axis=0)) == 1) == (group == "twins")
        # a group of keys for each cell and glyph
        groups = np.stack([np.where(cell < 0, -1, 9 * glyph + cell) for cell, glyph in placed])
        with torch.inference_mode(), scope.record(GroupMass(torch.from_numpy(groups), 36), reduce=None) as recording:
            task.predict(inputs)
        table = recording.to_polars()
        rows = table.filter((table["site"] == head.site) & (table["head"] == head.head)).sort("sample")
        mass = np.stack([np.asarray(values).reshape(256, 4, 9) for values in rows["group_mass"]])
        shares = []
        for row, (cell, glyph) in enumerate(placed):
            tokens = np.flatnonzero(cell >= 0)
            on_cell = mass[row, tokens, :, cell[tokens]]
            shares.append(on_cell.sum(1) - on_cell[np.arange(len(tokens)), glyph[tokens]])
            # 1 / m for each counterpart that has the token's code, and that has m tokens
            attention = truth.attention[row, truth.heads.index(head)]
            others = (cell[tokens, None] == cell) & (glyph[tokens, None] != glyph)
            expected = (attention[tokens] * others).sum(1)
            np.testing.assert_allclose(shares[-1], expected, rtol=0, atol=1e-5)
        found[group] = np.mean(shares)
    assert found["twins"] > 0.3
    assert found["distinct"] < 0.1


@pytest.mark.parametrize("fill", ["zero", pytest.param("mean", marks=pytest.mark.full)])
def test_smallest_circuits(tasks, fill):
    """Of all 2^7 sets of heads of `pairs`: the smallest that keep the prediction, when all others are removed, are the
    circuits."""
    task = tasks["pairs"]
    scope = Scope(task.denoiser)
    items, group = items_of("faces"), open_group("faces")
    reference = [group.item(index) for index in group.indices("train")[:16]]
    every = [head.key for head in task.denoiser.truth.heads]
    inputs, truth = forward_of(task, items, 132)
    unchanged = prediction_tolerance(truth).max()
    with torch.inference_mode():
        clean = task.predict(inputs)
        with scope.record("head_output") as means:
            task.predict(task.noisy_inputs(task.prepare(reference), 132))
        keeps = []
        for kept in itertools.chain.from_iterable(itertools.combinations(every, count) for count in range(8)):
            edits = {
                site.name: HeadEdit(torch.tensor([[float((site.name, head) in kept) for head in range(site.heads)]]))
                for site in scope.sites
            }
            with scope.edit(edits, fill=means if fill == "mean" else None):
                changed = (task.predict(inputs) - clean).abs().max()
            if changed <= unchanged:
                keeps.append(kept)
            else:
                assert changed > 100 * unchanged
    smallest = min(map(len, keeps))
    assert {kept for kept in keeps if len(kept) == smallest} == set(task.denoiser.truth.circuits(132, fill))


def test_circuits_by_timestep_and_fill():
    truth = planted_truth("all")
    names = {head.key: head.name for head in truth.heads}

    def left_out(timestep, fill):
        return {frozenset(names.values()) - {names[key] for key in one} for one in truth.circuits(timestep, fill)}

    assert left_out(132, "zero") == {frozenset({"dead", "below", f"either_{n}"}) for n in (1, 2)}
    assert left_out(495, "zero") == {frozenset({"dead", "below", "above", f"either_{n}"}) for n in (1, 2)}
    assert left_out(858, "mean") == {frozenset({"dead", "above", "one_hot", f"either_{n}"}) for n in (1, 2)}


def test_the_code_on_the_page_runs(tmp_path, monkeypatch):
    page = Path(__file__).parents[2] / "docs" / "planted.md"
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(compile(block, page.name, "exec"), names)
    forward, target, heads = names["forward"], names["target"], names["pair"].heads
    np.testing.assert_allclose(forward.effect(target, heads[:1]), 0.0, atol=1e-12)
    assert np.abs(forward.effect(target, heads)).max() > 1e-4
    assert len(names["run"].table("ablations").collect()) == 2 * 7


def test_truth_as_json():
    for name in PLANTED:
        truth = planted_truth(name)
        found = json.loads(json.dumps(truth.as_dict()))
        assert [head["name"] for head in found["heads"]] == [head.name for head in truth.heads]
        assert len({head.key for head in truth.heads}) == len(truth.heads)
        for pair in found["pairs"]:
            assert len(pair["heads"]) == 2
        assert found["circuits"]["zero"]["between"] == [list(map(list, one)) for one in truth.circuits(495)]
