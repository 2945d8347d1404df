"""What the page of two runs leads with: nothing whose interval spans no change has a tile."""

import polars as pl
import pytest

from headscope.report.comparison.findings import findings, points, tiles
from headscope.report.naming import Names
from headscope.study.compare import Comparison

GROUPS = pl.DataFrame({"part": [""], "group": ["lfw"], "items": [20], "sources": [20], "how": ["all"]})
STEPS = pl.DataFrame({"part": [""], "first": [100], "second": [100], "log_snr": [0.5]})
NAMES = Names(["mid"], ["lfw"])


def row(value, low, high, p=0.001, **labels):
    table = {"part": "", "group": "lfw", **labels, "value": value, "low": low, "high": high, "p_value": p, "p_maxt": p}
    return pl.DataFrame([table | {"sources": 20, "exploratory": p is None, "void": 0}], schema_overrides=FLOATS)


FLOATS = dict.fromkeys(("value", "low", "high", "p_value", "p_maxt"), pl.Float64)


def ranks(value, low, high):
    beside = {"within_first": 0.8, "within_second": 0.7, "across": 0.6, "heads": 8}
    return row(value, low, high, fill="mean", quantity="degradation").with_columns(
        pl.lit(number).alias(name) for name, number in beside.items()
    )


def comparison(**tables):
    return Comparison(GROUPS, STEPS, **tables)


def test_a_correlation_stands_with_its_control():
    found = comparison(ranks=ranks(0.9, 0.8, 0.95))
    (tile,) = tiles(found, NAMES)
    assert tile.value == "0.90"
    assert "0.60 across the runs, 0.80 and 0.70 within" in tile.detail
    assert findings(found, NAMES) == [
        "The runs' rankings of heads correlate positively on lfw (mean fill), by degradation: Spearman 0.90 (95 %"
        " interval 0.80 to 0.95) over 8 heads; control, between halves of the images: 0.60 across the runs, 0.80 and"
        " 0.70 within each."
    ]


@pytest.mark.parametrize(("low", "high"), [(-0.2, 0.9), (None, None)])
def test_a_correlation_that_was_not_established_has_no_tile(low, high):
    found = comparison(ranks=ranks(0.5, low, high))
    assert tiles(found, NAMES) == []
    (sentence,) = findings(found, NAMES)
    assert sentence.startswith(("No correlation of the runs' rankings", "How alike the runs rank heads"))


def test_losses_and_heads_that_differ_have_tiles_and_others_none():
    clean = row(1.1, 1.05, 1.15, timestep=None)
    heads = row(0.03, 0.01, 0.05, fill="mean", site="mid", head=1)
    found = comparison(clean=clean, heads=heads)
    assert [tile.value for tile in tiles(found, NAMES)] == ["× 1.100", "+3.0 points"]
    sentences = findings(found, NAMES)
    assert sentences[0].startswith("On lfw run 2 has more denoising loss: × 1.100")
    assert "the degradation differs for 1 of 1 heads (corrected p < 0.05); most for mid h1: +3.0 points" in sentences[1]
    unclear = comparison(
        clean=row(1.1, 0.95, 1.25, 0.2, timestep=None),
        heads=row(0.03, -0.01, 0.07, 0.3, fill="mean", site="mid", head=1),
    )
    assert tiles(unclear, NAMES) == []
    sentences = findings(unclear, NAMES)
    assert sentences[0].startswith(
        "No difference in clean loss was established on lfw: run 2 / run 1 95 % interval 0.950"
    )
    assert "no difference in degradation was established for any of 1 heads" in sentences[1]
    assert "single 95 % intervals reach 7.0 points" in sentences[1]


def test_points_are_written_with_their_sign():
    assert points(0.0123) == "+1.2 points"
    assert points(-0.0123) == "−1.2 points"
    assert points(None) == "–"
