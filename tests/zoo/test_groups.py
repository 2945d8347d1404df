"""Image groups: determinism, splits, the procedural faces and their masks, folders."""

import errno
import hashlib
import json
import os

import numpy as np
import pytest
from PIL import Image

from headscope import zoo
from headscope.zoo.faces import PART_NAMES
from headscope.zoo.groups import SPLITS, Faces, FacesGrey, Lfw, Photographs

# test_structure.py has the tied ones
NAMES = [name for name in zoo.GROUPS if not isinstance(zoo.open_group(name), zoo.Tied)]


def digest(image: np.ndarray) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("name", NAMES)
def test_items_have_the_promised_form(name):
    group = zoo.open_group(name)
    assert len(group) == 100
    for index in (0, 57, 99):
        item = group.item(index)
        assert item.image.shape == (32, 32, 3)
        assert item.image.dtype == np.uint8
        assert item.image.std() > 5
        assert item.key == f"{name}/{index}"
        assert (item.group, item.index) == (name, index)
        assert index in group.indices(item.split)
        assert item.source_id in group.sources(item.split)
        json.dumps(item.attributes)


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_no_source_and_have_equal_counts(name):
    group = zoo.open_group(name)
    assert [len(group.indices(split)) for split in SPLITS] == [60, 20, 20]
    sources = [set(group.sources(split)) for split in SPLITS]
    assert sum(map(len, sources)) == len(set.union(*sources)) == len(group.sources())
    assert sorted(index for split in SPLITS for index in group.indices(split)) == group.indices() == list(range(100))


def test_faces_and_grey_faces_split_alike():
    faces, grey = Faces(), FacesGrey()
    for split in SPLITS:
        assert faces.indices(split) == grey.indices(split)
        assert faces.sources(split) == grey.sources(split)


def test_an_item_does_not_depend_on_the_length():
    long, short = Faces(length=250), Faces(length=7)
    np.testing.assert_array_equal(long.item(5).image, short.item(5).image)
    assert long.item(5).split == short.item(5).split
    assert [len(long.indices(split)) > 120 for split in SPLITS] == [True, False, False]


# recorded once. Faces and LFW are exact; the rocket is a JPEG, so photographs pin those stored as PNG
PINNED = {
    ("faces", 0): "06239749315d9979",
    ("faces", 9): "e2dcfbe9d0d38fbc",
    ("faces", 24): "361c54f314939cbf",
    ("faces_grey", 0): "74f2b1c20e359c17",
    ("lfw", 0): "938da02a73a7bf1e",
    ("lfw", 99): "f0f2945aa13a5f89",
    ("photographs", 0): "f95738778b938112",
    ("photographs", 4): "0adc86160ac14f1a",
}


@pytest.mark.parametrize(("name", "index"), list(PINNED))
def test_pinned_images(name, index):
    assert digest(zoo.open_group(name).item(index).image) == PINNED[name, index]


def test_pinned_mask():
    _, mask = zoo.render_face(zoo.face_attributes(0))
    assert digest(mask) == "50359fe73a6561bc"


def test_grey_groups_are_grey():
    for group in (FacesGrey(), Lfw()):
        image = group.item(3).image
        assert (image == image[..., :1]).all()


def test_grey_faces_follow_the_path_of_lfw():
    grey = Image.fromarray(Faces().item(4).image).convert("L").resize((25, 25), Image.Resampling.BICUBIC)
    expected = np.asarray(grey.resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(FacesGrey().item(4).image[..., 0], expected)


def test_other_sizes():
    for name in NAMES:
        assert zoo.open_group(name, size=48).item(1).image.shape == (48, 48, 3)
    mask = Faces(size=64).item(1).part_mask
    assert mask is not None
    assert mask.shape == (64, 64)


def test_every_face_shows_its_parts():
    faces = Faces(length=20)
    for index in range(len(faces)):
        item = faces.item(index)
        assert item.part_mask is not None
        assert item.attributes is not None
        counts = np.bincount(item.part_mask.ravel(), minlength=len(PART_NAMES))
        present = {name for name, count in zip(PART_NAMES, counts, strict=True) if count}
        assert {"background", "clothes", "skin", "eyes", "nose", "mouth"} <= present
        assert ("glasses" in present) == (item.attributes["glasses"] != "none")
        bare = item.attributes["hair_style"] == "bald" and item.attributes["facial_hair"] == "none"
        assert ("hair" in present) != bare


@pytest.mark.parametrize(
    ("attribute", "colour", "parts"),
    [
        ("lip_colour", [0.0, 1.0, 0.0], {"mouth"}),
        ("hair_colour", [0.0, 0.0, 1.0], {"hair", "brows"}),
        ("clothes_colour", [1.0, 0.0, 0.0], {"clothes"}),
    ],
)
def test_the_mask_agrees_with_the_picture(attribute, colour, parts):
    # recolour one part: the pixels that change most are those the mask gives to it
    attributes = zoo.face_attributes(29)
    first, mask = zoo.render_face(attributes, size=96)
    second, _ = zoo.render_face({**attributes, attribute: colour}, size=96)
    change = np.abs(first.astype(int) - second.astype(int)).sum(axis=-1)
    named = np.isin(mask, [PART_NAMES.index(part) for part in parts])
    assert named.any()
    strong = change > 0.6 * np.median(change[named])
    assert (strong & ~named).sum() <= 0.15 * named.sum()
    assert change[named].mean() > 10 * change[~named].mean()


def test_attributes_are_controlled():
    attributes = zoo.face_attributes(3)
    image, _ = zoo.render_face(attributes)
    for change in ({"yaw": 0.2}, {"glasses": "round"}, {"mouth_open": 0.08}, {"light": [-0.8, -0.2]}):
        assert (zoo.render_face({**attributes, **change})[0] != image).any()
    np.testing.assert_array_equal(zoo.render_face(json.loads(json.dumps(attributes)))[0], image)


def test_wrong_attributes_are_named():
    attributes = zoo.face_attributes(0)
    with pytest.raises(ValueError, match=r"attributes\['glasses'\]: got 'monocle', expected one of none"):
        zoo.render_face({**attributes, "glasses": "monocle"})
    del attributes["yaw"]
    with pytest.raises(ValueError, match=r"attributes: got none of \['yaw'\]"):
        zoo.render_face(attributes)


def test_photographs_come_from_the_source_they_name():
    group = Photographs(length=10)
    assert [group.item(i).source_id for i in range(5)] == ["chelsea", "coffee", "motorcycle", "rocket", "astronaut"]
    assert group.item(3).split == "discover"
    assert (group.item(0).image != group.item(5).image).any()


@pytest.mark.parametrize("index", [-1, 100])
def test_an_index_outside_is_an_error(index):
    with pytest.raises(IndexError, match=f"index: got {index}, expected 0 to 99"):
        Faces().item(index)


def test_wrong_names_are_errors():
    with pytest.raises(ValueError, match="name: got 'cats', expected one of faces, faces_grey"):
        zoo.open_group("cats")
    with pytest.raises(ValueError, match="split: got 'test', expected None or one of train"):
        Faces().indices("test")
    with pytest.raises(ValueError, match="length: got 0"):
        Faces(length=0)
    with pytest.raises(ValueError, match="length: got 101, expected at most 100"):
        Lfw(length=101)
    with pytest.raises(ValueError, match="size: got 4"):
        zoo.open_group("faces", size=4)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b").mkdir()
    for name, size in (("z.png", (40, 30)), ("b/a.jpg", (64, 100)), ("a.webp", (33, 33)), ("grey.PNG", (20, 50))):
        mode = "L" if name == "grey.PNG" else "RGB"
        Image.new(mode, size, 128 if mode == "L" else (200, 100, 50)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_folder(folder):
    group = zoo.open_group("mine", path=folder)
    assert group.sources() == ["a.webp", "b/a.jpg", "grey.PNG", "z.png"]
    assert [len(group.indices(split)) for split in SPLITS] == [0, 2, 2]
    for index in range(len(group)):
        item = group.item(index)
        assert item.image.shape == (32, 32, 3)
        assert item.key == f"mine/{index}"
    np.testing.assert_allclose(group.item(3).image[16, 16], [200, 100, 50])


def test_folder_takes_the_central_square(tmp_path):
    picture = np.zeros((10, 30, 3), np.uint8)
    picture[:, 10:20] = 255
    Image.fromarray(picture).save(tmp_path / "wide.png")
    assert (zoo.FolderGroup(tmp_path).item(0).image == 255).all()


def test_folder_errors(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path: got '.*nowhere', expected an existing folder of images"):
        zoo.open_group("mine", path=tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"path: got '.*empty', which holds no image, expected files ending in .png"):
        zoo.open_group("mine", path=empty)
    (folder / "broken.png").write_bytes(b"not a picture")
    group = zoo.open_group("mine", path=folder)
    with pytest.raises(ValueError, match=r"the file 'broken.png' of the group 'mine' can't be read"):
        group.item(group.sources().index("broken.png"))


def drawn(path, level):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (level, 0, 0)).save(path, "PNG")


def test_links_are_followed_and_circles_end(tmp_path):
    """A folder that is met twice keeps the name under which it lies there."""
    mine, elsewhere = tmp_path / "mine", tmp_path / "elsewhere"
    drawn(mine / "b" / "1.png", 1)
    drawn(elsewhere / "deep er" / "2.png", 2)
    drawn(elsewhere / "3.png", 3)
    (mine / "a").symlink_to(mine / "b")
    (mine / "b" / "up").symlink_to(mine)
    (mine / "c").symlink_to(elsewhere)
    (mine / "4.png").symlink_to(elsewhere / "3.png")
    (mine / "folder.png").mkdir()
    group = zoo.FolderGroup(mine)
    assert group.sources() == ["4.png", "b/1.png", "c/3.png", "c/deep er/2.png"]
    assert [int(group.item(index).image[0, 0, 0]) for index in range(4)] == [3, 1, 3, 2]


@pytest.mark.parametrize("name", ["gone.png", "folder"])
def test_links_that_lead_nowhere_are_named(tmp_path, name):
    drawn(tmp_path / "1.png", 1)
    (tmp_path / name).symlink_to(tmp_path / "nowhere" if name == "gone.png" else tmp_path / name)
    with pytest.raises(ValueError, match=rf"path: '.*{name}' is a link that leads nowhere"):
        zoo.FolderGroup(tmp_path)


def test_an_editors_lock_is_no_image(tmp_path):
    """A hidden link whose target is a text."""
    drawn(tmp_path / "1.png", 1)
    (tmp_path / ".#notes.txt").symlink_to("me@here.123:456")
    assert zoo.FolderGroup(tmp_path).sources() == ["1.png"]


def test_folders_that_cannot_be_read_are_errors(tmp_path, monkeypatch):
    drawn(tmp_path / "a" / "1.png", 1)
    drawn(tmp_path / "locked" / "2.png", 2)
    scandir = os.scandir

    def refusing(path):
        if os.fspath(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match="locked"):
        zoo.FolderGroup(tmp_path)


def test_a_pipe_is_no_image(tmp_path):
    """And nobody waits for what it might say."""
    os.mkfifo(tmp_path / "1.png")
    drawn(tmp_path / "2.png", 2)
    (tmp_path / "3.png").touch()
    group = zoo.FolderGroup(tmp_path, "mine")
    with pytest.raises(ValueError, match=r"the file '1\.png' of the group 'mine' can't be read: .*an ordinary file"):
        group.item(0)
    assert group.item(1).image[0, 0].tolist() == [2, 0, 0]
    with pytest.raises(ValueError, match=r"the file '3\.png' of the group 'mine' can't be read: it is no image"):
        group.item(2)


def test_long_and_strange_names_are_kept(tmp_path):
    """Composed and decomposed letters are two names where the file system says so."""
    names = [
        "x" * 251 + ".png",
        " leading and trailing .png",
        "\u00e9t\u00e9.png",
        "e\u0301te\u0301.png",
        "new\nline.png",
    ]
    for level, name in enumerate(names):
        drawn(tmp_path / name, level)
    group = zoo.FolderGroup(tmp_path)
    assert set(group.sources()) == {entry.name for entry in tmp_path.iterdir()}
    assert {int(group.item(index).image[0, 0, 0]) for index in range(len(group))} == set(range(len(names)))


def test_what_is_not_read_is_said(tmp_path):
    for name in ("a.heic", "b.HEIC", "c.txt", ".DS_Store", "README"):
        (tmp_path / name).touch()
    drawn(tmp_path / "1.png", 1)
    assert zoo.FolderGroup(tmp_path).note == "files of other endings are not read: 2 .heic, 1 .txt, 1 README"
    assert Faces().note == ""


@pytest.mark.parametrize("index", [1.5, 2.0, "1", None])
def test_an_index_is_a_whole_number(index):
    with pytest.raises(TypeError):
        Faces().item(index)
    for field in ("length", "size"):
        with pytest.raises(ValueError, match=f"{field}: got 32.5, expected a whole number"):
            Faces(**{field: 32.5})


def test_numpys_integers_are_whole_numbers():
    group = Faces(length=np.int64(40), size=np.int16(16))
    assert (type(group.length), group.length) == (int, 40)
    assert group.item(np.uint8(3)).image.shape == (16, 16, 3)
