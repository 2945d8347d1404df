"""Image files as a viewer shows them: exact pixels of every kind, and what is refused."""

import io
import os
import struct
import tarfile
import zlib
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from headscope import zoo
from headscope._images import as_shown, nearest_parts, read_image
from headscope.models.recording.plots import heatmaps
from headscope.sweep.plan.sources import TarGroup

RED, WHITE = [255, 0, 0], [255, 255, 255]
# a row of four levels that none of 8 bits hits
RAMP = np.array([[0, 20000, 40000, 65535]], np.uint16)
SHOWN_RAMP = [0, 78, 156, 255]


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def png(bits: int, colour: int, rows: list[bytes], width: int, transparent: bytes) -> bytes:
    """A PNG that Pillow doesn't write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = chunk(b"IHDR", header) + chunk(b"tRNS", transparent) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def greys(content: bytes) -> list[int]:
    """The first row, of which all channels must be equal."""
    shown = read_image(content)
    assert shown.dtype == np.uint8
    assert (shown == shown[..., :1]).all()
    return shown[0, :, 0].tolist()


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("PPM", {})]
)
def test_sixteen_bits_of_grey_are_scaled(kind, options):
    assert greys(encoded(Image.fromarray(RAMP), kind, **options)) == SHOWN_RAMP
    whole = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert read_image(encoded(Image.fromarray(whole), kind, **options)).mean() == pytest.approx(127.5)


def test_tiffs_of_sixteen_bits_say_what_white_is():
    negative = encoded(Image.fromarray(RAMP), "TIFF", tiffinfo={262: 0})
    assert greys(negative) == [255 - level for level in SHOWN_RAMP]
    # three bytes hold two pixels of twelve bits: 0, 4095, 2048, 1024
    packed = bytes([0x00, 0x0F, 0xFF, 0x80, 0x04, 0x00])
    entries = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 6)]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    header = struct.pack("<2sHI", b"II", 42, 14) + packed
    assert greys(header + struct.pack("<H", len(entries)) + directory + bytes(4)) == [0, 255, 128, 64]


def test_numbers_without_a_range_are_refused_by_their_mode():
    floats = np.linspace(0, 1, 4, dtype=np.float32).reshape(1, 4)
    integers = np.array([[0, 1, 2**31 - 1, -5]], np.int32)
    for array, mode in ((floats, "F"), (integers, "I")):
        content = encoded(Image.fromarray(array), "TIFF")
        with pytest.raises(ValueError, match=f"^it has the mode {mode}, whose range of brightness no file states"):
            read_image(content)
        with pytest.raises(ValueError, match=f"the mode {mode},"):
            as_shown(Image.fromarray(array))


def test_palettes():
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, 0, 0, 255, 10, 20, 30])
    image.putdata([0, 1, 2])
    assert read_image(encoded(image))[0].tolist() == [RED, [0, 0, 255], [10, 20, 30]]
    # one entry is transparent, or each has an alpha of its own
    assert read_image(encoded(image, transparency=1))[0].tolist() == [RED, WHITE, [10, 20, 30]]
    assert read_image(encoded(image, "GIF", transparency=1))[0].tolist() == [RED, WHITE, [10, 20, 30]]
    half = read_image(encoded(image, transparency=bytes([0, 51, 255])))[0].tolist()
    assert half == [WHITE, [204, 204, 255], [10, 20, 30]]
    coloured = Image.new("P", (2, 1))
    coloured.putpalette(bytes([*RED, 255, 0, 0, 0, 102]), "RGBA")
    coloured.putdata([0, 1])
    assert as_shown(coloured)[0].tolist() == [RED, [153, 153, 153]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_alpha_is_composed_on_white(kind):
    pixels = np.array([[[0, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 51], [100, 200, 0, 102]]], np.uint8)
    # WebP keeps colours exactly where nothing hides them
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    shown = read_image(encoded(Image.fromarray(pixels), kind, **options))
    assert shown[0].tolist() == [WHITE, RED, [204, 204, 204], [193, 233, 153]]


def test_grey_with_alpha():
    pixels = np.array([[[0, 0], [7, 255], [0, 51], [100, 102]]], np.uint8)
    image = Image.frombytes("LA", (4, 1), pixels.tobytes())
    assert greys(encoded(image)) == [255, 7, 204, 193]


def test_one_transparent_colour():
    grey = Image.fromarray(np.array([[5, 6, 7]], np.uint8))
    assert greys(encoded(grey, transparency=6)) == [5, 255, 7]
    colour = Image.fromarray(np.array([[[1, 2, 3], [1, 2, 4]]], np.uint8))
    assert read_image(encoded(colour, transparency=(1, 2, 3)))[0].tolist() == [WHITE, [1, 2, 4]]
    assert greys(encoded(Image.fromarray(RAMP), transparency=20000)) == [0, 255, 156, 255]
    # levels 0, 9, 15 and 3 of four bits, the second transparent; and 0, 1, 2, 3 of two
    assert greys(png(4, 0, [bytes([0x09, 0xF3])], 4, struct.pack(">H", 9))) == [0, 255, 255, 51]
    assert greys(png(2, 0, [bytes([0b00011011])], 4, struct.pack(">H", 1))) == [0, 255, 170, 255]
    assert greys(png(1, 0, [bytes([0b01000000])], 2, struct.pack(">H", 0))) == [255, 255]
    with pytest.raises(ValueError, match="it has a transparent colour of 16 bits a channel"):
        read_image(png(16, 2, [bytes([0, 1, 0, 2, 0, 3])], 1, struct.pack(">HHH", 1, 2, 3)))


def test_one_bit():
    bits = Image.fromarray(np.array([[True, False]]))
    for kind in ("PNG", "TIFF", "BMP"):
        assert greys(encoded(bits, kind)) == [255, 0]


def inks_profile() -> bytes:
    """A profile of a press that prints no ink black and full cyan white, whatever else it is given."""
    lab = {False: b"\0\x80\x80", True: b"\xff\x80\x80"}
    # the first ink varies slowest
    grid = b"".join(lab[place >= 8] for place in range(16))
    identity = [65536, 0, 0, 0, 65536, 0, 0, 0, 65536]
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9i", *identity)
    table += bytes(range(256)) * 4 + grid + bytes(range(256)) * 3
    table += bytes(-len(table) % 4)
    header = struct.pack(">I4sI4s4s4s", 0, b"    ", 0x02400000, b"prtr", b"CMYK", b"Lab ") + bytes(12) + b"acsp"
    header = header.ljust(128, b"\0")
    tags = struct.pack(">I4sII", 1, b"A2B0", 144, len(table))
    profile = header + tags + table
    return struct.pack(">I", len(profile)) + profile[4:]


def test_inks():
    pixels = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 100, 200, 55]]], np.uint8)
    image = Image.frombytes("CMYK", (3, 1), pixels.tobytes())
    shown = read_image(encoded(image, "TIFF"))[0]
    assert shown.tolist() == [WHITE, [0, 255, 255], [200, 122, 43]]
    with_profile = read_image(encoded(image.crop((0, 0, 2, 1)), "TIFF", icc_profile=inks_profile()))[0]
    np.testing.assert_allclose(with_profile, [[0, 0, 0], WHITE], atol=2)
    # a JPEG of inks is stored turned round
    np.testing.assert_allclose(read_image(encoded(image, "JPEG", quality=100, subsampling=0))[0, 0], WHITE, atol=3)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *((kind, "L") for kind in ("PNG", "TIFF", "JPEG", "WEBP")),
        *((kind, mode) for kind in ("PNG", "TIFF") for mode in ("P", "I;16")),
    ],
)
def test_rotations_are_applied(kind, mode):
    image = Image.fromarray(np.repeat(RAMP, 8, 0)) if mode == "I;16" else Image.new("L", (4, 8), 255)
    if mode != "I;16":
        image.paste(0, (0, 0, 1, 8))
    if mode == "P":
        image = image.convert("P")
    exif = Image.Exif()
    # stored lying on its left side
    exif[0x0112] = 6
    options = {"quality": 100} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    shown = read_image(encoded(image, kind, exif=exif, **options))
    assert shown.shape == (4, 8, 3)
    expected = SHOWN_RAMP if mode == "I;16" else [0, 255, 255, 255]
    np.testing.assert_allclose(shown[:, 3, 0].astype(int), expected, atol=0 if kind != "JPEG" else 60)
    assert (shown[0] < 100).all()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_several_frames_are_refused(kind):
    frames = [Image.new("RGB", (4, 4), (level, 0, 0)) for level in (0, 120, 250)]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=r"^it holds 3 frames or pages, expected a single picture$"):
        read_image(content)


def test_of_a_photograph_with_previews_the_first_is_taken():
    first, second = Image.new("RGB", (8, 8), (250, 0, 0)), Image.new("RGB", (8, 8))
    content = encoded(first, "MPO", save_all=True, append_images=[second])
    assert read_image(content)[4, 4].tolist() == pytest.approx([250, 0, 0], abs=3)


def test_errors_name_the_file(tmp_path, monkeypatch):
    image = Image.new("RGB", (64, 64))
    files = {
        "float.tif": (encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), "it has the mode F"),
        "cut.png": (encoded(Image.effect_noise((64, 64), 50))[:900], ""),
        "text.png": (b"no picture", "it is no image of a kind that Pillow knows$"),
        "large.png": (encoded(image), r"Image size \(4096 pixels\) exceeds limit"),
    }
    for name, (content, _) in files.items():
        (tmp_path / name).write_bytes(content)
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        for name in files:
            archive.add(tmp_path / name, name)
    # twice the limit is taken for a decompression bomb
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    folder, tar = zoo.open_group("mine", path=tmp_path), TarGroup("mine", str(tmp_path / "all.tar"), 8)
    for index, name in enumerate(folder.sources()):
        reason = rf"^path: the file '{name}' of the group 'mine' can't be read: {files[name][1]}"
        with pytest.raises(ValueError, match=reason):
            folder.item(index)
    for index, name in enumerate(tar.sources()):
        reason = next(reason for file, (_, reason) in files.items() if file.startswith(name.removeprefix("all.tar/")))
        with pytest.raises(ValueError, match=rf"^groups: image '{name}' of 'mine' can't be read: {reason}"):
            tar.item(index)


def test_names_that_are_not_text_are_named(tmp_path):
    file = os.fsencode(tmp_path) + b"/pr\xe9.png"
    try:
        with open(file, "wb") as opened:
            opened.write(encoded(Image.new("RGB", (8, 8))))
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    message = r"path: the name of the file b'pr\\xe9.png' isn't UTF-8"
    with pytest.raises(ValueError, match=message):
        zoo.open_group("mine", path=tmp_path)
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        archive.add(os.fsdecode(file), "pr\udce9.png")
    with pytest.raises(ValueError, match="isn't UTF-8"):
        TarGroup("mine", str(tmp_path / "all.tar"), 8)


def test_pictures_beside_maps_are_shown_as_they_are():
    maps = {"head 0": np.zeros((2, 2))}
    for picture in (Image.fromarray(RAMP), np.repeat(RAMP[..., None], 3, 2) / np.float32(65535)):
        figure = heatmaps(maps, "nats", picture)
        assert np.asarray(figure.data[0].z)[0, :, 0].tolist() == SHOWN_RAMP
    with pytest.raises(ValueError, match=r"image: got \[1, 4, 3\] of uint16, expected a PIL image, or"):
        heatmaps(maps, "nats", np.repeat(RAMP[..., None], 3, 2))


@pytest.mark.parametrize("size", [3, 5, 6, 8, 12, 24])
def test_parts_at_other_sizes_are_those_of_the_pixel_at_the_middle(size):
    random = np.random.default_rng(0)
    mask = random.integers(0, 4, (8, 8), np.uint8)
    ties = random.integers(-1, 64, (8, 8, 3)).astype(np.int32)
    found, moved = nearest_parts(mask, ties, size)
    assert moved is not None
    assert (found.dtype, moved.dtype) == (np.uint8, np.int32)

    def middle(place: int, edge: int, other: int) -> int:
        return int((place + Fraction(1, 2)) / edge * other)

    for row, column in np.ndindex(size, size):
        old = middle(row, size, 8), middle(column, size, 8)
        assert found[row, column] == mask[old]
        for tie, now in zip(ties[old].tolist(), moved[row, column].tolist(), strict=True):
            place = tuple(middle(number, 8, size) for number in divmod(tie, 8))
            assert now == (-1 if tie < 0 else place[0] * size + place[1])
    assert nearest_parts(mask, None, size)[1] is None
