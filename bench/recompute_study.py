"""A study's tables computed a second time, from the raw Parquet files of its stages, by other code.

    python bench/recompute_study.py STUDY_DIR

Nothing of headscope is imported: numpy does the sums, as the definitions in docs/study.md say them. Point estimates,
standard errors, and bias and error of the mean fill are compared; intervals and p-values are random, and proved
otherwise (bench/statistics, bench/null_studies.py). Prints the largest difference of every table, relative to
max(1, |value|), and exits with 1 where one is above 1e-9, or where a table has a row that nothing was found for.
"""

import csv
import json
import re
import sys
from collections import defaultdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recompute_roles import causal, circuits, roles

AGREES = 1e-9
FOLD = re.compile(r"mean \d+/\d+")
CONTRAST = ("lfw", "faces_grey")
# a half of the sources is whichever the program drew; of the others, which is which follows from the words
NOT_RECOMPUTED = {"contrast_controls": "halves"}
HEAD = ("site", "head", "query_group", "keys")
SITE = ("site", "query_group", "keys")
ITEM = ("group", "split", "source_id", "item")

Table = dict[str, np.ndarray]
Found = dict[tuple, dict[str, float]]


def main(study: Path) -> int:
    found = {**entropies(study), **interventions(study), **roles(study), **causal(study), **circuits(study)}
    failed = False
    for path in sorted((study / "tables").glob("*.csv")):
        if path.stem not in found:
            print(f"{path.stem:24} not recomputed")
            continue
        numbers, largest, unmatched = compared(path, found[path.stem])
        failed |= largest > AGREES or unmatched > 0 or numbers == 0
        missing = f", {unmatched} rows that nothing was found for" if unmatched else ""
        print(f"{path.stem:24} {numbers:6} numbers, largest difference {largest:.1e}{missing}")
    return int(failed)


def compared(path: Path, found: tuple[tuple[str, ...], Found]) -> tuple[int, float, int]:
    """How many numbers, their largest difference, and how many rows were found on one side only."""
    keys, expected = found
    numbers, largest, seen, unmatched = 0, 0.0, set(), 0
    for row in csv.DictReader(path.open(encoding="utf-8")):
        if row.get("kind") == NOT_RECOMPUTED.get(path.stem, "") or row.get("omitted"):
            continue
        row["head?"] = str(row.get("kind") == "head")
        key = tuple(row[name] for name in keys)
        unmatched += key not in expected
        seen.add(key)
        for name, value in expected.get(key, {}).items():
            written = float(row[name]) if row[name] else np.nan
            # a void number is void on both sides
            if not (np.isnan(written) and np.isnan(value)):
                difference = abs(written - value) / max(1.0, abs(value))
                largest = max(largest, np.inf if np.isnan(difference) else difference)
            numbers += 1
    return numbers, largest, unmatched + len(expected.keys() - seen)


def raw(study: Path, stage: str, kind: str) -> Table:
    """All rows of a kind of a stage; texts as text, numbers as they are."""
    files = sorted((study / stage / kind).glob("*.parquet"))
    if not files:
        return {}
    table = pa.concat_tables([pq.read_table(file) for file in files], promote_options="permissive")
    columns = {}
    for name in table.column_names:
        texts = pa.types.is_dictionary(table.schema.field(name).type) or pa.types.is_string(
            table.schema.field(name).type
        )
        columns[name] = np.array([str(value) for value in table[name].to_pylist()]) if texts else table[name].to_numpy()
    return columns


def averaged(table: Table, by: tuple[str, ...], values: tuple[str, ...]) -> Table:
    """The means of equal labels, sorted by them."""
    code = np.zeros(len(table[by[0]]), np.int64)
    for name in by:
        place = np.unique(table[name], return_inverse=True)[1]
        code = np.unique(code * (place.max() + 1) + place, return_inverse=True)[1]
    _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
    count = np.bincount(inverse)
    sums = {name: np.bincount(inverse, table[name].astype(np.float64)) / count for name in values}
    return {name: table[name][first] for name in by} | sums


def chosen(table: Table, where: np.ndarray) -> Table:
    return {name: column[where] for name, column in table.items()}


def by_cell(table: Table, by: tuple[str, ...], value: str) -> dict[tuple, np.ndarray]:
    """Means over a source's draws, then items: [sources, timesteps], by the names that tell cells apart."""
    for last in (("source_id", "item", "timestep"), ("source_id", "timestep")):
        table = averaged(table, (*by, *last), (value,))
    steps, count = np.unique(table["timestep"], return_counts=True)
    parts = defaultdict(list)
    for row in zip(*(table[name].tolist() for name in by), table[value].tolist(), strict=True):
        parts[row[:-1]].append(row[-1])
    return {key: np.array(numbers).reshape(-1, len(steps)) for key, numbers in parts.items()} if len(count) else {}


def texts(key: tuple) -> tuple[str, ...]:
    """As CSV has them; None is an empty field."""
    return tuple("" if part is None else str(part) for part in key)


def entropies(study: Path) -> dict[str, tuple[tuple[str, ...], Found]]:
    """Of heads and groups, the contrast and its controls."""
    observed = items_of(raw(study, "observe", "observations"))
    untrained = raw(study, "untrained", "observations")
    steps = np.unique(observed["timestep"]).tolist()
    held_out = chosen(observed, observed["split"] != "train")
    heads: Found = {}
    for measure in ("nats", "normalised"):
        for (group, *head), values in by_cell(held_out, ("group", *HEAD), measure).items():
            for step, mean in zip([*steps, None], [*values.mean(0), values.mean()], strict=True):
                heads[texts((group, *head, step, measure))] = {"value": mean}
                if measure == "nats":
                    heads[texts((group, *head, step, "deficit"))] = {"value": np.log(head[-1]) - mean}
    groups: Found = {}
    for (group,), values in by_cell(pooled(held_out), ("group",), "normalised").items():
        for step, source in zip([*steps, None], [*values.T, values.mean(1)], strict=True):
            groups[texts((group, step))] = {"value": source.mean(), "standard_error": error_of(source)}
    first, second = (of(observed, group, "confirm") for group in CONTRAST)
    found = {
        "entropy_heads": (("group", *HEAD, "timestep", "measure"), heads),
        "entropy_groups": (("group", "timestep"), groups),
        "contrast_heads": (HEAD, differences(first, second, HEAD)),
        "contrast_sites": ((*SITE, "timestep"), site_ratios(first, second, steps)),
        "contrast_pooled": (("timestep",), pooled_ratios(first, second, steps)),
        "contrast_divergences": (("measure", "timestep"), divergences(first, second, steps)),
    }
    pairs = {("main", "lfw against faces_grey"): (first, second)}
    for kind, names in (
        ("colour", ("faces", "faces_grey")),
        ("matched", tuple(f"{name}_matched" for name in CONTRAST)),
    ):
        pairs[kind, " against ".join(names)] = tuple(of(observed, name, "confirm") for name in names)
    if untrained:
        random = items_of(untrained)
        key = "untrained", f"{' against '.join(CONTRAST)}, untrained weights"
        pairs[key] = tuple(of(random, name, "confirm") for name in CONTRAST)
    for name in CONTRAST:
        parts = of(observed, name, "train"), of(held_out, name)
        pairs["training", f"{name}, training against held-out items"] = parts
    controls = {}
    for key, (one, two) in pairs.items():
        if len(one["item"]) and len(two["item"]):
            ratio = pooled_ratios(one, two, steps)[texts((None,))]["value"]
            controls[key] = {"ratio": ratio, "energy": energy(*(matrix(side, "nats") for side in (one, two)), one, two)}
    return found | {"contrast_controls": (("kind", "control"), controls)}


def items_of(rows: Table) -> Table:
    """An item's entropies: means over its draws, of queries of the image where there are others."""
    rows = rows | {"nats": rows["entropy_mean"], "normalised": rows["entropy_normalised_mean"]}
    return averaged(rows, (*ITEM, "timestep", *HEAD), ("nats", "normalised"))


def pooled(items: Table) -> Table:
    """Means over the heads that have more than one key."""
    return averaged(chosen(items, items["keys"] > 1), (*ITEM, "timestep"), ("normalised",))


def of(items: Table, group: str, split: str | None = None) -> Table:
    return chosen(items, (items["group"] == group) & ((items["split"] == split) | (split is None)))


def error_of(source: np.ndarray) -> float:
    return source.std(ddof=1) / np.sqrt(len(source))


def differences(first: Table, second: Table, by: tuple[str, ...]) -> Found:
    one, two = (by_cell(side, by, "nats") for side in (first, second))
    found = {}
    for key in one:
        x, y = one[key].mean(1), two[key].mean(1)
        found[texts(key)] = {"value": x.mean() - y.mean(), "standard_error": np.hypot(error_of(x), error_of(y))}
    return found


def site_ratios(first: Table, second: Table, steps: list[int]) -> Found:
    sides = [averaged(side, (*ITEM, "timestep", *SITE), ("nats",)) for side in (first, second)]
    one, two = (by_cell(side, SITE, "nats") for side in sides)
    found = {}
    for key in one:
        change = one[key].mean(0) - two[key].mean(0)
        for step, value in zip([*steps, None], [*change, change.mean()], strict=True):
            found[texts((*key, step))] = {"value": np.exp(value)}
    return found


def pooled_ratios(first: Table, second: Table, steps: list[int]) -> Found:
    one, two = (
        np.mean([values.mean(0) for values in by_cell(pooled(side), ("group",), "normalised").values()], axis=0)
        for side in (first, second)
    )
    rows = zip([*steps, None], [*one, one.mean()], [*two, two.mean()], strict=True)
    return {texts((step,)): {"first": x, "second": y, "value": x / y} for step, x, y in rows}


def matrix(items: Table, measure: str) -> np.ndarray:
    """[sources, timesteps, heads] of the heads with more than one key."""
    cells = by_cell(chosen(items, items["keys"] > 1), HEAD, measure)
    return np.stack([cells[key] for key in sorted(cells)], axis=2)


def energy(x: np.ndarray, y: np.ndarray, first: Table, second: Table) -> float:
    """Unbiased energy distance of sources over all heads and timesteps; no source is compared with its own version."""
    x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
    spread = np.concatenate([x, y]).std(axis=0)
    varies = spread > 1e-10 * np.abs(np.concatenate([x, y])).max(axis=0)
    x, y = x[:, varies] / spread[varies], y[:, varies] / spread[varies]

    def distances(one: np.ndarray, two: np.ndarray) -> np.ndarray:
        return np.sqrt(((one[:, None] - two[None]) ** 2).sum(-1))

    own = np.unique(first["source_id"])[:, None] == np.unique(second["source_id"])[None]
    within = [distances(side, side).sum() / (len(side) * (len(side) - 1)) for side in (x, y)]
    return 2 * distances(x, y)[~own].mean() - sum(within)


def divergences(first: Table, second: Table, steps: list[int]) -> Found:
    x, y = matrix(first, "nats"), matrix(second, "nats")
    u, v = matrix(first, "normalised"), matrix(second, "normalised")
    found = {}
    parts = defaultdict(list)
    for number, step in enumerate(steps):
        here = slice(number, number + 1)
        found[texts(("energy", step))] = {"value": energy(x[:, here], y[:, here], first, second)}
        parts["wasserstein"].append(
            np.mean([wasserstein(a, b) for a, b in zip(x[:, number].T, y[:, number].T, strict=True)])
        )
        parts["jensen_shannon"].append(jensen_shannon(u[:, number], v[:, number]))
        parts["jensen_shannon_pooled"].append(jensen_shannon(u[:, number].mean(1), v[:, number].mean(1)))
    found[texts(("energy", None))] = {"value": energy(x, y, first, second)}
    for measure, values in parts.items():
        for step, value in zip([*steps, None], [*values, np.mean(values)], strict=True):
            found[texts((measure, step))] = {"value": value}
    return found


def wasserstein(x: np.ndarray, y: np.ndarray) -> float:
    """The area between both cumulative distributions."""
    at = np.sort(np.concatenate([x, y]))
    below = [np.searchsorted(np.sort(side), at[:-1], side="right") / len(side) for side in (x, y)]
    return float((np.abs(below[0] - below[1]) * np.diff(at)).sum())


def jensen_shannon(x: np.ndarray, y: np.ndarray) -> float:
    edges = (min(x.min(), y.min()), max(x.max(), y.max()))
    p, q = (np.histogram(side, bins=20, range=edges)[0] / side.size for side in (x, y))
    middle = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(sum(np.nansum(side * np.log(side / middle)) for side in (p, q)) / 2)


class Losses:
    """A stage's paired losses as [sources, timesteps] per edit, group, split and fill."""

    def __init__(self, study: Path, stage: str) -> None:
        manifest = json.loads((study / stage / "manifest.json").read_text(encoding="utf-8"))
        heads = {(site["name"], head) for site in manifest["sites"] for head in range(site["heads"])}
        self.sets = {
            one["name"]: {head for head in heads if any(fnmatchcase(head[0], pattern) for pattern in one["sites"])}
            | {(site, head) for site, head in one["heads"]}
            for one in manifest["config"]["sets"]
        }
        self.cells: dict[tuple, np.ndarray] = {}
        self.first: dict[tuple, np.ndarray] = {}
        by = ("head?", "edit", "group", "split", "fill")
        for kind in ("ablations", "set_ablations"):
            rows = raw(study, stage, kind)
            if not rows:
                continue
            if kind == "ablations":
                rows["edit"] = np.array(
                    [f"{site} h{head}" for site, head in zip(rows["site"], rows["head"], strict=True)]
                )
            rows["head?"] = np.full(len(rows["edit"]), kind == "ablations")
            rows["change"] = rows["edited"] - rows["clean"]
            folded = np.isin(rows["replicate"], rows["replicate"][[bool(FOLD.fullmatch(f)) for f in rows["fill"]]])
            for store, part in ((self.cells, rows), (self.first, chosen(rows, folded))):
                if len(part["edit"]):
                    change, clean = (by_cell(part, by, name) for name in ("change", "clean"))
                    store.update({key: np.stack([change[key], clean[key]]) for key in change})
        self.folds = sorted({key[-1] for key in self.first if FOLD.fullmatch(key[-1])})

    def damage(self, parts: dict[tuple, float], group: str, split: str, fill: str) -> dict[str, Any]:
        """Of a weighted sum of edits: relative and absolute degradation, errors, bias, and what each timestep has."""

        def both(cells: dict, fill: str) -> tuple[np.ndarray, np.ndarray]:
            found = [(weight, cells[(*edit, group, split, fill)]) for edit, weight in parts.items()]
            return np.sum([weight * pair[0] for weight, pair in found], axis=0), found[0][1][1]

        change, clean = both(self.cells, fill)
        at = change.mean(0) / clean.mean(0)
        bias, fold_error, error_at = np.full(len(at), np.nan), np.nan, np.full(len(at), np.nan)
        if fill == "mean" and self.folds:
            pairs = [both(self.first, fold) for fold in self.folds]
            by_fold = np.array([d.mean(0) / c.mean(0) for d, c in pairs])
            whole, beside = both(self.first, "mean")
            count = len(self.folds)
            bias = (by_fold.mean(0) - whole.mean(0) / beside.mean(0)) / (count - 1)
            fold_error = by_fold.mean(1).std(ddof=1) / np.sqrt(count)
            error_at = by_fold.std(axis=0, ddof=1) / np.sqrt(count)
        taken = np.nan_to_num(bias)
        influence = (change - at * clean) / clean.mean(0)
        return {
            "value": (at - taken).mean(),
            "absolute": (change.mean(0) - taken * clean.mean(0)).mean(),
            "standard_error": error_of(influence.mean(1)),
            "fill_error": fold_error,
            "fill_bias": bias.mean(),
            "at": at - taken,
            "error_at": np.array([error_of(column) for column in influence.T]),
            "fill_error_at": error_at,
        }


def interventions(study: Path) -> dict[str, tuple[tuple[str, ...], Found]]:
    """Degradations of single heads and sets, together against alone, by timestep, in curves and by degrees."""
    discover, confirm = Losses(study, "discover"), Losses(study, "confirm")
    steps = np.unique(raw(study, "confirm", "ablations")["timestep"]).tolist()
    effects, at_timesteps, joint, curves, doses, ranking, ranking_at = ({} for _ in range(7))
    for head, edit, group, split, fill in confirm.cells:
        if FOLD.fullmatch(fill):
            continue
        found = confirm.damage({(head, edit): 1.0}, group, split, fill)
        one = (head, edit, group, "discover", fill)
        before = discover.damage({(head, edit): 1.0}, *one[2:])["value"] if one in discover.cells else np.nan
        kept = ("value", "absolute", "standard_error", "fill_error", "fill_bias")
        key = group, fill, str(head), edit
        effects[key] = {name: found[name] for name in kept} | {"discover": before}
        if fill == "mean":
            columns = zip(steps, found["at"], found["error_at"], found["fill_error_at"], strict=True)
            for step, value, error, of_fill in columns:
                at_timesteps[texts((*key, step))] = {"value": value, "standard_error": error, "fill_error": of_fill}
    for losses in (discover, confirm):
        for head, edit, group, split, fill in losses.cells:
            singles = {(True, f"{site} h{number}"): -1.0 for site, number in losses.sets.get(edit, ())}
            every = all((*one, group, split, fill) in losses.cells for one in singles)
            if head or fill != "mean" or not every:
                continue
            rest = losses.damage({(False, edit): 1.0, **singles}, group, split, fill)
            whole = losses.damage({(False, edit): 1.0}, group, split, fill)["value"]
            alone = losses.damage(dict.fromkeys(singles, 1.0), group, split, fill)["value"]
            numbers = {"heads": len(singles), "joint": whole, "sum": alone}
            joint[group, split, fill, edit] = numbers | {name: rest[name] for name in ("value", "fill_error")}
    for stage in sorted(path.name for path in study.glob("curves-*")):
        curve_points(Losses(study, stage), curves, doses)
    for head, edit, group, split, fill in discover.cells:
        if head:
            found = discover.damage({(head, edit): 1.0}, group, split, fill)
            site, _, number = edit.rpartition(" h")
            ranking[group, fill, site, number] = {name: found[name] for name in ("value", "absolute")}
            for step, value, error in zip(steps, found["at"], found["error_at"], strict=True):
                ranking_at[group, fill, site, number, str(step)] = {"value": value, "standard_error": error}
    return {
        "effects": (("group", "fill", "head?", "edit"), effects),
        "effects_timesteps": (("group", "fill", "head?", "edit", "timestep"), at_timesteps),
        "joint": (("group", "split", "fill", "edit"), joint),
        "curves": (("group", "order", "number", "count"), curves),
        "doses": (("group", "edit", "gate"), doses),
        "ablation_ranking": (("group", "fill", "site", "head"), ranking),
        "ablation_timesteps": (("group", "fill", "site", "head", "timestep"), ranking_at),
    }


def curve_points(losses: Losses, curves: Found, doses: Found) -> None:
    """Of one group's stage; the random orders' mean is number 0."""
    random = defaultdict(dict)
    kept = ("value", "standard_error")
    for head, edit, group, split, fill in losses.cells:
        found = losses.damage({(head, edit): 1.0}, group, split, fill)
        ordered, shuffled = re.fullmatch(r"(most|least) (\d+)", edit), re.fullmatch(r"random (\d+): (\d+)", edit)
        dosed = re.fullmatch(r"(.+) at gate ([\d.]+)", edit)
        if ordered:
            key = group, f"{ordered[1]} important first", "0", ordered[2]
            curves[key] = {name: found[name] for name in kept}
        elif shuffled:
            curves[group, "random order", *shuffled.groups()] = {name: found[name] for name in kept}
            random[group, split, fill, shuffled[2]][head, edit] = 1.0
        elif dosed:
            doses[group, dosed[1], str(float(dosed[2]))] = {name: found[name] for name in kept}
    for (group, split, fill, count), edits in random.items():
        mean = losses.damage({edit: 1 / len(edits) for edit in edits}, group, split, fill)
        curves[group, "random order", "0", count] = {name: mean[name] for name in kept}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
