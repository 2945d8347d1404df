"""Paths between heads: against path patching by torch alone, and where they are known to be there or not."""

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as functional

import headscope
from headscope import Scope
from headscope.sweep import HeadSet, SweepConfig
from headscope.sweep.plan.items import load_task, open_items
from headscope.zoo.planted import load_planted
from headscope.zoo.planted.designs import HEAD_DIM
from headscope.zoo.planted.weights import FEATURES, WIDTH

TIMESTEP = 132


def swept(out, model, nodes, **fields):
    """The tables "paths" and "ablations" of a run, with plain strings."""
    asked = {"items": 3, "timesteps": (TIMESTEP,), "fills": ("zero",), "heads": None, **fields}
    asked = {"groups": ("twins",), "splits": ("confirm",), "observe": False, "kinds": ("paths",), **asked}
    paths = (HeadSet("twins", **nodes),)
    run = headscope.sweep(out, model=model, progress=False, paths=paths, **asked)
    assert run.status().complete
    tables = [run.table(kind).collect() for kind in ("paths", "ablations")]
    return [table.with_columns(pl.col(pl.Categorical).cast(pl.String)) for table in tables]


def direct(paths):
    return paths.filter(pl.col("part") == "output")


def between(paths):
    return paths.filter(pl.col("part") != "output")


@pytest.mark.parametrize("fill", ["zero", "mean"])
def test_heads_that_read_no_other(tmp_path, fill):
    """Of a planted model no head reads what another one wrote: edges are exactly 0, and a head's own way to the
    prediction is all that its removal does."""
    pipeline = load_planted("pairs")
    reference = {"reference_items": 8} if fill == "mean" else {}
    paths, ablations = swept(tmp_path / "run", pipeline, {"sites": ("*",)}, fills=(fill,), **reference)
    # 4 heads before 3, by 3 parts; 7 to the prediction
    assert len(between(paths)) == 3 * 36
    assert len(direct(paths)) == 3 * 7
    assert (between(paths)["edited"] == between(paths)["clean"]).all()
    both = direct(paths).join(
        ablations, left_on=["item", "sender_site", "sender_head"], right_on=["item", "site", "head"], suffix="_alone"
    )
    assert len(both) == 21
    np.testing.assert_allclose(both["edited"], both["edited_alone"], rtol=1e-6)
    assert (both["edited"] - both["clean"]).abs().to_numpy().max() > 1e-4


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_a_path_that_was_built_in(tmp_path, part):
    """One head of the second site is given another one's output as its query, key or value: that edge, no other."""
    pipeline = load_planted("pairs")
    attn = pipeline.unet.blocks[1].attn
    # the head 2 of the second site; what the first head of the first site writes follows the features
    rows = slice(2 * HEAD_DIM, 3 * HEAD_DIM)
    with torch.no_grad():
        if part != "v":
            # its logits are the product of that number at one place and the luminance at the other
            attn.to_q.weight[rows] = attn.to_k.weight[rows] = 0.0
            attn.get_submodule({"q": "to_k", "k": "to_q"}[part]).weight[rows.start, FEATURES["luminance"]] = 8.0
        attn.get_submodule(f"to_{part}").weight[rows.start, WIDTH] = 1.0
    paths, _ = swept(tmp_path / "run", pipeline, {"sites": ("*",)})
    changed = between(paths).filter(pl.col("edited") != pl.col("clean"))
    found = changed.select("sender_site", "sender_head", "receiver_site", "receiver_head", "part").unique().rows()
    assert found == [("blocks.0.attn", 0, "blocks.1.attn", 2, part)]
    assert (changed["edited"] - changed["clean"]).abs().to_numpy().max() > 1e-5


class Spy:
    """Torch's attention, call by call, with queries, keys, values or outputs of some calls replaced."""

    def __init__(self, inputs=None, outputs=None):
        self.inputs, self.outputs = inputs or {}, outputs or {}
        self.seen, self.given = [], []
        self._stock = functional.scaled_dot_product_attention

    def __call__(self, query, key, value, **options):
        number = len(self.seen)
        given = {"q": query, "k": key, "v": value} | self.inputs.get(number, {})
        output = self._stock(given["q"], given["k"], given["v"], **options)
        output = self.outputs.get(number, output)
        self.seen.append(output)
        self.given.append(given)
        return output

    def __enter__(self):
        functional.scaled_dot_product_attention = self
        return self

    def __exit__(self, *_):
        functional.scaled_dot_product_attention = self._stock


FULL = pytest.mark.full


@pytest.mark.parametrize(
    ("family", "batch"),
    [
        ("ddpm", 16),
        pytest.param("ddpm", 2, marks=FULL),
        # cross-attention beside self-attention; text and image joined
        pytest.param("stable_diffusion", 16, marks=FULL),
        pytest.param("stable_diffusion_3", 16, marks=FULL),
        pytest.param("flux", 16, marks=FULL),
    ],
)
def test_against_torch_alone(family_directory, ddpm_directory, tmp_path, family, batch):
    """Every edge between some heads of a model with random weights, one forward each."""
    directory = ddpm_directory if family == "ddpm" else family_directory(family)
    config = SweepConfig(
        model=directory, groups=("twins",), splits=("confirm",), items=3, timesteps=(60,), fills=("zero",)
    )
    task = load_task(config)
    sites = Scope(task.denoiser).sites
    order = [site.name for site in sites]
    nodes = [(site.name, head) for site in sites[:6] for head in range(min(site.heads, 2))]
    cross = {site.name for site in sites if site.kind == "cross"}
    paths, _ = swept(tmp_path / "run", directory, {"heads": tuple(nodes)}, timesteps=(60,), batch=batch)
    (group,) = open_items(config, task)
    compared, largest = 0, 0.0
    for item in group.swept[: 2 if family == "ddpm" else 1]:
        noisy = task.noisy_inputs(task.prepare([item]), 60)

        def loss(noisy=noisy, **replaced):
            with torch.inference_mode(), Spy(**replaced) as spy:
                return float(task.loss(noisy)[0]), spy

        clean, whole = loss()
        rows = {
            (row["sender_site"], row["sender_head"], row["receiver_site"], row["receiver_head"], row["part"]): row
            for row in paths.filter(pl.col("item") == item.index).iter_rows(named=True)
        }
        expected = set()
        for site, head in nodes:
            first = order.index(site)
            held = dict(enumerate(whole.seen))
            held[first] = whole.seen[first].clone()
            held[first][:, head] = 0.0
            edited, spy = loss(outputs=held)
            expected.add((site, head, None, None, "output"))
            assert rows[site, head, None, None, "output"]["edited"] == pytest.approx(edited, rel=1e-5)
            for receiver, other in nodes:
                second = order.index(receiver)
                if second <= first:
                    continue
                for part in "q" if receiver in cross else "qkv":
                    patched = whole.given[second][part].clone()
                    patched[:, other] = spy.given[second][part][:, other]
                    edited, _ = loss(inputs={second: {part: patched}})
                    row = rows[site, head, receiver, other, part]
                    assert row["clean"] == pytest.approx(clean, rel=1e-5)
                    assert row["edited"] - row["clean"] == pytest.approx(edited - clean, abs=2e-6 * clean)
                    expected.add((site, head, receiver, other, part))
                    largest = max(largest, abs(edited - clean) / clean)
                    compared += 1
        assert set(rows) == expected
    assert compared > 20
    # there is something to compare
    assert largest > 2e-5


def test_what_can_t_be_measured(ddpm_directory, tmp_path):
    # pixeldit has 48
    many = (HeadSet("twins", sites=("*",)),)
    with pytest.raises(ValueError, match=r"paths: 'twins': got 48 heads, expected at most 30"):
        headscope.sweep(
            tmp_path / "run", groups=("twins",), items=1, fills=("zero",), kinds=("paths",), paths=many, progress=False
        )
    with pytest.raises(ValueError, match="fills: got 'uniform' with the kind paths, expected some of mean, zero"):
        swept(tmp_path / "run", ddpm_directory, {"sites": ("*",)}, fills=("uniform",))
    with pytest.raises(ValueError, match=r"paths: 'twins': heads: got \('nowhere', 0\), expected heads of"):
        swept(tmp_path / "run", ddpm_directory, {"heads": (("nowhere", 0),)})
