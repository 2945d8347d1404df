"""Studies in which there is nothing to find: how many find something?

    python bench/null_studies.py [--studies 200] [--draws 999] [--out bench/results/null-studies.json]

Every study is made of tables like those of a study's sweeps, without a model: both groups of images have the same
distribution of entropies, and no edit changes the loss on average. It is analysed as `headscope study` does it, and
every test that the page makes is counted where it rejects at 5 %. A *family* is what one correction is for: all heads
of a comparison, all edits of a group and fill. What makes it hard on the tests: 20 and 24 sources; two items a source,
which resemble each other; two draws of noise an item; heads that go together; in every second study skewed numbers
(lognormal), in the others normal ones; edits that are selected on discover; a mean fill that is itself estimated, whose
error is as large as a good part of the sampling error, and has a bias.
"""

import argparse
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import polars as pl
from scipy.stats import binomtest

from headscope.bench import records
from headscope.study import StudyResult, analyse, select_heads
from headscope.study.edits import edits_of
from headscope.study.inference import settings

GROUPS = {"lfw": 20, "faces_grey": 24}
SITES = {"blocks.0": 4, "blocks.1": 4}
KEYS = {"blocks.0": 64, "blocks.1": 16}
TIMESTEPS = (100, 500)
ITEMS, DRAWS, FOLDS = 2, 2, 4
SELECTED = 2
LEVEL = 0.05
# by the order they are reported in; each name is a kind of test, and its family
KINDS = {
    "omnibus": "energy distance over all heads and timesteps, a comparison",
    "omnibus of halves": "the same, of two halves of one group",
    "heads": "max-t over the heads of a comparison",
    "sites": "max-t over the sites of a comparison",
    "pooled ratio": "the pooled ratio of a comparison",
    "energy at timesteps": "Holm over the timesteps of a comparison",
    "Wasserstein-1 at timesteps": "Holm over the timesteps of a comparison",
    "plug-in divergence at timesteps": "Holm over the timesteps of a comparison",
    "effects, mean fill": "max-t over the edits of a group, with the fill's own error",
    "effects, zero fill": "max-t over the edits of a group",
    "joint minus sum": "max-t over the sets of a group and split",
    "one effect, mean fill": "each edit's own p-value; not a family",
    "one effect, zero fill": "each edit's own p-value; not a family",
}
HEADS = tuple((site, head) for site, count in SITES.items() for head in range(count))
NAMES = [f"{site} h{head}" for site, head in HEADS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument("--draws", type=int, default=999, help="of every bootstrap and permutation")
    parser.add_argument("--out", type=Path, default=Path("bench/results/null-studies.json"))
    arguments = parser.parse_args()
    settings.RESAMPLES = arguments.draws
    started = time.perf_counter()
    found: dict[str, list[bool]] = defaultdict(list)
    for seed in range(arguments.studies):
        for kind, rejected in null_study(seed).items():
            found[kind] += rejected
        if (seed + 1) % 10 == 0:
            print(f"{seed + 1} studies, {time.perf_counter() - started:.0f} s", flush=True)
    rows = rates(found)
    print("| test | tested | rejected | % | 95 % interval |\n|---|---|---|---|---|")
    for row in rows:
        low, high = (f"{100 * row[end]:.1f}" for end in ("low", "high"))
        print(f"| {row['kind']} | {row['tested']} | {row['rejected']} | {100 * row['rate']:.1f} | {low} to {high} |")
    record = {"studies": arguments.studies, "draws": arguments.draws, "minutes": (time.perf_counter() - started) / 60}
    records.write(arguments.out, records.software() | record | {"rates": rows})


def rates(found: dict[str, list[bool]]) -> list[dict]:
    """Per kind of test how many were made and how many rejected, with the binomial (Clopper and Pearson) interval."""
    rows = []
    for kind, meaning in KINDS.items():
        rejected, tested = sum(found[kind]), len(found[kind])
        interval = binomtest(rejected, tested).proportion_ci(method="exact")
        row = {"kind": kind, "family": meaning, "tested": tested, "rejected": rejected, "rate": rejected / tested}
        rows.append(row | {"low": float(interval.low), "high": float(interval.high)})
    return rows


def null_study(seed: int) -> dict[str, list[bool]]:
    """Of one study, by kind of test, whether each family has a finding."""
    # not the stream that permutations are drawn from
    generator = np.random.default_rng([seed, 1])
    skewed = seed % 2 == 1
    observations = pl.concat([entropies(generator, group, skewed) for group in GROUPS])
    wholes = [{"name": site, "sites": [site], "heads": []} for site in SITES]
    every = {name: (name,) for name in NAMES} | {
        site: tuple(f"{site} h{n}" for n in range(SITES[site])) for site in SITES
    }
    discover = losses(generator, "discover", every, skewed, ("mean",), folds=0)
    ranked, _ = single_heads(discover)
    chosen = select_heads(ranked, SELECTED)
    sets = {"top": chosen, "first and last": [chosen[0], chosen[-1]]}
    edits = edits_of([*({"name": name, "sites": [], "heads": heads} for name, heads in sets.items()), *wholes], SITES)
    members = {edit.name: tuple(f"{site} h{head}" for site, head in edit.heads) for edit in edits}
    kept = [*(f"{site} h{head}" for site, head in chosen), *sets, *SITES]
    confirm = losses(
        generator, "confirm", {name: members[name] for name in kept}, skewed, ("mean", "zero"), folds=FOLDS
    )
    (discover, discover_sets), (confirm, confirm_sets) = map(single_heads, (discover, confirm))
    result = analyse(
        observations,
        discover,
        confirm,
        discover_sets=discover_sets,
        confirm_sets=confirm_sets,
        edits=edits,
        count_per_group=SELECTED,
        sites=list(SITES),
        seed=seed,
    )
    return findings(result)


def single_heads(rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The rows of single heads, with site and head in the place of the edit, and those of sets."""
    single = pl.col("edit").is_in(NAMES)
    name = pl.col("edit").str.split(" h")
    heads = rows.filter(single).with_columns(site=name.list.first(), head=name.list.last().cast(pl.Int64))
    return heads.drop("edit"), rows.filter(~single)


def findings(result: StudyResult) -> dict[str, list[bool]]:
    """By kind of test, whether each family has a p-value below 5 %."""
    contrast, found = result.contrast, result.interventions
    assert contrast is not None
    assert found is not None
    assert found.joint is not None

    def below(table: pl.DataFrame, name: str) -> bool:
        assert table[name].is_not_null().any(), f"nothing was tested: {name}"
        return bool((table[name] < LEVEL).any())

    at = contrast.divergences.filter(pl.col("timestep").is_not_null())
    halves = [control.comparison for control in result.controls if control.kind == "halves"]
    effects = {fill: found.effects.filter(pl.col("fill") == fill) for fill in ("mean", "zero")}
    rejected = {
        "omnibus": [contrast.omnibus["p_value"] < LEVEL],
        "omnibus of halves": [half.omnibus["p_value"] < LEVEL for half in halves if half is not None],
        "heads": [below(contrast.heads, "p_maxt")],
        "sites": [below(contrast.sites, "p_maxt")],
        "pooled ratio": [contrast.ratio["p_value"] < LEVEL],
        "energy at timesteps": [below(at.filter(pl.col("measure") == "energy"), "p_holm")],
        "Wasserstein-1 at timesteps": [below(at.filter(pl.col("measure") == "wasserstein"), "p_holm")],
        "plug-in divergence at timesteps": [below(at.filter(pl.col("measure") == "jensen_shannon"), "p_holm")],
        "joint minus sum": [below(part, "p_maxt") for part in found.joint.partition_by("group", "split")],
    }
    for fill, table in effects.items():
        rejected[f"effects, {fill} fill"] = [below(part, "p_maxt") for part in table.partition_by("group")]
        rejected[f"one effect, {fill} fill"] = (table["p_value"] < LEVEL).to_list()
    return rejected


def _noise(generator: np.random.Generator, shape: tuple[int, ...], skewed: bool) -> np.ndarray:
    """Of mean 0 and variance 1."""
    normal = generator.normal(size=shape)
    if not skewed:
        return normal
    spread = 0.8
    scale = np.sqrt(np.expm1(spread**2) * np.exp(spread**2))
    return (np.exp(spread * normal) - np.exp(spread**2 / 2)) / scale


def _nested(generator: np.random.Generator, sources: int, cells: tuple[int, ...], skewed: bool) -> np.ndarray:
    """Noise of sources, items and draws that all cells partly share: [sources, items, draws, *cells]."""
    found = np.zeros((sources, ITEMS, DRAWS, *cells))
    for size, shape in ((1.0, (sources, 1, 1)), (0.6, (sources, ITEMS, 1)), (0.8, (sources, ITEMS, DRAWS))):
        for share, own in ((0.6, (1,) * len(cells)), (0.8, cells)):
            found = found + size * share * _noise(generator, (*shape, *own), skewed)
    return found


def _labels(group: str, split: str, sources: int) -> dict[str, np.ndarray]:
    """Of every source, item and draw, flat."""
    source, item, draw = (axis.ravel() for axis in np.meshgrid(*map(np.arange, (sources, ITEMS, DRAWS)), indexing="ij"))
    names = np.array([f"{group} {split} {number}" for number in source])
    return {"source_id": names, "item": source * ITEMS + item + (1000 if split == "confirm" else 0), "replicate": draw}


def entropies(generator: np.random.Generator, group: str, skewed: bool) -> pl.DataFrame:
    """Of every head, timestep and draw; both groups have the same means."""
    level = np.linspace(0.3, 0.8, len(HEADS))
    frames = []
    for split in ("discover", "confirm"):
        values = 0.03 * _nested(generator, GROUPS[group], (len(TIMESTEPS), len(HEADS)), skewed)
        for step, timestep in enumerate(TIMESTEPS):
            for place, (site, head) in enumerate(HEADS):
                normalised = np.clip(level[place] + 0.05 * step + values[..., step, place].ravel(), 0.001, 0.999)
                columns = {"timestep": timestep, "site": site, "head": head, "call": 0, "branch": None}
                columns |= {"query_group": "image", "keys": KEYS[site], "group": group, "split": split}
                frame = pl.DataFrame(_labels(group, split, GROUPS[group])).with_columns(
                    **{name: pl.lit(value) for name, value in columns.items()},
                    entropy_mean=pl.Series(normalised * np.log(KEYS[site])),
                    entropy_normalised_mean=pl.Series(normalised),
                )
                frames.append(frame.with_columns(pl.col("branch").cast(pl.String)))
    return pl.concat(frames)


def losses(
    generator: np.random.Generator,
    split: str,
    edits: dict[str, tuple[str, ...]],
    skewed: bool,
    fills: tuple[str, ...],
    folds: int,
) -> pl.DataFrame:
    """Paired losses whose differences are 0 on average over sources and over reference images.

    edits: the heads of every edit. A set's change is the sum of its heads' and one of its own.
    """
    frames = []
    for group, sources in GROUPS.items():
        difficulty = np.exp(0.4 * generator.normal(size=(sources, 1, 1, 1)))
        clean = difficulty * 0.1 / (1 + np.arange(len(TIMESTEPS))) * np.ones((sources, ITEMS, DRAWS, 1))
        parts = [*dict.fromkeys((*(head for heads in edits.values() for head in heads), *edits))]
        for fill in fills:
            noise = 0.02 * _nested(generator, sources, (len(TIMESTEPS), len(parts)), skewed)
            changes = {part: clean * noise[..., place] for place, part in enumerate(parts)}
            of_folds = 0.006 * generator.normal(size=(max(folds, 1), len(parts)))
            errors = {part: of_folds[:, place] for place, part in enumerate(parts)}
            for name, heads in edits.items():
                summed = (*heads, name) if heads != (name,) else heads
                change = sum(changes[part] for part in summed)
                error = sum(errors[part] for part in summed)
                versions = {fill: change}
                if fill == "mean" and folds:
                    # the mean of all folds errs by the mean of their errors, and by the square of it
                    bias = 0.002
                    versions = {fill: change + clean * (error.mean() + bias)}
                    for number in range(folds):
                        versions[f"mean {number + 1}/{folds}"] = change + clean * (error[number] + folds * bias)
                for version, value in versions.items():
                    for step, timestep in enumerate(TIMESTEPS):
                        rows = _labels(group, split, sources)
                        columns = {"clean": clean[..., step].ravel(), "edited": (clean + value)[..., step].ravel()}
                        frame = pl.DataFrame(rows | columns).with_columns(
                            edit=pl.lit(name), group=pl.lit(group), split=pl.lit(split), timestep=pl.lit(timestep),
                            fill=pl.lit(version),
                        )  # fmt: skip
                        # as in a sweep, folds have the first draw's noisy images alone
                        frames.append(frame if version == fill else frame.filter(pl.col("replicate") == 0))
    return pl.concat(frames)


if __name__ == "__main__":
    main()
