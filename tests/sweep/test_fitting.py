"""How many rows go through at once, and what happens where they are too many."""

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from torch import nn

from headscope.models import PixelTask
from headscope.sweep import Run, SweepConfig, run_sweep
from headscope.sweep.fitting import CPU_ROWS, Rows, _rows, fitting_rows, measured_bytes, prefers_channels_last
from sweep.faults import ordered


def test_rows_are_what_fits():
    mebi = 2**20
    assert _rows([10 * mebi, 20 * mebi], 10_000 * mebi, 64) == 64
    # 70 % of 400 MiB at 10 MiB a row: 28, down to a multiple of 8
    assert _rows([10 * mebi, 20 * mebi], 400 * mebi, 64) == 24
    assert _rows([10 * mebi, 20 * mebi], 60 * mebi, 64) == 4
    assert _rows([10 * mebi, 20 * mebi], 1 * mebi, 64) == 1


def test_bytes_are_counted_and_views_are_not():
    device = torch.device("cpu")
    assert measured_bytes(device, lambda: torch.zeros(1000)) == 4000
    assert measured_bytes(device, lambda: torch.zeros(1000).view(10, 100).transpose(0, 1)) == 4000
    assert fitting_rows(device, lambda rows: torch.zeros(rows, 1000)) == CPU_ROWS


def test_convolutional_models_like_channels_last():
    assert prefers_channels_last(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Linear(8, 8)))
    assert not prefers_channels_last(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Linear(64, 64)))


def test_pieces_are_halved_and_nothing_is_done_twice():
    done: list[int] = []

    def compute(piece: range) -> None:
        if len(piece) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.extend(piece)

    rows = Rows(16)
    rows.run(21, compute)
    assert done == list(range(21))
    assert rows.most == 2
    with pytest.raises(torch.OutOfMemoryError):
        Rows(1).run(1, lambda piece: compute(range(4)))
    with pytest.raises(ZeroDivisionError):
        Rows(4).run(4, lambda piece: 1 // 0)


def test_a_sweep_that_runs_out_of_memory_goes_on_in_smaller_batches(ddpm_directory, tmp_path, monkeypatch):
    config = SweepConfig(
        model=ddpm_directory, groups=("faces",), splits=("confirm",), items=5, timesteps=(60,), fills=("zero",)
    )
    run_sweep(config, tmp_path / "whole", progress=False, batch=16)
    predict = PixelTask.predict
    largest = []

    def small(self, inputs):
        if len(inputs.sample) > 3:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        largest.append(len(inputs.sample))
        return predict(self, inputs)

    monkeypatch.setattr(PixelTask, "predict", small)
    run_sweep(config, tmp_path / "run", progress=False, batch=16)
    assert max(largest) <= 3
    for kind in ("observations", "ablations"):
        one, two = (ordered(Run.open(tmp_path / name), kind) for name in ("run", "whole"))
        assert isinstance(one, pl.DataFrame)
        assert_frame_equal(one, two, rel_tol=1e-5, abs_tol=1e-7)
