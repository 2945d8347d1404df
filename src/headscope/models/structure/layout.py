"""The layout of one attention call: the samples of its rows, and the image, text and frames in its queries and keys."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from torch import Tensor, nn

from headscope.models.structure.sites import Site

IMAGE, TEXT, FRAME, ALL = "image", "text", "frame", "all"


class Segment(NamedTuple):
    """Queries (or keys) start..stop of one group.

    Attributes:
        group: "image", "text", "frame" (a query is a frame, at one place of the picture), or "all" where the model
            doesn't tell image and text apart.
        frame: the video frame that all of them belong to, else None.
    """

    group: str
    frame: int | None
    start: int
    stop: int


class Given(NamedTuple):
    """The inputs of an attention module in its current run.

    Attributes:
        text: text tokens beside the image; 0 for none.
        rows, tokens: of its first tensor; 0 where it isn't one of [rows, tokens, channels] or of images.
        attended: the rows of its earlier attention calls in this run.
        image_prompts: 1 where images come after the text, in calls of their own (IP-Adapter).
    """

    text: int = 0
    rows: int = 0
    tokens: int = 0
    attended: int = 0
    image_prompts: int = 0


class Place(NamedTuple):
    """The rows of a module's run that an attention call takes.

    Attributes:
        samples: how many samples of the batch this run of the module has.
        rows: the rows that they are together.
        first: the call's first row among those: a module may attend to one part of its rows after the other.
        alone: the call tells nothing of the module's run, and counts as one by itself.
    """

    samples: int
    rows: int
    first: int
    alone: bool = False


def place_of(batch: int, given: Given, rows: int, queries: int) -> Place | None:
    """The place of a call on so many rows and queries in a batch; None where it can't be told."""
    whole = given.rows
    # with as many rows as samples, or as many queries as tokens, the module has not folded them otherwise
    if rows < whole and whole % batch == 0 and (whole == batch or rows % batch or queries == given.tokens):
        return Place(batch, whole, given.attended % whole)
    if rows % batch == 0:
        return Place(batch, rows, 0)
    if rows <= whole < batch and batch % whole == 0:
        return Place(whole, whole, given.attended % whole)
    return Place(rows, rows, 0, alone=True) if batch % rows == 0 else None


@dataclass(frozen=True)
class Layout:
    """The layout of one attention call [rows, heads, queries, dim].

    Attributes:
        samples: how many samples of the batch its rows are.
        first_sample: the first of them: attention may walk through the batch in several calls.
        fold: rows per sample, where frames or pixels were folded into the batch.
        folds_frames: those rows are frames.
        queries: the groups of its queries.
        keys: the groups of its keys; empty where nothing is known of them.
        grid: (height, width) of the image's queries, row by row, where the model tells it.
    """

    samples: int
    first_sample: int
    fold: int
    folds_frames: bool
    queries: tuple[Segment, ...]
    keys: tuple[Segment, ...]
    grid: tuple[int, int] | None

    @property
    def end_sample(self) -> int:
        """The sample after the last one."""
        return self.first_sample + self.samples


@dataclass(frozen=True)
class Geometry:
    """The batch and the tokens of a forward, as the denoiser's arguments and configuration give them.

    Attributes:
        batch: the samples in it, all guidance branches together.
        size: (height, width) of its input in pixels or latents, where it is a picture or a video.
        frames: the number of frames of a video, else None.
        tokens: the number of image tokens, where its input is a sequence already.
        text: the number of text tokens it is given, else 0.
        patch: the edge of a patch; None where the model downsamples step by step.
        patch_frames: frames per patch.
        ids: places of image tokens [tokens, 3] (frame, row, column), where the model is given them.
        packed: its input has no dimension of samples: a packed sequence, which is one sample.
    """

    batch: int
    size: tuple[int, int] | None = None
    frames: int | None = None
    tokens: int | None = None
    text: int = 0
    patch: int | None = None
    patch_frames: int = 1
    ids: Tensor | None = field(default=None, compare=False)
    packed: bool = False

    @classmethod
    def of(cls, denoiser: nn.Module, arguments: Mapping[str, Any]) -> "Geometry":
        """Read it off the denoiser's arguments and configuration; nothing is read back from the device."""
        sample = next((value for value in arguments.values() if isinstance(value, (Tensor, list))), None)
        if isinstance(sample, list):
            return cls(len(sample))
        if sample is None:
            raise ValueError(f"{type(denoiser).__name__} was called without a tensor, expected its input among them")
        if sample.ndim < 2:
            return cls(1, packed=True)
        config = getattr(denoiser, "config", None) or {}
        text = arguments.get("encoder_hidden_states")
        # with an image prompt (IP-Adapter) the text comes first
        text = text[0] if isinstance(text, tuple) and text else text
        text_tokens = int(text.shape[1]) if isinstance(text, Tensor) and text.ndim == 3 else 0
        patch, patch_frames = _patch(config)
        frames = arguments.get("num_frames")
        frames = frames if isinstance(frames, int) and frames > 1 else None
        if sample.ndim == 4:
            size = (int(sample.shape[2]), int(sample.shape[3]))
            # a video whose frames are pictures of the batch
            if frames is not None and sample.shape[0] % frames == 0:
                return cls(sample.shape[0] // frames, size, frames, None, text_tokens, patch)
            return cls(sample.shape[0], size, None, None, text_tokens, patch)
        if sample.ndim == 5:
            channels_second = sample.shape[1] == config.get("in_channels", sample.shape[1])
            count = int(sample.shape[2] if channels_second else sample.shape[1])
            size = (int(sample.shape[3]), int(sample.shape[4]))
            return cls(sample.shape[0], size, count, None, text_tokens, patch, patch_frames)
        tokens = int(sample.shape[1]) if sample.ndim == 3 else None
        ids = arguments.get("img_ids")
        height, width = arguments.get("height"), arguments.get("width")
        size = (height, width) if isinstance(height, int) and isinstance(width, int) else None
        # a packed sequence is patched already
        return cls(sample.shape[0], size, frames, tokens, text_tokens, 1, 1, ids if isinstance(ids, Tensor) else None)

    def same_as(self, other: "Geometry") -> bool:
        """True if both are equal, and the places of their tokens are one tensor."""
        return self.ids is other.ids and self == other

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """(height, width) of a picture of that many tokens, or None. May read `ids` back from the device, once."""
        known = self._grid_of_size(tokens)
        return self._grid_of_ids if known is None and tokens == self.tokens else known

    @cached_property
    def _grid_of_ids(self) -> tuple[int, int] | None:
        if self.ids is None:
            return None
        ids = self.ids.reshape(-1, self.ids.shape[-1])[: self.tokens]
        height, width = (int(x) for x in (ids[:, -2:].amax(0) - ids[:, -2:].amin(0) + 1).tolist())
        return (height, width) if height * width == self.tokens else None

    def _grid_of_size(self, tokens: int) -> tuple[int, int] | None:
        if self.size is None:
            return None
        height, width = self.size
        if self.patch is not None:
            found = (height // self.patch, width // self.patch)
            return found if found[0] * found[1] == tokens else None
        while True:
            if height * width == tokens:
                return height, width
            if (height, width) == (1, 1):
                return None
            # a convolution of stride 2 rounds up
            height, width = math.ceil(height / 2), math.ceil(width / 2)

    def video_frames(self, tokens: int) -> int | None:
        """The number of frames that so many image tokens make; None where they make none."""
        if self.frames is None:
            return None
        frames = max(1, self.frames // self.patch_frames)
        whole = tokens % frames == 0 and self._grid_of_size(tokens // frames) is not None
        return frames if whole else None


def _patch(config: Mapping[str, Any]) -> tuple[int | None, int]:
    size = config.get("patch_size")
    if isinstance(size, (list, tuple)):
        return int(size[-1]), int(size[0]) if len(size) == 3 else 1
    frames = config.get("patch_size_t")
    return (int(size) if isinstance(size, int) else None), int(frames) if isinstance(frames, int) else 1


@lru_cache(maxsize=4096)
def layout_of(
    site: Site, geometry: Geometry, rows: int, queries: int, keys: int, given: Given, place: Place, first_sample: int
) -> Layout:
    """The layout of an attention call.

    Args:
        rows, queries, keys: its sizes.
        first_sample: the first sample that it is of.
    """
    fold = place.rows // place.samples
    segments = _query_segments(site, geometry, queries, keys, given, fold)
    text = given.text or geometry.text
    # an image prompt may have as many tokens as the text
    if given.image_prompts and given.attended >= given.rows:
        key_segments = ()
    elif site.kind == "cross" and keys == text:
        key_segments = (Segment(TEXT, None, 0, keys),)
    else:
        key_segments = segments if keys == queries else ()
    images = [segment for segment in segments if segment.group == IMAGE]
    folds_frames = fold > 1 and fold == geometry.frames and bool(images) and images[0].frame is None
    grid = geometry._grid_of_size(images[0].stop - images[0].start) if images else None
    return Layout(rows // fold, first_sample, fold, folds_frames, segments, key_segments, grid)


def _query_segments(
    site: Site, geometry: Geometry, queries: int, keys: int, given: Given, fold: int
) -> tuple[Segment, ...]:
    text = given.text or geometry.text
    if site.kind == "joint" and queries == keys and site.text_first is not None:
        # of a sample's text, some modules leave out what is padding
        if given.text and 0 < queries - given.tokens < text:
            text = queries - given.tokens
        image = queries - text
        if 0 < text < queries and _image_tokens(geometry, image):
            if site.text_first:
                return Segment(TEXT, None, 0, text), *_image_segments(geometry, image, text)
            return *_image_segments(geometry, image, 0), Segment(TEXT, None, image, queries)
    # before the image: a place of the picture in every row
    if fold > 1 and queries == geometry.frames and geometry._grid_of_size(fold) is not None:
        return (Segment(FRAME, None, 0, queries),)
    if _image_tokens(geometry, queries):
        return tuple(_image_segments(geometry, queries, 0))
    if queries == geometry.text and site.kind == "self":
        return (Segment(TEXT, None, 0, queries),)
    return (Segment(ALL, None, 0, queries),)


def _image_tokens(geometry: Geometry, tokens: int) -> bool:
    known = geometry._grid_of_size(tokens) is not None or geometry.video_frames(tokens) is not None
    return known or tokens == geometry.tokens


def _image_segments(geometry: Geometry, tokens: int, start: int) -> list[Segment]:
    frames = geometry.video_frames(tokens)
    if frames is None:
        return [Segment(IMAGE, None, start, start + tokens)]
    size = tokens // frames
    return [Segment(IMAGE, frame, start + frame * size, start + (frame + 1) * size) for frame in range(frames)]
