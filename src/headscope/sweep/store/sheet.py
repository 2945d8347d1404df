"""A contact sheet: what a run's generations look like, clean and with the heads removed that change them most."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from headscope._extras import require
from headscope._files import write_atomic
from headscope.sweep.plan.units import KINDS
from headscope.sweep.store.run import Run, as_written
from headscope.sweep.store.store import unit_files

MARGIN = 4
LABEL_HEIGHT = 14


def write_contact_sheets(run: Run, *, edits: int = 12, items: int = 8) -> list[Path]:
    """A picture for each group and fill of a run's generations, in the run's directory.

    The first row is the whole model's images, each further one those of an edit, those first whose mean distance to
    the clean images is largest.

    Args:
        edits: how many rows of edits at most.
        items: how many columns at most.

    Raises:
        ValueError: the run has no generations, or a file of theirs is damaged.
    """
    sheets = contact_sheets(run, edits=edits, items=items)
    if not sheets:
        raise ValueError(f"run: {str(run.path)!r} has no generations, expected a sweep with the score generate")
    written = []
    for sheet in sheets:
        for name in (sheet.group, sheet.fill):
            if "/" in name or "\0" in name:
                raise ValueError(f"run: a table of {str(run.path)!r} has {name!r}, expected a name without /")
        path = run.path / f"contact-{sheet.kind}-{sheet.group}-{sheet.fill}.png"
        _write(path, sheet.rows)
        written.append(path)
    return written


class ContactSheet(NamedTuple):
    """The images of one group and fill.

    Attributes:
        kind: the table of their edits.
        rows: a label and images, uint8 [height, width, 3], of the whole model and of every edit, items in one order.
    """

    kind: str
    group: str
    fill: str
    rows: list[tuple[str, list[np.ndarray]]]


def contact_sheets(run: Run, *, edits: int = 12, items: int = 8) -> list[ContactSheet]:
    """The sheets that `write_contact_sheets` writes; none where the run has no generations."""
    found = []
    for kind in (name for name in run.tables if KINDS[name].images):
        with as_written(run):
            frame, images, clean = _read(run, kind)
            for (group, fill), rows in frame.group_by("group", "fill", maintain_order=True):
                found.append(ContactSheet(kind, str(group), str(fill), _sheet(rows, images, clean, edits, items)))
    return found


def _read(run: Run, kind: str) -> tuple[pl.DataFrame, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The table with each row's unit, its place among the unit's images, and the items' places; the units' images."""
    frames, images, clean = [], {}, {}
    for unit in run.units:
        file, _ = unit_files(run.path, kind, unit["id"])
        if unit["kind"] != kind or not file.is_file():
            continue
        tensors = run.images(kind, unit["id"])
        images[unit["id"]], clean[unit["id"]] = tensors["edited"], tensors["clean"]
        frame = pl.read_parquet(file).with_columns(pl.col(pl.Categorical).cast(pl.String))
        edit = pl.format("{}  {}", "site", "head") if "head" in frame.columns else pl.col("edit")
        count = len(tensors["clean"])
        frames.append(
            frame.select("group", "fill", "item", "replicate", "distance", edit=edit)
            .with_row_index("row")
            .with_columns(place=pl.col("row") % count, unit=pl.lit(unit["id"]))
        )
    return pl.concat(frames), images, clean


def _sheet(
    rows: pl.DataFrame, images: dict[str, np.ndarray], clean: dict[str, np.ndarray], edits: int, items: int
) -> list[tuple[str, list[np.ndarray]]]:
    """Labelled rows of images, of the first noise draw."""
    rows = rows.filter(pl.col("replicate") == pl.col("replicate").min())
    chosen = rows["item"].unique(maintain_order=True).head(items)
    ranked = rows.group_by("edit", maintain_order=True).agg(pl.col("distance").mean())
    ranked = ranked.sort("distance", "edit", descending=[True, False]).head(edits)
    first = rows.filter(pl.col("edit") == ranked["edit"][0], pl.col("item").is_in(chosen.implode()))
    sheet = [("clean", [clean[row["unit"]][row["place"]] for row in first.iter_rows(named=True)])]
    for edit, distance in ranked.iter_rows():
        members = rows.filter(pl.col("edit") == edit, pl.col("item").is_in(chosen.implode()))
        shown = [images[row["unit"]][row["row"]] for row in members.iter_rows(named=True)]
        sheet.append((f"{edit}  (mean squared difference {distance:.2g})", shown))
    return sheet


def _write(path: Path, sheet: list[tuple[str, list[np.ndarray]]]) -> None:
    image_module, draw_module = require("PIL.Image", "study"), require("PIL.ImageDraw", "study")
    height, width = sheet[0][1][0].shape[:2]
    # small images are enlarged by whole pixels
    scale = max(1, 64 // height)
    step = LABEL_HEIGHT + scale * height + MARGIN
    columns = max(len(images) for _, images in sheet)
    size = (max(columns * (scale * width + MARGIN), 400) + MARGIN, len(sheet) * step + MARGIN)
    picture = image_module.new("RGB", size, "white")
    draw = draw_module.Draw(picture)
    for number, (label, images) in enumerate(sheet):
        top = MARGIN + number * step
        draw.text((MARGIN, top), label, fill="black")
        for column, image in enumerate(images):
            enlarged = image_module.fromarray(image.repeat(scale, 0).repeat(scale, 1))
            picture.paste(enlarged, (MARGIN + column * (scale * width + MARGIN), top + LABEL_HEIGHT))
    write_atomic(path, lambda file: picture.save(file, "png"))
