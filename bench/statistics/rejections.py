"""How often tests reject: under hypotheses that hold (size) and for planted effects (power)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import ttest_1samp, ttest_ind
from worlds import Draw, clustered, lognormal, losses, mild, normal, t3

from headscope.study.inference import energy_test, settings, smooth
from headscope.study.inference.draws import divided, flipped
from headscope.study.inference.intervals import infer
from headscope.study.inference.permutation import permuted

BATCH = 100
HEADS, CORRELATION = 48, 0.5
LEVEL = 0.05
# rejected by every test, [trials] each
Rejected = dict[str, Any]
Test = Callable[[np.random.Generator, int, int], Rejected]


def one_sample(draw: Draw, sources: int, effect: float = 0.0) -> Test:
    """Is a group's mean 0? Beside headscope's: Student's t and sign flips."""

    def test(generator: np.random.Generator, trials: int, seed: int) -> Rejected:
        sample = draw(generator, sources, trials) + effect
        means = flipped(seed, sources, settings.RESAMPLES) @ sample / sources
        return {
            "headscope": infer([sample[None]], smooth.mean, seed).p_value <= LEVEL,
            "Student's t": ttest_1samp(sample, 0.0).pvalue <= LEVEL,
            "sign flips": _shares(means, sample.mean(axis=0)) <= LEVEL,
        }

    return test


def degradation(sources: int, heavy: bool, effect: float = 0.0) -> Test:
    """Is the relative degradation 0?"""

    def test(generator: np.random.Generator, trials: int, seed: int) -> Rejected:
        groups = losses(generator, sources, trials, heavy, effect)
        return {"headscope": infer(groups, smooth.relative, seed).p_value <= LEVEL}

    return test


def paired(draw: Draw, sources: int, effect: float = 0.0) -> Test:
    """Two versions of the same sources, correlated 0.8, the second with twice the spread, both skewed."""

    def test(generator: np.random.Generator, trials: int, seed: int) -> Rejected:
        shared, own = draw(generator, sources, trials), draw(generator, sources, trials)
        first, second = shared + effect, 2 * (0.8 * shared + 0.6 * own)
        return {
            "headscope": infer([(first - second)[None]], smooth.mean, seed).p_value <= LEVEL,
            "Student's t": ttest_1samp(first - second, 0.0).pvalue <= LEVEL,
        }

    return test


def two_samples(first: Draw, second: Draw, sizes: tuple[int, int], spreads: tuple[float, float], effect=0.0) -> Test:
    """Do two groups differ in their mean? Beside headscope's: its parts, Welch's t, and permuted plain differences."""

    def test(generator: np.random.Generator, trials: int, seed: int) -> Rejected:
        x = spreads[0] * first(generator, sizes[0], trials) + effect
        y = spreads[1] * second(generator, sizes[1], trials)
        found = infer([x[None], y[None]], smooth.difference, seed)
        welch, _ = permuted(x, y, found.value / found.standard_error, seed)
        pooled = np.concatenate([x, y])
        sums = divided(seed, *sizes, settings.RESAMPLES) @ pooled
        plain = sums / sizes[0] - (pooled.sum(axis=0) - sums) / sizes[1]
        return {
            "headscope": np.maximum(welch, found.p_value) <= LEVEL,
            "Welch permutation alone": welch <= LEVEL,
            "Welch's t": ttest_ind(x, y, equal_var=False).pvalue <= LEVEL,
            "plain permutation": _shares(plain, found.value) <= LEVEL,
        }

    return test


def _shares(null: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """p-values of observed statistics [trials] from a null [draws, trials]."""
    return (1 + (np.abs(null) >= np.abs(observed) * (1 - 1e-10)).sum(axis=0)) / (len(null) + 1)


def heads(draw: Draw, generator: np.random.Generator, sources: int) -> np.ndarray:
    """A number per source and head, [sources, heads], standardised; heads are correlated.

    The correlation is that of normal numbers, of which a skewed head is a function.
    """
    z = generator.normal(size=(sources, HEADS)) * np.sqrt(1 - CORRELATION)
    z += generator.normal(size=(sources, 1)) * np.sqrt(CORRELATION)
    if draw is normal:
        return z
    sigma = 1.0 if draw is lognormal else 0.6
    return (np.exp(sigma * z) - np.exp(sigma**2 / 2)) / np.sqrt(np.expm1(sigma**2) * np.exp(sigma**2))


def family(draw: Draw, sizes: tuple[int, ...], spreads: tuple[float, ...], effect: float = 0.0) -> Test:
    """48 heads, one of which has the effect where there is one.

    Without an effect: is any head found (one false finding or more)? With one: is that head found?
    """

    def test(generator: np.random.Generator, trials: int, seed: int) -> Rejected:
        names = ("headscope", "uncorrected", "permutation alone" if len(sizes) == 2 else "sign flips alone")
        found: dict[str, list[bool]] = {name: [] for name in names}
        for trial in range(trials):
            samples = [spread * heads(draw, generator, size) for size, spread in zip(sizes, spreads, strict=True)]
            samples[0][:, 0] += effect
            groups = [sample[None] for sample in samples]
            function = smooth.difference if len(samples) == 2 else smooth.mean
            ours = infer(groups, function, seed + trial, family=True)
            corrected, single = ours.p_maxt, ours.p_value
            if len(samples) == 2:
                t = ours.value / ours.standard_error
                alone, other = permuted(*samples, t, seed + trial, family=True)[::-1]
                corrected, single = np.maximum(corrected, alone), np.maximum(single, other)
            else:
                alone = _flipped(samples[0], generator)
            for name, p in zip(names, (corrected, single, alone), strict=True):
                found[name].append(bool(p[0] <= LEVEL if effect else (p <= LEVEL).any()))
        return {name: np.array(values) for name, values in found.items()}

    return test


def _flipped(sample: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Max-t p-values of studentised sign flips, [heads]."""
    sources = len(sample)
    signs = generator.choice([-1.0, 1.0], (settings.RESAMPLES, sources))
    mean = signs @ sample / sources
    t = mean / np.sqrt(((sample**2).mean(axis=0) - mean**2) / (sources - 1))
    observed = sample.mean(axis=0) / np.sqrt(sample.var(axis=0, ddof=1) / sources)
    return (1 + (np.abs(t).max(axis=1)[:, None] >= np.abs(observed)).sum(axis=0)) / (settings.RESAMPLES + 1)


def energy(draw: Draw, sizes: tuple[int, int], effect: float = 0.0, pairs: bool = False) -> Test:
    """48 heads at once; the effect is in every fourth."""

    def test(generator: np.random.Generator, trials: int, seed: int) -> Rejected:
        found = []
        for trial in range(trials):
            x, y = (heads(draw, generator, size) for size in sizes)
            if pairs:
                # exchangeable versions of the same sources
                shared = heads(draw, generator, sizes[0])
                x, y = shared + x, shared + y
            x[:, ::4] += effect
            found.append(energy_test(x, y, seed + trial, paired=pairs).p_value)
        return {"headscope": np.array(found, float) <= LEVEL}

    return test


def sizes() -> dict[str, tuple[Test, float]]:
    """Tests whose hypothesis holds, and the share of the trials to run."""
    found: dict[str, tuple[Test, float]] = {}
    draws = {"normal": normal, "t with 3 df": t3, "lognormal σ = 0.6": mild, "lognormal σ = 1": lognormal}
    for sources in (20, 40):
        for name, draw in (draws | {"crops": clustered}).items():
            found[f"effect, {name}, n = {sources}"] = one_sample(draw, sources), 1.0
        for heavy in (False, True):
            name = "heavy tails" if heavy else "mild"
            found[f"degradation, {name}, n = {sources}"] = degradation(sources, heavy), 1.0
    for name in ("normal", "lognormal σ = 1"):
        found[f"pairs, {name}, n = 20"] = paired(draws[name], 20), 1.0
    for name in ("normal", "lognormal σ = 0.6", "lognormal σ = 1"):
        for numbers in ((20, 20), (20, 80)):
            for spreads in ((1.0, 1.0), (3.0, 1.0), (1.0, 3.0)):
                said = f"difference, {name}, {_said(numbers, spreads)}"
                found[said] = two_samples(draws[name], draws[name], numbers, spreads), 1.0
    found["difference, lognormal σ = 1 against normal, n = 20 and 20"] = (
        two_samples(lognormal, normal, (20, 20), (1.0, 1.0)),
        1.0,
    )
    for name in ("normal", "lognormal σ = 0.6", "lognormal σ = 1"):
        found[f"48 heads, effect, {name}, n = 20"] = family(draws[name], (20,), (1.0,)), 0.25
        for numbers, spreads in (((20, 20), (1.0, 1.0)), ((20, 80), (3.0, 1.0)), ((20, 80), (1.0, 3.0))):
            said = f"48 heads, difference, {name}, {_said(numbers, spreads)}"
            found[said] = family(draws[name], numbers, spreads), 0.25
    for name in ("normal", "lognormal σ = 1"):
        for numbers in ((20, 20), (20, 80)):
            found[f"energy, 48 heads, {name}, n = {numbers[0]} and {numbers[1]}"] = energy(draws[name], numbers), 0.25
        found[f"energy, 48 heads, {name}, 20 pairs"] = energy(draws[name], (20, 20), pairs=True), 0.25
    return found


def _said(numbers: tuple[int, int], spreads: tuple[float, float]) -> str:
    return f"n = {numbers[0]} and {numbers[1]}, spreads {spreads[0]:g} : {spreads[1]:g}"


def powers() -> dict[str, tuple[Callable[[float], Test], float]]:
    """Tests of a planted effect in standard deviations of a source, and the share of the trials to run."""
    found: dict[str, tuple[Callable[[float], Test], float]] = {}
    for name, draw in (("normal", normal), ("lognormal σ = 1", lognormal)):
        for sources in (20, 40):
            found[f"effect, {name}, n = {sources}"] = partial(one_sample, draw, sources), 0.5
        found[f"difference, {name}, n = 20 and 20"] = partial(two_samples, draw, draw, (20, 20), (1.0, 1.0)), 0.5
        found[f"one of 48 heads, effect, {name}, n = 20"] = partial(family, draw, (20,), (1.0,)), 0.1
        found[f"one of 48 heads, difference, {name}, n = 20 and 20"] = (
            partial(family, draw, (20, 20), (1.0, 1.0)),
            0.1,
        )
        found[f"energy, 12 of 48 heads, {name}, n = 20 and 20"] = partial(energy, draw, (20, 20)), 0.1
    return found


def rejected(test: Test, trials: int, seed: int, advance: Callable[[int], None]) -> dict[str, dict[str, float]]:
    """Per test: the share rejected, its binomial standard error, trials."""
    outcomes: dict[str, list[np.ndarray]] = {}
    for number in range(max(1, trials // BATCH)):
        size = min(BATCH, trials)
        for name, outcome in test(np.random.default_rng([seed, number]), size, 1000 * number).items():
            outcomes.setdefault(name, []).append(outcome)
        advance(size)
    found = {}
    for name, parts in outcomes.items():
        outcome = np.concatenate(parts)
        share = float(outcome.mean())
        error = float(np.sqrt(share * (1 - share) / len(outcome)))
        found[name] = {"rejected": share, "error": error, "trials": len(outcome)}
    return found
