"""The tensors of heads in a recording."""

import sys

import pytest
import torch

from headscope.models.recording.tensors import HeadTensors, Key


@pytest.mark.parametrize("reduce", ["mean", None])
def test_saving_costs_as_much_for_each_tensor_however_many_there_are(reduce):
    """A run of 50 steps keeps thousands."""

    def calls(count):
        tensors = HeadTensors(reduce)
        for index in range(count):
            tensors.put(Key.of("head_output", "mid", 0, index // 2, "cond", index % 2), torch.zeros(1, 1, 1, 1, 1))
        made = 0

        def note(frame, event, argument):
            nonlocal made
            made += event == "call"

        before = sys.getprofile()
        sys.setprofile(note)
        try:
            for key, _ in tensors.stored():
                tensors.mean(key)
        finally:
            sys.setprofile(before)
        return made

    assert calls(400) < 5 * calls(100)


def test_means_are_over_visits():
    tensors = HeadTensors(None)
    for visit, values in enumerate(([1.0, 2.0], [6.0], [7.0])):
        key = Key.of("q", "mid", 0, 3, None, visit)
        tensors.put(key, torch.tensor(values).reshape(-1, 1, 1, 1, 1))
    for visit in (0, 2, 5):
        assert tensors.mean(Key.of("q", "mid", 0, 3, None, visit)).item() == 4.0
    with pytest.raises(KeyError, match="timestep 4"):
        tensors.mean(Key.of("q", "mid", 0, 4, None))
