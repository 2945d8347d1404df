"""Scores of a part of the image: means over the pixels, or latents, that belong to it."""

import math

import numpy as np
import pytest
import torch

import tiny
from headscope.models import NoisyInputs, Task, part_means
from headscope.zoo import open_group


def twins(count: int) -> list:
    group = open_group("twins")
    return [group.item(index) for index in range(count)]


def error(items: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(items, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("part", ["glyph 2", ["glyph 1", "glyph 4"], "background"])
def test_of_pixels(part):
    items, values = twins(3), error(4, 32)
    rows = [items[index] for index in (0, 1, 1, 2)]
    # what lies outside of the part doesn't matter, whatever it is
    names = items[0].part_names
    numbers = [names.index(name) for name in ([part] if isinstance(part, str) else part)]
    inside = np.stack([np.isin(item.part_mask, numbers) for item in rows])
    values[torch.from_numpy(~inside)[:, None].expand_as(values)] = torch.nan
    found = part_means(values, rows, part)
    assert found.dtype == torch.float64
    expected = [values[row].double().numpy()[:, inside[row]].mean() for row in range(4)]
    # sums of some hundred numbers of float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_of_latents():
    """A latent belongs to the part that covers most of its 4 x 4 pixels; of equal shares the first part has it."""
    items, values = twins(2), error(2, 8)
    expected = []
    for item, one in zip(items, values, strict=True):
        blocks = item.part_mask.reshape(8, 4, 8, 4).transpose(0, 2, 1, 3).reshape(8, 8, 16)
        largest = np.apply_along_axis(lambda block: np.bincount(block, minlength=5).argmax(), 2, blocks)
        expected.append(one.double().numpy()[:, largest == 3].mean())
    np.testing.assert_allclose(part_means(values, items, "glyph 3").numpy(), expected, rtol=1e-12)


def test_items_without_such_pixels_raise_or_are_what_is_asked_for():
    faces = open_group("faces", size=16)
    drawn = [faces.item(index) for index in range(30)]
    bald = next(item for item in drawn if item.attributes and item.attributes["hair_style"] == "bald")
    photograph = open_group("lfw", size=16).item(0)
    other = open_group("twins", size=16).item(0)
    hairy = next(item for item in drawn if (item.part_mask == item.part_names.index("hair")).any())
    parts = ["hair"]
    lacking = {
        bald: f"{bald.key!r} has no pixel of hair",
        photograph: "'lfw/0' has no part mask",
        other: "'twins/0' has no part 'hair', expected some of background, glyph 1",
    }
    for item, message in lacking.items():
        with pytest.raises(ValueError, match=message):
            part_means(error(1, 16), [item], parts)
    values = error(4, 16)
    found = part_means(values, [bald, photograph, other, hairy], parts, missing=math.nan)
    assert found.isnan().tolist() == [True, True, True, False]
    assert part_means(values[:1], [photograph], "hair", missing=-1.0).tolist() == [-1.0]
    # a part that is misspelt beside one that isn't doesn't pass for that one
    assert part_means(values[3:], [hairy], ["hair", "hare"], missing=math.nan).isnan().all()


def test_what_does_not_fit_is_refused():
    items = twins(2)
    with pytest.raises(ValueError, match="items: got 2, expected 3, as the error has"):
        part_means(error(3, 32), items, "glyph 1")
    with pytest.raises(ValueError, match="part: got none"):
        part_means(error(2, 32), items, [])
    assert part_means(error(0, 32), [], "glyph 1").shape == (0,)


@pytest.mark.parametrize("build", [tiny.ddpm, tiny.stable_diffusion])
def test_inputs_have_their_rows_items(build):
    task = Task.of(build())
    items = tiny.pictures(3)
    prepared = task.prepare(items)
    assert prepared.items == tuple(items)
    assert prepared.rows(torch.tensor([2, 0, 2])).items == (items[2], items[0], items[2])
    inputs = task.noisy_inputs(prepared, 100)
    assert list(inputs.items) == items
    rows = inputs.rows(torch.tensor([1, 1, 2])).rows(torch.tensor([2, 0]))
    assert len(rows.items) == 2
    assert list(rows.items) == [items[2], items[1]]
    assert rows.items[1:] == (items[1],)
    # a task that doesn't say which items they are
    assert NoisyInputs(inputs.sample, 100, {}, inputs.target).rows(torch.tensor([0])).items == ()
