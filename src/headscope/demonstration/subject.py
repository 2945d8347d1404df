"""What the heads of an exported model do: every head removed in turn on every group, added to the model's card.

Heads are chosen on the discover split and measured on the confirm split, whose sources had no part in the choice.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
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
    items: int = 20,
    bands: int = 3,
    progress: bool = True,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure what removing heads costs, on every group the model was trained on, and add it to the model's card.

    Args:
        folder: an exported model (`headscope.zoo.card.export`); gains heads.json, heads.png and a section of
            MODEL_CARD.md, which replaces an earlier one.
        work: a directory for the sweeps; what is finished there isn't done again.
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
    groups = next(model.groups for model in MODELS.values() if model.part == part)
    show: dict[str, Any] = {"progress": progress, "console": console, "pipeline": pipeline}

    def config(split: str, heads: Sequence[tuple[str, int]] | None) -> SweepConfig:
        return SweepConfig(
            model="in memory",
            groups=groups,
            splits=(split,),
            items=items,
            bands=bands,
            observe=False,
            fills=("mean",),
            heads=None if heads is None else tuple(heads),
            sets=(HeadSet(_ALL, sites=("*",)),),
        )

    found = run_sweep(config("discover", None), work / "discover", title="every head removed", **show)
    discover = _effects(table_in_memory(found, "ablations"))
    chosen = {group: _largest(discover, group) for group in groups}
    heads = list(dict.fromkeys(head for several in chosen.values() for head in several))
    found = run_sweep(config("confirm", heads), work / "confirm", title="chosen heads removed", **show)
    confirm = _effects(table_in_memory(found, "ablations"))
    together = _effects(table_in_memory(found, "set_ablations"))
    clean = _clean_losses(table_in_memory(found, "set_ablations"))
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
    lines = [
        "",
        "Rise of the denoising loss when a head's output is replaced by its mean output over training images of the",
        "same group (mean fill), in percent of the loss, averaged over timesteps"
        f" {', '.join(map(str, summary['timesteps']))} (log-SNR 3 to -3);",
        f"{summary['items_per_split']} items of each split, one noise draw each; 95 % intervals by source. The three",
        "largest heads of each group were chosen on `discover`; the numbers are those of `confirm`.",
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
            "The heads chosen on a tied group, on it and on its control (same split, items and noise):",
            "",
            "| tied | head | on it | on its control | control over tied |",
            "|---|---|---:|---:|---:|",
        ]
        for group, control in ties:
            for entry in summary["chosen"][group]:
                ratio = entry[control]["value"] / entry[group]["value"]
                head = f"{named[entry['site']]} h{entry['head']}"
                cells = [_percent(entry[group]), _percent(entry[control]), f"{ratio:+.2f}"]
                lines.append(f"| {group}, {control} | {head} | {' | '.join(cells)} |")
        steps = list(map(str, summary["timesteps"]))
        lines += [
            "",
            "Clean loss on a tied group and on its control, by timestep:",
            "",
            f"| tied, control | {' | '.join(steps)} |",
            "|---|" + "---:|" * len(steps),
        ]
        for group, control in ties:
            one, other = (summary["clean_loss"][name] for name in (group, control))
            cells = [f"{one[step]:.4f}, {other[step]:.4f} ({one[step] / other[step]:.2f})" for step in steps]
            lines.append(f"| {group}, {control} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _control(group: str) -> str:
    opened = open_group(group)
    return opened.control if isinstance(opened, Tied) else ""
