"""What the heads of an exported model do: every head removed in turn on every group, added to the model's card.

Heads are chosen on the discover split and measured on the confirm split, whose sources had no part in the choice.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console

from headscope._files import local_path, write_atomic
from headscope.demonstration.runs import table_in_memory
from headscope.report.naming import Names
from headscope.study.ablation import per_group_and_fill
from headscope.study.inference import degradations
from headscope.sweep import HeadSet, SweepConfig, run_sweep
from headscope.sweep.plan.config import IN_MEMORY
from headscope.zoo import MODELS, Tied, load_pipeline, open_group
from headscope.zoo.card_pictures import heat_map

__all__ = ["describe_heads"]

_MARK = "\n## What its heads do\n"
_ALL = "all heads"
_CHOSEN = 3


def describe_heads(
    folder: str | Path,
    work: str | Path,
    *,
    groups: Sequence[str] = (),
    items: int = 20,
    bands: int = 3,
    progress: bool = True,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure what removing heads costs, and where they attend on tied groups, and add it to the model's card.

    Args:
        folder: an exported model (`headscope.zoo.card.export`); gains heads.json, heads.png and a section of
            MODEL_CARD.md, which replaces an earlier one.
        work: a directory for the sweeps; what is finished there isn't done again.
        groups: the groups to measure on; none given are those that the model was trained on.
        items: items of each group and split.
        bands: timesteps, evenly spaced in log-SNR from 3 to -3.

    Returns:
        What heads.json holds.

    Raises:
        ValueError: the folder holds no exported model.
    """
    folder, work = local_path("folder", folder), local_path("work", work)
    pipeline = load_pipeline(folder)
    part = "transformer" if hasattr(pipeline, "transformer") else "unet"
    groups = tuple(groups) or next(model.groups for model in MODELS.values() if model.part == part)
    show: dict[str, Any] = {"progress": progress, "console": console, "pipeline": pipeline}

    ties = [(group, control) for group in groups if (control := _control(group)) in groups]
    base = SweepConfig(model=IN_MEMORY, groups=groups, splits=("discover",), items=items, bands=bands, observe=False)
    base = replace(base, fills=("mean",), sets=(HeadSet(_ALL, sites=("*",)),))
    found = run_sweep(base, work / "discover", title="every head removed", **show)
    discover = _effects(table_in_memory(found, "ablations"))
    chosen = {group: _largest(discover, group) for group in groups}
    heads = tuple(dict.fromkeys(head for several in chosen.values() for head in several))
    base = replace(base, splits=("confirm",), heads=heads)
    found = run_sweep(base, work / "confirm", title="chosen heads removed", **show)
    confirm = _effects(table_in_memory(found, "ablations"))
    together = _effects(table_in_memory(found, "set_ablations"))
    clean = _clean_losses(table_in_memory(found, "set_ablations"))
    attended: dict[str, dict[str, list[float]]] = {}
    if ties:
        tied = tuple(group for pair in ties for group in pair)
        base = replace(base, groups=tied, heads=None, sets=(), fills=(), scores=(), kinds=("regions",))
        regions = run_sweep(base, work / "regions", title="where tied parts attend", **show)
        attended = _counterparts(table_in_memory(regions, "regions"))
    sites = [site["name"] for site in found.manifest["sites"]]
    summary = {
        "items_per_split": items,
        "timesteps": found.manifest["timesteps"],
        "clean_loss": clean,
        "all_heads": {group: _estimate(together, group) for group in groups},
        "single_heads_discover": {
            group: {f"{site} {head}": value for site, head, value in _values(discover, group)} for group in groups
        },
        "chosen": {
            group: [
                {"site": site, "head": head, **{other: _estimate(confirm, other, site, head) for other in groups}}
                for site, head in chosen[group]
            ]
            for group in groups
        },
        "counterparts": attended,
    }
    write_atomic(folder / "heads.json", json.dumps(summary, indent=1).encode())
    _picture(summary, sites, groups, folder / "heads.png")
    card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    written = card.partition(_MARK)[0].rstrip("\n") + "\n" + _MARK + _section(summary, sites, groups)
    write_atomic(folder / "MODEL_CARD.md", written.encode())
    return summary


def _effects(ablations: pl.DataFrame) -> pl.DataFrame:
    """Of each group and head or set: the relative degradation over timesteps, with its interval by source."""
    by = ["site", "head"] if "head" in ablations.columns else ["edit"]
    return per_group_and_fill(ablations, lambda rows: degradations(rows, by, "timestep", test=False)[0])


def _largest(effects: pl.DataFrame, group: str) -> list[tuple[str, int]]:
    return [(site, head) for site, head, _ in _values(effects, group)[:_CHOSEN]]


def _values(effects: pl.DataFrame, group: str) -> list[tuple[str, int, float]]:
    """(site, head, degradation) of a group's heads, the largest first."""
    rows = effects.filter(pl.col("group") == group).sort(["value", "site", "head"], descending=[True, False, False])
    return [(site, int(head), value) for site, head, value in rows.select("site", "head", "value").iter_rows()]


def _estimate(effects: pl.DataFrame, group: str, site: str | None = None, head: int | None = None) -> dict[str, Any]:
    rows = effects.filter(pl.col("group") == group)
    if site is not None:
        rows = rows.filter((pl.col("site") == site) & (pl.col("head") == head))
    (row,) = rows.iter_rows(named=True)
    return {name: row[name] for name in ("value", "low", "high", "sources")}


def _clean_losses(ablations: pl.DataFrame) -> dict[str, dict[str, float]]:
    """The whole model's loss by group and timestep: means over items."""
    means = ablations.group_by("group", "timestep").agg(pl.col("clean").mean()).sort("group", "timestep")
    found: dict[str, dict[str, float]] = {}
    for group, timestep, loss in means.iter_rows():
        found.setdefault(group, {})[str(timestep)] = loss
    return found


def _counterparts(regions: pl.DataFrame) -> dict[str, dict[str, list[float]]]:
    """Of each group and head ("site head"): mass on the counterparts of a query's part and their share of the keys.

    At the first timestep, the least noisy one; means over queries with counterparts, then over items, a source each.
    """
    rows = regions.filter((pl.col("keys") == "counterparts") & pl.col("mass").is_not_null())
    rows = rows.filter(pl.col("timestep") == rows["timestep"].min())
    mean = [(pl.col(name) * pl.col("tokens")).sum() / pl.col("tokens").sum() for name in ("mass", "share")]
    table = (
        rows.group_by("group", "site", "head", "item")
        .agg(mean)
        .group_by("group", "site", "head")
        .agg(pl.col("mass", "share").mean())
    )
    found: dict[str, dict[str, list[float]]] = {}
    for group, site, head, mass, share in table.sort("group", "site", "head").iter_rows():
        found.setdefault(group, {})[f"{site} {head}"] = [mass, share]
    return found


def _percent(estimate: dict[str, Any]) -> str:
    value = f"{100 * estimate['value']:+.1f}"
    if estimate["low"] is None:
        return f"{value} [one source]"
    return f"{value} [{100 * estimate['low']:+.1f}, {100 * estimate['high']:+.1f}]"


def _picture(summary: dict[str, Any], sites: Sequence[str], groups: Sequence[str], file: Path) -> None:
    """Heads across, groups down: what removing each costs."""
    singles = summary["single_heads_discover"]
    heads = sorted({int(name.rpartition(" ")[2]) for name in next(iter(singles.values()))})
    columns = [f"{site} {head}" for site in sites for head in heads]
    values = np.array([[singles[group].get(name, np.nan) for name in columns] for group in groups])
    named = Names(list(sites), []).sites
    picture = heat_map(list(groups), [(named[site], len(heads)) for site in sites], values)
    write_atomic(file, lambda out: picture.save(out, format="PNG", optimize=True))


def _section(summary: dict[str, Any], sites: Sequence[str], groups: Sequence[str]) -> str:
    named = Names(list(sites), []).sites
    steps, count = ", ".join(map(str, summary["timesteps"])), summary["items_per_split"]
    lines = [
        "",
        "Rise of the denoising loss when a head's output is replaced by its mean output over training images of the",
        f"same group (mean fill), in percent of the loss, averaged over timesteps {steps} (log-SNR from 3 to -3);",
        f"{count} items of each split, one noise draw each; 95 % intervals by source. The three largest heads of each",
        "group were chosen on `discover`; the numbers are those of `confirm`.",
        "",
        "| group | clean loss | all heads together | largest | second | third |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for group in groups:
        loss = float(np.mean(list(summary["clean_loss"][group].values())))
        chosen = summary["chosen"][group]
        cells = [f"{named[entry['site']]} h{entry['head']}: {_percent(entry[group])}" for entry in chosen]
        cells = [f"{loss:.4f}", _percent(summary["all_heads"][group]), *cells]
        lines.append(f"| {group} | {' | '.join(cells)} |")
    lines += ["", "![What removing each head costs on each group](heads.png)", ""]
    ties = [(group, control) for group in groups if (control := _control(group)) in groups]
    if ties:
        lines += [
            "The heads chosen on a tied group, on it and on its control (same split, number of items and timesteps).",
            f"Mass, at timestep {summary['timesteps'][0]}: the attention of queries that have counterparts on the parts"
            " that hold these,",
            "and in brackets the share of keys there, which is what uniform attention would have:",
            "",
            "| tied, control | head | on the tied | on the control | control over tied | mass, tied | mass, control |",
            "|---|---|---:|---:|---:|---:|---:|",
        ]
        for group, control in ties:
            for entry in summary["chosen"][group]:
                ratio = entry[control]["value"] / entry[group]["value"]
                head = f"{named[entry['site']]} h{entry['head']}"
                cells = [_percent(entry[group]), _percent(entry[control]), f"{ratio:+.2f}"]
                for name in (group, control):
                    mass, share = summary["counterparts"][name][f"{entry['site']} {entry['head']}"]
                    cells.append(f"{mass:.2f} ({share:.2f})")
                lines.append(f"| {group}, {control} | {head} | {' | '.join(cells)} |")
        columns = list(map(str, summary["timesteps"]))
        lines += [
            "",
            "Clean loss on a tied group and on its control, by timestep:",
            "",
            f"| tied, control | {' | '.join(columns)} |",
            "|---|" + "---:|" * len(columns),
        ]
        for group, control in ties:
            one, other = (summary["clean_loss"][name] for name in (group, control))
            cells = [f"{one[step]:.4f}, {other[step]:.4f} ({one[step] / other[step]:.2f})" for step in columns]
            lines.append(f"| {group}, {control} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _control(group: str) -> str:
    opened = open_group(group)
    return opened.control if isinstance(opened, Tied) else ""
