"""The command's studies without anything to find: their tables, and that few find something."""

import importlib.util
from collections import defaultdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy.stats import binom

from study import simulated

SCRIPT = Path(__file__).parents[2] / "bench" / "null_studies.py"


@pytest.fixture(scope="module")
def command():
    spec = importlib.util.spec_from_file_location("null_studies", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nothing_is_different_on_average(command):
    generator = np.random.default_rng(0)
    for skewed in (False, True):
        noise = command._noise(generator, (200_000,), skewed)
        assert abs(noise.mean()) < 5 / np.sqrt(len(noise))
        assert noise.var() == pytest.approx(1, abs=0.05)
    both = {}
    for kind in ("top", "alone"):
        heads = {"top": ("blocks.0 h0", "blocks.1 h1"), "alone": ("blocks.0 h0",)}[kind]
        both[kind] = [
            command.losses(np.random.default_rng(seed), "confirm", {"e": heads}, False, ("mean",), folds=4)
            for seed in range(30)
        ]
    for tables in both.values():
        changes = [((t["edited"] - t["clean"]) / t["clean"]).filter(t["fill"] == "mean").mean() for t in tables]
        # but for the bias of the fill, which the folds tell
        assert abs(np.mean(changes) - 0.002) < 4 * np.std(changes) / np.sqrt(len(changes))


def test_one_study(command):
    with simulated.fewer_draws(199):
        found = command.null_study(1)
    assert set(found) == set(command.KINDS)
    assert all(found.values())
    assert len(found["joint minus sum"]) == 4
    rows = command.rates({kind: [True, False, False] for kind in command.KINDS})
    assert rows[0]["rate"] == pytest.approx(1 / 3)
    assert rows[0]["low"] < 1 / 3 < rows[0]["high"]


def test_what_is_there_is_found(command, monkeypatch):
    """The same study with one group's entropies 5 % higher, and losses that all edits raise."""
    entropies, losses = command.entropies, command.losses

    def higher(generator, group, skewed):
        factor = 1.05 if group == "lfw" else 1.0
        return entropies(generator, group, skewed).with_columns(
            pl.col("entropy_mean", "entropy_normalised_mean") * factor
        )

    def worse(*arguments, **further):
        return losses(*arguments, **further).with_columns(edited=pl.col("edited") + 0.05 * pl.col("clean"))

    monkeypatch.setattr(command, "entropies", higher)
    monkeypatch.setattr(command, "losses", worse)
    with simulated.fewer_draws(499):
        found = command.null_study(0)
    # halves of one group don't differ; every edit raises the loss alike, so that a set costs less than its heads' sum
    assert not any(found["omnibus of halves"])
    for kind in ("omnibus", "heads", "sites", "pooled ratio", "effects, mean fill", "effects, zero fill"):
        assert all(found[kind]), kind
    assert any(found["joint minus sum"])


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_few_null_studies_find_something(command):
    """Of 20, no more than what a rate of 6 % gives with a probability of 0.1 %."""
    found = defaultdict(list)
    with simulated.fewer_draws(999):
        for seed in range(1000, 1020):
            for kind, rejected in command.null_study(seed).items():
                found[kind] += rejected
    for kind in command.KINDS:
        # tests of one effect depend on each other, families hardly
        if not kind.startswith("one effect"):
            tested = len(found[kind])
            assert sum(found[kind]) <= binom.ppf(0.999, tested, 0.06), kind
