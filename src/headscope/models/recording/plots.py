"""Maps over the picture, as plotly figures."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from headscope._extras import require
from headscope._images import as_shown


def heatmaps(maps: Mapping[str, np.ndarray], unit: str, image: Any = None) -> Any:
    """A figure of maps [height, width] beside each other on one colour scale, after the image if there is one."""
    require("plotly", "study")
    subplots = require("plotly.subplots", "study")
    graph = require("plotly.graph_objects", "study")
    titles = [*([] if image is None else ["image"]), *maps]
    figure = subplots.make_subplots(rows=1, cols=len(titles), subplot_titles=titles, horizontal_spacing=0.02)
    if image is not None:
        figure.add_trace(graph.Image(z=_pixels(image)), row=1, col=1)
    for column, (name, values) in enumerate(maps.items(), len(titles) - len(maps) + 1):
        figure.add_trace(graph.Heatmap(z=values, name=name, coloraxis="coloraxis"), row=1, col=column)
    figure.update_xaxes(visible=False)
    # rows count down from the top, as in the picture; places are square
    figure.update_yaxes(visible=False, autorange="reversed")
    for column in range(1, len(titles) + 1):
        figure.update_yaxes(scaleanchor=f"x{column if column > 1 else ''}", row=1, col=column)
    figure.update_layout(
        coloraxis={"colorscale": "Viridis", "colorbar": {"title": {"text": unit}}},
        height=320,
        width=120 + 260 * len(titles),
        margin={"l": 10, "r": 10, "t": 40, "b": 10},
    )
    return figure


def _pixels(image: Any) -> np.ndarray:
    """PIL's images, or arrays of uint8 or of floats from 0 to 1, as uint8 [height, width, 3]."""
    if hasattr(image, "getbands"):
        return as_shown(image)
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or not (pixels.dtype == np.uint8 or pixels.dtype.kind == "f"):
        raise ValueError(
            f"image: got {list(pixels.shape)} of {pixels.dtype}, expected a PIL image, or [height, width, 3] of"
            " uint8 or of floats from 0 to 1"
        )
    return pixels if pixels.dtype == np.uint8 else np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
