"""Tables of feature maps, key masses and counterparts, of heads whose roles are planted, without a model."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
from scipy.ndimage import gaussian_filter

FEATURES = ("luminance", "edge", "texture", "saturation")
TIMESTEPS = (100, 500)
SITE = "blocks.0"
GRID = 8


class Head(NamedTuple):
    """What a head does.

    kind: "follows" (a feature, by effect logits a standard deviation of its map), "position", "uniform", "random"
    (another place in every image, by effect logits a standard deviation, 1.5 where it is 0), "other" (follows a feature
    of images that aren't of the group's split), "sink", "local", "middle" (near, as all queries look at what lies in
    the middle), "counterpart" (effect: share of attention beyond what others get).
    at: the timesteps at which it does so; elsewhere it is uniform.
    """

    kind: str
    feature: str = ""
    effect: float = 0.0
    at: Sequence[int] | None = None


class World(NamedTuple):
    """The tables of one or several groups."""

    features: pl.DataFrame
    key_mass: pl.DataFrame
    counterparts: pl.DataFrame


def smooth(generator: np.random.Generator, count: int, grid: int, width: float = 1.0) -> np.ndarray:
    """Spatially correlated maps, [count, grid * grid], of mean 0 and standard deviation 1 each."""
    maps = gaussian_filter(generator.normal(size=(count, grid, grid)), (0, width, width), mode="nearest")
    maps = maps.reshape(count, -1)
    maps -= maps.mean(axis=1, keepdims=True)
    return maps / maps.std(axis=1, keepdims=True)


def mixed_maps(generator: np.random.Generator, count: int, grid: int, features: Sequence[str] = FEATURES) -> np.ndarray:
    """Maps that depend on each other and on position, [count, features, tokens]."""
    own = np.stack([smooth(generator, count, grid) for _ in features], axis=1)
    position = smooth(generator, len(features), grid, 2.0)
    # the first feature is in all others
    shared = np.where(np.arange(len(features)) > 0, 0.5, 0.0)[None, :, None] * own[:, :1]
    return own + shared + 0.7 * position


def world(
    heads: Sequence[Head],
    *,
    sources: int = 24,
    items: int = 1,
    draws: int = 1,
    group: str = "faces",
    seed: int = 0,
    grid: int = GRID,
    noise: float = 0.3,
    donors: int = 3,
    timesteps: Sequence[int] = TIMESTEPS,
    maps: Mapping[str, np.ndarray] | None = None,
    profiles: np.ndarray | None = None,
    features: Sequence[str] = FEATURES,
    splits: Sequence[str] = ("discover", "confirm"),
    site: str = SITE,
) -> World:
    """The tables of one group.

    maps: of each split, [items, features, tokens]; profiles: logits of each head whatever the image shows, [heads,
    tokens]; drawn if none are given.
    """
    generator = np.random.default_rng(seed)
    profiles = 0.8 * smooth(generator, len(heads), grid, 2.0) if profiles is None else profiles
    parts = []
    if maps is None:
        maps = {split: mixed_maps(generator, sources * items, grid, features) for split in splits}
    for number, split in enumerate(splits):
        count = sources * items
        shown = maps[split], maps[splits[number - 1]]
        labels = pl.DataFrame(
            {
                "item": np.arange(count) + 10_000 * number,
                "group": [group] * count,
                "source_id": [f"{group}-{split}-{index // items}" for index in range(count)],
                "split": [split] * count,
            }
        )
        parts.append(
            (
                _features(labels, shown[0], features, grid),
                _key_mass(labels, shown, heads, profiles, features, grid, draws, noise, timesteps, site, generator),
                _counterparts(labels, heads, draws, donors, timesteps, site, generator),
            )
        )
    return World(*(pl.concat(tables) for tables in zip(*parts, strict=True)))


def together(*worlds: World) -> World:
    return World(*(pl.concat(tables) for tables in zip(*worlds, strict=True)))


def _lists(array: np.ndarray) -> pl.Series:
    return pl.Series(array.astype(np.float32)).cast(pl.List(pl.Float32))


def _repeated(labels: pl.DataFrame, times: int) -> pl.DataFrame:
    """Every row so many times, one after the other."""
    return labels[np.repeat(np.arange(len(labels)), times)]


def _features(labels: pl.DataFrame, maps: np.ndarray, names: Sequence[str], grid: int) -> pl.DataFrame:
    return _repeated(labels, len(names)).with_columns(
        replicate=pl.lit(0),
        feature=pl.Series(list(names) * len(labels)),
        grid_height=pl.lit(grid),
        grid_width=pl.lit(grid),
        map=_lists(maps.reshape(-1, grid * grid)),
        resolved=pl.lit(0.8),
    )


def logits_of(
    head: Head,
    profile: np.ndarray,
    shown: tuple[np.ndarray, np.ndarray],
    names: Sequence[str],
    noise: float,
    generator: np.random.Generator,
) -> np.ndarray:
    """Logits that all queries share, [items, tokens]; shown: maps of the items and of others."""
    count, _, tokens = shown[0].shape
    grid = round(tokens**0.5)
    if head.kind in ("uniform", "local", "counterpart"):
        return np.zeros((count, tokens))
    if head.kind == "sink":
        return np.tile(np.where(np.arange(tokens) == tokens // 3, 6.0, 0.0), (count, 1))
    if head.kind == "position":
        return np.tile(profile, (count, 1))
    if head.kind == "middle":
        row, column = np.divmod(np.arange(tokens), grid)
        middle = (grid - 1) / 2
        return np.tile(-1.0 * np.hypot(row - middle, column - middle), (count, 1))
    noisy = noise * smooth(generator, count, grid)
    if head.kind == "random":
        return profile + (head.effect or 1.5) * smooth(generator, count, grid)
    maps = shown[head.kind == "other"]
    return profile + head.effect * maps[:, list(names).index(head.feature)] + noisy


def _key_mass(labels, shown, heads, profiles, names, grid, draws, noise, timesteps, site, generator) -> pl.DataFrame:
    row, column = np.divmod(np.arange(grid * grid), grid)
    distances = np.hypot(row[:, None] - row, column[:, None] - column)
    uniform = distances.mean()
    frames = []
    for timestep in timesteps:
        for number, head in enumerate(heads):
            acts = head if head.at is None or timestep in head.at else Head("uniform")
            for draw in range(draws):
                for translated in (False, True):
                    logits = logits_of(acts, profiles[number], shown, names, noise, generator)
                    mass = np.exp(logits - logits.max(axis=1, keepdims=True))
                    mass /= mass.sum(axis=1, keepdims=True)
                    entropy = -(mass * np.log(mass)).sum(axis=1)
                    distance = (mass @ distances.T).mean(axis=1)
                    if acts.kind == "counterpart":
                        entropy = entropy - 1.0
                    if acts.kind == "local":
                        distance, entropy = 0.2 * uniform + 0.01 * generator.normal(size=len(mass)), entropy - 1.5
                    if acts.kind == "middle":
                        # as if few keys were near, and fewer when the image has moved
                        distance = (0.3 + 0.15 * translated) * uniform + 0.01 * generator.normal(size=len(mass))
                    frames.append(
                        labels.with_columns(
                            replicate=pl.lit(draw),
                            timestep=pl.lit(timestep),
                            site=pl.lit(site),
                            call=pl.lit(0),
                            head=pl.lit(number),
                            translated=pl.lit(translated),
                            grid_height=pl.lit(grid),
                            grid_width=pl.lit(grid),
                            entropy=pl.Series(entropy),
                            entropy_normalised=pl.Series(entropy / np.log(grid * grid)),
                            distance=pl.Series(distance),
                            distance_uniform=pl.lit(uniform),
                            key_mass=_lists(mass),
                        )
                    )
    return pl.concat(frames)


def _counterparts(labels, heads, draws, donors, timesteps, site, generator) -> pl.DataFrame:
    count = len(labels)
    # how much of the image an item's regions are
    share = generator.uniform(0.03, 0.08, count)
    source = labels["source_id"].to_numpy()
    frames = []
    for timestep in timesteps:
        for number, head in enumerate(heads):
            effect = head.effect if head.kind == "counterpart" and (head.at is None or timestep in head.at) else 0.0
            leaning = generator.normal(size=count) * 0.005
            for draw in range(draws):
                for donor in range(donors + 1):
                    of = (np.arange(count) + donor) % count
                    mass = share[of] + leaning + 0.004 * generator.normal(size=count) + effect * (donor == 0)
                    frames.append(
                        labels.with_columns(
                            replicate=pl.lit(draw),
                            timestep=pl.lit(timestep),
                            site=pl.lit(site),
                            call=pl.lit(0),
                            head=pl.lit(number),
                            donor=pl.lit(donor),
                            donor_source=pl.Series(source[of]),
                            tokens=pl.lit(16),
                            mass=pl.Series(mass),
                            share=pl.Series(share[of]),
                        )
                    )
    return pl.concat(frames)
