"""Small pictures for the model card, drawn with Pillow: line charts and sheets of images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headscope._extras import require

__all__ = ["PALETTE", "Series", "heat_map", "image_sheet", "line_charts"]

_INK = (40, 44, 52)
_GRID = (226, 229, 234)
_MUTED = (112, 118, 130)
# a palette that remains distinct for colour-blind readers (Okabe and Ito)
PALETTE = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))
# drawn this many times larger and then reduced, for smooth lines
_SUPERSAMPLING = 3


@dataclass(frozen=True)
class Series:
    """One line of a chart: points, colour, and whether it is dashed."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: tuple[int, int, int] = PALETTE[0]
    dashed: bool = False


def _text(
    draw: Any, position: tuple[float, float], text: str, size: float, colour: tuple[int, int, int], anchor: str
) -> None:
    font = require("PIL.ImageFont", "study").load_default(size * _SUPERSAMPLING)
    draw.text((position[0] * _SUPERSAMPLING, position[1] * _SUPERSAMPLING), text, fill=colour, font=font, anchor=anchor)


def line_charts(panels: Sequence[tuple[str, str, Sequence[Series]]], width: int = 520, height: int = 320) -> Any:
    """Charts side by side, a Pillow image. A panel is (title, x label, series); the vertical axis is logarithmic.

    width, height: of one panel, in pixels. All y must be positive.
    """
    pil, draw_module = require("PIL.Image", "study"), require("PIL.ImageDraw", "study")
    scale = _SUPERSAMPLING
    canvas = pil.new("RGB", (width * len(panels) * scale, height * scale), "white")
    draw = draw_module.Draw(canvas)
    for number, (title, x_label, series) in enumerate(panels):
        _panel(draw, number * width, width, height, title, x_label, series)
    return canvas.resize((width * len(panels), height), pil.Resampling.LANCZOS)


def _panel(draw: Any, offset: int, width: int, height: int, title: str, x_label: str, series: Sequence[Series]) -> None:
    labelled = [line for line in series if line.label]
    # the labels stand beside the lines, not on them
    left, right, top, bottom = offset + 58, offset + width - (166 if labelled else 14), 34, height - 46
    values = [value for line in series for value in line.y]
    low, high = min(values) * 0.95, max(values) * 1.05
    last = max(max(line.x) for line in series)

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (right - left) * x / last
        up = (math.log(y) - math.log(low)) / (math.log(high) - math.log(low))
        return across, bottom - (bottom - top) * up

    scale = _SUPERSAMPLING
    _text(draw, (left, 10), title, 13, _INK, "la")
    for tick in _logarithmic_ticks(low, high):
        y = place(0, tick)[1]
        draw.line((left * scale, y * scale, right * scale, y * scale), fill=_GRID, width=scale)
        _text(draw, (left - 7, y), f"{tick:g}", 11, _MUTED, "rm")
    for tick in _linear_ticks(last):
        x = place(tick, high)[0]
        draw.line((x * scale, bottom * scale, x * scale, (bottom + 4) * scale), fill=_MUTED, width=scale)
        _text(draw, (x, bottom + 7), f"{tick:g}", 11, _MUTED, "ma")
    draw.line((left * scale, bottom * scale, right * scale, bottom * scale), fill=_MUTED, width=scale)
    _text(draw, ((left + right) / 2, height - 18), x_label, 11, _MUTED, "ma")
    for line in series:
        points = [place(x, y) for x, y in zip(line.x, line.y, strict=True)]
        _stroke(draw, points, line.colour, line.dashed)
    for row, line in enumerate(labelled):
        y = top + 8 + 16 * row
        _stroke(draw, [(right + 10, y), (right + 36, y)], line.colour, line.dashed)
        _text(draw, (right + 42, y), line.label, 11, _INK, "lm")


def _stroke(draw: Any, points: list[tuple[float, float]], colour: tuple[int, int, int], dashed: bool) -> None:
    scale = _SUPERSAMPLING
    position = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        length = math.hypot(x1 - x0, y1 - y0)
        pieces = max(1, math.ceil(length / 2)) if dashed else 1
        for piece in range(pieces):
            # dashes of 5 pixels with gaps of 4, counted along the whole line
            if not dashed or position % 9 < 5:
                start, end = piece / pieces, (piece + 1) / pieces
                ends = [x0 + (x1 - x0) * start, y0 + (y1 - y0) * start, x0 + (x1 - x0) * end, y0 + (y1 - y0) * end]
                draw.line([value * scale for value in ends], fill=colour, width=round(1.7 * scale), joint="curve")
            position += length / pieces


def _logarithmic_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    return ticks


def _linear_ticks(last: float) -> list[float]:
    step = 10.0 ** math.floor(math.log10(max(last, 1e-9)))
    for factor in (0.2, 0.25, 0.5, 1.0, 2.0):
        if last / (step * factor) <= 6:
            return [index * step * factor for index in range(int(last / (step * factor)) + 1)]
    return [0.0, last]


def image_sheet(rows: Sequence[tuple[str, Sequence[np.ndarray]]], scale: int = 2) -> Any:
    """Images (uint8 [size, size, 3]) in labelled rows, a Pillow image; every pixel becomes scale x scale pixels."""
    pil, draw_module = require("PIL.Image", "study"), require("PIL.ImageDraw", "study")
    size = rows[0][1][0].shape[0] * scale
    gap, margin = 3, max(len(label) for label, _ in rows) * 6 + 16
    width = margin + max(len(images) for _, images in rows) * (size + gap) + gap
    sheet = pil.new("RGB", (width, len(rows) * (size + gap) + gap), "white")
    draw = draw_module.Draw(sheet)
    font = require("PIL.ImageFont", "study").load_default(11)
    for row, (label, images) in enumerate(rows):
        y = gap + row * (size + gap)
        draw.text((8, y + size / 2), label, fill=_INK, font=font, anchor="lm")
        for column, image in enumerate(images):
            picture = pil.fromarray(image).resize((size, size), pil.Resampling.NEAREST)
            sheet.paste(picture, (margin + gap + column * (size + gap), y))
    return sheet


def heat_map(rows: Sequence[str], columns: Sequence[tuple[str, int]], values: np.ndarray) -> Any:
    """Fractions as coloured cells, a Pillow image: red above 0, blue below, on a scale from 0.1 % to 100 %.

    rows: their labels. columns: label and width of each block of columns. values: [rows, columns], 0.25 is 25 %.
    """
    pil, draw_module = require("PIL.Image", "study"), require("PIL.ImageDraw", "study")
    scale, cell, gap, margin, top = _SUPERSAMPLING, 15, 8, max(map(len, rows)) * 7 + 16, 30
    width = margin + len(columns) * gap + values.shape[1] * cell + 8
    height = top + len(rows) * (cell + 2) + 30
    canvas = pil.new("RGB", (width * scale, height * scale), "white")
    draw = draw_module.Draw(canvas)
    for row, label in enumerate(rows):
        _text(draw, (margin - 8, top + row * (cell + 2) + cell / 2), label, 11, _INK, "rm")
    x, column = margin, 0
    for label, count in columns:
        _text(draw, (x, 8), label, 10, _MUTED, "la")
        for _ in range(count):
            for row in range(len(rows)):
                y = top + row * (cell + 2)
                box = [side * scale for side in (x, y, x + cell - 2, y + cell)]
                draw.rectangle(box, fill=_shade(float(values[row, column])))
            x, column = x + cell, column + 1
        x += gap
    x, y = margin, height - 22
    for value in (-0.1, -0.01, 0.0, 0.01, 0.03, 0.1, 0.3, 1.0):
        draw.rectangle([side * scale for side in (x, y, x + cell - 2, y + cell)], fill=_shade(value))
        _text(draw, (x + cell + 2, y + cell / 2), f"{100 * value:+g} %" if value else "0", 10, _MUTED, "lm")
        x += 58
    return canvas.resize((width, height), pil.Resampling.LANCZOS)


def _shade(value: float) -> tuple[int, int, int]:
    """White at 0.1 % and below; the full colour at 100 %."""
    if not math.isfinite(value):
        return _GRID
    strength = min(max(1.0 + math.log10(max(abs(value), 1e-9)) / 3.0, 0.0), 1.0)
    full = (178, 24, 43) if value > 0 else (33, 102, 172)
    return tuple(round(255 + (channel - 255) * strength) for channel in full)  # type: ignore[return-value]
