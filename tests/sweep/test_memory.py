"""A sweep holds no more after many units than after a few."""

import gc
from collections import Counter

import pytest
import torch

from headscope.sweep import Execution, SweepConfig
from headscope.sweep.compute.opened import Opened
from headscope.sweep.work.executors.member import Silent
from headscope.sweep.work.worker import work

# units after which every kind of unit has run and every cache is filled
SETTLED = 4


class Counting(Silent):
    """What is alive after each unit."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[int] = []
        self.objects: list[int] = []

    def finished(self, unit) -> None:
        gc.collect()
        alive = gc.get_objects()
        self.objects.append(len(alive))
        self.tensors.append(sum(issubclass(type(entry), torch.Tensor) for entry in alive))


@pytest.mark.full
def test_nothing_piles_up_over_units(ddpm_directory, tmp_path):
    config = SweepConfig(
        model=ddpm_directory,
        groups=("lfw",),
        splits=("confirm",),
        items=4,
        timesteps=tuple(range(50, 650, 50)),
        fills=("mean", "zero"),
        scores=("loss", "distance"),
        sites=("mid_block.*",),
        observe=False,
    )
    opened = Opened(config, Execution(rows=16))
    kinds = Counter(unit.kind for unit in opened.plan.units)
    assert kinds["ablations"] == 12
    counting = Counting()
    work(opened.context(opened.store(tmp_path / "run")), "", counting)
    tensors, objects = counting.tensors[SETTLED:], counting.objects[SETTLED:]
    # a unit computed meanwhile holds some of its own; a leak of one thing a unit would be more than half of the count
    # of units apart, a leak of a unit's predictions (at least 3 tensors) far more
    assert max(tensors) - min(tensors) < len(tensors) / 2
    per_unit = (objects[-1] - objects[0]) / (len(objects) - 1)
    assert per_unit < 50
