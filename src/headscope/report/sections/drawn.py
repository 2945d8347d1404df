"""Images drawn by the whole model and without heads, side by side from the same noise."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headscope.report.images import sheet
from headscope.report.section import Section


@dataclass(frozen=True)
class Drawn:
    """Images drawn from the same noise, the whole model's and those of edits.

    Attributes:
        title: whose noise, and which fill.
        rows: a label and images, uint8 [height, width, 3]; every row begins with the same noise.
    """

    title: str
    rows: Sequence[tuple[str, Sequence[np.ndarray]]]


def drawn_section(drawn: Sequence[Drawn]) -> Section | None:
    """The section, where images were drawn."""
    found = []
    for one in drawn:
        rows = []
        for label, images in one.rows:
            uri, width, height = sheet(np.stack(list(images)))
            rows.append({"label": label, "uri": uri, "width": width, "height": height, "count": len(images)})
        found.append({"title": one.title, "rows": rows})
    return Section("drawn", "Images side by side", {"drawn": found}) if found else None
