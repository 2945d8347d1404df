"""The page of a plain sweep, and what every page says of a run: its settings, groups, sample images and tables."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from headscope._files import is_utf8
from headscope._machine import memory_bytes
from headscope.counter import check_seed
from headscope.report.naming import listed
from headscope.report.page import SECTIONS, GroupInfo, write_sweep_report
from headscope.report.sections.drawn import Drawn
from headscope.study.analysis import LOOKED
from headscope.study.edits import Edited, edits_of
from headscope.study.further import of_edits
from headscope.study.noise import log_snr_of
from headscope.sweep import Run
from headscope.sweep.store.run import as_written
from headscope.sweep.store.sheet import contact_sheets
from headscope.zoo import MODELS, open_group

REPORT = "report.html"
# the edits of a set of heads that are shown where they were made
_EDITS = ("keep", "temperature", "key_bias", "key_scale")
# the parts of a manifest that reports read, and their types: see `_fits`
_READ_OF_MANIFESTS: dict[str, Any] = {
    "identity": {"model": str},
    "config": {
        "model": str,
        "dtype": str,
        "seed": int,
        "groups": [str],
        "sets": [{"name": str, "sites": [str], "heads": [(str, int)]}],
    },
    "sites": [{"name": str, "heads": int}],
    "groups": [{"name": str, "description": str, "items": object}],
    "device": str,
    "threads": object,
    "versions": dict,
    "created": str,
    "timesteps": list,
    "forwards": int,
}
# of each group, on the page
SHOWN_IMAGES = 20


def report_sweep(path: Path) -> Path:
    """Write report.html into a sweep's run directory, from whichever tables it has.

    Raises:
        ValueError: it isn't a run, has no finished unit, or its tables are damaged or of another shape.
    """
    run = Run.open(path)
    check_described(run)
    with as_written(run):
        tables = {kind: table_in_memory(run, kind) for kind in run.tables}
        if not tables:
            raise ValueError(f"run: {str(path)!r} has no finished unit yet, expected some results to report")
        return write_sweep_report(
            run.path / REPORT,
            title=f"Sweep of {_model_name(run.manifest)}",
            run_info=run_info(run.manifest),
            groups=group_infos(run.manifest),
            sites=sites_of(run),
            edits=edits_in(run),
            drawn=drawn_in(run),
            log_snr=log_snr_of(run.manifest),
            seed=run.manifest["config"]["seed"],
            others={kind: table for kind, table in tables.items() if kind not in SECTIONS},
            caveats=[*_unfinished(run), *_not_shown(tables)],
            **{kind: table for kind, table in tables.items() if kind in SECTIONS},
        )


def unfinished(run: Run) -> str:
    """The units that are done of each kind that lacks some, as in "ablations 3 of 12"; "" of a finished run."""
    units = run.status().units.items()
    return ", ".join(f"{kind} {done:,} of {every:,}" for kind, (done, every) in units if done < every)


def _unfinished(run: Run) -> list[str]:
    """The caveat of an unfinished run."""
    lacking = unfinished(run)
    return (
        [f"This run is not finished: every number here will change. Units that are done: {lacking}."] if lacking else []
    )


def _not_shown(tables: Mapping[str, pl.DataFrame]) -> list[str]:
    """The caveat of tables that the page says nothing of: those of no edits, but for observations and roles."""
    lacking = [kind for kind, table in tables.items() if kind not in SECTIONS and not of_edits(table)]
    looked = [tables[kind] for kind in LOOKED[:2] if kind in tables]
    if len(looked) == 2 and all({"discover", "confirm"} <= set(table["split"].unique()) for table in looked):
        lacking = [kind for kind in lacking if kind not in LOOKED]
    if not lacking:
        return []
    read = [said for said, kinds in _READ_BY.items() if set(kinds) & set(lacking)]
    said = f" ({'; '.join(read)})" if read else ""
    return [f"Tables of the run that this page doesn't show: {', '.join(lacking)}{said}."]


# what reads tables that a page of a sweep doesn't show
_READ_BY = {
    "headscope.study.roles.assess reads those of features and key_mass of both splits": LOOKED,
    "headscope.study.circuits reads those of circuits and paths": ("circuits", "paths"),
}


def check_described(run: Run) -> None:
    """Raise ValueError if a manifest, which may have been made elsewhere, lacks something that a report shows."""
    lacking = [name for name in _READ_OF_MANIFESTS if name not in run.manifest]
    if lacking:
        raise ValueError(f"run: the manifest of {str(run.path)!r} lacks {', '.join(lacking)}, which reports show")
    for name, shape in _READ_OF_MANIFESTS.items():
        if not _fits(run.manifest[name], shape):
            raise ValueError(
                f"run: the manifest of {str(run.path)!r} says something else of {name} than headscope writes, which"
                " reports show"
            )
    check_seed(run.manifest["config"]["seed"])


def _fits(value: Any, shape: Any) -> bool:
    """True if a JSON value has a shape.

    A shape is a type, a list of the shape of every entry, a tuple of one shape per entry, or a dictionary of the shapes
    of the keys that must be there.
    """
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(key in value and _fits(value[key], part) for key, part in shape.items())
    if isinstance(shape, tuple):
        return isinstance(value, list) and len(value) == len(shape) and all(map(_fits, value, shape))
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(entry, shape[0]) for entry in value)
    if shape is str and isinstance(value, str):
        # JSON can hold half characters (surrogates), which pages and tables can't
        return is_utf8(value)
    return isinstance(value, shape)


def run_info(manifest: dict[str, Any]) -> dict[str, Any]:
    """Model, device, versions and settings of a run, in the order to show them."""
    config = manifest["config"]
    heads = sum(site["heads"] for site in manifest["sites"])
    sets = {"Sets of heads": _sets(config["sets"])} if config["sets"] else {}
    return {
        "Model": f"{_model_name(manifest)}: {len(manifest['sites'])} attention sites, {heads} heads",
        "Model fingerprint": manifest["identity"]["model"][:16],
        "Device": f"{manifest['device']}, {manifest['threads']} threads, {config['dtype']}",
        "Versions": manifest["versions"],
        "Started": manifest["created"],
        "Noise replicate (seed)": config["seed"],
        "Timesteps": manifest["timesteps"],
        "Work": work_of(manifest),
        **sets,
    }


def _sets(sets: list[dict[str, Any]]) -> str:
    """Describe the sets of heads: sites and heads of each, and its edits."""
    described = []
    for chosen in sets:
        heads = [f"{site} h{head}" for site, head in chosen["heads"]]
        edits = [
            f"{name} {listed(value)}" for name, value in chosen.items() if name in _EDITS and value not in (None, [])
        ]
        described.append(f"{chosen['name']}: {', '.join([*chosen['sites'], *heads])} ({', '.join(edits) or 'removed'})")
    return "; ".join(described)


def group_infos(manifest: dict[str, Any]) -> list[GroupInfo]:
    """The run's groups, with sample images if the group can still be opened."""
    folders = dict(text.partition("=")[::2] for text in manifest["config"]["groups"])
    infos = []
    for group in manifest["groups"]:
        images = np.zeros((0, 1, 1, 3), np.uint8)
        if group["name"] in folders:
            # a folder may be gone by now, or hold an image that the sweep had no use for and that can't be read
            with contextlib.suppress(ValueError, OSError):
                opened = open_group(group["name"], folders[group["name"]] or None)
                indices = opened.indices("confirm")
                chosen = indices[:: max(1, len(indices) // SHOWN_IMAGES)][:SHOWN_IMAGES]
                images = np.stack([opened.item(index).image for index in chosen]) if chosen else images
        infos.append(GroupInfo(group["name"], group["description"], images))
    return infos


def sites_of(run: Run) -> list[str]:
    """The model's sites in the order of execution."""
    return [site["name"] for site in run.manifest["sites"]]


def drawn_in(run: Run) -> list[Drawn]:
    """The images that a run drew, to show side by side."""
    return [Drawn(f"noise of {one.group}, {one.fill} fill", one.rows) for one in contact_sheets(run)]


def edits_in(run: Run) -> list[Edited]:
    """What a run edits: every head by itself, and its sets."""
    sites = {site["name"]: int(site["heads"]) for site in run.manifest["sites"]}
    return edits_of(run.manifest["config"]["sets"], sites)


def _model_name(manifest: dict[str, Any]) -> str:
    model = manifest["config"]["model"]
    return f"{MODELS[model].title} (32 x 32 pixels)" if model in MODELS else Path(model).name


def work_of(manifest: dict[str, Any]) -> str:
    groups = ", ".join(f"{group['name']} {group['items']} items" for group in manifest["groups"])
    return f"{manifest['forwards']:,} forwards of one image; {groups}; timesteps {manifest['timesteps']}"


def table_in_memory(run: Run, kind: str) -> pl.DataFrame:
    """A whole table of a run, its labels as strings.

    Raises:
        ValueError: it doesn't fit in memory. A small file may hold any number of equal rows.
    """
    table = run.table(kind)
    rows = table.select(pl.len()).collect().item()
    # numbers take 8 bytes or less, texts 16 or more
    needed, there = 8 * rows * len(table.collect_schema()), memory_bytes()
    if needed > there:
        raise ValueError(
            f"run: {kind} of {str(run.path)!r} has {rows:,} rows, about {needed / 2**30:,.1f} GiB; reports are made of"
            f" tables that fit in the {there / 2**30:,.1f} GiB of this machine's memory"
        )
    return table.with_columns(pl.col(pl.Categorical).cast(pl.String)).collect()
