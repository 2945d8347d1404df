"""One self-contained HTML page: no request leaves it, and it reads the same in ten years."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import polars as pl
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from headscope._files import local_path, write_atomic
from headscope.report import figures, findings, tables
from headscope.report.caveats import STUDY_CAVEATS, caveats_of
from headscope.report.images import sheet
from headscope.report.naming import Names, listed
from headscope.report.panels import Figure, View
from headscope.study import ablation, entropy, inference
from headscope.study.ablation import headline_fill
from headscope.study.analysis import StudyResult, analyse_sweep

STUDY_SUMMARY = "A small model on small data: it shows what can be measured and how, not what is true of large models."
SWEEP_SUMMARY = "What a sweep measured, without a selection and a separate test: every ranking here is exploratory."


@dataclass(frozen=True)
class GroupInfo:
    """An image group, for the page.

    Attributes:
        images: uint8 [n, height, width, 3], a sample; may be empty.
        sources: how many sources were used, by split. Empty: as counted in the tables.
    """

    name: str
    description: str
    images: np.ndarray
    sources: dict[str, int] = field(default_factory=dict)


def write_report(
    path: str | Path,
    *,
    title: str,
    run_info: dict[str, Any],
    groups: Sequence[GroupInfo],
    result: StudyResult,
    label: str = "Demonstration",
    summary: str = STUDY_SUMMARY,
    caveats: Sequence[str] = STUDY_CAVEATS,
) -> Path:
    """Write a study's report: one HTML file, with Plotly inside, that opens without a network.

    run_info: what was run, in the order to show it (model, versions, device, date, duration, settings); values may be
    lists and dictionaries. groups: in the order to show them; the tables' other groups come after. label: stands above
    the title. summary: the sentence below it. caveats: stand before those that follow from the tables. Returns
    the path.
    """
    path = local_path("path", path)
    shown = [info.name for info in groups]
    names = Names(result.sites, [*shown, *(group for group in result.groups if group not in shown)])
    order = [*(group for group in shown if group in result.groups), *(g for g in result.groups if g not in shown)]
    page = _environment().get_template("template.html")
    text = page.render(
        title=title,
        label=label,
        summary=summary,
        tiles=findings.tiles(result, names),
        findings=findings.findings(result, names),
        run=[(name, listed(value)) for name, value in run_info.items()],
        groups=[_group_card(info, result) for info in groups],
        result=result,
        figures=_figures(result, names, order),
        tables=_tables(result, names, order),
        further=[(score.title, score.definition, tables.further_table(score, names)) for score in result.further],
        caveats=[*caveats, *caveats_of(result)],
        words=_words(),
        example=_example(result, names),
        fill=_fill(result),
        fills=ablation.FILLS,
        drawn="" if result.generation_ranking is None else headline_fill(result.generation_ranking),
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
    )
    write_atomic(path, text.encode())
    return path


# the tables with a section of their own
SECTIONS = ("observations", "ablations", "generations")


def write_sweep_report(
    path: str | Path,
    *,
    title: str,
    run_info: dict[str, Any],
    groups: Sequence[GroupInfo] = (),
    observations: pl.DataFrame | None = None,
    ablations: pl.DataFrame | None = None,
    generations: pl.DataFrame | None = None,
    others: Mapping[str, pl.DataFrame] | None = None,
    sites: Sequence[str] = (),
    seed: int = 0,
    label: str = "Sweep",
    summary: str = SWEEP_SUMMARY,
    caveats: Sequence[str] = (),
) -> Path:
    """Write the report of a plain sweep, from whichever of its tables there are. Otherwise as `write_report`.

    others: its further tables, by kind. sites: the model's, in the order of execution.
    """
    result = analyse_sweep(observations, ablations, generations, others=others, sites=sites, seed=seed)
    return write_report(
        path,
        title=title,
        run_info=run_info,
        groups=groups,
        result=result,
        label=label,
        summary=summary,
        caveats=caveats,
    )


def _environment() -> jinja2.Environment:
    folder = files("headscope.report")

    def load(name: str) -> str | None:
        resource = folder / name
        return resource.read_text(encoding="utf-8") if resource.is_file() else None

    return jinja2.Environment(
        loader=jinja2.FunctionLoader(load),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _figures(result: StudyResult, names: Names, groups: Sequence[str]) -> dict[str, Markup]:
    """Every figure there are numbers for, as JSON that is safe inside a script element."""
    found: dict[str, Sequence[View] | Figure | None] = {}
    if result.entropy_heads is not None and result.entropy_groups is not None:
        observed = sorted(result.entropy_heads["timestep"].drop_nulls().unique().to_list())
        found["entropy_groups"] = figures.entropy_by_timestep(result.entropy_groups, names, groups)
        found["entropy_maps"] = figures.entropy_maps(result.entropy_heads, names, groups, observed)
    if result.contrast:
        found["contrast"] = figures.contrast_by_timestep(result.contrast)
        found["contrast_heads"] = figures.contrast_by_head(result.contrast, names)
    fill = _fill(result)
    if result.ablation_ranking is not None and result.ablation_timesteps is not None:
        ablated = sorted(result.ablation_timesteps["timestep"].unique().to_list())
        found["ranking"] = figures.degradation_ranking(result.ablation_ranking, names, groups, fill)
        found["degradation_maps"] = figures.degradation_maps(result.ablation_timesteps, names, groups, ablated, fill)
    if result.ablation_confirm is not None:
        found["confirm"] = figures.degradation_confirmed(result.ablation_confirm, names, groups, fill)
    if result.generation_ranking is not None:
        drawn = headline_fill(result.generation_ranking)
        found["distances"] = figures.distance_ranking(result.generation_ranking, names, groups, drawn)
    return {name: _json(figure) for name, figure in found.items() if figure}


def _json(figure: Sequence[View] | Figure) -> Markup:
    views = [View("", figure)] if isinstance(figure, dict) else figure
    text = json.dumps([{"label": view.label, **view.figure} for view in views], allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _tables(result: StudyResult, names: Names, groups: Sequence[str]) -> dict[str, tables.Table]:
    found = {"sites": tables.sites_table(result, names)}
    if result.contrast:
        found["contrast"] = tables.contrast_table(result.contrast)
        found["contrast_heads"] = tables.contrast_heads_table(result.contrast, names)
    if result.entropy_heads is not None:
        present = set(result.entropy_heads["group"])
        found["entropy"] = tables.entropy_table(result.entropy_heads, names, [g for g in groups if g in present])
    if result.ablation_confirm is not None:
        found["confirm"] = tables.confirm_table(result.ablation_confirm, names)
    if result.ablation_ranking is not None:
        found["ranking"] = tables.ranking_table(result.ablation_ranking, names)
    if result.generation_ranking is not None:
        found["distances"] = tables.distance_table(result.generation_ranking, names)
    return found


def _fill(result: StudyResult) -> str:
    for table in (result.ablation_ranking, result.ablation_confirm, result.generation_ranking):
        if table is not None:
            return headline_fill(table)
    return ablation.HEADLINE_FILL


def _example(result: StudyResult, names: Names) -> tuple[str, int, str] | None:
    """A head's label, number and site, to explain labels by."""
    for table in (result.ablation_confirm, result.ablation_ranking, result.entropy_heads, result.generation_ranking):
        if table is not None and len(table):
            site, head = table.select("site", "head").row(0)
            return names.head(site, head), head, site
    return None


def _group_card(info: GroupInfo, result: StudyResult) -> dict[str, Any]:
    counts = result.sources.filter(pl.col("group") == info.name)
    sources = info.sources or dict(counts.select("split", "sources").sort("split", descending=True).iter_rows())
    card: dict[str, Any] = {"name": info.name, "description": info.description, "sources": sources, "sheet": None}
    if len(info.images):
        uri, width, height = sheet(info.images)
        card |= {"sheet": uri, "width": width, "height": height, "shown": min(len(info.images), 20)}
    return card


def _words() -> dict[str, Any]:
    """The definitions, as the analysis code states them."""
    return {
        "mean": inference.MEAN,
        "difference": inference.DIFFERENCE,
        "ratio": inference.RATIO,
        "relative": inference.RELATIVE.format(of="loss"),
        "absolute": inference.ABSOLUTE.format(of="loss"),
        "effect_test": inference.EFFECT_TEST,
        "difference_test": inference.DIFFERENCE_TEST,
        "interval": inference.INTERVAL,
        "void": inference.VOID,
        "holm": inference.HOLM,
        "fewest": inference.FEWEST_SOURCES,
        "resamples": inference.settings.RESAMPLES,
        "measures": entropy.MEASURES,
        "pooled": entropy.POOLED,
        "selection": entropy.SELECTION,
        "family": ablation.FAMILY,
        "distance": ablation.DISTANCE,
    }
