"""How many rows go through at once, and what happens where they are too many."""

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from torch import nn
from torch.utils._pytree import tree_leaves

from headscope.models import PixelTask
from headscope.sweep import Execution, Run, SweepConfig, run_sweep
from headscope.sweep.compute.fitting import CPU_ROWS, Rows, Sharing, fit, fitted, measured_bytes, prefers_channels_last
from headscope.sweep.compute.opened import Opened
from headscope.sweep.store.store import Fit
from sweep.faults import ordered

MEBI = 2**20
# a whole forward takes 10 MiB a row
USED = (10 * MEBI, 20 * MEBI)


def test_rows_are_what_fits():
    alone = Sharing()
    assert fitted(USED, alone, 4, 10_000 * MEBI, 64) == Fit(64, 4)
    # 70 % of 400 MiB at 10 MiB a row: 28, down to a multiple of 8
    assert fitted(USED, alone, 4, 400 * MEBI, 64) == Fit(24, 4)
    assert fitted(USED, alone, 8, 60 * MEBI, 64) == Fit(4, 4)
    assert fitted(USED, alone, 4, 1 * MEBI, 64) == Fit(1, 1)


def test_what_clean_forwards_keep_is_left_room():
    # 280 MiB: 4 items keep 80, which leaves 200, at 12 MiB a row 16
    assert fitted(USED, Sharing(20 * MEBI, 2 * MEBI), 4, 400 * MEBI, 64) == Fit(16, 4)
    # at most half of it is kept, unless that is an item's
    assert fitted(USED, Sharing(60 * MEBI, 0), 4, 400 * MEBI, 64) == Fit(16, 2)
    assert fitted(USED, Sharing(200 * MEBI, 0), 4, 400 * MEBI, 64) == Fit(8, 1)
    # an item's and a row don't fit: nothing is shared, and whole forwards have all of the memory
    assert fitted(USED, Sharing(275 * MEBI, 0), 4, 400 * MEBI, 64) == Fit(24, 0)


@pytest.mark.parametrize("kept", [0, 1, 7, 20, 60, 130, 200])
@pytest.mark.parametrize("copied", [0, 3, 30])
@pytest.mark.parametrize("free", [60, 100, 400, 3000])
def test_what_is_chosen_fits(kept, copied, free):
    chosen = fitted(USED, Sharing(kept * MEBI, copied * MEBI), 4, free * MEBI, 256)
    if chosen.clean == 0:
        assert kept + copied + 10 > 0.7 * free
        assert chosen.rows * 10 <= 0.7 * free
    else:
        assert chosen.clean * kept + chosen.rows * (10 + copied) <= 0.7 * free
        assert chosen.clean <= min(4, chosen.rows)


def test_a_clean_forward_that_leaves_no_room_is_halved_and_edited_ones_are_not():
    done: list[tuple[int, int]] = []
    rows = Rows(8, 4)

    def clean(items: range) -> None:
        def edited(piece: range) -> None:
            # each clean row keeps 3, each edited one takes 1, of 10
            if 3 * len(items) + len(piece) > 10:
                raise torch.OutOfMemoryError("CUDA out of memory")
            done.extend((item, edit) for item in items for edit in piece)

        rows.run(8, edited)

    rows.run_clean(5, clean)
    # 4 items never fit, 2 do with 4 edits at a time
    assert (rows.clean, rows.most) == (2, 4)
    assert done == [
        (item, edit)
        for part in ([0, 1], [2, 3], [4])
        for half in (range(4), range(4, 8))
        for item in part
        for edit in half
    ]


@pytest.mark.parametrize("family", ["stable_diffusion", "flux"])
def test_the_memory_of_sharing_is_that_of_what_is_kept(family, family_directory):
    """Beside an account of its own: every tensor that replays read, by the storage it lies in."""
    config = SweepConfig(model=family_directory(family), groups=("lfw",), items=4, timesteps=(500,), fills=("zero",))
    opened = Opened(config, Execution())
    prefix, sharing = opened.prefix, opened.sharing
    sites = [frozenset([site.name]) for site in opened.scope.sites]
    sizes = {}
    for rows in (1, 3):
        with torch.inference_mode(), prefix.clean(sites) as kept:
            opened.forward(rows)
        held = {
            leaf.untyped_storage().data_ptr(): leaf.untyped_storage()
            for leaf in tree_leaves(kept.values)
            if isinstance(leaf, torch.Tensor)
        }
        sizes[rows] = sum(storage.nbytes() for storage in held.values())
        assert kept.nbytes == sizes[rows]
    assert sharing.cached == sizes[1]
    # what all rows have in common doesn't grow
    assert 2 * sizes[1] < sizes[3] <= 3 * sizes[1]
    assert 0 < sharing.copied <= sharing.cached
    # little memory: nothing is shared, and the numbers of rows say so
    tight = fitted((10, 20), sharing, 4, sharing.cached, 16)
    assert tight.clean == 0


def test_bytes_are_counted_and_views_are_not():
    device = torch.device("cpu")
    assert measured_bytes(device, lambda: torch.zeros(1000)) == 4000
    assert measured_bytes(device, lambda: torch.zeros(1000).view(10, 100).transpose(0, 1)) == 4000
    assert fit(device, lambda rows: torch.zeros(rows, 1000), Sharing(), 4) == Fit(CPU_ROWS, 4)


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
