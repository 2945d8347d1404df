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
from headscope.demonstration.stages import carriers_name, control_of
from headscope.report.naming import Names
from headscope.study.ablation import per_group_and_fill, ranked_heads
from headscope.study.inference import degradations
from headscope.sweep import HeadSet, SweepConfig, run_sweep
from headscope.sweep.plan.config import IN_MEMORY
from headscope.zoo import MODELS, load_pipeline
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
    reference_items: int | None = None,
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
        reference_items: training items of each group that the mean fill is taken over; None takes all.

    Returns:
        What heads.json holds.

    Raises:
        ValueError: the folder holds no exported model.
    """
    folder, work = local_path("folder", folder), local_path("work", work)
    pipeline = load_pipeline(folder)
    part = "transformer" if hasattr(pipeline, "transformer") else "unet"
    groups = tuple(groups) or next(model.groups for model in MODELS.values() if model.part == part)
    ties = {group: control for group in groups if (control := control_of(group)) in groups}
    show: dict[str, Any] = {"progress": progress, "console": console, "pipeline": pipeline}

    everything = HeadSet(_ALL, sites=("*",))
    base = SweepConfig(model=IN_MEMORY, groups=groups, splits=("discover",), items=items, bands=bands, observe=False)
    base = replace(base, fills=("mean",), sets=(everything,), reference_items=reference_items)
    found = run_sweep(base, work / "discover", title="every head removed", **show)
    ablations = table_in_memory(found, "ablations")
    discover = _effects(ablations)
    singles = {group: _singles(discover, group) for group in groups}
    largest = {group: ranked_heads(ablations, group)[:_CHOSEN] for group in groups}
    carrying = {group: ranked_heads(ablations, group, beyond=control)[:_CHOSEN] for group, control in ties.items()}
    heads = tuple(
        dict.fromkeys(head for chosen in (largest, carrying) for several in chosen.values() for head in several)
    )
    sets = (everything, *(HeadSet(carriers_name(group), heads=tuple(chosen)) for group, chosen in carrying.items()))
    base = replace(base, splits=("confirm",), heads=heads, sets=sets)
    found = run_sweep(base, work / "confirm", title="chosen heads removed", **show)
    of_sets = table_in_memory(found, "set_ablations")
    confirm, together = _effects(table_in_memory(found, "ablations")), _effects(of_sets)
    attended = {}
    if ties:
        tied = tuple(group for pair in ties.items() for group in pair)
        nothing = {"heads": None, "sets": (), "fills": (), "scores": (), "reference_items": None}
        base = replace(base, groups=tied, kinds=("regions",), **nothing)
        regions = run_sweep(base, work / "regions", title="where tied parts attend", **show)
        attended = _counterparts(table_in_memory(regions, "regions"))

    def described(head: tuple[str, int], *of: str) -> dict[str, Any]:
        return {"site": head[0], "head": head[1], **{group: _estimate(confirm, group, head) for group in of}}

    sites = [site["name"] for site in found.manifest["sites"]]
    summary = {
        "items_per_split": items,
        "timesteps": found.manifest["timesteps"],
        "clean_loss": _clean_losses(of_sets),
        "all_heads": {group: _estimate(together, group, _ALL) for group in groups},
        "single_heads_discover": {
            group: {f"{site} {head}": effect for (site, head), effect in singles[group].items()} for group in groups
        },
        "largest": {group: [described(head, group) for head in largest[group]] for group in groups},
        "ties": [
            {
                "tied": group,
                "control": control,
                "heads": [described(head, group, control) for head in carrying[group]],
                "together": {name: _estimate(together, name, carriers_name(group)) for name in (group, control)},
            }
            for group, control in ties.items()
        ],
        "counterparts": attended,
    }
    write_atomic(folder / "heads.json", json.dumps(summary, indent=1).encode())
    _picture(summary, sites, groups, folder / "heads.png")
    card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    written = card.partition(_MARK)[0].rstrip("\n") + "\n" + _MARK + _section(summary, sites, groups)
    write_atomic(folder / "MODEL_CARD.md", written.encode())
    return summary


def _effects(ablations: pl.DataFrame) -> pl.DataFrame:
    """Of each group and head or set ("edit"): the relative degradation, with its interval by source; at every timestep,
    and (timestep null) overall, their mean."""
    single = pl.format("{} {}", "site", "head") if "head" in ablations.columns else pl.col("edit")
    rows = ablations.with_columns(single.alias("edit"))
    overall = per_group_and_fill(rows, lambda part: degradations(part, ["edit"], "timestep", test=False)[0])
    each = per_group_and_fill(rows, lambda part: degradations(part, ["edit", "timestep"], test=False)[0])
    return pl.concat([overall.with_columns(timestep=pl.lit(None, each.schema["timestep"])), each], how="diagonal")


def _singles(effects: pl.DataFrame, group: str) -> dict[tuple[str, int], float]:
    """What each (site, head) costs a group overall."""
    rows = effects.filter((pl.col("group") == group) & pl.col("timestep").is_null())
    parted = ((*edit.rsplit(" ", 1), value) for edit, value in rows.select("edit", "value").iter_rows())
    return {(site, int(head)): value for site, head, value in parted}


def _estimate(effects: pl.DataFrame, group: str, edit: str | tuple[str, int]) -> dict[str, Any]:
    """A head's or set's effect on a group: overall, and at the least noisy timestep."""
    name = edit if isinstance(edit, str) else f"{edit[0]} {edit[1]}"
    rows = effects.filter((pl.col("group") == group) & (pl.col("edit") == name))
    overall, *each = rows.sort("timestep", nulls_last=False).iter_rows(named=True)

    def numbers(row: dict[str, Any]) -> dict[str, Any]:
        return {column: row[column] for column in ("value", "low", "high", "sources")}

    return {**numbers(overall), "least_noisy": numbers(each[0])}


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
        chosen = summary["largest"][group]
        cells = [f"{named[entry['site']]} h{entry['head']}: {_percent(entry[group])}" for entry in chosen]
        cells = [f"{loss:.4f}", _percent(summary["all_heads"][group]), *cells]
        lines.append(f"| {group} | {' | '.join(cells)} |")
    lines += ["", "![What removing each head costs on each group](heads.png)", ""]
    if summary["ties"]:
        first = summary["timesteps"][0]
        lines += [
            "The heads that carry a tie: the three whose removal costs a tied group most beyond what it costs its",
            "control, chosen on `discover` and measured on `confirm` of both (same number of items and timesteps):",
            f"overall, as above, and at timestep {first} alone, the least noisy. Mass, there: the attention of queries",
            "that have counterparts on the parts that hold these, tied / control, and in brackets what uniform",
            "attention would have.",
            "",
            f"| tied, control | head | tied | control | tied at {first} | control at {first} | mass |",
            "|---|---|---:|---:|---:|---:|---:|",
        ]
        for tie in summary["ties"]:
            names = tie["tied"], tie["control"]
            rows = [(f"{named[entry['site']]} h{entry['head']}", entry) for entry in tie["heads"]]
            for title, entry in (*rows, ("all three", tie["together"])):
                cells = [_percent(entry[name]) for name in names]
                cells += [_percent(entry[name]["least_noisy"]) for name in names]
                cells.append(_mass(summary["counterparts"], names, entry) if "site" in entry else "")
                lines.append(f"| {', '.join(names)} | {title} | {' | '.join(cells)} |")
        columns = list(map(str, summary["timesteps"]))
        lines += [
            "",
            "Clean loss on a tied group and on its control, by timestep:",
            "",
            f"| tied, control | {' | '.join(columns)} |",
            "|---|" + "---:|" * len(columns),
        ]
        for tie in summary["ties"]:
            group, control = tie["tied"], tie["control"]
            one, other = (summary["clean_loss"][name] for name in (group, control))
            cells = [f"{one[step]:.4f}, {other[step]:.4f} ({one[step] / other[step]:.2f})" for step in columns]
            lines.append(f"| {group}, {control} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _mass(found: dict[str, dict[str, list[float]]], names: Sequence[str], entry: dict[str, Any]) -> str:
    parts = [found[name][f"{entry['site']} {entry['head']}"] for name in names]
    return " / ".join(f"{mass:.2f} ({share:.2f})" for mass, share in parts)
