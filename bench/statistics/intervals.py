"""How often intervals hold the truth, and how wide they are, beside other ways to make them."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import bootstrap
from scipy.stats import t as student
from worlds import World

from headscope.study.inference import settings
from headscope.study.inference.intervals import Added, infer
from headscope.study.inference.smooth import Smooth, estimate, studentised

METHODS = ("headscope", "symmetric", "equal-tailed", "Student's t", "BCa")
# trials that share a table of draws
BATCH = 100
# BCa recomputes every draw's statistic, which takes much longer
BCA_TRIALS, BCA_SOURCES = 200, 40


def coverage(
    members: Sequence[World], sources: int, trials: int, seed: int, advance: Callable[[int], None]
) -> dict[str, dict[str, float]]:
    """Per method: covered (a share), its binomial standard error, trials, and width (median, over Student's t)."""
    held: dict[str, list[np.ndarray]] = {name: [] for name in METHODS}
    widths: dict[str, list[np.ndarray]] = {name: [] for name in METHODS}
    size = min(BATCH, max(1, trials // len(members)))
    batches = max(1, trials // size)
    for number in range(batches):
        world = members[number % len(members)]
        generator = np.random.default_rng([seed, sources, number])
        groups = world.groups(generator, sources, size)
        added = None
        if world.added:
            # an error of known variance, whose standard error is estimated with few degrees of freedom
            share, freedom = world.added
            spread = share / np.sqrt(sources)
            groups = [group + generator.normal(0, spread, size) for group in groups]
            guessed = spread * np.sqrt(generator.chisquare(freedom, size) / freedom)
            added = Added(guessed, np.full(size, float(freedom)))
        bounds = _bounds(groups, world.function, number, added)
        if number * size < BCA_TRIALS and sources <= BCA_SOURCES:
            bounds["BCa"] = _bca(groups, world.function, number)
        reference = bounds["Student's t"][1] - bounds["Student's t"][0]
        for name, (low, high) in bounds.items():
            # an interval that is not bounded holds everything
            open_ended = np.isnan(low) | np.isnan(high)
            held[name].append(open_ended | ((low <= world.truth) & (world.truth <= high)))
            widths[name].append(np.where(open_ended, np.inf, (high - low) / reference))
        advance(size)
    found = {}
    for name in METHODS:
        if not held[name]:
            continue
        inside = np.concatenate(held[name])
        share = float(inside.mean())
        found[name] = {
            "covered": share,
            "error": float(np.sqrt(share * (1 - share) / len(inside))),
            "trials": len(inside),
            "width": float(np.median(np.concatenate(widths[name]))),
        }
    return found


def _bounds(
    groups: list[np.ndarray], function: Smooth, seed: int, added: Added | None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    ours = infer(groups, function, seed, added, tested=False)
    value, error = estimate(groups, function)
    t = np.concatenate([part.t for part in studentised(groups, function, seed, settings.RESAMPLES)], axis=1)
    half = np.sort(np.abs(t), axis=0)[round(0.95 * (len(t) + 1)) - 1] * error
    ordered = np.sort(t, axis=0)
    low, high = (ordered[round(share * (len(t) + 1)) - 1] for share in (0.025, 0.975))
    freedom = min(group.shape[1] for group in groups) - 1
    if len(groups) == 2:
        freedom = _welch_freedom(groups)
    classic = student.ppf(0.975, freedom) * error
    return {
        "headscope": (ours.low, ours.high),
        "symmetric": (value - half, value + half),
        "equal-tailed": (value - high * error, value - low * error),
        "Student's t": (value - classic, value + classic),
    }


def _welch_freedom(groups: list[np.ndarray]) -> np.ndarray:
    parts = np.array([group[0].var(axis=0, ddof=1) / group.shape[1] for group in groups])
    freedom = np.array([[group.shape[1] - 1] for group in groups])
    return parts.sum(axis=0) ** 2 / (parts**2 / freedom).sum(axis=0)


def _bca(groups: list[np.ndarray], function: Smooth, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What the study computed before: bias-corrected and accelerated, of as many draws."""
    columns = [len(group) for group in groups]

    def statistic(*samples: np.ndarray, axis: int) -> np.ndarray:
        means = [sample.mean(axis=axis) for sample in samples]
        shape = means[0].shape
        stacked = [mean.reshape(1, -1) for mean in means]
        split = np.split(np.stack(stacked), np.cumsum(columns)[:-1])
        return function(*split)[0].reshape(shape)

    samples = [column.T for group in groups for column in group]
    found = bootstrap(
        samples,
        statistic,
        n_resamples=settings.RESAMPLES,
        batch=50,
        vectorized=True,
        paired=len(groups) == 1 and len(samples) > 1,
        axis=-1,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return found.low, found.high
