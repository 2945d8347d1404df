"""Image files as a viewer shows them: 8-bit RGB, or an error that says why not.

Pillow's own conversions saturate what has more than 8 bits and show what lies behind transparent pixels, so the kinds
of image are told apart here.

- 16-bit grey is scaled by 255 / 65535 and rounded; 12-bit TIFF by 255 / 4095. 16-bit colour loses its low bytes.
- Transparency is composed on white, on the 8-bit values.
- EXIF rotations are applied. Of a photograph with previews beside it (MPO) the first picture is taken.
- CMYK goes through the file's own profile, or without one by (255 - ink) (255 - black) / 255. Profiles of other images
  aren't applied, as training pipelines don't.
- Refused: animations and several pages; floating point and 32-bit integers, whose range no file states.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from headscope._extras import require

# modes that Pillow turns to RGB, or with transparency to RGBA, as a viewer does
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "YCbCr")
# levels between two of Pillow's for a PNG's grey of few bits, whose transparent level is in the file's own
_LEVELS = {"L;2": 85, "L;4": 17}
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
_WHITE_IS_ZERO = 0


def read_image(source: Path | bytes) -> np.ndarray:
    """An image file, or its content, as a viewer shows it: uint8 [height, width, 3].

    Raises:
        ValueError: it can't be read or isn't one picture of a known range; says why, to be put behind the name.
    """
    image_module, operations = require("PIL.Image", "study"), require("PIL.ImageOps", "study")
    try:
        with image_module.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            if getattr(opened, "is_animated", False) and opened.format != "MPO":
                raise ValueError(f"it holds {opened.n_frames} frames or pages, expected a single picture")
            # loading forgets these
            largest, negative, levels = _largest(opened), _is_negative(opened), _levels(opened)
            upright = operations.exif_transpose(opened)
        return as_shown(upright, largest, negative, levels)
    except image_module.UnidentifiedImageError:
        raise ValueError("it is no image of a kind that Pillow knows") from None
    # each decoder raises errors of other classes
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error


def read_square(source: Path | bytes, size: int) -> np.ndarray:
    """The central square of `read_image`, at another size (bicubic): uint8 [size, size, 3]. Raises as it does."""
    return resized(central_square(read_image(source)), size)


def central_square(image: np.ndarray) -> np.ndarray:
    """The central square of an image or mask, [height, width, ...]."""
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[top : top + side, left : left + side]


def read_indices(content: bytes) -> np.ndarray:
    """A PNG of whole numbers, 0 to 255: levels of grey of 8 bits, or places in a palette; uint8 [height, width].

    Raises:
        ValueError: it can't be read or is another kind of image; says why, to be put behind the name.
    """
    image_module = require("PIL.Image", "study")
    try:
        with image_module.open(io.BytesIO(content)) as opened:
            # Pillow spreads levels of fewer bits over all 8
            raw = opened.tile[0][3] if opened.format == "PNG" and opened.tile else opened.mode
            if opened.format != "PNG" or opened.mode not in ("L", "P") or (opened.mode == "L" and raw != "L"):
                raise ValueError(
                    f"it is a {opened.format} of the kind {raw}, expected a PNG of 8 bits of grey, or of a palette"
                )
            return np.asarray(opened)
    except image_module.UnidentifiedImageError:
        raise ValueError("it is no image of a kind that Pillow knows") from None
    # each decoder raises errors of other classes
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """A square image at another size, uint8 [n, n] or [n, n, 3], by Pillow's bicubic filter."""
    image_module = require("PIL.Image", "study")
    return np.asarray(image_module.fromarray(image).resize((size, size), image_module.Resampling.BICUBIC))


def as_shown(picture: Any, largest: int | None = None, negative: bool = False, levels: int = 1) -> np.ndarray:
    """A picture of Pillow's as a viewer shows it: uint8 [height, width, 3].

    Args:
        largest: the value of white in a picture of more than 8 bits; None if its mode alone determines it.
        negative: True if white is 0 in a picture of more than 8 bits.
        levels: the factor for a transparent level of grey.

    Raises:
        ValueError: a mode whose range isn't known; names it.
    """
    mode, key = picture.mode, picture.info.get("transparency")
    if mode.startswith("I;16") and largest is None:
        largest = 65535
    if mode.startswith("I") and largest is not None:
        values = np.asarray(picture).astype(np.int64)
        scaled = np.clip((values * 255 + largest // 2) // largest, 0, 255)
        grey = (255 - scaled if negative else scaled).astype(np.uint8)
        return _on_white(np.repeat(grey[..., None], 3, axis=2), None if key is None else values != key)
    if mode == "CMYK":
        return _from_inks(picture)
    if mode not in _EIGHT_BITS:
        raise ValueError(
            f"it has the mode {mode}, whose range of brightness no file states; expected 8 or 16 bits a channel"
        )
    if mode in ("1", "L", "RGB") and key is not None:
        return _without(picture, np.asarray(key) * levels)
    if not picture.has_transparency_data:
        return np.asarray(picture.convert("RGB"))
    pixels = np.asarray(picture.convert("RGBA"))
    return _on_white(pixels[..., :3], pixels[..., 3])


def nearest_parts(mask: np.ndarray, counterparts: np.ndarray | None, size: int) -> tuple[np.ndarray, np.ndarray | None]:
    """A square part mask and its counterparts at another size: each pixel's are those of the pixel at its middle.

    Args:
        mask: uint8 [edge, edge].
        counterparts: int32 [edge, edge, n], pixels of the image (row * edge + column), -1: none; or None.
        size: the new edge.
    """
    edge = len(mask)
    if edge == size:
        return mask, counterparts
    # the old pixel of each new one, and the new pixel at the middle of each old one
    old = (2 * np.arange(size) + 1) * edge // (2 * size)
    mask = mask[old][:, old]
    if counterparts is None:
        return mask, None
    middle = ((2 * np.arange(edge) + 1) * size // (2 * edge)).astype(np.int32)
    # the last entry is that of -1
    moved = np.append((middle[:, None] * size + middle).ravel(), -1).astype(np.int32)
    return mask, moved[counterparts][old][:, old]


def _largest(opened: Any) -> int | None:
    """The value of white in an opened file of more than 8 bits of grey; None if its mode alone determines it."""
    if opened.mode.startswith("I;16") and opened.format == "TIFF":
        return 2 ** opened.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0] - 1
    return 65535 if opened.mode == "I" and opened.format in ("PNG", "PPM") else None


def _is_negative(opened: Any) -> bool:
    """True if 0 is white in 16 bits: Pillow inverts only narrower images."""
    return opened.format == "TIFF" and opened.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO


def _levels(opened: Any) -> int:
    """The factor for a PNG's transparent level of grey; raises ValueError where it isn't known."""
    raw = opened.tile[0][3] if opened.format == "PNG" and opened.tile else None
    if raw == "RGB;16B" and "transparency" in opened.info:
        raise ValueError("it has a transparent colour of 16 bits a channel, expected 8, or an alpha channel")
    return _LEVELS.get(raw, 1) if isinstance(raw, str) else 1


def _without(picture: Any, colour: np.ndarray) -> np.ndarray:
    """An image in which one colour (or level of grey) is transparent."""
    pixels = np.asarray(picture.convert("RGB"))
    return _on_white(pixels, (pixels != colour).any(axis=2))


def _on_white(pixels: np.ndarray, alpha: np.ndarray | None) -> np.ndarray:
    """Composed on white.

    Args:
        pixels: uint8 [height, width, 3].
        alpha: [height, width], bool or 0 to 255; None where nothing is transparent.
    """
    if alpha is None:
        return pixels
    weight = alpha.astype(np.uint32)[..., None] * (255 if alpha.dtype == bool else 1)
    return ((pixels * weight + 255 * (255 - weight) + 127) // 255).astype(np.uint8)


def _from_inks(picture: Any) -> np.ndarray:
    profile = picture.info.get("icc_profile")
    if profile:
        colours = require("PIL.ImageCms", "study")
        picture = colours.profileToProfile(
            picture, io.BytesIO(profile), colours.createProfile("sRGB"), outputMode="RGB"
        )
    return np.asarray(picture.convert("RGB"))
