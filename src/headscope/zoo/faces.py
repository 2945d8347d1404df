"""Procedurally generated faces with controlled attributes and a ground-truth part mask.

A face is a stack of shapes, each a signed distance function, painted from back to front. Coverage comes from the
distance (one sample wide) on a grid four times finer than the image, which is then averaged. Only additions,
multiplications, divisions and square roots are used, in a fixed order, so that every machine gets the same bytes.

Coordinates: x to the right and y downwards, both from -1 to 1 over the image; lengths are in those units.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from typing import Any

import numpy as np

from headscope.counter import counter_uniform

__all__ = ["HAIR_STYLES", "PART_NAMES", "eye_centres", "face_attributes", "render_face"]

PART_NAMES = ("background", "clothes", "skin", "hair", "brows", "eyes", "nose", "mouth", "glasses")
HAIR_STYLES = ("bald", "short", "parted", "fringe", "bob", "long", "curly", "bun")

_SAMPLES = 4
# faces of up to so many pixels to a side are kept in memory, 4 KiB each
_KEPT_SIZE = 32

_SKIN_TONES = (
    (0.98, 0.85, 0.74),
    (0.95, 0.78, 0.65),
    (0.89, 0.69, 0.54),
    (0.80, 0.58, 0.42),
    (0.66, 0.45, 0.31),
    (0.50, 0.33, 0.22),
    (0.37, 0.24, 0.17),
)
_HAIR_COLOURS = (
    (0.10, 0.08, 0.08),
    (0.22, 0.14, 0.09),
    (0.38, 0.24, 0.13),
    (0.56, 0.36, 0.17),
    (0.82, 0.66, 0.36),
    (0.64, 0.25, 0.12),
    (0.66, 0.66, 0.67),
)
_EYE_COLOURS = ((0.28, 0.16, 0.08), (0.20, 0.38, 0.62), (0.25, 0.45, 0.28), (0.42, 0.30, 0.14), (0.14, 0.10, 0.08))
_BACKGROUNDS = ("plain", "gradient", "split", "clouds")


def face_attributes(identity: int) -> dict[str, Any]:
    """The attributes of one identity, drawn from its own stream: JSON values only (numbers, strings, lists).

    Colours are red, green, blue from 0 to 1; lengths and offsets are in half image widths; `yaw`, `pitch` and `roll`
    are the tangents of half the angle.
    """

    def number(name: str, low: float, high: float) -> float:
        return low + (high - low) * float(counter_uniform("faces", identity, name))

    def choice(name: str, options: tuple, weights: tuple[float, ...] | None = None) -> Any:
        weights = weights or (1.0,) * len(options)
        threshold = float(counter_uniform("faces", identity, name)) * sum(weights)
        for option, weight in zip(options, weights, strict=True):
            threshold -= weight
            if threshold < 0:
                return option
        return options[-1]

    def jitter(name: str, colour: tuple[float, float, float], amount: float) -> list[float]:
        offsets = (counter_uniform("faces", identity, name, shape=3) - 0.5) * (2 * amount)
        return [min(max(value + float(offset), 0.02), 0.99) for value, offset in zip(colour, offsets, strict=True)]

    def muted(name: str, low: float, high: float) -> list[float]:
        # half way to grey: full saturation is rare in photographs
        brightness = number(f"{name} brightness", low, high)
        return [0.5 * (brightness + number(f"{name} {channel}", low, high)) for channel in "rgb"]

    skin = choice("skin", _SKIN_TONES)
    return {
        "skin": jitter("skin jitter", skin, 0.03),
        "hair_style": choice("hair style", HAIR_STYLES, (0.5, 1.6, 1.4, 1.2, 1.2, 1.4, 1.0, 0.7)),
        "hair_colour": jitter("hair jitter", choice("hair colour", _HAIR_COLOURS, (3, 3, 2, 2, 2, 1, 1)), 0.03),
        "facial_hair": choice("facial hair", ("none", "moustache", "beard"), (5, 1, 1.2)),
        "eye_colour": jitter("eye jitter", choice("eye colour", _EYE_COLOURS), 0.03),
        "eye_size": number("eye size", 0.105, 0.14),
        "eye_spacing": number("eye spacing", 0.205, 0.25),
        "eye_openness": number("eye openness", 0.50, 0.85),
        "gaze": number("gaze", -0.4, 0.4),
        "brow_weight": number("brow weight", 0.026, 0.052),
        "brow_tilt": number("brow tilt", -0.25, 0.30),
        "nose_width": number("nose width", 0.065, 0.115),
        "nose_length": number("nose length", 0.20, 0.30),
        "mouth_width": number("mouth width", 0.15, 0.25),
        "lip_thickness": number("lip thickness", 0.030, 0.055),
        "lip_colour": jitter(
            "lip jitter", choice("lip", ((0.72, 0.32, 0.32), (0.62, 0.28, 0.27), (0.80, 0.22, 0.28))), 0.04
        ),
        "smile": number("smile", -0.25, 1.0),
        "mouth_open": choice("mouth open", (0.0, 0.045, 0.085), (3, 1.5, 1)),
        "glasses": choice("glasses", ("none", "round", "square"), (3.2, 1, 1)),
        "face_width": number("face width", 0.455, 0.53),
        "face_height": number("face height", 0.60, 0.68),
        "jaw": number("jaw", 0.0, 0.30),
        "yaw": number("yaw", -0.20, 0.20),
        "pitch": number("pitch", -0.08, 0.08),
        "roll": number("roll", -0.07, 0.07),
        "scale": number("scale", 1.02, 1.22),
        "shift": [number("shift x", -0.06, 0.06), number("shift y", -0.04, 0.06)],
        "light": [number("light x", -0.85, 0.85), number("light y", -0.75, 0.05)],
        "light_strength": number("light strength", 0.35, 0.75),
        "light_warmth": number("light warmth", -0.06, 0.06),
        "background": choice("background", _BACKGROUNDS, (1, 2, 1, 2)),
        "background_colours": [muted(f"background {row}", 0.10, 0.92) for row in (0, 1)],
        "clothes_colour": muted("clothes", 0.06, 0.90),
        "texture": identity,
    }


def render_face(attributes: dict[str, Any], size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Paint a face: the image, uint8 [size, size, 3], and its part mask, uint8 [size, size], indices of PART_NAMES.

    `attributes` has the keys of `face_attributes`, and may have `right_eye_colour` (the image's right; that of the left
    otherwise) and `iris` (its radius, in the eye's; 0.54 otherwise). A pixel's part is the one that covers most of it,
    counting only what is visible. Raises ValueError for a missing attribute or an unknown style.
    """
    missing = set(face_attributes(0)) - set(attributes)
    if missing:
        raise ValueError(f"attributes: got none of {sorted(missing)}, expected every key of face_attributes()")
    for name, options in (
        ("hair_style", HAIR_STYLES),
        ("facial_hair", ("none", "moustache", "beard")),
        ("glasses", ("none", "round", "square")),
        ("background", _BACKGROUNDS),
    ):
        if attributes[name] not in options:
            raise ValueError(f"attributes[{name!r}]: got {attributes[name]!r}, expected one of {', '.join(options)}")
    if size > _KEPT_SIZE:
        return _painted(attributes, size)
    image, mask = _kept(json.dumps(attributes, sort_keys=True, default=_as_list), size)
    return image.copy(), mask.copy()


def _as_list(value: Any) -> Any:
    """NumPy's numbers and arrays, for JSON."""
    return np.asarray(value).tolist()


@lru_cache(maxsize=4096)
def _kept(attributes: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A small face, of attributes as JSON: one takes a tenth of a second, and a study opens its groups many times."""
    return _painted(json.loads(attributes), size)


def _painted(attributes: dict[str, Any], size: int) -> tuple[np.ndarray, np.ndarray]:
    painting = _Painting(attributes, size)
    painting.background()
    painting.hair_behind()
    painting.shoulders()
    painting.head()
    painting.eyes()
    painting.nose()
    painting.mouth()
    painting.hair_in_front()
    painting.brows()
    painting.glasses()
    return painting.finish()


def eye_centres(attributes: dict[str, Any]) -> list[tuple[float, float]]:
    """The places (x, y) of the left and the right eye in the image, in half image widths from its middle."""
    painting = _Painting(attributes, 1)
    cosine, sine = _turn(attributes["roll"])
    centres = []
    for side in (-1.0, 1.0):
        x, y, _ = painting.eye(side)
        across, down = cosine * x - sine * y, cosine * y + sine * x
        centres.append(
            (across * attributes["scale"] + attributes["shift"][0], down * attributes["scale"] + attributes["shift"][1])
        )
    return centres


def _ellipse(x: np.ndarray, y: np.ndarray, width: float, height: float) -> np.ndarray:
    """Distance to an ellipse of the given half axes, exact to first order at its edge."""
    p, q = x / width, y / height
    radius = np.sqrt(p * p + q * q)
    slope = np.sqrt(p * p / (width * width) + q * q / (height * height)) + 1e-6
    return radius * (radius - 1.0) / slope


def _box(x: np.ndarray, y: np.ndarray, width: float, height: float, corner: float) -> np.ndarray:
    """Distance to a box of the given half sides with rounded corners."""
    p = np.abs(x) - (width - corner)
    q = np.abs(y) - (height - corner)
    outside_x, outside_y = np.maximum(p, 0.0), np.maximum(q, 0.0)
    return np.sqrt(outside_x * outside_x + outside_y * outside_y) + np.minimum(np.maximum(p, q), 0.0) - corner


def _segment(x: np.ndarray, y: np.ndarray, start: tuple[float, float], end: tuple[float, float]) -> np.ndarray:
    """Distance to a line segment."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = np.clip(((x - start[0]) * dx + (y - start[1]) * dy) / (dx * dx + dy * dy + 1e-12), 0.0, 1.0)
    p, q = x - start[0] - along * dx, y - start[1] - along * dy
    return np.sqrt(p * p + q * q)


def _smooth(low: float, high: float, values: np.ndarray) -> np.ndarray:
    """0 below `low`, 1 above `high`, a cubic between."""
    t = np.clip((values - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def _value_noise(x: np.ndarray, y: np.ndarray, cells_x: int, cells_y: int, *key: str | int) -> np.ndarray:
    """Smooth noise from -1 to 1 with about the given number of bumps across the image, [height, width]."""
    lattice = counter_uniform(*key, shape=(cells_y + 2, cells_x + 2)) * 2.0 - 1.0
    column = np.clip((x + 1.0) * 0.5, 0.0, 0.999999) * cells_x
    row = np.clip((y + 1.0) * 0.5, 0.0, 0.999999) * cells_y
    left, top = np.floor(column).astype(np.int64), np.floor(row).astype(np.int64)
    u, v = column - left, row - top
    u, v = u * u * (3.0 - 2.0 * u), v * v * (3.0 - 2.0 * v)
    upper = lattice[top, left] * (1.0 - u) + lattice[top, left + 1] * u
    lower = lattice[top + 1, left] * (1.0 - u) + lattice[top + 1, left + 1] * u
    return upper * (1.0 - v) + lower * v


def _turn(half_tangent: float) -> tuple[float, float]:
    """Cosine and sine of the angle whose half has this tangent."""
    square = half_tangent * half_tangent
    return (1.0 - square) / (1.0 + square), 2.0 * half_tangent / (1.0 + square)


class _Painting:
    """The canvas of one face and the shapes painted on it, in the order that `render_face` calls them."""

    def __init__(self, attributes: dict[str, Any], size: int) -> None:
        self.a = attributes
        self.size = size
        fine = size * _SAMPLES
        axis = (np.arange(fine) * 2 + 1) / fine - 1.0
        self.image_x, self.image_y = np.meshgrid(axis, axis)
        cosine, sine = _turn(attributes["roll"])
        shifted_x = (self.image_x - attributes["shift"][0]) / attributes["scale"]
        shifted_y = (self.image_y - attributes["shift"][1]) / attributes["scale"]
        # x, y: the head's own frame, upright, its centre at the origin
        self.x = cosine * shifted_x + sine * shifted_y
        self.y = cosine * shifted_y - sine * shifted_x
        self.sample = 2.0 / fine / attributes["scale"]
        self.colour = np.zeros((fine, fine, 3))
        self.weights = np.zeros((len(PART_NAMES), fine, fine))
        self.yaw, self.pitch = _turn(attributes["yaw"]), _turn(attributes["pitch"])
        self.skin = np.array(attributes["skin"])
        self.hair = np.array(attributes["hair_colour"])
        self.width, self.height = attributes["face_width"], attributes["face_height"]
        self.shade = self._light(self.width * 1.12, self.height * 1.08, 0.0)

    def _light(self, width: float, height: float, centre_y: float) -> np.ndarray:
        """Brightness of an ellipsoid under the attributes' light, about 0.5 to 1.2, [fine, fine]."""
        normal_x, normal_y = self.x / width, (self.y - centre_y) / height
        normal_z = np.sqrt(np.maximum(1.0 - normal_x * normal_x - normal_y * normal_y, 0.02))
        light_x, light_y = self.a["light"]
        length = math.sqrt(light_x * light_x + light_y * light_y + 0.8 * 0.8)
        lambert = np.maximum((normal_x * light_x + normal_y * light_y + normal_z * 0.8) / length, 0.0)
        strength = self.a["light_strength"]
        return 1.08 - strength + strength * 1.12 * lambert

    def _paint(self, coverage: np.ndarray, colour: np.ndarray, part: str | None) -> None:
        """Lay `colour` ([3] or [fine, fine, 3]) over the canvas; part None tints without changing the mask."""
        self.colour += coverage[..., None] * (colour - self.colour)
        if part is not None:
            self.weights *= 1.0 - coverage
            self.weights[PART_NAMES.index(part)] += coverage

    def _inside(self, distance: np.ndarray) -> np.ndarray:
        return np.clip(0.5 - distance / self.sample, 0.0, 1.0)

    def _lit(self, colour: np.ndarray, shade: np.ndarray | None = None) -> np.ndarray:
        return colour * (self.shade if shade is None else shade)[..., None]

    def _place(self, u: float, v: float) -> tuple[float, float, float]:
        """The place of a point of the face's front after yaw and pitch: x, y, and its foreshortening in x."""
        p, q = u / self.width, v / self.height
        depth = math.sqrt(max(1.0 - p * p - q * q, 0.0)) * self.width
        x = u * self.yaw[0] + depth * self.yaw[1]
        y = v * self.pitch[0] + depth * self.pitch[1]
        # a surface point turned away by its own slope and the yaw appears narrower
        slope = u / max(depth, 0.2)
        return x, y, min(max(self.yaw[0] - slope * self.yaw[1], 0.55), 1.25)

    def background(self) -> None:
        first, second = (np.array(colour) for colour in self.a["background_colours"])
        kind = self.a["background"]
        if kind == "plain":
            mix = 0.15 * (self.image_y + 1.0)
        elif kind == "gradient":
            mix = 0.5 * (self.image_y + 1.0) * 0.9 + 0.05 * (self.image_x + 1.0)
        elif kind == "split":
            edge = float(counter_uniform("faces", self.a["texture"], "split edge")) * 1.2 - 0.6
            mix = self._inside(edge - self.image_x + 0.2 * self.image_y)
        else:
            mix = 0.5 + 0.5 * _value_noise(self.image_x, self.image_y, 4, 4, "faces", self.a["texture"], "clouds")
        grain = 0.03 * _value_noise(self.image_x, self.image_y, 14, 14, "faces", self.a["texture"], "grain")
        colour = first + (second - first) * mix[..., None] + grain[..., None]
        self._paint(np.ones_like(self.x), colour, "background")

    def _hair_colour(self, shade: np.ndarray) -> np.ndarray:
        """Hair with strands that run outwards from the crown, [fine, fine, 3]."""
        bend = self.x / (np.abs(self.y + 0.9) + 0.45)
        strands = _value_noise(bend, self.y * 0.5, 22, 3, "faces", self.a["texture"], "strands")
        return np.clip(self._lit(self.hair + 0.02, shade * (1.0 + 0.20 * strands)), 0.0, 1.0)

    def hair_behind(self) -> None:
        x, y, style = self.x - 0.25 * self.yaw[1] * -self.width, self.y, self.a["hair_style"]
        wide, tall = self.width, self.height
        if style == "long":
            distance = np.minimum(
                _ellipse(x, y + 0.08, wide * 1.20, tall * 1.10), _box(x, y - 0.45, wide * 1.16, 0.62, 0.22)
            )
        elif style == "bob":
            distance = np.minimum(
                _ellipse(x, y + 0.08, wide * 1.22, tall * 1.08), _box(x, y - 0.14, wide * 1.24, 0.36, 0.20)
            )
        elif style == "curly":
            distance = _ellipse(x, y + 0.14, wide * 1.34, tall * 1.08)
            for index in range(11):
                angle_cosine, angle_sine = _turn((index - 5) * 0.27)
                centre_x, centre_y = angle_sine * wide * 1.30, -0.10 - angle_cosine * tall * 1.05
                distance = np.minimum(distance, _ellipse(x - centre_x, y - centre_y, 0.16, 0.16))
        elif style == "bun":
            distance = _ellipse(x, y + tall * 1.13, 0.24, 0.20)
        else:
            return
        self._paint(self._inside(distance), self._hair_colour(0.72 * self.shade), "hair")

    def shoulders(self) -> None:
        x, y = self.x, self.y
        neck = _box(x, y - self.height * 1.0, self.width * 0.52, 0.36, 0.08)
        clothes = np.array(self.a["clothes_colour"])
        torso = _ellipse(x, y - 1.32, 0.98, 0.64)
        collar = _ellipse(x, y - 0.72, self.width * 0.62, 0.17)
        self._paint(self._inside(torso), self._lit(clothes, self._light(1.2, 1.2, 0.9)), "clothes")
        self._paint(self._inside(np.maximum(collar, torso - 0.02)), self._lit(self.skin, 0.80 * self.shade), "skin")
        # the chin's shadow
        self._paint(self._inside(neck) * (y < 0.80), self._lit(self.skin, 0.70 * self.shade), "skin")

    def _face_distance(self) -> np.ndarray:
        # below the cheekbones the outline narrows towards the chin, less so for a strong jaw
        lower = _smooth(0.0, self.height, self.y)
        narrowing = 1.0 - (0.14 - 0.30 * self.a["jaw"] * 0.5) * lower
        return _ellipse(self.x / narrowing, self.y, self.width, self.height) * 0.95

    def head(self) -> None:
        x, y = self.x, self.y
        for side in (-1.0, 1.0):
            ear_x = side * self.width * (1.0 - 0.25 * side * self.yaw[1]) - 0.12 * self.yaw[1]
            ear = _ellipse(x - ear_x, y - 0.03, 0.085, 0.15)
            self._paint(self._inside(ear), self._lit(self.skin * np.array([0.95, 0.86, 0.84])), "skin")
            inner = _ellipse(x - ear_x, y - 0.03, 0.04, 0.09)
            self._paint(0.5 * self._inside(inner), self._lit(self.skin * 0.72), None)
        self.face = self._face_distance()
        self._paint(self._inside(self.face), np.clip(self._lit(self.skin), 0.0, 1.0), "skin")
        inside = self._inside(self.face)
        # the outline darkens as the surface turns away
        self._paint(inside * 0.22 * _smooth(-0.14, 0.0, self.face), self._lit(self.skin * 0.45), None)
        for side in (-1.0, 1.0):
            cheek_x, cheek_y, narrow = self._place(side * 0.27, 0.20)
            cheek = _ellipse(x - cheek_x, y - cheek_y, 0.20 * narrow, 0.16)
            blush = np.clip(self.skin * np.array([1.06, 0.80, 0.78]), 0.0, 1.0)
            self._paint(inside * 0.40 * (1.0 - _smooth(-0.12, 0.06, cheek)), self._lit(blush), None)
        if self.a["facial_hair"] == "beard":
            jaw_x, jaw_y, _ = self._place(0.0, 0.10)
            opening = _ellipse(x - jaw_x, y - jaw_y, self.width * 0.80, 0.36)
            beard = np.maximum(np.maximum(self.face, -opening), 0.05 - y)
            self._paint(0.92 * self._inside(beard), self._hair_colour(0.9 * self.shade), "hair")

    def eye(self, side: float) -> tuple[float, float, float]:
        """The place of an eye (-1 the left one, 1 the right), as `_place` gives it."""
        return self._place(side * self.a["eye_spacing"], -0.07)

    def eyes(self) -> None:
        x, y, size = self.x, self.y, self.a["eye_size"]
        for side in (-1.0, 1.0):
            eye_x, eye_y, narrow = self.eye(side)
            width, height = size * narrow, size * self.a["eye_openness"]
            socket = _ellipse(x - eye_x, y - eye_y + 0.02, width * 1.55, size * 1.15)
            self._paint(0.35 * (1.0 - _smooth(-0.08, 0.05, socket)), self._lit(self.skin * 0.58), None)
            eye = _ellipse(x - eye_x, y - eye_y, width, height)
            self._paint(self._inside(eye), self._lit(np.array([0.97, 0.96, 0.95]), 0.35 + 0.62 * self.shade), "eyes")
            iris_x = eye_x + self.a["gaze"] * width * 0.6 + 0.02 * self.yaw[1]
            radius = size * self.a.get("iris", 0.54)
            iris = np.maximum(_ellipse(x - iris_x, y - eye_y, radius * narrow, radius), eye)
            colour = self.a["eye_colour"] if side < 0 else self.a.get("right_eye_colour", self.a["eye_colour"])
            self._paint(self._inside(iris), self._lit(np.array(colour)), "eyes")
            pupil = np.maximum(_ellipse(x - iris_x, y - eye_y, size * 0.27, size * 0.27), eye)
            self._paint(self._inside(pupil), np.array([0.03, 0.03, 0.04]), "eyes")
            glint = _ellipse(x - iris_x + 0.03, y - eye_y + 0.03, 0.024, 0.024)
            self._paint(0.9 * self._inside(np.maximum(glint, eye)), np.array([1.0, 1.0, 1.0]), "eyes")
            # the upper lid: the eye's outline, shifted down, cut out of the outline itself
            lid = np.maximum(np.abs(eye) - 0.017, (y - eye_y) + 0.01)
            self._paint(0.85 * self._inside(lid), self._lit(self.skin * 0.25), "eyes")

    def nose(self) -> None:
        x, y = self.x, self.y
        top_x, top_y, _ = self._place(0.0, -0.06)
        tip_x, tip_y, _ = self._place(0.0, -0.06 + self.a["nose_length"])
        tip_x += 0.10 * self.yaw[1]
        width = self.a["nose_width"]
        along = np.clip((y - top_y) / (tip_y - top_y), 0.0, 1.0)
        centre = top_x + (tip_x - top_x) * along
        half = width * (0.38 + 0.62 * along * along)
        nose = np.maximum(np.abs(x - centre) - half, np.maximum(top_y + 0.06 - y, y - tip_y - 0.03))
        ball = _ellipse(x - tip_x, y - tip_y + 0.01, width * 1.1, 0.07)
        whole = np.minimum(nose, ball)
        side = -1.0 if self.a["light"][0] > 0 else 1.0
        shadow = _segment(x, y, (top_x + side * width * 0.45, top_y + 0.02), (tip_x + side * width * 0.95, tip_y))
        self._paint(0.40 * (1.0 - _smooth(0.0, 0.075, shadow)), self._lit(self.skin * 0.50), None)
        ridge = _segment(x, y, (top_x - side * 0.015, top_y + 0.03), (tip_x - side * 0.015, tip_y - 0.03))
        bright = np.clip(self.skin * 1.14 + 0.05, 0.0, 1.0)
        self._paint(0.55 * (1.0 - _smooth(0.0, 0.06, ridge)), self._lit(bright), None)
        base = _ellipse(x - tip_x, y - tip_y - 0.045, width * 1.05, 0.026)
        self._paint(0.55 * (1.0 - _smooth(-0.02, 0.02, base)), self._lit(self.skin * 0.42), None)
        for nostril in (-1.0, 1.0):
            hole = _ellipse(x - tip_x - nostril * width * 0.55, y - tip_y - 0.035, 0.026, 0.018)
            self._paint(0.75 * self._inside(hole), self._lit(self.skin * 0.22), None)
        # the nose is skin as far as colour goes; only the mask tells it apart
        coverage = self._inside(whole)
        self.weights *= 1.0 - coverage
        self.weights[PART_NAMES.index("nose")] += coverage

    def mouth(self) -> None:
        x, y = self.x, self.y
        mouth_x, mouth_y, narrow = self._place(0.0, 0.36)
        width, thickness, opening = self.a["mouth_width"] * narrow, self.a["lip_thickness"], self.a["mouth_open"]
        if self.a["facial_hair"] != "none":
            above = _ellipse(x - mouth_x, y - mouth_y + 0.075, width * 1.08, 0.055)
            self._paint(0.92 * self._inside(above), self._hair_colour(0.9 * self.shade), "hair")
        across = np.clip((x - mouth_x) / width, -1.2, 1.2)
        # a smile lifts the corners, a frown drops them
        line = mouth_y - 0.085 * self.a["smile"] * (across * across - 0.35)
        taper = np.sqrt(np.maximum(1.0 - across * across, 0.0))
        half = (thickness + opening) * taper + 0.006
        lips = np.maximum(np.abs(y - line) - half, np.abs(x - mouth_x) - width)
        colour = np.array(self.a["lip_colour"]) * (0.45 + 0.55 * self.skin)
        self._paint(self._inside(lips), np.clip(self._lit(colour), 0.0, 1.0), "mouth")
        inner = np.maximum(np.abs(y - line) - opening * taper - 0.007, np.abs(x - mouth_x) - width * 0.92)
        self._paint(self._inside(inner), np.array([0.22, 0.07, 0.08]), "mouth")
        if opening > 0:
            teeth = np.maximum(inner, y - line - 0.15 * opening)
            self._paint(
                self._inside(teeth + 0.008), self._lit(np.array([0.94, 0.93, 0.90]), 0.3 + 0.6 * self.shade), "mouth"
            )
        under = _ellipse(x - mouth_x, y - mouth_y - thickness - opening - 0.055, width * 0.6, 0.022)
        self._paint(0.28 * (1.0 - _smooth(-0.02, 0.02, under)), self._lit(self.skin * 0.5), None)

    def hair_in_front(self) -> None:
        style = self.a["hair_style"]
        if style == "bald":
            return
        # the hair turns with the head, by less than the face in front of it
        x, y, wide, tall = self.x - 0.5 * self.width * self.yaw[1], self.y, self.width, self.height
        cap = _ellipse(self.x, y + 0.06, wide * 1.10, tall * 1.06)
        if style in ("short", "curly", "bun"):
            lowest, bend, part = -0.40, 1.35, 0.0
        elif style == "parted":
            lowest, bend, part = -0.46, 0.95, 0.22
        elif style == "fringe":
            lowest, bend, part = -0.25, 0.35, 0.0
        else:
            lowest, bend, part = -0.46, 2.30, 0.05
        p = x - part
        edge = lowest + bend * p * p
        slope = 2.0 * bend * p
        waves = 0.018 * _value_noise(self.x, self.y, 12, 12, "faces", self.a["texture"], "hairline")
        hairline = (y - edge) / np.sqrt(1.0 + slope * slope) + waves
        longest = {"short": 0.06, "parted": 0.02, "fringe": 0.04, "curly": 0.10, "bun": 0.0}.get(style, 0.48)
        distance = np.maximum(np.maximum(cap, hairline), y - longest)
        shadow = (1.0 - _smooth(0.0, 0.10, hairline)) * self._inside(self.face) * (y < longest)
        self._paint(0.30 * shadow, self._lit(self.skin * 0.4), None)
        self._paint(self._inside(distance), self._hair_colour(self._light(wide * 1.2, tall * 1.15, -0.05)), "hair")
        gloss = _ellipse(x + 0.25 * self.a["light"][0] * -1.0, y + tall * 0.80, wide * 0.5, 0.07)
        self._paint(
            0.22 * (1.0 - _smooth(-0.06, 0.05, gloss)) * self._inside(distance), np.clip(self.hair + 0.35, 0, 1), None
        )

    def brows(self) -> None:
        tilt, weight = self.a["brow_tilt"], self.a["brow_weight"]
        for side in (-1.0, 1.0):
            inner = self._place(side * (self.a["eye_spacing"] - 0.10), -0.235 + 0.12 * tilt)
            outer = self._place(side * (self.a["eye_spacing"] + 0.13), -0.235 - 0.10 * tilt)
            brow = _segment(self.x, self.y, inner[:2], outer[:2]) - weight
            self._paint(0.92 * self._inside(brow), self._lit(self.hair * 0.85), "brows")

    def glasses(self) -> None:
        kind = self.a["glasses"]
        if kind == "none":
            return
        frame = np.array([0.07, 0.06, 0.07]) + (0.25 if self.a["texture"] % 3 == 0 else 0.0)
        bridge = []
        for side in (-1.0, 1.0):
            x, y, narrow = self._place(side * (self.a["eye_spacing"] + 0.01), -0.06)
            if kind == "round":
                lens = _ellipse(self.x - x, self.y - y, 0.185 * narrow, 0.175)
            else:
                lens = _box(self.x - x, self.y - y, 0.190 * narrow, 0.145, 0.05)
            self._paint(0.16 * self._inside(lens), np.array([0.85, 0.92, 0.98]), None)
            self._paint(self._inside(np.abs(lens) - 0.026), frame, "glasses")
            bridge.append((x - side * 0.185 * narrow, y - 0.02))
            temple = _segment(
                self.x, self.y, (x + side * 0.185 * narrow, y - 0.03), (side * self.width * 1.02, y - 0.05)
            )
            self._paint(self._inside(temple - 0.022) * self._inside(self.face - 0.02), frame, "glasses")
        self._paint(self._inside(_segment(self.x, self.y, bridge[0], bridge[1]) - 0.022), frame, "glasses")

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        warmth = self.a["light_warmth"]
        colour = np.clip(self.colour * np.array([1.0 + warmth, 1.0, 1.0 - warmth]), 0.0, 1.0)
        image, weights = _average(colour), _average(np.moveaxis(self.weights, 0, -1))
        # rounded to a grid before comparing, so that a tie goes to the first part on every machine
        mask = np.argmax(np.round(weights * 4096.0), axis=-1).astype(np.uint8)
        return np.floor(image * 255.0 + 0.5).astype(np.uint8), mask


def _average(fine: np.ndarray) -> np.ndarray:
    """Mean over each pixel's samples, [fine, fine, n] -> [size, size, n], added up in a fixed order."""
    total = np.zeros_like(fine[::_SAMPLES, ::_SAMPLES])
    for row in range(_SAMPLES):
        for column in range(_SAMPLES):
            total += fine[row::_SAMPLES, column::_SAMPLES]
    return total / (_SAMPLES * _SAMPLES)
