"""Masks of the images in a folder, from a folder beside it."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from headscope import zoo
from headscope.features import feature_maps
from headscope.sweep import SweepConfig
from headscope.sweep.plan.items import load_task, open_items

PALETTE = [255, 255, 255, 200, 0, 0, 0, 0, 200]


@pytest.fixture
def folder(tmp_path):
    """Two images, of 12 x 16 and of 20 x 10 pixels, with masks of the same sizes."""
    random = np.random.default_rng(3)
    images, masks = tmp_path / "mine", tmp_path / "mine.parts"
    for name, height, width in (("a.jpg", 12, 16), ("day/b.png", 20, 10)):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (masks / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(images / name)
        mask = random.integers(0, 3, (height, width), np.uint8)
        Image.fromarray(mask).save((masks / name).with_suffix(".png"))
    (masks / "names.json").write_text(json.dumps(["background", "leaf", "twig"]))
    return images


def mask_of(folder, name: str) -> np.ndarray:
    return np.asarray(Image.open(folder.with_name("mine.parts") / name))


def test_masks_are_cropped_and_resized_as_the_images_are(folder):
    """Each pixel has the part of the pixel at its middle."""
    group = zoo.FolderGroup(folder, size=8)
    assert group.part_names == ("background", "leaf", "twig")
    assert group.description == "2 images of a folder, with masks of 3 part(s)"
    for index, name, rows, columns in (
        (0, "a.png", range(12), range(2, 14)),
        (1, "day/b.png", range(5, 15), range(10)),
    ):
        item = group.item(index)
        assert item.part_names == group.part_names
        assert item.counterparts is None
        square = mask_of(folder, name)[rows.start : rows.stop, columns.start : columns.stop]
        middle = [int((pixel + 0.5) * len(square) / 8) for pixel in range(8)]
        np.testing.assert_array_equal(item.part_mask, square[np.ix_(middle, middle)])
        assert np.asarray(item.part_mask).dtype == np.uint8
        assert {"object", "part leaf", "part twig"} <= set(feature_maps(item))
    without = folder.rename(folder.with_name("other"))
    plain = zoo.FolderGroup(without, size=8)
    np.testing.assert_array_equal(plain.item(0).image, group_image(without))
    assert plain.item(0).part_mask is None
    assert plain.description == "2 images of a folder"


def group_image(folder) -> np.ndarray:
    image = Image.open(folder / "a.jpg").convert("RGB").crop((2, 0, 14, 12))
    return np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC))


def test_a_palette_s_places_count_and_not_its_colours(folder):
    mask = mask_of(folder, "a.png")
    coloured = Image.fromarray(mask)
    coloured.putpalette(PALETTE)
    for bits in (8, 2):
        encoded = io.BytesIO()
        coloured.save(encoded, "PNG", bits=bits)
        (folder.with_name("mine.parts") / "a.png").write_bytes(encoded.getvalue())
        assert np.array_equal(zoo.FolderGroup(folder, size=12).item(0).part_mask, mask[:, 2:14])


def test_a_relative_path_has_them_beside_it(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert zoo.FolderGroup(".").part_names == ("background", "leaf", "twig")
    monkeypatch.chdir(folder.parent)
    assert zoo.FolderGroup("mine/").part_names == ("background", "leaf", "twig")


def grey_of_two_bits() -> bytes:
    """A PNG whose levels 0 to 3 Pillow shows as 0, 85, 170 and 255."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 12, 2, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0\x1b\x1b\x1b\x1b" * 12)) + chunk(b"IEND", b"")
    )


def encoded(mode: str, kind: str = "PNG") -> bytes:
    found = io.BytesIO()
    Image.new(mode, (16, 12)).save(found, kind)
    return found.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (encoded("L")[:45], "can't be read: "),
        (b"nothing", "can't be read: it is no image of a kind that Pillow knows"),
        (
            encoded("RGB"),
            "can't be read: it is a PNG of the kind RGB, expected a PNG of 8 bits of grey, or of a palette",
        ),
        (encoded("I;16"), "can't be read: it is a PNG of the kind I;16"),
        (encoded("1"), "can't be read: it is a PNG of the kind 1"),
        (grey_of_two_bits(), "can't be read: it is a PNG of the kind L;2"),
        (encoded("L", "JPEG"), "can't be read: it is a JPEG of the kind L"),
        ("turned", "has 16 x 12 pixels, expected 12 x 16, as 'a.jpg' has"),
        ("another", "has a pixel of part 3, expected 0 to 2, those of names.json"),
    ],
)
def test_masks_that_do_not_fit_are_named(folder, content, said):
    path = folder.with_name("mine.parts") / "a.png"
    if content == "turned":
        Image.fromarray(mask_of(folder, "a.png").T).save(path)
    elif content == "another":
        mask = mask_of(folder, "a.png").copy()
        # outside of the square that is looked at, too
        mask[0, 0] = 3
        Image.fromarray(mask).save(path)
    else:
        path.write_bytes(content)
    group = zoo.FolderGroup(folder)
    with pytest.raises(ValueError, match=rf"^path: the mask 'a.png' in '.*mine.parts' {re.escape(said)}"):
        group.item(0)
    assert group.item(1).part_mask is not None


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (None, "can't be read, expected a list of the parts' names"),
        ("[", "can't be read, expected a list of the parts' names"),
        ("[]", r"holds \[\], expected a list of 1 to 256 names, each once"),
        ('{"a": 1}', "holds {'a': 1}, expected a list"),
        ('["a", "a"]', r"holds \['a', 'a'\], expected a list"),
        ('["a", ""]', ".* expected a list of 1 to 256 names"),
        ('["a", 1]', ".* expected a list of 1 to 256 names"),
    ],
)
def test_names_are_said(folder, names, said):
    path = folder.with_name("mine.parts") / "names.json"
    path.unlink()
    if names is not None:
        path.write_text(names)
    with pytest.raises(ValueError, match=f"path: '.*names.json' {said}"):
        zoo.FolderGroup(folder)


def test_every_image_has_a_mask_of_its_own(folder):
    masks = folder.with_name("mine.parts")
    (masks / "day" / "b.png").rename(masks / "kept.png")
    said = "lacks the masks of 1 of 2 images, the first 'day/b.png' of 'day/b.png'; expected one of each"
    with pytest.raises(ValueError, match=f"path: '.*mine.parts' {said}"):
        zoo.FolderGroup(folder)
    (masks / "kept.png").rename(masks / "day" / "b.png")
    Image.new("RGB", (16, 12)).save(folder / "a.bmp")
    with pytest.raises(ValueError, match=r"path: the mask 'a.png' would be of 'a.bmp' and of 'a.jpg', expected one"):
        zoo.FolderGroup(folder)


def test_a_sweep_has_them_at_the_model_s_size(folder, ddpm_directory):
    config = SweepConfig(
        model=ddpm_directory, groups=(f"mine={folder}",), timesteps=(60,), observe=False, fills=(), kinds=("features",)
    )
    (group,) = open_items(config, load_task(config))
    for item in group.swept:
        assert item.part_names == ("background", "leaf", "twig")
        assert np.shape(item.part_mask) == (32, 32)
        assert item.parts is not None
