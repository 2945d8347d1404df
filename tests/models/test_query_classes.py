"""Classes of queries in recordings: their tables, files and later contexts, and what is refused."""

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as functional
from polars.testing import assert_frame_equal

from headscope import CounterpartMass, GroupMass, Recording, Regions, Scope
from headscope.models import attending
from masked import NAMES, TIED, masks, rows_of
from running import run


@pytest.mark.parametrize("reduce", ["mean", None])
def test_rows_over_all_queries_stay_what_they_are(unet, sample, reduce):
    regions = Regions(masks(3, 9, 9), NAMES, TIED)
    scope = Scope(unet)
    wanted = ("entropy", "logsumexp", "key_mass", GroupMass(regions))
    with scope.record(*wanted, reduce=reduce) as plain:
        run(unet, sample)
    with scope.record(*wanted, CounterpartMass(regions), queries=regions, reduce=reduce) as recording:
        run(unet, sample)
    table = recording.to_polars()
    assert table["query_class"].dtype == pl.Categorical
    whole = table.filter(pl.col("query_class").is_null())
    assert whole["counterpart_mass_mean"].null_count() == whole["group_mass_share"].null_count() == len(whole)
    assert_frame_equal(whole.select(plain.to_polars().columns), plain.to_polars(), check_exact=True)
    of_classes = table.filter(pl.col("query_class").is_not_null())
    assert len(of_classes) == len(scope.sites) * 3 * 4 * len(NAMES)
    # classes have means alone
    for name in ("entropy_std", "entropy_min", "grid_height", "key_mass", *(["entropy"] if reduce is None else [])):
        assert of_classes[name].null_count() == len(of_classes)
    assert of_classes["queries"].dtype == pl.Int32


def test_the_schema_without_classes_is_as_it_was(unet, sample):
    with Scope(unet).record("entropy", GroupMass(torch.zeros(64, dtype=torch.int64), 1)) as recording:
        run(unet, sample)
    words, number, whole = pa.dictionary(pa.int32(), pa.string()), pa.float32(), pa.int32()
    masses = {f"group_mass_{reduction}": pa.list_(number) for reduction in ("mean", "std", "min", "max")}
    expected = {
        "forward": whole, "step": whole, "timestep": pa.float64(), "site": words, "call": pa.int16(), "sample": whole,
        "branch": pa.dictionary(pa.int8(), pa.string()), "head": pa.int16(), "query_group": words, "frame": pa.int16(),
        "queries": whole, "keys": whole, "grid_height": whole, "grid_width": whole, "entropy_mean": number,
        "entropy_std": number, "entropy_min": number, "entropy_max": number, "entropy_normalised_mean": number,
        **masses,
    }  # fmt: skip
    assert recording.to_arrow().schema == pa.schema(expected.items())


def test_a_recording_goes_on_with_other_samples_masks(unet, sample):
    first, second = Regions(masks(2, 8, 8, seed=1), NAMES), Regions(masks(1, 8, 8, seed=2), NAMES)
    scope = Scope(unet)
    with scope.record("entropy", GroupMass(first), queries=first) as recording:
        run(unet, sample[:2])
    with scope.record("entropy", GroupMass(second), queries=second, into=recording) as again:
        run(unet, sample[2:])
    assert again is recording
    tables = []
    for regions, images in ((first, sample[:2]), (second, sample[2:])):
        with scope.record("entropy", GroupMass(regions), queries=regions) as alone:
            run(unet, images)
        tables.append(alone.to_polars().drop("forward", "step"))
    table = recording.to_polars().drop("forward", "step")
    categories = [pl.col(pl.Categorical).cast(pl.String)]
    assert_frame_equal(
        table.with_columns(categories), pl.concat([one.with_columns(categories) for one in tables]), check_exact=True
    )
    wrong = pytest.raises(ValueError, match=r"into: got .*, expected a recording of entropy, .* queries of left, right")
    with wrong, scope.record("entropy", queries=Regions(masks(1, 8, 8), NAMES), into=recording):
        pass


def test_saved_and_loaded(unet, sample, tmp_path):
    regions = Regions(masks(3, 8, 8), NAMES, TIED)
    wanted = ("entropy", "head_output", GroupMass(regions), CounterpartMass(regions))
    with Scope(unet).record(*wanted, queries=regions) as recording:
        run(unet, sample)
    recording.save(tmp_path)
    loaded = Recording.load(tmp_path)
    assert loaded.to_polars().equals(recording.to_polars())
    assert (loaded.query_classes, loaded.regions) == (NAMES, {"group_mass": NAMES})
    means = Recording.from_tensors(recording.to_tensors())
    site = Scope(unet).sites[0].name
    assert torch.equal(means.mean("head_output", site, 0, 7), recording.mean("head_output", site, 0, 7))


def test_xarray_has_a_dimension_of_classes(unet, sample):
    pytest.importorskip("xarray")
    regions = Regions(masks(3, 8, 8), NAMES, TIED)
    with Scope(unet).record("entropy", CounterpartMass(regions), queries=regions) as recording:
        run(unet, sample)
    data = recording.to_xarray()
    assert data["query_class"].values.tolist() == ["none", *NAMES]
    table = recording.to_polars().with_columns(pl.col(pl.Categorical).cast(pl.String)).fill_null("none")
    for row in table.sample(8, seed=0).iter_rows(named=True):
        names = ("forward", "site", "call", "sample", "head", "query_group", "query_class")
        place = {name: row[name] for name in names}
        for name in ("entropy_mean", "counterpart_mass_mean"):
            found = float(data[name].sel(place).squeeze())
            assert found == row[name] if row[name] is not None else np.isnan(found)


def test_a_plot_is_of_all_queries(unet, sample):
    regions = Regions(masks(3, 8, 8), NAMES)
    scope = Scope(unet)
    with scope.record("entropy", queries=regions, reduce=None) as recording:
        run(unet, sample)
    assert len(recording.plot("entropy", scope.sites[0].name, heads=[0, 1]).data) == 2


def test_edits_and_gradients_inside_the_context(unet, sample):
    """Masks are ordinary tensors in a backward; a removed head's attention is what it was."""
    regions = Regions(masks(3, 8, 8), NAMES, TIED)
    scope = Scope(unet)
    site = scope.sites[0].name
    pixels = sample.clone().requires_grad_()
    with scope.edit({site: [0]}), scope.record("entropy", CounterpartMass(regions), queries=regions) as recording:
        unet(pixels, 7, return_dict=False)[0].square().sum().backward()
    assert pixels.grad is not None
    with scope.record("entropy", CounterpartMass(regions), queries=regions) as plain:
        run(unet, sample)
    table, other = recording.to_polars(), plain.to_polars()
    assert rows_of(table, site).drop("timestep").equals(rows_of(other, site).drop("timestep"))


CLASSES = {"all": torch.ones(1, 4, 4, dtype=torch.bool)}


@pytest.mark.parametrize(
    ("statistics", "queries", "error", "message"),
    [
        (["entropy"], {}, ValueError, r"queries: got \[\], expected at least one name"),
        (["entropy"], [1], TypeError, "queries: got list, expected headscope.Regions or a dictionary"),
        (["entropy"], {"a": torch.ones(1, 4, 4)}, TypeError, r"queries\['a'\]: got torch.float32, expected a bool"),
        (["entropy"], {"a": CLASSES["all"][0]}, ValueError, r"queries\['a'\]: got shape \[4, 4\], expected \[samples"),
        (
            ["entropy"],
            {"a": CLASSES["all"].expand(3, 4, 4), "b": CLASSES["all"].expand(2, 4, 4)},
            ValueError,
            r"queries\['b'\]: got shape \[2, 4, 4\], expected \[3 or 1, height, width\]",
        ),
        (["key_mass"], CLASSES, ValueError, "queries: got some beside key_mass, expected a statistic of each query"),
        (["head_output"], CLASSES, ValueError, "queries: got some beside head_output, expected a statistic"),
        (["tied"], None, ValueError, "queries: got NoneType, expected the regions of 'counterpart_mass'"),
        (["tied"], CLASSES, ValueError, "queries: got dict, expected the regions of 'counterpart_mass'"),
    ],
)
def test_requests_that_do_not_fit_are_refused(unet, statistics, queries, error, message):
    regions = Regions(masks(1, 4, 4), NAMES, TIED)
    asked = [CounterpartMass(regions) if name == "tied" else name for name in statistics]
    with pytest.raises(error, match=message), Scope(unet).record(*asked, queries=queries):
        pass


def test_masks_of_another_number_of_samples_are_refused_before_the_model_runs(unet, sample):
    regions, ran = Regions(masks(2, 8, 8), NAMES), []
    scope = Scope(unet)
    handle = unet.conv_in.register_forward_pre_hook(lambda *_: ran.append(1))
    for statistics, queries, named in (
        ([GroupMass(regions)], None, "statistics: the regions of 'group_mass'"),
        (["entropy"], regions, "queries: the masks"),
    ):
        wrong = pytest.raises(ValueError, match=f"{named} are of 2 samples, expected 3 or 1: the batch has 3 rows")
        with wrong, scope.record(*statistics, queries=queries):
            run(unet, sample)
    handle.remove()
    assert ran == []


def draw(diffusion, regions, queries):
    with Scope(diffusion).record(GroupMass(regions), sites="*attn2", queries=queries):
        diffusion(["a fox", "a house"], num_inference_steps=1, output_type="np")


def test_regions_that_nothing_attends_to_are_an_error(diffusion):
    regions = Regions(masks(2, 8, 8), NAMES)
    for queries in (None, regions):
        with pytest.raises(ValueError, match="'group_mass' is of regions of the picture, and no attention call"):
            draw(diffusion, regions, queries)
    model = Timeless()
    wrong = pytest.raises(ValueError, match="queries: no attention call of the recorded sites has image tokens")
    with wrong, torch.inference_mode(), Scope(model).record("entropy", queries=regions):
        model(torch.randn(2, 5, 8))


class Tokens(torch.nn.Module):
    heads = 2

    def forward(self, tokens):
        query = tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return functional.scaled_dot_product_attention(query, query, query)


class Timeless(torch.nn.Module):
    """Attention of tokens whose places nothing tells."""

    def __init__(self):
        super().__init__()
        self.attention = Tokens()

    def forward(self, tokens):
        return self.attention(tokens)


def test_two_recordings_may_have_regions_of_one_name_if_they_are_the_same(unet, sample):
    regions, others = (Regions(masks(3, 8, 8, seed), NAMES) for seed in (0, 1))
    scope = Scope(unet)
    with scope.record(GroupMass(regions)) as one, scope.record(GroupMass(regions), "entropy") as two:
        run(unet, sample)
    assert one.to_polars()["group_mass_mean"].equals(two.to_polars()["group_mass_mean"])
    wrong = pytest.raises(ValueError, match="'group_mass' means different things in two active recordings")
    with wrong, scope.record(GroupMass(regions)), scope.record(GroupMass(others)):
        run(unet, sample)
    with scope.record(GroupMass(regions), GroupMass(others, name="others")) as both:
        run(unet, sample)
    assert both.regions == {"group_mass": NAMES, "others": NAMES}


def test_counterparts_are_asked_of_regions_that_have_some():
    with pytest.raises(ValueError, match="regions: got some without counterparts"):
        CounterpartMass(Regions(masks(1, 4, 4), NAMES))
    with pytest.raises(TypeError, match="regions: got Tensor, expected"):
        CounterpartMass(torch.zeros(4))


def test_one_mass_serves_both_statistics_of_the_same_regions(unet, sample, monkeypatch):
    regions, others = (Regions(masks(3, 8, 8, seed), NAMES, TIED) for seed in (0, 1))
    stock, asked = attending.attention, []

    def spy(*tensors, statistics, **options):
        asked.append([type(one).__name__ for one in statistics])
        return stock(*tensors, statistics=statistics, **options)

    monkeypatch.setattr(attending, "attention", spy)
    scope, tables = Scope(unet), []
    for wanted in ([], [GroupMass(regions)], [GroupMass(others, name="others")]):
        asked.clear()
        with scope.record(CounterpartMass(regions), *wanted, queries=regions) as recording:
            run(unet, sample)
        assert asked == [["GroupMass"] * (2 if "others_mean" in recording.to_polars().columns else 1)] * 2
        tables.append(recording.to_polars().filter(pl.col("query_class").is_not_null())["counterpart_mass_mean"])
    assert tables[0].null_count() < len(tables[0])
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])
