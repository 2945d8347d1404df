"""What a page leads with: the strongest design first, nothing that wasn't established, each with its control."""

import math
from dataclasses import replace

import polars as pl
import pytest

from headscope.report.lead import NOTHING, Strength, lead_of
from headscope.report.lead.effects import ABSTRACT_RANGE
from headscope.report.naming import Names
from headscope.study import analyse, select_heads
from headscope.study.analysis import StudyResult, analyse_sweep
from headscope.study.edits import Edited
from headscope.study.interventions import Interventions
from study import simulated

GROUPS = ["tied", "untied"]
SITES = ["block 1", "block 2"]
COLUMNS = ("group", "fill", "kind", "edit", "value", "low", "high", "p_maxt", "sources", "void", "discover")
EDITS = [
    Edited("block 1 h0", "head", (("block 1", 0),)),
    Edited("block 1", "site", (("block 1", 0), ("block 1", 1))),
    Edited("copies", "set", (("block 1", 0), ("block 2", 1))),
    Edited("others", "set", (("block 1", 1), ("block 2", 0))),
]


def study(*effects, **fields):
    """A result of such effects: group, kind, edit, value, low, high, corrected p (None: not tested)."""
    rows = [
        (group, "mean", kind, edit, value, low, high, p, 20, 0 if value is not None else 3, None)
        for group, kind, edit, value, low, high, p in effects
    ]
    schema = dict.fromkeys(COLUMNS, pl.Float64) | dict.fromkeys(COLUMNS[:4], pl.String) | {"sources": pl.Int64}
    table = pl.DataFrame(rows, schema=schema | {"void": pl.Int64}, orient="row")
    table = table.with_columns(exploratory=pl.col("p_maxt").is_null())
    sources = pl.DataFrame({"group": GROUPS, "split": "confirm", "items": 20, "sources": 20})
    return StudyResult(GROUPS, SITES, [100], sources, interventions=Interventions(EDITS, table), **fields)


def lead(result):
    return lead_of(result, Names(result.sites, result.groups))


CLEAR = ("tied", "head", "block 1 h0", 0.31, 0.25, 0.38, 0.001)
CONTROL = ("untied", "head", "block 1 h0", 0.004, -0.01, 0.02, 0.8)


def test_an_effect_stands_with_its_interval_and_the_same_removal_elsewhere():
    found = lead(study(CLEAR, CONTROL))
    (tile,) = found.tiles
    assert tile.value == "31.0 %"
    assert tile.label == "more loss on tied without block 1 h0"
    assert "25.0 % to 38.0 %" in tile.detail
    assert "corrected p = 0.0010" in tile.detail
    assert "elsewhere: untied 0.40 % (−1.0 % to 2.0 %)" in tile.detail
    first, second = found.sentences
    assert first.startswith("The largest confirmed effect of a single head: removing block 1 h0")
    assert second == (
        "No effect of a single head was established on untied (1 tested, 95 % intervals reach from −1.0 % to 2.0 %)."
    )


@pytest.mark.parametrize(
    "effect",
    [
        ("tied", "head", "block 1 h0", 0.31, -0.05, 0.67, 0.04),  # its interval spans 0
        ("tied", "head", "block 1 h0", 0.31, 0.01, 0.61, 0.06),  # its corrected p is too large
        ("tied", "head", "block 1 h0", 0.31, None, None, 0.01),  # nothing bounds it
    ],
)
def test_what_was_not_established_has_no_tile_and_is_said_first(effect):
    found = lead(study(effect))
    assert found.tiles == []
    assert found.sentences[0] == NOTHING
    assert not any("31.0 %" in sentence for sentence in found.sentences)


def test_kinds_have_a_finding_each_and_the_largest_of_each_is_named():
    found = lead(
        study(
            CLEAR,
            ("tied", "head", "block 1 h1", 0.9, -0.5, 2.3, 0.3),
            ("tied", "site", "block 1", 0.6, 0.5, 0.7, 0.001),
            ("untied", "set", "copies", 0.05, 0.02, 0.08, 0.01),
            ("tied", "set", "copies", 1.5, 1.2, 1.8, 0.001),
            ("tied", "set", "others", 0.2, -0.1, 0.5, 0.4),
        )
    )
    assert [tile.value for tile in found.tiles] == ["31.0 %", "60.0 %", "150 %", "5.0 to 150 %"]
    span = found.sentences[-1]
    assert span.startswith("2 of 3 removals of a targeted set from a group raise the loss")
    assert "5.0 % (copies on untied" in span
    assert "150 % (copies on tied" in span
    assert ABSTRACT_RANGE == "25.6 to 128.3 %"
    assert ABSTRACT_RANGE in span
    assert ABSTRACT_RANGE in found.tiles[-1].detail


def test_the_range_is_that_of_sets_on_the_groups_they_were_selected_for():
    """Removed from other groups' images, they are controls."""
    found = study(
        ("untied", "set", "copies", 0.05, 0.02, 0.08, 0.01),
        ("tied", "set", "copies", 1.5, 1.2, 1.8, 0.001),
        ("untied", "set", "others", 0.3, 0.2, 0.4, 0.001),
    )
    assert found.interventions is not None
    targeted = replace(found.interventions, targets={"copies": "tied", "others": "untied"})
    span = lead(replace(found, interventions=targeted)).sentences[-1]
    assert span.startswith("2 of 2 removals of a targeted set from the group that it was selected for raise the loss")
    assert "from 30.0 % (others on untied" in span
    assert "to 150 % (copies on tied" in span


def test_removals_that_lower_the_loss_are_told_as_such():
    found = lead(study(("tied", "head", "block 1 h0", -0.2, -0.3, -0.1, 0.001)))
    assert found.tiles[0].label == "less loss on tied without block 1 h0"
    assert found.tiles[0].value == "20.0 %"
    assert "lowers the denoising loss on tied by 20.0 %" in found.sentences[0]


def test_void_effects_are_counted():
    found = lead(study(CLEAR, ("tied", "set", "copies", None, None, None, None)))
    assert any(sentence.startswith("1 of 2 effects are void") for sentence in found.sentences)


def test_untested_edits_are_exploratory():
    clear, unclear = ("tied", "set", "copies", 0.5, 0.4, 0.6, None), ("untied", "set", "copies", 0.1, -0.1, 0.3, None)
    found = lead(study(clear, unclear))
    (tile,) = found.tiles
    assert tile.label.endswith("exploratory")
    assert found.sentences == [
        "On tied, removing copies (mean fill) changes the loss by 50.0 % (95 % interval 40.0 % to 60.0 %; exploratory,"
        " 20 sources); it is the largest of 1 edits of heads, 1 of which have an interval clear of 0.",
        "On untied no effect of 1 edits of heads is clear of 0: 95 % intervals reach from −10.0 % to 30.0 % (not"
        " tested).",
    ]


@pytest.fixture(scope="module")
def whole():
    with simulated.fewer_draws(199):
        discover = simulated.ablations(timesteps=(100,), heads=2)
        chosen = select_heads(discover, 2)
        confirm = simulated.ablations(split="confirm", chosen=chosen, timesteps=(100,), heads=2)
        return analyse(simulated.observations(timesteps=(100,), heads=2), discover, confirm)


def test_the_strongest_design_comes_first(whole):
    sentences = lead(whole).sentences
    starts = (
        "Entropy of attention on lfw",
        "The largest confirmed effect of a single head",
        "On faces_grey, ",
        "Across",
    )
    places = [next(i for i, text in enumerate(sentences) if text.startswith(start)) for start in starts]
    assert places == sorted(places)
    assert places[0] == 0
    assert list(Strength) == sorted(Strength)
    # split halves of either group, and colour against grey, stand beside
    assert "Controls, all heads at once: " in sentences[0]
    assert "halves of lfw" in sentences[0]
    assert "faces against faces_grey" in sentences[0]
    # nothing exploratory has a tile beside what was tested
    assert not any("exploratory" in tile.label for tile in lead(whole).tiles)


def test_an_unestablished_contrast_has_no_tile(whole):
    rows = whole.contrast.divergences.with_columns(p_value=pl.lit(0.4))
    found = lead(replace(whole, contrast=replace(whole.contrast, divergences=rows)))
    assert not any("spread their attention" in tile.label for tile in found.tiles)
    assert "can't be told apart" in " ".join(found.sentences)


def attributions():
    """As of a run: what removal costs, and nearly so by gradients."""
    table = simulated.ablations(timesteps=(100,), heads=2)
    importance = 0.9 * (pl.col("edited") - pl.col("clean"))
    table = table.with_columns(loss=pl.col("clean"), g=0.2 * importance, c=0.8 * importance, importance=importance)
    return table.drop("clean", "edited")


def test_attributions_alone_lead_a_page():
    with simulated.fewer_draws(99):
        result = analyse_sweep(others={"attributions": attributions()})
    found = lead(result)
    assert len(found.tiles) == 2
    assert all(tile.label.endswith("estimated from gradients; exploratory") for tile in found.tiles)
    assert all(sentence.startswith("By gradients, on ") for sentence in found.sentences)
    assert not any("They rank heads" in sentence for sentence in found.sentences)


def test_attributions_beside_ablations_say_how_they_agree():
    with simulated.fewer_draws(99):
        ablations = simulated.ablations(timesteps=(100,), heads=2)
        result = analyse_sweep(ablations=ablations, others={"attributions": attributions()})
    sentences = [text for text in lead(result).sentences if text.startswith("By gradients")]
    assert len(sentences) == 2
    # ranked alike but for nothing, which no interval bounds
    assert result.attributions is not None
    assert result.attributions.agreement is not None
    assert result.attributions.agreement["value"].to_list() == pytest.approx([1.0, 1.0])
    assert result.attributions.agreement["low"].to_list() == [None, None]


def test_heads_whose_losses_are_none_are_counted():
    table = simulated.ablations(timesteps=(100,), heads=2)
    broken = (pl.col("site") == simulated.SITES[0][0]) & (pl.col("head") == 0)
    table = table.with_columns(edited=pl.when(broken).then(math.nan).otherwise("edited"))
    with simulated.fewer_draws(99):
        sentences = lead(analyse_sweep(ablations=table)).sentences
    assert sum("1 more heads are void" in sentence for sentence in sentences) == 2
