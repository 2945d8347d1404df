"""Mean head outputs of reference items, as the files of reference units hold them: of all items, and of each fold."""

from collections.abc import Mapping

from torch import Tensor

from headscope.models import Recording
from headscope.sweep.plan.config import fold_of


def stored(means: Mapping[str, Recording]) -> dict[str, Tensor]:
    """Recordings of means, by the fill they are, as tensors named for safetensors; `read` is the inverse."""
    found = {}
    for fill, recording in means.items():
        first = f"{fill}|" if fold_of(fill) else ""
        found |= {first + name: tensor for name, tensor in recording.to_tensors().items()}
    return found


def read(tensors: Mapping[str, Tensor]) -> dict[str, Recording]:
    """The recordings of means that `stored` wrote, by fill."""
    by_fill: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        fill, bar, rest = name.partition("|")
        place = (fill, rest) if bar and fold_of(fill) else ("mean", name)
        by_fill.setdefault(place[0], {})[place[1]] = tensor
    return {fill: Recording.from_tensors(found) for fill, found in by_fill.items()}
