"""Scores of a part of the image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from headscope._shapes import Bool, ItemScore, Sample
from headscope.ops.regions import Regions


def part_means(
    error: Sample, items: Sequence[Any], part: str | Sequence[str], *, missing: float | None = None
) -> ItemScore:
    """The mean of each item's error over one part of its image, such as the pixels of a glyph; float64.

    For a score of your own, as in `part_means((edited - target).square(), inputs.items, "glyph 1")`. In a VAE's latent
    space a place of the latents belongs to the part that covers most of it (`headscope.Regions`).

    Args:
        error: a number for each channel and pixel (or latent) of each item, on any device.
        items: as many, with `part_mask` and `part_names`, as NoisyInputs has them.
        part: a part's name, or those of several, over all of whose pixels the mean is then taken.
        missing: what an item without such a pixel gets, be it that it has no mask, no part of (each) such name, or that
            none is visible: None raises; NaN keeps it out of all that reports average, where it is counted.

    Raises:
        ValueError: another number of items, no part, or an item without such a pixel.
    """
    if len(items) != len(error):
        raise ValueError(f"items: got {len(items)}, expected {len(error)}, as the error has")
    parts = (part,) if isinstance(part, str) else tuple(part)
    if not parts:
        raise ValueError("part: got none, expected the name of a part, or some")
    height, width = error.shape[2:]
    # rows of one item follow each other in a sweep: its edits
    known: dict[int, Bool[np.ndarray, "height width"]] = {}
    for item in items:
        if id(item) not in known:
            known[id(item)] = inside = _inside(item, parts, (height, width))
            if missing is None and not inside.any():
                raise ValueError(f"items: {_lacking(item, parts)}; missing=math.nan leaves such items out")
    rows = [known[id(item)] for item in items]
    places = np.stack(rows) if rows else np.zeros((0, height, width), bool)
    counts = torch.from_numpy(places.sum((1, 2)) * error.shape[1]).to(error.device)
    # selected, not weighted: 0 times an error that isn't finite is NaN
    chosen = torch.where(torch.from_numpy(places).to(error.device)[:, None], error.double(), 0)
    means = chosen.sum((1, 2, 3)) / counts
    return means if missing is None else means.masked_fill(counts == 0, missing)


def _inside(item: Any, parts: Sequence[str], grid: tuple[int, int]) -> Bool[np.ndarray, "height width"]:
    """True where a place of a grid belongs to one of some parts of an item's image."""
    mask, names = getattr(item, "part_mask", None), getattr(item, "part_names", ())
    if mask is None or not set(parts) <= set(names):
        return np.zeros(grid, bool)
    numbers = [names.index(name) for name in parts]
    if mask.shape == grid:
        return np.isin(mask, numbers)
    return np.isin(Regions.of([item]).on_grid(grid).numpy().reshape(grid), numbers)


def _lacking(item: Any, parts: Sequence[str]) -> str:
    called = repr(getattr(item, "key", "an item"))
    if getattr(item, "part_mask", None) is None:
        return f"{called} has no part mask"
    names = getattr(item, "part_names", ())
    for part in parts:
        if part not in names:
            return f"{called} has no part {part!r}, expected some of {', '.join(names)}"
    return f"{called} has no pixel of {', '.join(parts)}"
