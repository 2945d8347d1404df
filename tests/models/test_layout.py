"""Queries of the image, the text and each frame are recorded apart, never pooled."""

import pytest
import torch
import torch.nn.functional as functional
from diffusers import CogVideoXTransformer3DModel, UNetMotionModel

import tiny
from headscope import Scope
from headscope.models.structure.layout import Geometry, Given, Place, layout_of, place_of
from headscope.models.structure.sites import Site

FAMILIES = {"sd3": (tiny.sd3_transformer, tiny.sd3_inputs), "flux": (tiny.flux_transformer, tiny.flux_inputs)}


def run(model, inputs):
    with torch.inference_mode():
        return model(**inputs, return_dict=False)[0]


def entropy_of(query, key):
    logits = query.double() @ key.double().transpose(-1, -2) / query.shape[-1] ** 0.5
    return torch.special.entr(logits.softmax(-1)).sum(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_tokens_of_the_first_layer_do_not_depend_on_the_image(family):
    """The text's values are those that stay as they were when only the image changes."""
    build, make = FAMILIES[family]
    model, inputs = build(), make()
    other = {**inputs, "hidden_states": inputs["hidden_states"] + 1}
    scope = Scope(model)
    site = scope.sites[0]
    values = []
    for given in (inputs, other):
        with scope.record("v", "entropy", sites=[site.name], reduce=None) as recording:
            run(model, given)
        timestep = recording.to_polars()["timestep"][0]
        values.append(recording.samples("v", site.name, 0, timestep))
    unchanged = (values[0] == values[1]).all(-1).all(1)[0]
    table = recording.to_polars()
    sizes = dict(table.select("query_group", "queries").unique().iter_rows())
    image = inputs["hidden_states"].shape[1] if family == "flux" else 16
    assert sizes == {"text": 5, "image": image}
    groups = list(table["query_group"].unique(maintain_order=True).cast(str))
    expected = torch.cat([torch.full((sizes[group],), group == "text") for group in groups])
    assert torch.equal(unchanged, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_are_reduced_apart(family):
    build, make = FAMILIES[family]
    model, inputs = build(), make()
    scope = Scope(model)
    with scope.record("entropy", "q", "k", reduce=None) as recording:
        run(model, inputs)
    table = recording.to_polars()
    timestep = table["timestep"][0]
    for site in scope.sites:
        assert site.kind == "joint"
        entropy = entropy_of(*(recording.samples(name, site.name, 0, timestep) for name in ("q", "k")))
        text, image = (
            (entropy[..., :5], entropy[..., 5:]) if site.text_first else (entropy[..., -5:], entropy[..., :-5])
        )
        for group, expected in (("text", text), ("image", image)):
            rows = table.filter((table["site"].cast(str) == site.name) & (table["query_group"].cast(str) == group))
            rows = rows.sort("sample", "head")
            for column, value in (
                ("entropy_mean", expected.mean(-1)),
                ("entropy_std", expected.std(-1, correction=0)),
                ("entropy_min", expected.amin(-1)),
                ("entropy_max", expected.amax(-1)),
            ):
                assert rows[column].to_numpy() == pytest.approx(value.flatten().numpy(), abs=1e-4), column
            every = torch.tensor(rows["entropy"].to_list())
            assert float((every - expected.flatten(0, 1)).abs().max()) <= 1e-4


def test_spatial_attention_of_a_video_is_apart_by_frame():
    torch.manual_seed(0)
    model = UNetMotionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
    ).eval()
    frames = 3
    inputs = {
        "sample": torch.randn(2, 4, frames, 8, 8),
        "timestep": torch.tensor(7),
        "encoder_hidden_states": torch.randn(2 * frames, 5, 12),
    }
    scope = Scope(model)
    spatial = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    temporal = "down_blocks.0.motion_modules.0.transformer_blocks.0.attn1"
    captured = []
    stock = functional.scaled_dot_product_attention

    def spy(query, key, value, **options):
        captured.append((query, key))
        return stock(query, key, value, **options)

    functional.scaled_dot_product_attention = spy
    try:
        run(model, inputs)
    finally:
        functional.scaled_dot_product_attention = stock
    with scope.record("entropy") as recording:
        run(model, inputs)
    table = recording.to_polars()
    query, key = next((q, k) for q, k in captured if q.shape[2] == 64 and k.shape[2] == 64)
    expected = entropy_of(query, key).unflatten(0, (2, frames)).mean(-1)  # [samples, frames, heads]
    rows = table.filter(table["site"].cast(str) == spatial).sort("sample", "frame", "head")
    assert set(rows["query_group"].cast(str)) == {"image"}
    assert rows["entropy_mean"].to_numpy() == pytest.approx(expected.flatten().numpy(), abs=1e-4)
    query, key = next((q, k) for q, k in captured if q.shape[2] == frames)
    expected = entropy_of(query, key).unflatten(0, (2, -1)).mean((1, 3))  # [samples, heads]
    rows = table.filter(table["site"].cast(str) == temporal).sort("sample", "head")
    assert set(rows["query_group"].cast(str)) == {"frame"}
    assert rows["entropy_mean"].to_numpy() == pytest.approx(expected.flatten().numpy(), abs=1e-4)


def test_full_attention_of_a_video_is_apart_by_frame_and_text():
    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=8,
        num_layers=1,
        sample_width=8,
        sample_height=6,
        sample_frames=9,
        patch_size=2,
        max_text_seq_length=5,
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 3, 4, 6, 8),
        "encoder_hidden_states": torch.randn(1, 5, 8),
        "timestep": torch.tensor([7]),
    }
    scope = Scope(model)
    with scope.record("entropy", "q", "k", reduce=None) as recording:
        run(model, inputs)
    name = scope.sites[0].name
    entropy = entropy_of(*(recording.samples(quantity, name, 0, 7) for quantity in ("q", "k")))[0]
    table = recording.to_polars().sort("frame", "head", nulls_last=True)
    expected = [*(entropy[:, 5 + 12 * frame : 17 + 12 * frame].mean(-1) for frame in range(3)), entropy[:, :5].mean(-1)]
    assert list(table["query_group"].cast(str)) == ["image"] * 6 + ["text"] * 2
    assert table["frame"].to_list() == [0, 0, 1, 1, 2, 2, None, None]
    assert table["entropy_mean"].to_numpy() == pytest.approx(torch.cat(expected).numpy(), abs=1e-4)


def test_grids():
    site = Site("attn", "self", 2, 8)
    unet = Geometry(1, (12, 20))
    assert [unet.grid(tokens) for tokens in (240, 60, 15, 6, 16)] == [(12, 20), (6, 10), (3, 5), (2, 3), None]
    patched = Geometry(1, (12, 20), patch=2)
    assert (patched.grid(60), patched.grid(240)) == ((6, 10), None)
    packed = Geometry(1, tokens=12, ids=tiny.flux_inputs(height=4, width=3)["img_ids"])
    assert packed.grid(12) == (4, 3)
    assert layout_of(site, unet, 1, 60, 60, Given(), Place(1, 1, 0), 0).grid == (6, 10)


@pytest.mark.parametrize(
    ("given", "rows", "queries", "expected"),
    [
        # all samples, of which each may be several rows
        ((0, 3, 16), 3, 16, Place(3, 3, 0)),
        ((0, 3, 16), 12, 4, Place(3, 12, 0)),
        ((0, 0, 0), 12, 4, Place(3, 12, 0)),
        # a part of the module's rows, after others
        ((0, 3, 16, 0), 1, 16, Place(3, 3, 0)),
        ((0, 3, 16, 2), 1, 20, Place(3, 3, 2)),
        ((0, 24, 16, 0), 16, 16, Place(3, 24, 0)),
        ((0, 24, 16, 16), 8, 16, Place(3, 24, 16)),
        ((0, 72, 16, 0), 48, 16, Place(3, 72, 0)),
        # not a part: frames or pixels were folded the other way
        ((0, 72, 16), 48, 24, Place(3, 48, 0)),
        # the module itself is run on a part of the batch, and twice attends to it
        ((0, 1, 16, 0), 1, 16, Place(1, 1, 0)),
        ((0, 1, 16, 1), 1, 16, Place(1, 1, 0)),
        # nothing is known of the module
        ((0, 0, 0), 1, 16, Place(1, 1, 0, alone=True)),
        ((0, 0, 0), 2, 16, None),
    ],
)
def test_which_rows_of_a_batch_of_three_a_call_is_of(given, rows, queries, expected):
    assert place_of(3, Given(*given), rows, queries) == expected
