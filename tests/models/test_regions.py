"""Statistics of regions and per class of queries, against attention that is written out in float64."""

from collections.abc import Mapping

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as functional
from diffusers import CogVideoXTransformer3DModel, UNetMotionModel
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from headscope import CounterpartMass, GroupEntropy, GroupMass, Regions, Scope
from headscope.models import Site, Task
from headscope.zoo import load_pipeline, open_group
from masked import NAMES, TIED, masks, rows_of
from running import run

# a statistic errs by 1e-5 and a few roundings of its largest logit (the operator's contract); logits here are below 20,
# and means of float32 round a few times more
CLOSE = 2e-5


def probabilities(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """[samples, heads, queries, keys], float64."""
    logits = query.double() @ key.double().transpose(-1, -2) / query.shape[-1] ** 0.5
    return logits.softmax(-1)


def assert_close(found: pl.Series, expected: torch.Tensor) -> None:
    """Numbers, or lists of them; NaN of the expected ones stands for null."""
    flat = expected.flatten(0, 1)
    empty = flat.isnan().flatten(1).all(1) if flat.ndim > 1 else flat.isnan()
    assert found.is_null().to_list() == empty.tolist()
    values = np.array(found.drop_nulls().to_list()).reshape(flat[~empty].shape)
    np.testing.assert_allclose(values, flat[~empty].numpy(), rtol=0, atol=CLOSE)


def check_classes(
    table: pl.DataFrame,
    site: Site,
    p: torch.Tensor,
    classes: Mapping[str, torch.Tensor],
    groups: torch.Tensor | None = None,
    relation: torch.Tensor | None = None,
    start: int = 0,
    **labels,
) -> None:
    """Compare a site's rows with its probabilities [samples, heads, queries, keys].

    Args:
        classes: bool [samples, image tokens] by name.
        groups: the region of each key, [samples, keys]; None where the table has no masses.
        relation: bool [samples, regions, regions].
        start: the first image token among the queries.
    """
    keys = p.shape[-1]
    entropy = torch.special.entr(p).sum(-1)
    for name, inside in classes.items():
        chosen = torch.zeros(p.shape[0], p.shape[2], dtype=torch.bool)
        chosen[:, start : start + inside.shape[1]] = inside
        count = chosen.sum(1)

        def mean(values: torch.Tensor, chosen=chosen, count=count) -> torch.Tensor:
            picked = values * chosen[:, None, :, *[None] * (values.ndim - 3)]
            return picked.sum(2) / count[:, None, *[None] * (values.ndim - 3)]

        found = rows_of(table, site.name, query_class=name, **labels)
        assert len(found) == p.shape[0] * p.shape[1]
        assert found["queries"].to_list() == count.repeat_interleave(p.shape[1]).tolist()
        assert set(found["keys"]) == {keys}
        assert_close(found["entropy_mean"], mean(entropy))
        assert_close(found["entropy_normalised_mean"], mean(entropy / np.log(keys)))
        if groups is None:
            continue
        members = functional.one_hot(groups + 1, len(NAMES) + 1)[..., 1:].double()
        mass = p @ members[:, None]
        assert_close(found["group_mass_mean"], mean(mass))
        share = members.mean(1)
        np.testing.assert_allclose(
            np.array(found["group_mass_share"].to_list()), share.repeat_interleave(p.shape[1], 0), atol=1e-7
        )
        if "group_entropy_mean" in found.columns:
            within = (p[..., None] * members[:, None, None]) / mass[..., None, :].clamp(min=1e-300)
            assert_close(found["group_entropy_mean"], mean(torch.special.entr(within).sum(3)))
        if relation is not None:
            related = relation[:, NAMES.index(name)].double()
            none = (related.sum(-1) == 0)[:, None].expand(-1, p.shape[1])
            counterpart = (mean(mass) * related[:, None]).sum(-1).masked_fill(none, torch.nan)
            assert_close(found["counterpart_mass_mean"], counterpart)
            shares = (share * related).sum(-1)[:, None].expand(-1, p.shape[1]).masked_fill(none, torch.nan)
            assert_close(found["counterpart_mass_share"], shares)


def classes_of(regions: Regions, grid: tuple[int, int], samples: int) -> dict[str, torch.Tensor]:
    tokens = regions.on_grid(grid).expand(samples, -1)
    return {name: tokens == number for number, name in enumerate(regions.names)}


STATISTICS = ("entropy", "q", "k")


@pytest.mark.parametrize("own", [True, False], ids=["masks of each", "one mask for all"])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (7, 5), (3, 4), (64, 24)])
def test_a_dit_with_items_of_its_own_masks(own, height, width):
    """Of 4 x 4 tokens: masks of other sizes are brought to them."""
    model = tiny.dit().transformer
    sample = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    regions = Regions(masks(3 if own else 1, height, width), NAMES, TIED)
    scope = Scope(model)
    wanted = (*STATISTICS, GroupMass(regions), GroupEntropy(regions), CounterpartMass(regions))
    with torch.inference_mode(), scope.record(*wanted, queries=regions, reduce=None) as recording:
        model(sample, torch.full((3,), 7), torch.tensor([1, 2, 3]))
    table = recording.to_polars()
    assert recording.query_classes == NAMES
    assert recording.regions == {"group_mass": NAMES, "group_entropy": NAMES}
    assert regions.counterparts is not None
    for site in scope.sites:
        p = probabilities(*(recording.samples(name, site.name, 0, 7) for name in ("q", "k")))
        groups = regions.on_grid((4, 4)).expand(3, -1).long()
        relation = regions.counterparts.expand(3, -1, -1)
        check_classes(table, site, p, classes_of(regions, (4, 4), 3), groups, relation)


def test_the_bundled_model_on_twins():
    """An item's masks are its own, at every site's size."""
    task, group = Task.of(load_pipeline()), open_group("twins")
    items = [group.item(index) for index in (1, 5, 8)]
    regions = Regions.of(items)
    scope = Scope(task.denoiser)
    inputs = task.noisy_inputs(task.prepare(items), 100)
    with scope.record(*STATISTICS, CounterpartMass(regions), queries=regions, reduce=None) as recording:
        task.predict(inputs)
    table = recording.to_polars()
    for site in scope.sites:
        p = probabilities(*(recording.samples(name, site.name, 0, 100) for name in ("q", "k")))
        edge = round(p.shape[2] ** 0.5)
        check_classes(table, site, p, classes_of(regions, (edge, edge), 3))
        tokens = regions.on_grid((edge, edge))
        for glyph in range(1, 5):
            found = rows_of(table, site.name, query_class=f"glyph {glyph}")
            others = (tokens > 0) & (tokens != glyph)
            mass = (p * others[:, None, None]).sum(-1)
            mine = (tokens == glyph)[:, None]
            assert_close(found["counterpart_mass_mean"], (mass * mine).sum(-1) / mine.sum(-1))
            share = others.double().mean(1)[:, None].expand(-1, p.shape[1])
            assert_close(found["counterpart_mass_share"], share)
        background = rows_of(table, site.name, query_class="background")
        assert background["counterpart_mass_mean"].null_count() == len(background)
        assert background["counterpart_mass_share"].null_count() == len(background)
        assert background["entropy_mean"].null_count() == 0


class Picture(torch.nn.Module):
    """Attention of a picture's places, with queries and keys as they come in."""

    heads = 2

    def forward(self, sample):
        query, key = (part.flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3) for part in sample.chunk(2, 1))
        return functional.scaled_dot_product_attention(query, key, key)


class Pictures(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Picture()

    def forward(self, sample, timestep=None):
        return self.attention(sample)


def queries_and_keys(sample: torch.Tensor) -> list[torch.Tensor]:
    return [part.flatten(2).unflatten(1, (2, -1)).transpose(2, 3) for part in sample.chunk(2, 1)]


@st.composite
def problems(draw):
    """A batch of pictures, masks for each or one for all, and classes that overlap."""
    samples, height, width = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    given = draw(st.sampled_from([1, samples]))
    size = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    numbers = given * size[0] * size[1]
    regions = draw(st.lists(st.integers(-1, 3), min_size=numbers, max_size=numbers))
    bits = draw(st.lists(st.booleans(), min_size=2 * numbers, max_size=2 * numbers))
    classes = torch.tensor(bits).view(2, given, *size)
    return (samples, height, width), torch.tensor(regions).view(given, *size), classes, draw(st.integers(0, 2**31))


@settings(max_examples=25, deadline=None)
@given(problems())
def test_any_masks_and_classes(problem):
    (samples, height, width), numbers, overlapping, seed = problem
    sample = torch.randn(samples, 8, height, width, generator=torch.Generator().manual_seed(seed))
    regions, model = Regions(numbers, NAMES), Pictures()
    classes = {"one": overlapping[0], "other": overlapping[1, :1]}
    scope = Scope(model)
    with torch.inference_mode(), scope.record("entropy", GroupMass(regions), queries=classes) as recording:
        model(sample)
    p = probabilities(*queries_and_keys(sample))
    inside = {}
    for name, mask in classes.items():
        # at least half of a token: that of a region whose other pixels are in none
        tokens = Regions(mask.long() - 1, ["it"]).on_grid((height, width))
        inside[name] = (tokens == 0).expand(samples, -1)
    groups = regions.on_grid((height, width)).expand(samples, -1).long()
    check_classes(recording.to_polars(), scope.sites[0], p, inside, groups)


def test_not_a_number_stays_in_its_class():
    """What is in no class, or in another one, changes nothing: classes are selected, not weighted by 0."""
    sample = torch.randn(1, 8, 2, 2)
    sample[0, :4, 0, 0] = torch.nan
    classes = {name: torch.zeros(1, 2, 2, dtype=torch.bool) for name in ("bad", "good", "empty")}
    classes["bad"][0, 0], classes["good"][0, 1] = True, True
    model = Pictures()
    with torch.inference_mode(), Scope(model).record("entropy", "max_logit", queries=classes) as recording:
        model(sample)
    table = recording.to_polars()
    query, key = (part.double() for part in queries_and_keys(sample))
    logits = query @ key.transpose(-1, -2) / 2**0.5
    for head in range(2):
        found = {name: rows_of(table, "attention", query_class=name)[head] for name in classes}
        assert found["good"]["max_logit_mean"][0] == pytest.approx(
            float(logits[0, head, 2:].amax(-1).mean()), abs=CLOSE
        )
        assert found["bad"]["entropy_mean"].is_nan()[0]
        assert not found["good"]["entropy_mean"].is_nan()[0]
        assert found["empty"]["entropy_mean"][0] is None
        assert found["empty"]["queries"][0] == 0


def test_masks_that_are_all_none(unet, sample):
    regions = Regions(torch.full((1, 16, 16), -1), NAMES, TIED)
    wanted = ("entropy", GroupMass(regions), CounterpartMass(regions))
    with Scope(unet).record(*wanted, queries=regions) as recording:
        run(unet, sample)
    table = recording.to_polars()
    whole, classes = table.filter(pl.col("query_class").is_null()), table.filter(pl.col("query_class").is_not_null())
    assert np.abs(np.array(whole["group_mass_mean"].to_list())).max() == 0
    assert set(classes["queries"]) == {0}
    for name in ("entropy_mean", "group_mass_mean", "counterpart_mass_mean"):
        assert classes[name].null_count() == len(classes)


def guided(diffusion, *statistics, queries, **options):
    """Two prompts under guidance: four rows, and masks of two samples."""
    scope = Scope(diffusion)
    with scope.record(*statistics, queries=queries, **options) as recording:
        generator = torch.Generator().manual_seed(0)
        diffusion(["a fox", "a house"], num_inference_steps=1, generator=generator, output_type="np")
    return scope, recording


@pytest.mark.parametrize("given", ["of a branch", "of the batch"])
def test_both_guidance_branches_have_their_sample_s_masks(diffusion, given):
    """And sites whose keys are the text's have classes of queries, and no masses."""
    numbers = masks(2, 12, 10)
    regions = Regions(numbers, NAMES, TIED)
    if given == "of the batch":
        regions = regions.take([0, 1, 0, 1])
    wanted = (*STATISTICS, GroupMass(regions), CounterpartMass(regions))
    scope, recording = guided(diffusion, *wanted, queries=regions, reduce=None)
    table = recording.to_polars()
    timestep = table["timestep"][0]
    assert {site.kind for site in scope.sites} == {"self", "cross"}
    relation = regions.counterparts
    assert relation is not None
    for site in scope.sites:
        edge = round(max(rows_of(table, site.name)["queries"].to_list()) ** 0.5)
        tokens = Regions(numbers, NAMES).on_grid((edge, edge)).long()
        for branch in ("uncond", "cond"):
            p = probabilities(*(recording.samples(name, site.name, 0, timestep, branch) for name in ("q", "k")))
            classes = {name: tokens == number for number, name in enumerate(NAMES)}
            if site.kind == "cross":
                check_classes(table, site, p, classes, branch=branch)
                rows = rows_of(table, site.name)
                for name in ("group_mass_mean", "counterpart_mass_mean", "group_mass_share"):
                    assert rows[name].null_count() == len(rows)
            else:
                check_classes(table, site, p, classes, tokens, relation.expand(2, -1, -1), branch=branch)


def test_images_of_one_prompt_take_its_masks_several_times(diffusion):
    regions = Regions(masks(2, 8, 8), NAMES)
    scope = Scope(diffusion)
    draw = {"num_inference_steps": 1, "num_images_per_prompt": 2, "output_type": "np"}
    wrong = pytest.raises(ValueError, match="of 2 samples, expected 4 or 1: the batch has 8 rows in 2 guidance branch")
    with wrong, scope.record("entropy", queries=regions):
        diffusion(["a fox", "a house"], **draw)
    repeated = regions.take([0, 0, 1, 1])
    with scope.record("entropy", queries=repeated) as recording:
        diffusion(["a fox", "a house"], **draw)
    table = recording.to_polars()
    for site in scope.sites:
        whole = rows_of(table, site.name, query_class=None, head=0, branch="cond")
        edge = round(whole["queries"][0] ** 0.5)
        counts = (regions.on_grid((edge, edge)) == 0).sum(1).repeat_interleave(2).tolist()
        assert counts[0] != counts[2]
        for branch in ("uncond", "cond"):
            assert rows_of(table, site.name, query_class="left", head=0, branch=branch)["queries"].to_list() == counts


JOINT = {
    "sd3": (tiny.sd3_transformer, tiny.sd3_inputs, (4, 4)),
    "flux": (tiny.flux_transformer, tiny.flux_inputs, (4, 3)),
}


@pytest.mark.parametrize("family", JOINT)
def test_text_tokens_are_in_no_region(family):
    build, make, grid = JOINT[family]
    model, inputs = build(), make()
    tokens = grid[0] * grid[1]
    regions = Regions(masks(2, 8, 9), NAMES, TIED)
    scope = Scope(model)
    wanted = (*STATISTICS, GroupMass(regions), CounterpartMass(regions))
    with torch.inference_mode(), scope.record(*wanted, queries=regions, reduce=None) as recording:
        model(**inputs, return_dict=False)
    table = recording.to_polars()
    timestep = table["timestep"][0]
    of_image = regions.on_grid(grid).long()
    assert regions.counterparts is not None
    for site in scope.sites:
        p = probabilities(*(recording.samples(name, site.name, 0, timestep) for name in ("q", "k")))
        start = 5 if site.text_first else 0
        groups = torch.full((2, tokens + 5), -1)
        groups[:, start : start + tokens] = of_image
        relation = regions.counterparts.expand(2, -1, -1)
        check_classes(table, site, p, classes_of(regions, grid, 2), groups, relation, start)
        text = rows_of(table, site.name, query_group="text")
        assert text["query_class"].null_count() == len(text) == 2 * site.heads
        members = functional.one_hot(groups + 1, len(NAMES) + 1)[..., 1:].double()
        mass = (p @ members[:, None])[:, :, 0 if start else tokens :][:, :, :5].mean(2)
        assert_close(text["group_mass_mean"], mass)


def test_every_frame_of_a_video_has_its_sample_s_masks():
    torch.manual_seed(0)
    model = UNetMotionModel(
        sample_size=8, block_out_channels=(8, 16), down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=12, num_attention_heads=2, motion_num_attention_heads=2, motion_max_seq_length=8,
    ).eval()  # fmt: skip
    inputs = (torch.randn(2, 4, 3, 8, 8), torch.tensor(7), torch.randn(6, 5, 12))
    regions = Regions(masks(2, 8, 8), NAMES)
    scope = Scope(model)
    with torch.inference_mode(), scope.record(*STATISTICS, GroupMass(regions), queries=regions, reduce=None) as found:
        model(*inputs)
    table = found.to_polars()
    spatial = scope.site("down_blocks.0.attentions.0.transformer_blocks.0.attn1")
    p = probabilities(*(found.samples(name, spatial.name, 0, 7) for name in ("q", "k")))  # [samples, frames, ...]
    tokens = regions.on_grid((8, 8)).long()
    for frame in range(3):
        check_classes(table, spatial, p[:, frame], classes_of(regions, (8, 8), 2), tokens, frame=frame)
    # queries that are frames are in no class
    temporal = rows_of(table, "down_blocks.0.motion_modules.0.transformer_blocks.0.attn1")
    assert temporal["query_class"].null_count() == len(temporal) > 0
    assert temporal["group_mass_mean"].null_count() == len(temporal)


def test_full_attention_of_a_video_has_the_masks_in_every_frame():
    """Keys are the image tokens of all frames, and the text's, which are in no region."""
    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=8,
        num_layers=1, sample_width=8, sample_height=6, sample_frames=9, patch_size=2, max_text_seq_length=5,
    ).eval()  # fmt: skip
    inputs = (torch.randn(2, 3, 4, 6, 8), torch.randn(2, 5, 8), torch.tensor([7, 7]))
    regions = Regions(masks(2, 12, 16), NAMES, TIED)
    scope = Scope(model)
    wanted = (*STATISTICS, GroupMass(regions), CounterpartMass(regions))
    with torch.inference_mode(), scope.record(*wanted, queries=regions, reduce=None) as recording:
        model(*inputs)
    table = recording.to_polars()
    (site,) = scope.sites
    p = probabilities(*(recording.samples(name, site.name, 0, 7) for name in ("q", "k")))
    tokens = regions.on_grid((3, 4)).long()
    groups = torch.cat([torch.full((2, 5), -1), *[tokens] * 3], 1)
    assert regions.counterparts is not None
    relation = regions.counterparts.expand(2, -1, -1)
    for frame in range(3):
        classes = classes_of(regions, (3, 4), 2)
        check_classes(table, site, p, classes, groups, relation, 5 + 12 * frame, frame=frame)


class OneByOne(Pictures):
    """A model that attends to one sample after the other."""

    def forward(self, sample, timestep=None):
        return torch.cat([self.attention(one) for one in sample.split(1)])


@pytest.mark.parametrize("samples", [1, 3])
def test_attention_to_one_sample_after_the_other(samples):
    sample = torch.randn(3, 8, 3, 4, generator=torch.Generator().manual_seed(0))
    regions, model = Regions(masks(samples, 6, 8), NAMES, TIED), OneByOne()
    scope = Scope(model)
    wanted = ("entropy", GroupMass(regions), CounterpartMass(regions))
    with torch.inference_mode(), scope.record(*wanted, queries=regions) as recording:
        model(sample)
    groups = regions.on_grid((3, 4)).expand(3, -1).long()
    assert regions.counterparts is not None
    relation = regions.counterparts.expand(3, -1, -1)
    p = probabilities(*queries_and_keys(sample))
    check_classes(recording.to_polars(), scope.sites[0], p, classes_of(regions, (3, 4), 3), groups, relation)
