"""Parts of plotly figures that several packages draw."""

from collections.abc import Sequence
from typing import Any


def error_bars(spreads: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Plotly's error bars of points, each given as its lower end, its middle and its upper end."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - middle for _, middle, high in spreads],
        "arrayminus": [middle - low for low, middle, _ in spreads],
    }
