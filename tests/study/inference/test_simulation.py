"""Coverage and size by a quick simulation; bench/statistics is the long one. Unstudentised ways fail here."""

import numpy as np
import polars as pl
import pytest

from headscope.study.inference import differences, means, settings, smooth
from headscope.study.inference.intervals import infer

TRIALS = 600


@pytest.fixture(autouse=True)
def fewer(monkeypatch):
    monkeypatch.setattr(settings, "RESAMPLES", 399)


def covered(found, truth):
    return np.mean((found.low <= truth) & (truth <= found.high))


def holds_zero(table):
    return np.mean(((table["low"] <= 0) & (table["high"] >= 0)).to_numpy())


@pytest.mark.parametrize(
    ("name", "sources", "least"),
    # what is expected, less 3 binomial standard errors; BCa has 92.5, 87.9, 87.3, and 90.5 with 40
    [("normal", 20, 0.93), ("t3", 20, 0.935), ("lognormal", 20, 0.91), ("lognormal", 40, 0.92)],
)
def test_intervals_of_means_cover(name, sources, least):
    generator = np.random.default_rng(sources)
    size = (1, sources, TRIALS)
    sample, truth = {
        "normal": (generator.normal(size=size), 0.0),
        "t3": (generator.standard_t(3, size), 0.0),
        "lognormal": (generator.lognormal(size=size), np.exp(0.5)),
    }[name]
    assert least <= covered(infer([sample], smooth.mean, tested=False), truth) <= 0.99


def test_intervals_of_degradations_with_heavy_tails_cover():
    generator = np.random.default_rng(1)
    clean = generator.lognormal(0, 1, (1, 20, TRIALS))
    change = clean * (0.1 + 0.3 * generator.standard_t(3, clean.shape))
    # BCa has 81.8
    assert 0.93 <= covered(infer([np.concatenate([change, clean])], smooth.relative, tested=False), 0.1) <= 0.995


def test_effects_that_are_skewed_around_zero_are_not_found():
    sample = np.random.default_rng(2).lognormal(size=(1, 20, TRIALS)) - np.exp(0.5)
    rejected = np.mean(infer([sample], smooth.mean).p_value <= 0.05)
    # sign flips reject 15 %
    assert rejected < 0.09


def test_differences_of_unequal_groups_keep_their_size():
    generator = np.random.default_rng(3)
    first, second = (
        pl.DataFrame(
            {
                "source_id": np.repeat([f"{name}{index}" for index in range(size)], 300),
                "trial": np.tile(np.arange(300), size),
                "value": (spread * generator.normal(size=(size, 300))).ravel(),
            }
        )
        for name, size, spread in (("a", 20, 3.0), ("b", 80, 1.0))
    )
    table = differences(first, second, "value", ["trial"])
    # permuted plain differences reject 24 %
    assert 0.01 <= np.mean(table["p_value"].to_numpy() <= 0.05) <= 0.1
    assert holds_zero(table) > 0.91


def test_intervals_by_source_cover_and_by_crop_do_not():
    generator = np.random.default_rng(4)
    shape = (300, 40, 4)
    values = np.sqrt(0.5) * (generator.normal(size=shape) + generator.normal(size=(300, 40, 1)))
    trial, source, item = np.indices(shape).reshape(3, -1)
    rows = pl.DataFrame({"trial": trial, "source": source, "item": item, "value": values.ravel()})

    def held(source_id):
        table = means(rows.with_columns(source_id), "value", ["trial"])
        return holds_zero(table)

    assert 0.91 <= held(pl.format("{}", "source").alias("source_id")) <= 0.985
    crops = pl.format("{}/{}", "source", "item").alias("source_id")
    assert held(crops) < 0.82


def test_a_family_of_skewed_heads_has_few_false_findings():
    """Sign flips find one in half of such families, permutations in a third where spreads differ."""
    generator = np.random.default_rng(5)
    found = []
    for trial in range(60):
        z = np.sqrt(0.5) * (generator.normal(size=(20, 40)) + generator.normal(size=(20, 1)))
        family = infer([(np.exp(z) - np.exp(0.5))[None]], smooth.mean, trial, family=True)
        found.append((family.p_maxt <= 0.05).any())
    assert np.mean(found) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 60)
