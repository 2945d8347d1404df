"""One self-contained HTML page: no request leaves it, and it reads the same in ten years."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from headscope._files import local_path
from headscope.report.caveats import STUDY_CAVEATS, caveats_of
from headscope.report.images import sheet
from headscope.report.lead import lead_of
from headscope.report.naming import Names, listed
from headscope.report.rendering import write_page
from headscope.report.sections import sections_of
from headscope.report.sections.circuits import pictures
from headscope.report.sections.drawn import Drawn, drawn_section
from headscope.report.sites import sites_table
from headscope.study import inference
from headscope.study.analysis import StudyResult, analyse_sweep
from headscope.study.edits import Edited

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
    drawn: Sequence[Drawn] = (),
) -> Path:
    """Write a study's report: one HTML file, with Plotly inside, that opens without a network.

    run_info: what was run, in the order to show it (model, versions, device, date, duration, settings); values may be
    lists and dictionaries. groups: in the order to show them; the tables' other groups come after. label: stands above
    the title. summary: the sentence below it. caveats: stand before those that follow from the tables.
    drawn: images to show side by side. Returns the path.
    """
    path = local_path("path", path)
    names, order = _named(groups, result)
    lead = lead_of(result, names)
    return write_page(
        path,
        "page.html",
        title=title,
        label=label,
        summary=summary,
        tiles=lead.tiles,
        findings=lead.sentences,
        run=[(name, listed(value)) for name, value in run_info.items()],
        groups=[_group_card(info, result) for info in groups],
        unshown=result.unshown,
        sites=sites_table(result, names),
        sections=[*sections_of(result, names, order), *filter(None, [drawn_section(drawn)])],
        caveats=[*caveats, *caveats_of(result)],
        example=_example(result, names),
        difference_test=inference.DIFFERENCE_TEST,
        holm=inference.HOLM,
    )


def pictures_of(result: StudyResult, groups: Sequence[GroupInfo]) -> dict[str, str]:
    """A study's pictures that files may hold: SVG texts by name, with the page's labels; groups: as the page has."""
    names, order = _named(groups, result)
    return {f"circuit-{group}": text for group, text in pictures(result, names, order).items()}


def _named(groups: Sequence[GroupInfo], result: StudyResult) -> tuple[Names, list[str]]:
    """The labels of sites and groups, and the tables' groups in the order to show them."""
    shown = [info.name for info in groups]
    others = [group for group in result.groups if group not in shown]
    return Names(result.sites, [*shown, *others]), [*(group for group in shown if group in result.groups), *others]


# the tables that are given by name; a run's others come together
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
    edits: Sequence[Edited] = (),
    sites: Sequence[str] = (),
    log_snr: Mapping[int, float] | None = None,
    seed: int = 0,
    label: str = "Sweep",
    summary: str = SWEEP_SUMMARY,
    caveats: Sequence[str] = (),
    drawn: Sequence[Drawn] = (),
) -> Path:
    """Write the report of a plain sweep, from whichever of its tables there are. Otherwise as `write_report`.

    others: its further tables, by kind. edits: what was edited (`study.edits.edits_of`). sites: the model's, in the
    order of execution. log_snr: of every timestep, nats.
    """
    result = analyse_sweep(
        observations, ablations, generations, others=others, edits=edits, sites=sites, log_snr=log_snr, seed=seed
    )
    return write_report(
        path,
        title=title,
        run_info=run_info,
        groups=groups,
        result=result,
        label=label,
        summary=summary,
        caveats=caveats,
        drawn=drawn,
    )


def _example(result: StudyResult, names: Names) -> tuple[str, int, str] | None:
    """A head's label, number and site, to explain labels by."""
    attributed = None if result.attributions is None else result.attributions.heads
    for table in (result.ablation_ranking, result.entropy_heads, attributed, result.generation_ranking):
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
