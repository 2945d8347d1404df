"""Tables like those of a study's sweeps, from a random number generator: plausible, quick, and without a model."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import polars as pl
import pytest

from headscope.study.inference import settings

SITES = (
    ("down_blocks.1.attentions.0", 256),
    ("down_blocks.2.attentions.0", 64),
    ("mid_block.attentions.0", 64),
    ("up_blocks.0.attentions.0", 64),
    ("up_blocks.0.attentions.1", 64),
    ("up_blocks.1.attentions.0", 256),
    ("up_blocks.1.attentions.1", 256),
)
TIMESTEPS = (103, 251, 500, 748, 896)
SHIFTS = {"faces": 0.0, "faces_grey": 0.01, "lfw": 0.03, "photographs": 0.06}


@contextmanager
def fewer_draws(count: int) -> Iterator[None]:
    """Of the resampling, for tests that don't depend on how many there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "RESAMPLES", count)
        yield


def items(groups=tuple(SHIFTS), splits=("discover", "confirm"), sources=20, crops=4):
    """One row per item: item, group, source_id, split. Photographs are crops of one source a split."""
    rows = []
    for group in groups:
        for offset, split in enumerate(splits):
            for index in range(crops if group == "photographs" else sources):
                number = 1000 * offset + index
                source = f"{group}-{split}" if group == "photographs" else f"{group}-{number}"
                rows.append({"item": number, "group": group, "source_id": source, "split": split})
    return pl.DataFrame(rows)


def observations(table=None, seed=0, timesteps=TIMESTEPS, sites=SITES, heads=8):
    """Entropies of every head: higher in noisier images, a little higher in natural ones."""
    table = items() if table is None else table
    generator = np.random.default_rng(seed)
    level = generator.uniform(0.35, 0.95, (len(sites), heads))
    slope = generator.normal(0.1, 0.08, (len(sites), heads))
    natural = generator.normal(1.0, 1.0, (len(sites), heads))
    source = {name: generator.normal(0, 0.01) for name in table["source_id"].unique(maintain_order=True)}
    columns = []
    for row in table.iter_rows(named=True):
        for step, timestep in enumerate(timesteps):
            value = level + slope * (step / max(1, len(timesteps) - 1) - 0.5) + natural * SHIFTS.get(row["group"], 0)
            value = np.clip(value + source[row["source_id"]] + generator.normal(0, 0.012, value.shape), 0.02, 0.995)
            for number, (site, keys) in enumerate(sites):
                for head in range(heads):
                    columns.append((*row.values(), timestep, 0, site, head, 0, None, "image", keys, keys,
                                    value[number, head] * np.log(keys), 0.3, value[number, head]))  # fmt: skip
    names = ["item", "group", "source_id", "split", "timestep", "replicate", "site", "head", "call", "branch"]
    names += ["query_group", "queries", "keys", "entropy_mean", "entropy_std", "entropy_normalised_mean"]
    return pl.DataFrame(columns, schema=names, orient="row").with_columns(pl.col("branch").cast(pl.String))


def ablations(table=None, split="discover", fills=("mean",), chosen=None, seed=1, timesteps=TIMESTEPS, heads=8):
    """Paired losses: a few heads matter much, most hardly at all."""
    table = items(("faces_grey", "lfw")) if table is None else table
    generator = np.random.default_rng(seed)
    effect = {(site, head): generator.gamma(0.35, 0.12) for site, _ in SITES for head in range(heads)}
    chosen = list(effect) if chosen is None else chosen
    generator = np.random.default_rng([seed, len(split)])
    columns = []
    for row in table.filter(pl.col("split") == split).iter_rows(named=True):
        difficulty = generator.lognormal(0, 0.3)
        for step, timestep in enumerate(timesteps):
            clean = difficulty * 0.3 / (1 + step) ** 1.5
            for fill in fills:
                for site, head in chosen:
                    size = effect[site, head] * (1.4 if fill == "zero" else 1.0) * (1.2 if row["group"] == "lfw" else 1)
                    edited = clean * (1 + size * generator.gamma(8, 1 / 8) + generator.normal(0, 0.004))
                    columns.append((*row.values(), timestep, 0, site, head, fill, clean, edited))
    names = ["item", "group", "source_id", "split", "timestep", "replicate", "site", "head", "fill", "clean", "edited"]
    return pl.DataFrame(columns, schema=names, orient="row")


def generations(table=None, seed=2, heads=8):
    """Distances of drawn images, a row per item and head."""
    table = items(("faces_grey", "lfw")) if table is None else table
    generator = np.random.default_rng(seed)
    frames = []
    for site, _ in SITES:
        for head in range(heads):
            distance = generator.gamma(0.5, 0.01) * generator.gamma(4, 0.25, len(table))
            columns = {"replicate": 0, "site": site, "head": head, "fill": "mean", "steps": 10, "distance": distance}
            values = {name: pl.lit(value) for name, value in columns.items() if name != "distance"}
            frames.append(table.with_columns(**values, distance=pl.Series(distance)))
    return pl.concat(frames)
