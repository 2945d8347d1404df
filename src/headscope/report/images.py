"""Sample images, as a sheet inside the page."""

import base64
import io
import math

import numpy as np
from PIL import Image

_GAP = 2


def sheet(images: np.ndarray, most: int = 20) -> tuple[str, int, int]:
    """The first images of a group in one PNG: its data URI, width and height in pixels.

    images: uint8 [n, height, width, 3]. Raises ValueError for another shape or dtype.
    """
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise ValueError(f"images: got {images.dtype} {list(images.shape)}, expected uint8 [n, height, width, 3]")
    images = images[:most]
    count, height, width, _ = images.shape
    columns = min(10, max(1, count))
    rows = max(1, math.ceil(count / columns))
    canvas = np.zeros((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 4), np.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + _GAP), (index % columns) * (width + _GAP)
        canvas[top : top + height, left : left + width, :3] = image
        canvas[top : top + height, left : left + width, 3] = 255
    stream = io.BytesIO()
    Image.fromarray(canvas).save(stream, "PNG", optimize=True)
    encoded = base64.b64encode(stream.getvalue()).decode()
    return f"data:image/png;base64,{encoded}", canvas.shape[1], canvas.shape[0]
