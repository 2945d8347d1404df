"""The tables of roles and circuits computed a second time, by other code: a part of recompute_study.py.

Numpy does the sums, as the definitions in docs/study.md say them: the excess of every head on every feature and on
counterparts, what removing a role's heads costs inside and outside of its pixels, faithfulness, minimality,
completeness, edges. Which features are kept, and which sets were chosen, is taken from the tables and manifests.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Key = tuple[str, ...]
Found = dict[Key, dict[str, float]]


def rows_of(study: Path, stage: str, kind: str) -> list[dict]:
    """All rows of a kind of a stage."""
    files = sorted((study / stage / kind).glob("*.parquet"))
    return pa.concat_tables([pq.read_table(file) for file in files], promote_options="permissive").to_pylist()


def written(study: Path, name: str) -> list[dict[str, str]]:
    """The rows of a table of the study; none where there is no such table."""
    path = study / "tables" / f"{name}.csv"
    return list(csv.DictReader(path.open(encoding="utf-8"))) if path.is_file() else []


def spread(values: np.ndarray) -> float:
    return values.std(ddof=1) / np.sqrt(len(values))


def mean_by(rows: list[dict], keys: Key, value: str) -> dict[tuple, np.ndarray]:
    """The means of a column, numbers or lists, over the rows of equal keys."""
    found: dict[tuple, list] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(np.asarray(row[value], np.float64))
    return {key: np.mean(numbers, axis=0) for key, numbers in found.items()}


def roles(study: Path) -> dict[str, tuple[Key, Found]]:
    """Excess of heads on features and counterparts, from the stages roles and ties."""
    features = written(study, "roles_features")
    kept = {(row["group"], row["split"], row["feature"]) for row in features if row["kept"] == "true"}
    excess: Found = {}
    for stage in ("roles", "ties"):
        if not (study / stage / "key_mass").is_dir():
            continue
        looks = [row for row in rows_of(study, stage, "key_mass") if not row["translated"]]
        mass = mean_by(looks, ("group", "split", "site", "head", "source_id"), "key_mass")
        shown = mean_by(rows_of(study, stage, "features"), ("group", "split", "feature", "source_id"), "map")
        for group, split in sorted({key[:2] for key in mass}):
            sources = sorted({key[4] for key in mass if key[:2] == (group, split)})
            names = [name for name in sorted({key[2] for key in shown}) if (group, split, name) in kept]
            maps = residual(np.array([[shown[group, split, name, source] for name in names] for source in sources]))
            for site, head in sorted({key[2:4] for key in mass if key[:2] == (group, split)}):
                given = np.array([mass[group, split, site, head, source] for source in sources])
                for number, name in enumerate(names):
                    excess[group, split, site, str(head), name] = over_others(given @ maps[:, number].T)
        if (study / stage / "counterparts").is_dir():
            excess |= on_counterparts(rows_of(study, stage, "counterparts"))
    found = {"roles_excess": (("group", "split", "site", "head", "feature"), excess)} if excess else {}
    # a tied group against its control: Welch's error
    ties: Found = {}
    for row in written(study, "roles_ties"):
        sides = [excess[side, row["split"], row["site"], row["head"], "counterpart"]
                 for side in (row["group"], row["control"])]  # fmt: skip
        numbers = {"value": sides[0]["value"] - sides[1]["value"], "tied": sides[0]["value"]}
        numbers |= {
            "control_value": sides[1]["value"],
            "standard_error": np.hypot(*(one["standard_error"] for one in sides)),
        }
        ties[row["group"], row["split"], row["site"], row["head"]] = numbers
    return found | ({"roles_ties": (("group", "split", "site", "head"), ties)} if ties else {})


def residual(raw: np.ndarray) -> np.ndarray:
    """What neither position nor the other features say of maps [sources, features, tokens], in standard deviations."""
    centred = raw - raw.mean(axis=2, keepdims=True)
    there = (centred**2).mean(axis=2) > 1e-10 * np.maximum((raw**2).mean(axis=2), 1e-10)
    placed = np.zeros_like(centred)
    for feature in range(raw.shape[1]):
        has = there[:, feature]
        placed[has, feature] = centred[has, feature] - centred[has, feature].mean(axis=0)
    found = np.zeros_like(placed)
    for feature in range(raw.shape[1]):
        has = there[:, feature]
        others = np.delete(placed[has], feature, axis=1)
        design = np.moveaxis(others, 1, 2).reshape(-1, others.shape[1])
        aim = placed[has, feature]
        slopes = np.linalg.lstsq(design, aim.ravel(), rcond=None)[0]
        rest = aim - (design @ slopes).reshape(aim.shape)
        rest -= rest.mean(axis=0)
        # an excess is one per source that has the feature
        found[has, feature] = rest / np.sqrt((rest**2).mean()) * len(raw) / has.sum()
    return found


def over_others(table: np.ndarray) -> dict[str, float]:
    """The mean of a table's diagonal over that of its other places, and its error, [sources, sources]."""
    count = len(table)
    others = (table.sum() - np.trace(table)) / (count * (count - 1))
    parts = count / (count - 1) * (np.diag(table) - table.mean(0) - table.mean(1) + table.mean())
    return {"value": np.trace(table) / count - others, "standard_error": spread(parts)}


def on_counterparts(rows: list[dict]) -> Found:
    """The attention on counterparts beyond what other items' would get."""
    found: Found = {}
    cells = mean_by(rows, ("group", "split", "site", "head", "source_id", "donor_source"), "mass")
    tables: dict[tuple, dict[tuple[str, str], float]] = {}
    for (*head, source, donor), value in cells.items():
        tables.setdefault(tuple(head), {})[source, donor] = float(value)
    for (group, split, site, head), table in tables.items():
        donors = [source for source, donor in table if source != donor]
        pairs = sorted(pair for pair in table if pair[0] in donors)
        own = np.array([source == donor for source, donor in pairs])
        # an effect of the source and one of whose counterparts they are come off, by least squares
        sides = [sorted({pair[side] for pair in pairs}) for side in (0, 1)]
        effects = np.array([[float(pair[side] == name) for side in (0, 1) for name in sides[side]] for pair in pairs])
        hat = effects @ np.linalg.pinv(effects)
        both = np.array([[table[pair] for pair in pairs], own]).T
        rest = both - hat @ both
        left = rest[own, 1].mean()
        # residuals of one spread, whatever their leverage
        parts = rest[own, 0] / np.sqrt((1 - np.diag(hat)[own]) * left)
        numbers = {"value": rest[own, 0].mean() / left, "standard_error": spread(parts)}
        found[group, split, site, str(head), "counterpart"] = numbers
    return found


def causal(study: Path) -> dict[str, tuple[Key, Found]]:
    """What removing a role's heads adds to the error inside and outside of the role's pixels."""
    found: Found = {}
    rows = written(study, "roles_causal")
    sets = [(row["group"], row["set"], row["feature"].replace(" ", "_")) for row in rows]
    stages = {group: rows_of(study, f"causal-{group}", "set_ablations") for group in {group for group, *_ in sets}}
    for group, name, feature in sets:
        parts = []
        for row in stages[group]:
            share = row[f"share_on_{feature}"]
            if row["edit"] != name or not 0 < share < 1:
                continue
            errors = [row[f"{kind}_on_{feature}"] for kind in ("clean", "edited")]
            outside = [
                (row[kind] - share * error) / (1 - share)
                for kind, error in zip(("clean", "edited"), errors, strict=True)
            ]
            parts.append({**row, "in": errors[1] - errors[0], "was_in": errors[0]})
            parts[-1] |= {"out": outside[1] - outside[0], "was_out": outside[0]}
        if not parts:
            found[group, name] = dict.fromkeys(("inside", "outside", "difference", "absolute"), np.nan)
            continue
        change_in, change_out, clean_in, clean_out = (
            by_source(parts, column) for column in ("in", "out", "was_in", "was_out")
        )
        inside, more_inside = relative(change_in, clean_in)
        outside, more_outside = relative(change_out, clean_out)
        found[group, name] = {
            "inside": inside,
            "outside": outside,
            "difference": inside - outside,
            "standard_error": spread(more_inside - more_outside),
            "absolute": (change_in - change_out).mean(),
        }
    return {"roles_causal": (("group", "set"), found)} if found else {}


def relative(change: np.ndarray, clean: np.ndarray) -> tuple[float, np.ndarray]:
    """The relative degradation, mean over timesteps; and what every source adds to it, to first order, [sources]."""
    at = change.mean(0) / clean.mean(0)
    return at.mean(), ((change - at * clean) / clean.mean(0)).mean(axis=1)


def by_source(rows: list[dict], value: str) -> np.ndarray:
    """[sources, timesteps]: means over a source's draws and items."""
    cells = mean_by(rows, ("source_id", "timestep"), value)
    sources, steps = (sorted({key[place] for key in cells}) for place in (0, 1))
    return np.array([[cells[source, step] for step in steps] for source in sources])


def circuits(study: Path) -> dict[str, tuple[Key, Found]]:
    """How faithful sets are, what heads and parts they can't do without, and what edges carry."""
    faithful, needed, complete, edges = {}, {}, {}, {}
    for folder in sorted(study.glob("circuit-*")):
        if not (folder / "set_ablations").is_dir():
            continue
        group = folder.name.removeprefix("circuit-")
        rows = [row | {"change": row["edited"] - row["clean"]} for row in rows_of(study, folder.name, "set_ablations")]
        edits = {name: [row for row in rows if row["edit"] == name] for name in {row["edit"] for row in rows}}
        changes = {name: by_source(part, "change") for name, part in edits.items()}
        # where all heads don't clearly cost anything, by either measure, nothing is said of a part of them
        known = [row for row in written(study, "circuits_faithfulness") if row["group"] == group]
        stated = {row["metric"] for row in known if row["value"]}
        refused = "loss" not in stated
        clean = by_source(rows, "clean")
        heads = {one["name"]: {tuple(head) for head in one["heads"]} for one in _sets(folder)}

        def share(change: np.ndarray, clean=clean, whole=changes["every head"], refused=refused) -> dict[str, float]:
            """By what all heads cost: the ratio of means over timesteps of ratios of means, and its error."""
            if refused:
                return {"value": np.nan, "standard_error": np.nan}
            cost, every = ((part.mean(0) / clean.mean(0)) for part in (change, whole))
            value = cost.mean() / every.mean()
            parts = (change - value * whole - (cost - value * every) * clean) / clean.mean(0)
            return {"value": value, "standard_error": spread(parts.mean(1) / every.mean())}

        def left(name: str, changes=changes, share=share) -> dict[str, float]:
            found = share(changes[name])
            return {"value": 1 - found["value"], "standard_error": found["standard_error"]}

        circuit, kept = f"the circuit of {group}", {}
        for name in changes:
            if name == f"all but {circuit}":
                kept[name] = "the circuit"
            elif name == circuit:
                kept[name] = "all but the circuit"
                complete[group, "the circuit", "faithfulness"] = left(name)
            elif name.startswith("all but greedy "):
                kept[name] = f"greedy, {name.split()[3]} heads"
            elif name.startswith(f"all but {circuit} without "):
                label = name.removeprefix(f"all but {circuit} without ")
                drop = changes[name] - changes[f"all but {circuit}"]
                whole = f"{label} of {circuit}"
                if " h" in label:
                    site, _, head = label.rpartition(" h")
                    needed[group, site, head] = share(drop)
                part = sorted(heads[whole], key=lambda one: (_depth(folder, one[0]), one[1]))
                said = ", ".join(f"{site} h{head}" for site, head in part)
                complete[group, said, "circuit − model"] = share(changes[whole] - changes[name])
        for metric, column in (("loss", "change"), ("prediction", "distance")):
            if column not in rows[0]:
                continue
            whole = by_source(edits["every head"], column)
            for name, said in kept.items():
                found = share(by_source(edits[name], column), whole=whole, refused=metric not in stated)
                faithful[group, said, metric] = found | {"value": 1 - found["value"]}
        if (folder / "paths").is_dir():
            columns = ("sender_site", "sender_head", "receiver_site", "receiver_head", "part")
            patched: dict[tuple, list[dict]] = {}
            for row in rows_of(study, folder.name, "paths"):
                key = tuple("" if row[name] is None else str(row[name]) for name in columns)
                patched.setdefault(key, []).append(row | {"change": row["edited"] - row["clean"]})
            for key, part in patched.items():
                change, before = by_source(part, "change"), by_source(part, "clean")
                at = change.mean(0) / before.mean(0)
                error = spread(((change - at * before) / before.mean(0)).mean(1))
                edges[(group, *key)] = {"value": at.mean(), "standard_error": error}
    found = {
        "circuits_faithfulness": (("group", "set", "metric"), faithful),
        "circuits_minimality": (("group", "site", "head"), needed),
        "circuits_completeness": (("group", "set", "measure"), complete),
        "circuits_edges": (
            ("group", "sender_site", "sender_head", "receiver_site", "receiver_head", "part"),
            edges,
        ),
    }
    return {name: parts for name, parts in found.items() if parts[1]}


def _sets(folder: Path) -> list[dict]:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["config"]["sets"]


def _depth(folder: Path, site: str) -> int:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return [one["name"] for one in manifest["sites"]].index(site)
