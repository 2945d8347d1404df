"""Are roles found where there are some, and nowhere else? Simulated heads on the maps of real images, on one core.

    python bench/roles_simulation.py [--nulls 200] [--worlds 8] [--draws 999] [--out FILE]

Maps are those of headscope.features of images of lfw, faces and twins, on 8 x 8 tokens; what heads look at whatever the
image shows is what pixeldit's heads do (their mean key mass). **Null simulations**: heads that look at places only, at
everything alike, at random places in every image, and at what other images show there; counterparts of donors as good
as one's own. Each is analysed as `headscope.study.roles.assess` does it, and counted where it names a feature, where a
test of the discover split alone finds one (max-t over all heads and features), and where a single test rejects.
**Power**: heads that follow a feature by so many logits a standard deviation of its map.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from scipy.stats import binomtest

import headscope
from headscope.bench import records
from headscope.features import feature_maps, on_tokens
from headscope.study.inference import settings
from headscope.study.roles import assess
from headscope.study.roles.maps import IMAGE_FEATURES
from headscope.zoo import open_group

# what the tests plant
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from study.simulated_roles import Head, World, world

GROUPS, IMAGES, GRID = ("lfw", "faces", "twins"), 200, 8
TIMESTEPS = (100, 500)
NULL_SOURCES = (20, 40)
SOURCES, EFFECTS = (20, 40, 100), (0.1, 0.2, 0.4, 0.8)
LEVEL = 0.05
KINDS = {
    "name": "any head of a simulation named after a feature (chosen on discover, tested on confirm)",
    "name by discover alone": "any cell of a simulation with p_maxt below 5 % on discover",
    "one cell": "each head's and feature's own p-value; not a family",
    "one cell, counterpart": "each head's own p-value; not a family",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nulls", type=int, default=200)
    parser.add_argument("--worlds", type=int, default=8, help="of each effect and number of sources")
    parser.add_argument("--draws", type=int, default=999, help="of every bootstrap and permutation")
    parser.add_argument("--out", type=Path, default=Path("bench/results/roles-simulation.json"))
    arguments = parser.parse_args()
    settings.RESAMPLES = arguments.draws
    started = time.perf_counter()
    maps = {group: maps_of(group) for group in GROUPS}
    profiles = profiles_of("lfw")
    print(f"maps and profiles, {time.perf_counter() - started:.0f} s", flush=True)
    found: dict[str, list[bool]] = defaultdict(list)
    named_roles: dict[str, int] = defaultdict(int)
    for seed in range(arguments.nulls):
        for kind, rejected in null_simulation(seed, maps, profiles, named_roles).items():
            found[kind] += rejected
        if (seed + 1) % 20 == 0:
            print(f"{seed + 1} null simulations, {time.perf_counter() - started:.0f} s", flush=True)
    nulls = rates(found)
    print("| test | tested | rejected | % | 95 % interval |\n|---|---|---|---|---|")
    for row in nulls:
        low, high = (f"{100 * row[end]:.1f}" for end in ("low", "high"))
        share = f"{100 * row['rate']:.1f}"
        print(f"| {row['kind']} ({row['of']}) | {row['tested']} | {row['rejected']} | {share} | {low} to {high} |")
    powers = [power(sources, effect, arguments.worlds, maps, profiles) for sources in SOURCES for effect in EFFECTS]
    names = ("sources", "logits a standard deviation", "excess", "heads", "named right, %", "wrong, %")
    print(f"| {' | '.join(names)} |\n|---|---|---|---|---|---|")
    for row in powers:
        numbers = f"{row['excess']:.2f} | {row['heads']} | {100 * row['right']:.0f} | {100 * row['wrong']:.1f}"
        print(f"| {row['sources']} | {row['effect']} | {numbers} |")
    record = {"nulls": arguments.nulls, "draws": arguments.draws, "minutes": (time.perf_counter() - started) / 60}
    record |= {"rates": nulls, "names_of_null_heads": dict(named_roles), "powers": powers}
    records.write(arguments.out, records.software() | record)


class Shown(NamedTuple):
    """The maps of a group's images on tokens: names of the features, [images, features, tokens]."""

    names: tuple[str, ...]
    maps: np.ndarray


def maps_of(group: str) -> Shown:
    """In standard deviations, as heads follow them; of the features that the group's images have."""
    opened = open_group(group)
    found = []
    for index in range(min(IMAGES, len(opened))):
        pictures = feature_maps(opened.item(index))
        found.append([on_tokens(pictures[name], (GRID, GRID)).ravel() for name in IMAGE_FEATURES])
    maps = np.array(found)
    # photographs of lfw are grey
    there = maps.std(axis=(0, 2)) > 1e-9
    maps = maps[:, there] - maps[:, there].mean(axis=(0, 2), keepdims=True)
    return Shown(tuple(np.array(IMAGE_FEATURES)[there].tolist()), maps / maps.std(axis=(0, 2), keepdims=True))


def profiles_of(group: str) -> np.ndarray:
    """Logarithms of the mean key mass of pixeldit's heads: [heads, tokens]."""
    with tempfile.TemporaryDirectory() as folder:
        run = headscope.sweep(
            folder, groups=[group], items=10, splits=["confirm"], kinds=["key_mass"], observe=False, fills=[]
        )
        table = run.table("key_mass").filter(~pl.col("translated")).collect()
    keys = pl.col("key_mass").list.to_array(GRID * GRID)
    rows = table.sort("site", "head").select(pl.col("site").cast(pl.String), "head", keys)
    means = [
        part["key_mass"].to_numpy().mean(axis=0) for part in rows.partition_by("site", "head", maintain_order=True)
    ]
    return np.log(np.array(means, np.float64))


def null_simulation(
    seed: int, maps: dict[str, Shown], profiles: np.ndarray, named_roles: dict[str, int]
) -> dict[str, list[bool]]:
    """Which tests of one null simulation reject."""
    generator = np.random.default_rng([1, seed])
    shown = maps[GROUPS[seed % len(GROUPS)]]
    heads = [Head("position")] * 8 + [Head("uniform")] * 2
    heads += [Head("random", effect=effect) for effect in (0.5, 1.0, 2.0, 4.0, 8.0)]
    heads += [Head("other", str(generator.choice(shown.names)), effect) for effect in (0.2, 0.4, 0.8, 1.6, 3.2)]
    simulated = simulate(heads, NULL_SOURCES[seed // len(GROUPS) % 2], seed, shown, profiles, generator)
    roles = assess(*simulated, seed=seed)
    assert roles is not None
    named = roles.names.filter(pl.col("feature").is_not_null())
    for role in roles.names["role"]:
        named_roles[role] += 1
    cells = roles.excess.filter(pl.col("p_value").is_not_null())
    tied = pl.col("feature") == "counterpart"
    return {
        "name": [len(named) > 0],
        "name by discover alone": [bool((cells.filter(pl.col("split") == "discover")["p_maxt"] < LEVEL).any())],
        # a head that looks at places only has an excess of 0 but for rounding, and a test that can't reject
        "one cell": (cells.filter(~tied, pl.col("head") >= 10)["p_value"] < LEVEL).to_list(),
        "one cell, counterpart": (cells.filter(tied)["p_value"] < LEVEL).to_list(),
    }


def power(sources: int, effect: float, worlds: int, maps: dict[str, Shown], profiles: np.ndarray) -> dict:
    """How many of the heads that follow a feature are named after it, and after another."""
    right, wrong, excess = [], [], []
    # the same heads and images for every effect
    for seed in range(worlds):
        generator = np.random.default_rng([2, seed])
        # of the others there are too few images
        shown = maps[GROUPS[seed % len(GROUPS)] if sources < 100 else "twins"]
        heads = [Head("follows", feature, effect) for feature in shown.names for _ in range(2)]
        simulated = simulate(heads, sources, seed, shown, profiles, generator)
        roles = assess(*simulated[:2], seed=seed)
        assert roles is not None
        for head, role in zip(heads, roles.names.sort("head")["role"], strict=True):
            right.append(role == head.feature)
            wrong.append(role != head.feature and role in IMAGE_FEATURES)
        planted = pl.DataFrame({"head": range(len(heads)), "feature": [head.feature for head in heads]})
        excess += (
            roles.excess.filter(pl.col("split") == "confirm").join(planted, on=["head", "feature"])["value"].to_list()
        )
    shares = {"right": float(np.mean(right)), "wrong": float(np.mean(wrong)), "excess": float(np.mean(excess))}
    return {"sources": sources, "effect": effect, "heads": len(right), **shares}


def simulate(
    heads: list[Head], sources: int, seed: int, shown: Shown, profiles: np.ndarray, generator: np.random.Generator
) -> World:
    """The tables of one group of real images."""
    mine = shown.maps[generator.permutation(len(shown.maps))[: 2 * sources]]
    return world(
        heads,
        sources=sources,
        seed=seed,
        maps={"discover": mine[:sources], "confirm": mine[sources:]},
        profiles=profiles[generator.choice(len(profiles), len(heads))],
        features=shown.names,
        timesteps=TIMESTEPS,
        donors=7,
    )


def rates(found: dict[str, list[bool]]) -> list[dict]:
    """Per kind of test how many were made and how many rejected, with the binomial (Clopper and Pearson) interval."""
    rows = []
    for kind, of in KINDS.items():
        tested, rejected = len(found[kind]), sum(found[kind])
        interval = binomtest(rejected, tested).proportion_ci()
        row = {"kind": kind, "of": of, "tested": tested, "rejected": rejected, "rate": rejected / tested}
        rows.append(row | {"low": interval.low, "high": interval.high})
    return rows


if __name__ == "__main__":
    main()
