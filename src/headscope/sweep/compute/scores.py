"""Scores of edited predictions and images."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headscope._extras import require
from headscope._shapes import Float64, Images, ItemScore, Sample
from headscope.sweep.compute.fitting import is_out_of_memory
from headscope.sweep.plan.functions import imported

ImageScore = Callable[[np.ndarray, np.ndarray], Any]


def squared_error(prediction: Sample, target: Sample) -> ItemScore:
    """The mean squared difference over each row's elements, on their device."""
    # in place: fresh memory costs more than the arithmetic
    return prediction.to(torch.float64, copy=True).sub_(target).square_().flatten(1).mean(1)


def image_distance(edited: Images, clean: Images) -> Float64[np.ndarray, " items"]:
    """Mean squared difference of images, on a scale from 0 to 1."""
    difference = (edited.astype(np.float64) - clean) / 255.0
    return np.square(difference).reshape(len(edited), -1).mean(1)


def image_scores(names: Sequence[str]) -> dict[str, ImageScore]:
    """Functions of (clean, edited), uint8 [images, height, width, 3], that give a number for each image.

    Raises:
        ValueError: no such module or function.
        ImportError: torchmetrics isn't there.
    """
    return {name.rpartition(":")[2]: _named(name) for name in names}


def _named(name: str) -> ImageScore:
    if ":" not in name:
        require("torchmetrics", "sweep")
        return lambda clean, edited: _torchmetrics(name, clean, edited)
    score = imported("image_scores", name)

    def run(clean: np.ndarray, edited: np.ndarray) -> Any:
        with naming("image_scores", name):
            # copies: what one score does in place, others would see
            return score(clean.copy(), edited.copy())

    return run


@contextmanager
def naming(field: str, name: str) -> Iterator[None]:
    """Errors of the user's function name it; memory that ran out stays what it is, and fewer rows are tried."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{field}: {name} raised {type(error).__name__}: {error}") from error


def _torchmetrics(name: str, clean: np.ndarray, edited: np.ndarray) -> np.ndarray:
    image = require("torchmetrics.functional.image", "sweep")
    regression = require("torchmetrics.functional.regression", "sweep")
    # both on a scale from 0 to 1
    one, two = (torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255.0 for images in (clean, edited))
    if name == "mse":
        values = [regression.mean_squared_error(*pair) for pair in zip(two.contiguous(), one.contiguous(), strict=True)]
        return torch.stack(values).numpy()
    if name == "psnr":
        return image.peak_signal_noise_ratio(two, one, data_range=1.0, reduction="none", dim=(1, 2, 3)).numpy()
    values = image.structural_similarity_index_measure(two, one, data_range=1.0, reduction="none")
    return values.reshape(len(clean)).numpy()


def checked_score(name: str, values: Any, count: int, field: str = "image_scores") -> np.ndarray:
    """A score's numbers, one for each of `count` rows or images.

    Raises:
        ValueError: it gave another number of them, or something else than real numbers.
    """
    if isinstance(values, Tensor):
        # NumPy has no bfloat16
        values = (values.double() if values.is_floating_point() else values).detach().cpu()
    try:
        if np.ma.is_masked(values):
            raise TypeError("some are masked")
        found = np.asarray(values)
        # lists of a library's numbers, such as 0-dimensional tensors
        found = _numbers(found) if found.dtype == object else found
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{field}: {name} gave {type(values).__name__}, expected real numbers ({error})") from None
    if found.dtype.kind not in "biuf":
        raise ValueError(f"{field}: {name} gave numbers of dtype {found.dtype}, expected real ones")
    if found.shape != (count,):
        raise ValueError(f"{field}: {name} gave an array {list(found.shape)}, expected [{count}]")
    return found.astype(np.float64)


def _numbers(objects: np.ndarray) -> np.ndarray:
    """Float64 of objects that are numbers; raises TypeError for others, such as None and texts, which NumPy takes."""
    for one in objects.flat:
        if one is None or isinstance(one, (str, bytes)):
            raise TypeError(f"one is {one!r}")
    return objects.astype(np.float64)


def own_scores(names: Sequence[str]) -> dict[str, Callable[[Tensor, Tensor, Any], np.ndarray]]:
    """The user's scores of a teacher-forced forward, by the columns they fill: functions of the edited prediction, the
    clean one and the inputs.

    Raises:
        ValueError: no such module or function; from one of them, that it gave no number for each row.
    """

    def checked(name: str, score: Callable[..., Any]) -> Callable[[Tensor, Tensor, Any], np.ndarray]:
        def run(edited: Tensor, clean: Tensor, inputs: Any) -> np.ndarray:
            # copies: what one score does in place, others would see
            conditioning = {part: tensor.clone() for part, tensor in inputs.conditioning.items()}
            copies = replace(
                inputs, sample=inputs.sample.clone(), target=inputs.target.clone(), conditioning=conditioning
            )
            with naming("scores", name):
                values = score(edited.clone(), clean.clone(), copies.target, copies)
            return checked_score(name, values, len(edited), "scores")

        return run

    named = [name for name in names if ":" in name]
    return {name.rpartition(":")[2]: checked(name, imported("scores", name)) for name in named}
