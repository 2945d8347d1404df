"""Recordings, and the tables, tensors and files made of them."""

import sys

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as functional

from headscope import GroupMass, Recording, Scope
from running import run


def test_every_query_on_request(unet, sample):
    scope = Scope(unet)
    with scope.record("max_prob", "key_mass", reduce=None) as recording:
        run(unet, sample)
    table = recording.to_polars()
    every = table.filter(table["query_group"].cast(str) == "image")
    lists = np.array(every["max_prob"].to_list())
    assert lists.shape == (2 * 3 * 4, 64)
    for name, reduce in (("mean", np.mean), ("std", np.std), ("min", np.min), ("max", np.max)):
        assert every[f"max_prob_{name}"].to_numpy() == pytest.approx(reduce(lists, 1), abs=1e-6)
    keys = table.filter(table["query_group"].cast(str) == "all")
    # every query hands out a mass of 1
    assert np.array(keys["key_mass"].to_list()).sum(1) == pytest.approx(np.full(24, 64.0), rel=1e-5)


def test_group_masses_are_lists_that_sum_to_one(unet, sample):
    groups = torch.arange(64) % 3
    scope = Scope(unet)
    with scope.record(GroupMass(groups, 3, name="thirds")) as recording:
        run(unet, sample)
    masses = np.array(recording.to_polars()["thirds_mean"].to_list())
    assert masses.shape == (24, 3)
    assert masses.sum(1) == pytest.approx(np.ones(24), abs=1e-5)


def test_queries_keys_values_and_outputs_of_every_sample(unet, sample):
    scope = Scope(unet)
    with scope.record("q", "k", "v", "head_output", reduce=None) as each:
        run(unet, sample)
    with scope.record("q", "k", "v", "head_output") as means:
        run(unet, sample[:1])
        run(unet, sample[1:])
    for site in scope.sites:
        parts = {name: each.samples(name, site.name, 0, 7) for name in ("q", "k", "v", "head_output")}
        assert {tuple(tensor.shape) for tensor in parts.values()} == {(3, 4, 64, 8)}
        expected = torch.nn.functional.scaled_dot_product_attention(parts["q"], parts["k"], parts["v"])
        torch.testing.assert_close(parts["head_output"], expected, rtol=0, atol=1e-5)
        for name, tensor in parts.items():
            torch.testing.assert_close(means.mean(name, site.name, 0, 7), tensor.mean(0), rtol=0, atol=1e-5)
            torch.testing.assert_close(each.mean(name, site.name, 0, 7), tensor.mean(0), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="holds means"):
        means.samples("q", scope.sites[0].name, 0, 7)
    with pytest.raises(KeyError, match=r"recorded timesteps there: \[7.0\]"):
        each.mean("q", scope.sites[0].name, 0, 8)


def test_means_of_samples_at_different_timesteps_are_refused(unet, sample):
    with pytest.raises(ValueError, match="timestep: got 3 different ones"), Scope(unet).record("head_output"):
        run(unet, sample, torch.tensor([1, 2, 3]))


def test_each_sample_has_its_own_timestep(unet, sample):
    with Scope(unet).record("entropy") as recording:
        run(unet, sample, torch.tensor([1, 2, 3]))
    table = recording.to_polars()
    assert sorted(table.select("sample", "timestep").unique().iter_rows()) == [(0, 1.0), (1, 2.0), (2, 3.0)]


def test_a_forward_that_fails_leaves_no_rows(unet, sample):
    scope = Scope(unet)

    def fail(module, args):
        raise RuntimeError("planned")

    with scope.record("entropy", "head_output") as recording:
        handle = unet.conv_out.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="planned"):
            run(unet, sample)
        handle.remove()
        run(unet, sample, 9)
    assert set(recording.to_polars()["timestep"]) == {9.0}
    assert len(recording) == 2
    with pytest.raises(KeyError):
        recording.mean("head_output", scope.sites[0].name, 0, 7)


@pytest.mark.parametrize("reduce", ["mean", None])
def test_saved_and_loaded(unet, sample, tmp_path, reduce):
    scope = Scope(unet)
    with scope.record("entropy", "head_output", reduce=reduce) as recording:
        run(unet, sample)
    recording.save(tmp_path)
    loaded = Recording.load(tmp_path)
    assert loaded.to_polars().equals(recording.to_polars())
    name = scope.sites[0].name
    assert torch.equal(loaded.mean("head_output", name, 0, 7), recording.mean("head_output", name, 0, 7))
    with scope.edit({name: [1]}, fill=recording):
        expected = run(unet, sample)
    with scope.edit({name: [1]}, fill=loaded):
        assert torch.equal(run(unet, sample), expected)
    with scope.record("entropy") as other:
        run(unet, sample)
    other.save(tmp_path / "other")
    (tmp_path / "other" / "statistics.parquet").replace(tmp_path / "statistics.parquet")
    with pytest.raises(ValueError, match="not of one recording"):
        Recording.load(tmp_path)


def test_xarray(unet, sample, monkeypatch):
    scope = Scope(unet)
    with scope.record("entropy") as recording:
        run(unet, sample)
        run(unet, sample, 9)
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(ImportError, match=r"headscope\[xarray\]"):
        recording.to_xarray()
    monkeypatch.undo()
    pytest.importorskip("xarray")
    data = recording.to_xarray()
    assert dict(data.sizes) == {
        "forward": 2,
        "site": 2,
        "call": 1,
        "branch": 1,
        "sample": 3,
        "head": 4,
        "query_group": 1,
        "frame": 1,
    }
    assert data["timestep"].values.tolist() == [7.0, 9.0]
    table = recording.to_polars()
    for row in table.sample(5, seed=0).iter_rows(named=True):
        place = {name: row[name] for name in ("forward", "site", "call", "sample", "head", "query_group")}
        assert float(data["entropy_mean"].sel(place).squeeze()) == row["entropy_mean"]


def test_xarray_has_the_timestep_of_each_sample(unet, sample):
    pytest.importorskip("xarray")
    with Scope(unet).record("entropy") as recording:
        run(unet, sample, torch.tensor([1, 2, 3]))
        run(unet, sample, 4)
    timesteps = recording.to_xarray()["timestep"]
    assert timesteps.dims == ("forward", "branch", "sample")
    assert timesteps.values[:, 0].tolist() == [[1.0, 2.0, 3.0], [4.0, 4.0, 4.0]]


def test_a_timestep_is_what_it_was_when_the_forward_ran(unet, sample):
    """A loop of the user's own may count in one tensor."""
    timestep = torch.tensor([9.0])
    with Scope(unet).record("entropy", "head_output") as recording:
        for _ in range(2):
            run(unet, sample, timestep)
            timestep -= 2
    table = recording.to_polars().select("forward", "timestep").unique().sort("forward")
    assert list(table.iter_rows()) == [(0, 9.0), (1, 7.0)]


class Timeless(torch.nn.Module):
    """Attention in a model that may go without a timestep."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, tokens, timestep=None):
        return self.attention(tokens)


class Attention(torch.nn.Module):
    heads = 2

    def forward(self, tokens):
        query = tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return functional.scaled_dot_product_attention(query, query, query).transpose(1, 2).flatten(2)


class Twice(torch.nn.Module):
    """A picture's places, which attend to themselves, and to the first of them."""

    heads = 1

    def forward(self, tokens, timestep=None):
        for keys in (tokens, tokens[..., :2, :]):
            tokens = functional.scaled_dot_product_attention(*(x[:, None] for x in (tokens, keys, keys)))[:, 0]
        return tokens


class Pictures(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Twice()

    def forward(self, sample, timestep=None):
        return self.attention(sample.flatten(2).transpose(1, 2))


def test_a_plot_is_of_one_call():
    model = Pictures()
    with Scope(model).record("entropy", reduce=None) as recording:
        model(torch.randn(1, 8, 2, 3, generator=torch.Generator().manual_seed(1)))
    with pytest.raises(ValueError, match="call: got None, and site 'attention' attends 2 times"):
        recording.plot("entropy", "attention")
    table = recording.to_polars().sort("call")
    for call in (0, 1):
        figure = recording.plot("entropy", "attention", call=call)
        assert np.ravel(figure.data[0].z) == pytest.approx(np.array(table["entropy"][call]), abs=1e-6)


@pytest.mark.parametrize("arguments", [(), (None,)])
def test_models_without_a_timestep(arguments, tmp_path):
    model = Timeless()
    scope = Scope(model)
    first, second = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(1))
    with scope.record("head_output", "entropy") as recording:
        outputs = [model(first, *arguments), model(second, *arguments)]
    assert np.isnan(recording.to_polars()["timestep"].to_numpy()).all()
    mean = torch.cat(outputs).unflatten(-1, (2, -1)).transpose(1, 2).mean(0)
    recording.save(tmp_path)
    for found in (recording, Recording.load(tmp_path), Recording.from_tensors(recording.to_tensors())):
        assert torch.allclose(found.mean_head_output("attention", 0, float("nan"), None), mean, atol=1e-6)
        with scope.edit({"attention": [0]}, fill=found):
            edited = model(first, *arguments)
        assert torch.allclose(edited[..., :4], mean[0].expand(2, 5, 4), atol=1e-6)
        assert torch.allclose(edited[..., 4:], outputs[0][..., 4:], atol=1e-6)


def test_steps_are_the_pipelines_in_every_call(diffusion):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with Scope(diffusion).record("entropy") as recording:
        for _ in range(2):
            diffusion("a red fox", latents=latents, num_inference_steps=2, output_type="latent")
    table = recording.to_polars().select("forward", "step").unique().sort("forward")
    assert list(table.iter_rows()) == [(0, 0), (1, 1), (2, 0), (3, 1)]


def test_a_recording_goes_on_in_another_context(unet, sample):
    scope = Scope(unet)
    apart = []
    for factor in (1, 2):
        with scope.record("entropy") as single:
            run(unet, factor * sample, 400)
        apart.append(single.to_polars())
    with scope.record("entropy") as recording:
        run(unet, sample, 400)
    # other forwards come before it in the second
    with scope.edit({scope.sites[0].name: []}):
        run(unet, sample, 400)
        with scope.record("entropy", into=recording):
            run(unet, 2 * sample, 400)
    table = recording.to_polars()
    assert table["forward"].to_list() == table["step"].to_list() == [0] * len(apart[0]) + [1] * len(apart[1])
    together = pl.concat(apart)
    assert table.drop("forward", "step").equals(together.drop("forward", "step"))


def test_recordings_that_cannot_go_on(unet, sample, tmp_path):
    scope = Scope(unet)
    with scope.record("head_output") as recording:
        run(unet, sample, 400)
        with pytest.raises(ValueError, match=r"into: .*active still"), scope.record("head_output", into=recording):
            pass
    with pytest.raises(ValueError, match=r"recording of head_output, reduce=None$"):
        scope.record("head_output", reduce=None, into=recording).__enter__()
    recording.save(tmp_path)
    for read in (Recording.load(tmp_path), Recording.from_tensors(recording.to_tensors())):
        with pytest.raises(ValueError, match=r"into: .*read from a file"), scope.record("head_output", into=read):
            pass
