"""Features of the user's own, and losses over the pixels of a feature alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headscope._shapes import Float64, ItemScore, Sample
from headscope.features import FeatureItem, OwnFeature, columns_of, pixels_of
from headscope.models.recording.tensors import moved
from headscope.sweep.compute.scores import naming
from headscope.sweep.plan.functions import imported


def own_features(names: Sequence[str]) -> dict[str, OwnFeature]:
    """The user's features by name: functions of an item.

    Raises:
        ValueError: no such module or function; from one of them, what it raised.
    """

    def named(name: str, feature: OwnFeature) -> OwnFeature:
        def run(item: Any) -> Any:
            with naming("features", name):
                return feature(item)

        return run

    return {name.rpartition(":")[2]: named(name, imported("features", name)) for name in names}


class FeatureErrors:
    """Losses over the pixels of features of some items (`headscope.features.pixels_of`).

    Args:
        items: with images.
        names: of the features.
        own: features of the user's own, by name.
        target: of the items, [items, channels, height, width], whose places are the pixels, or those of latents.

    Attributes:
        shares: by the feature's columns, which share of each item's pixels are of it.
    """

    def __init__(
        self, items: Sequence[FeatureItem], names: Sequence[str], own: Mapping[str, OwnFeature], target: Sample
    ) -> None:
        height, width = target.shape[2:]
        # by columns, [items, 1, height, width]
        self._inside: dict[tuple[str, str, str], Tensor] = {}
        self.shares: dict[tuple[str, str, str], Float64[np.ndarray, " items"]] = {}
        for name in names:
            inside = np.stack([pixels_of(item, name, own, (height, width)) for item in items])
            self.shares[columns_of(name)] = inside.mean((1, 2))
            self._inside[columns_of(name)] = torch.from_numpy(inside).to(target.device)[:, None]

    def of(self, prediction: Sample, target: Sample, items: Sequence[int]) -> dict[tuple[str, str, str], ItemScore]:
        """By the feature's columns, the mean squared error over its pixels of each row; NaN where there is none.

        Args:
            items: of the rows, by their places among the items.
        """
        if not self._inside:
            return {}
        squares = prediction.to(torch.float64, copy=True).sub_(target).square_()
        rows = moved(torch.tensor(list(items)), target.device)
        found = {}
        for columns, inside in self._inside.items():
            mine = inside.index_select(0, rows)
            # selected, not weighted: 0 times an error that isn't finite is NaN
            total = torch.where(mine, squares, 0).flatten(1).sum(1)
            found[columns] = total / (mine.flatten(1).sum(1) * squares.shape[1])
        return found
