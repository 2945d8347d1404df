"""Populations of known truth to draw sources from."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import polars as pl

from headscope.study.inference import smooth

# losses of the bundled transformer, whole (clean) and without single heads; written by record.py
EFFECTS = Path("bench/results/statistics/effects.csv")
TIMESTEPS = 3

Draw = Callable[[np.random.Generator, int, int], np.ndarray]


@dataclass(frozen=True)
class World:
    """Something to estimate.

    Attributes:
        name: what is drawn.
        groups: draws, from a generator, the number of sources and of trials, the columns of every group, [columns,
            sources, trials].
        function: of the groups' means; see `headscope.study.inference.smooth`.
        truth: its value in the population.
        heavy: whether its tails are, so that an interval may be conservative.
        added: an error beside that of sampling, as a share of it for sources of spread 1, and its degrees of freedom.
    """

    name: str
    groups: Callable[[np.random.Generator, int, int], list[np.ndarray]]
    function: smooth.Smooth
    truth: float
    heavy: bool = False
    added: tuple[float, int] | None = None


def normal(generator: np.random.Generator, sources: int, trials: int) -> np.ndarray:
    return generator.normal(size=(sources, trials))


def t3(generator: np.random.Generator, sources: int, trials: int) -> np.ndarray:
    """Student's t with 3 degrees of freedom over its standard deviation."""
    return generator.standard_t(3, (sources, trials)) / np.sqrt(3)


def lognormal(generator: np.random.Generator, sources: int, trials: int, sigma: float = 1.0) -> np.ndarray:
    """exp(sigma z), with mean 0 and standard deviation 1."""
    mean, spread = np.exp(sigma**2 / 2), np.sqrt(np.expm1(sigma**2) * np.exp(sigma**2))
    return (generator.lognormal(0.0, sigma, (sources, trials)) - mean) / spread


def mild(generator: np.random.Generator, sources: int, trials: int) -> np.ndarray:
    """A lognormal with sigma 0.6: skewness 2.3."""
    return lognormal(generator, sources, trials, 0.6)


def clustered(generator: np.random.Generator, sources: int, trials: int) -> np.ndarray:
    """One to seven crops of each source, of correlation 0.5, averaged by source; one number of crops in all trials."""
    crops = generator.integers(1, 8, (sources, 1))
    return generator.normal(size=(sources, trials)) * np.sqrt(0.5 + 0.5 / crops)


def one(draw: Draw) -> Callable[[np.random.Generator, int, int], list[np.ndarray]]:
    return lambda generator, sources, trials: [draw(generator, sources, trials)[None]]


def losses(generator: np.random.Generator, sources: int, trials: int, heavy: bool, effect: float) -> list[np.ndarray]:
    """Changes and clean losses at three timesteps, [6, sources, trials]; the true relative degradation is `effect`.

    An image that is hard is so at all timesteps. Mild: lognormal losses, sigma 0.3, changes in proportion with a normal
    error half their size. Heavy: sigma 1, and an error with 3 degrees of freedom that is three times the effect.
    """
    spread = 1.0 if heavy else 0.3
    shared = generator.normal(size=(1, sources, trials))
    own = generator.normal(size=(TIMESTEPS, sources, trials))
    clean = np.exp(spread * (0.8 * shared + 0.6 * own))
    if heavy:
        factor = effect + 0.3 * generator.standard_t(3, (TIMESTEPS, sources, trials)) / np.sqrt(3)
    else:
        factor = effect + 0.05 * generator.normal(size=(TIMESTEPS, sources, trials))
    return [np.concatenate([factor * clean, clean])]


def redundant(generator: np.random.Generator, sources: int, trials: int) -> list[np.ndarray]:
    """A joint effect beyond the sum of two single ones, relative to shared clean losses: 0.2 - 0.05 - 0.05."""
    changes, clean = np.split(losses(generator, sources, trials, False, 0.2)[0], 2)
    for _ in range(2):
        changes = changes - np.exp(0.3 * generator.normal(size=changes.shape) - 0.045) * 0.05 * clean
    return [np.concatenate([changes, clean])]


@lru_cache
def populations() -> list[np.ndarray]:
    """Of every group and head that was recorded: changes and clean losses, [2 timesteps, sources]."""
    table = pl.read_csv(EFFECTS)
    found = []
    for (_,), rows in table.group_by("group", maintain_order=True):
        clean = rows.pivot("timestep", index="source_id", values="clean").drop("source_id").to_numpy().T
        for head in rows.columns[4:]:
            edited = rows.pivot("timestep", index="source_id", values=head).drop("source_id").to_numpy().T
            found.append(np.concatenate([edited - clean, clean]))
    return found


def resampled(generator: np.random.Generator, population: np.ndarray, sources: int, trials: int) -> np.ndarray:
    """Sources drawn with replacement, [columns, sources, trials]."""
    return population[:, generator.integers(population.shape[1], size=(sources, trials))]


def real(number: int, relative: bool) -> World:
    """A recorded population; its degradation, relative or absolute."""
    population = populations()[number]
    half = len(population) // 2

    def groups(generator: np.random.Generator, sources: int, trials: int) -> list[np.ndarray]:
        drawn = resampled(generator, population, sources, trials)
        return [drawn if relative else drawn[:half].mean(axis=0, keepdims=True)]

    means = population.mean(axis=1)
    truth = (means[:half] / means[half:]).mean() if relative else means[:half].mean()
    how = "relative" if relative else "absolute"
    return World(f"recorded effects, {how}", groups, smooth.relative if relative else smooth.mean, float(truth))


def ratio(sigma: float) -> World:
    """The ratio of two positive means, 1.2: lognormal numbers in two groups of one size."""

    def groups(generator: np.random.Generator, sources: int, trials: int) -> list[np.ndarray]:
        return [scale * generator.lognormal(0.0, sigma, (1, sources, trials)) for scale in (1.2, 1.0)]

    return World(f"ratio of means, lognormal σ = {sigma:g}", groups, smooth.log_ratio, float(np.log(1.2)), sigma >= 1)


def difference(draw: Draw, name: str, heavy: bool) -> World:
    return World(
        f"difference, {name}, spreads 2 : 1",
        lambda generator, sources, trials: [scale * draw(generator, sources, trials)[None] for scale in (2.0, 1.0)],
        smooth.difference,
        0.0,
        heavy,
    )


def worlds() -> list[list[World]]:
    """What intervals are tried on; a row of the table each, averaged over the worlds of a list."""
    found = [
        [World("mean, normal", one(normal), smooth.mean, 0.0)],
        [World("mean, t with 3 degrees of freedom", one(t3), smooth.mean, 0.0, True)],
        [World("mean, lognormal σ = 0.6", one(mild), smooth.mean, 0.0)],
        [World("mean, lognormal σ = 1", one(lognormal), smooth.mean, 0.0, True)],
        [World("mean, crops of a source correlated 0.5", one(clustered), smooth.mean, 0.0)],
        [
            World(
                "mean, normal, with a fill's error of 3 degrees of freedom",
                one(normal),
                smooth.mean,
                0.0,
                added=(0.5, 3),
            )
        ],
        [difference(normal, "normal", False)],
        [difference(lognormal, "lognormal σ = 1", True)],
        [ratio(0.5)],
        [ratio(1.0)],
        [World("degradation, mild", lambda g, n, t: losses(g, n, t, False, 0.1), smooth.relative, 0.1)],
        [World("degradation, heavy tails", lambda g, n, t: losses(g, n, t, True, 0.1), smooth.relative, 0.1, True)],
        [World("joint minus sum of singles", redundant, smooth.relative, 0.1)],
    ]
    if EFFECTS.exists():
        count = len(populations())
        found += [[real(number, relative) for number in range(count)] for relative in (True, False)]
    return found
