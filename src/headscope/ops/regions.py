"""Regions of a picture, for each sample: from pixels to the tokens of any grid."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headscope._shapes import Bool, Float, Int32, Integer, Shaped

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

Relation = Mapping[str, Sequence[str]] | Bool[Tensor, "_samples regions regions"]


class Regions:
    """Regions of the picture, such as the parts of a face, of each sample of a batch.

    A token of a height x width grid covers its rectangle of the picture. It belongs to the region that covers the
    largest share of it, the pixels of no region counting as one more. Of equal shares the region with the lowest number
    has it, and any region before none. A region that covers less than the share `least` of a token doesn't get it: 0.5
    asks for half of it, 1 for tokens that lie inside of one region. Shares are counted in whole numbers, without
    rounding.

    Args:
        masks: integers, the region of each pixel, 0 to len(names) - 1, -1: in none; one for each sample, or for all.
        names: the regions' names, each once.
        counterparts: which regions are the counterparts of each: {name: names}, the same for every sample, or bool
            [samples or 1, regions, regions] (of a region the row). None where nothing is said of counterparts.
        least: the share of a token, 0 to 1.

    Attributes:
        masks: int16 or wider, on the device they were given on.
        names: of the regions, in the order of their numbers.
        counterparts: bool [samples or 1, regions, regions], or None.

    Raises:
        TypeError: masks of another kind, names that are no texts.
        ValueError: another shape, a number that no region has, names that come twice, an unknown counterpart.
    """

    def __init__(
        self,
        masks: Integer[Tensor, "_samples height width"],
        names: Sequence[str],
        counterparts: Relation | None = None,
        *,
        least: float = 0.0,
    ) -> None:
        self.names = checked_names("names", names)
        self.masks = _checked_masks(masks, len(self.names))
        if isinstance(least, bool) or not isinstance(least, (int, float)) or not 0 <= least <= 1:
            raise ValueError(f"least: got {least!r}, expected a share of a token, 0 to 1")
        self.least = float(least)
        self.counterparts = None if counterparts is None else self._relation(counterparts)
        # by grid and device
        self._tokens: dict[tuple[tuple[int, int], torch.device], Tensor] = {}

    def __len__(self) -> int:
        """The number of regions."""
        return len(self.names)

    def __repr__(self) -> str:
        samples, height, width = self.masks.shape
        return f"Regions({len(self)} regions, {samples} samples of {height} x {width})"

    @property
    def samples(self) -> int:
        """The number of samples; 1 may stand for all."""
        return self.masks.shape[0]

    @classmethod
    def of(
        cls, items: Sequence[Any], parts: Sequence[str] | None = None, *, least: float = 0.0, names: Sequence[str] = ()
    ) -> "Regions":
        """The parts of some items as regions, a sample each.

        A region is another's counterpart where pixels of the other have counterparts in it.

        Args:
            items: with `part_mask` [height, width], `part_names`, and, if they have any, `counterparts` (as the zoo's
                items have them).
            parts: the names of those to take; what is in no other counts as none. All by default.
            names: the parts' names, where the items don't say.

        Raises:
            ValueError: no items, one without a mask, masks of different sizes or with different parts, an unknown part.
        """
        if not len(items):
            raise ValueError("items: got none, expected at least one")
        every = tuple(names or getattr(items[0], "part_names", ()))
        first: Any = getattr(items[0], "part_mask", None)
        for index, item in enumerate(items):
            if getattr(item, "part_mask", None) is None:
                raise ValueError(f"items: {_called(item, index)} has no part mask, expected one of every item")
            own = tuple(names or getattr(item, "part_names", ()))
            if own != every:
                raise ValueError(
                    f"items: {_called(item, index)} has the parts {list(own)}, expected those of the first one,"
                    f" {list(every)}"
                )
            if item.part_mask.shape != first.shape:
                raise ValueError(
                    f"items: {_called(item, index)} has a mask of shape {list(item.part_mask.shape)}, expected"
                    f" {list(first.shape)} as the first one"
                )
        if not every:
            raise ValueError(f"names: got none, and {_called(items[0], 0)} doesn't say what its parts are called")
        regions = cls(
            torch.from_numpy(np.stack([item.part_mask for item in items]).astype(np.int16)),
            every,
            _relation_of(items, len(every)),
            least=least,
        )
        return regions if parts is None else regions.only(parts)

    def only(self, names: Sequence[str]) -> "Regions":
        """Some of the regions, in this order; the others' pixels are in none.

        Raises:
            ValueError: an unknown name, or one twice.
        """
        names = checked_names("parts", names)
        for name in names:
            if name not in self.names:
                raise ValueError(f"parts: got {name!r}, expected some of {', '.join(self.names)}")
        chosen = [self.names.index(name) for name in names]
        # the last entry is that of -1
        renumbered = torch.full((len(self) + 1,), -1, dtype=self.masks.dtype, device=self.masks.device)
        renumbered[chosen] = torch.arange(len(chosen), dtype=self.masks.dtype, device=self.masks.device)
        relation = None if self.counterparts is None else self.counterparts[:, chosen][:, :, chosen]
        return Regions(renumbered[self.masks.long()], names, relation, least=self.least)

    def take(self, samples: Sequence[int]) -> "Regions":
        """Other samples: row i has what sample `samples[i]` has. For batches in which an item stands several times.

        Raises:
            ValueError: none, or one that isn't there.
        """
        for index in samples:
            if not 0 <= index < self.samples:
                raise ValueError(f"samples: got {index}, expected 0 to {self.samples - 1}")
        if not len(samples):
            raise ValueError("samples: got none, expected at least one")
        chosen = torch.as_tensor(list(samples), device=self.masks.device)
        relation = self.counterparts
        if relation is not None and relation.shape[0] > 1:
            relation = relation[chosen.to(relation.device)]
        return Regions(self.masks[chosen], self.names, relation, least=self.least)

    def on_grid(self, grid: tuple[int, int], device: torch.device | None = None) -> Int32[Tensor, "_samples tokens"]:
        """The region of each token of a grid, row by row, -1: in none. Worked out once for each grid and device.

        Args:
            grid: (height, width) in tokens.
            device: that of the masks by default.
        """
        device = self.masks.device if device is None else device
        found = self._tokens.get((grid, device))
        if found is None:
            # ordinary tensors, which a later forward may save for its backward
            with torch.inference_mode(False), torch.no_grad():
                found = self._tokens[grid, device] = self._on_grid(self.masks.to(device), grid)
        return found

    def _on_grid(self, masks: Tensor, grid: tuple[int, int]) -> Tensor:
        whole = masks.shape[1] * masks.shape[2]
        most = coverage(masks == -1, grid)
        token = torch.full(most.shape, -1, dtype=torch.int32, device=masks.device)
        for number in range(len(self)):
            covered = coverage(masks == number, grid)
            # a region comes before none, and before those of higher numbers
            better = (covered > most) | ((covered == most) & (token == -1) & (covered > 0))
            token = token.masked_fill(better, number)
            most = torch.maximum(most, covered)
        return token.masked_fill(most < self.least * whole, -1).flatten(1)

    def _relation(self, given: Relation) -> Tensor:
        count, device = len(self), self.masks.device
        if isinstance(given, Tensor):
            if given.dtype != torch.bool or given.shape not in ((1, count, count), (self.samples, count, count)):
                raise ValueError(
                    f"counterparts: got {given.dtype} of shape {list(given.shape)}, expected bool"
                    f" [{self.samples} or 1, {count}, {count}]"
                )
            return given.to(device)
        relation = torch.zeros(1, count, count, dtype=torch.bool)
        for name, others in given.items():
            others = (others,) if isinstance(others, str) else others
            for other in (name, *others):
                if other not in self.names:
                    raise ValueError(f"counterparts: got {other!r}, expected some of {', '.join(self.names)}")
            for other in others:
                relation[0, self.names.index(name), self.names.index(other)] = True
        return relation.to(device)


def coverage(
    masks: Bool[Tensor, "samples height width"], grid: tuple[int, int]
) -> Float[Tensor, "samples _rows _columns"]:
    """How much of each token of a grid is covered; height * width: all of it. Whole numbers, exact."""
    # MPS has no float64
    dtype = torch.float32 if masks.device.type == "mps" else torch.float64
    down, across = (
        overlaps(tokens, pixels).to(masks.device, dtype) for tokens, pixels in zip(grid, masks.shape[1:], strict=True)
    )
    return down @ masks.to(dtype) @ across.T


def overlaps(tokens: int, pixels: int) -> Shaped[Tensor, "tokens pixels"]:
    """How much of each pixel lies in each token, along an edge: a token is `pixels` long, a pixel `tokens`."""
    token, pixel = torch.arange(tokens + 1) * pixels, torch.arange(pixels + 1) * tokens
    ends = torch.minimum(token[1:, None], pixel[None, 1:])
    return (ends - torch.maximum(token[:-1, None], pixel[None, :-1])).clamp(min=0)


def checked_names(argument: str, names: Sequence[str]) -> tuple[str, ...]:
    """Names, of which there is at least one, and each once; raises TypeError or ValueError for others."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{argument}: got {names!r}, expected a list of texts")
    if not len(names) or not all(names) or len(set(names)) != len(names):
        raise ValueError(f"{argument}: got {list(names)}, expected at least one name, each once and none empty")
    return tuple(names)


def _checked_masks(masks: Any, count: int) -> Tensor:
    if not isinstance(masks, Tensor) or masks.dtype not in _INTEGERS:
        kind = masks.dtype if isinstance(masks, Tensor) else type(masks).__name__
        raise TypeError(f"masks: got {kind}, expected an integer tensor [samples or 1, height, width]")
    if masks.ndim != 3 or not all(masks.shape):
        raise ValueError(
            f"masks: got shape {list(masks.shape)}, expected [samples or 1, height, width], none of them 0"
        )
    lowest, highest = (int(number) for number in masks.aminmax())
    if lowest < -1 or highest >= count:
        raise ValueError(
            f"masks: got numbers from {lowest} to {highest}, expected 0 to {count - 1}, those of {count} names, or -1"
        )
    return masks.to(torch.int16) if count < 2**15 else masks.to(torch.int64)


def _relation_of(items: Sequence[Any], count: int) -> Tensor | None:
    """The counterparts of items' regions, from those of their pixels; None where no item has any."""
    every = [getattr(item, "counterparts", None) for item in items]
    if all(counterparts is None for counterparts in every):
        return None
    relation = np.zeros((len(items), count, count), bool)
    for number, (item, counterparts) in enumerate(zip(items, every, strict=True)):
        if counterparts is None:
            continue
        parts = item.part_mask.astype(np.int64)
        if parts.max() >= count:
            raise ValueError(
                f"items: {_called(item, number)} has a mask with a part {parts.max()}, expected 0 to {count - 1}"
            )
        own = np.broadcast_to(parts[..., None], counterparts.shape)
        known = counterparts >= 0
        relation[number, own[known], parts.ravel()[counterparts[known]]] = True
    return torch.from_numpy(relation)


def _called(item: Any, index: int) -> str:
    return repr(getattr(item, "key", f"item {index}"))
