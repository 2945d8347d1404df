"""Maps over the picture, as plotly figures."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from headscope._extras import require


def heatmaps(maps: Mapping[str, np.ndarray], unit: str, image: Any = None) -> Any:
    """A figure of maps [height, width] beside each other on one colour scale, after the image if there is one."""
    require("plotly", "study")
    subplots = require("plotly.subplots", "study")
    graph = require("plotly.graph_objects", "study")
    titles = [*([] if image is None else ["image"]), *maps]
    figure = subplots.make_subplots(rows=1, cols=len(titles), subplot_titles=titles, horizontal_spacing=0.02)
    if image is not None:
        pixels = np.asarray(image)
        if np.issubdtype(pixels.dtype, np.floating):
            pixels = np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
        figure.add_trace(graph.Image(z=pixels), row=1, col=1)
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
