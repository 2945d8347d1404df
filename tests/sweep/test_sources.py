"""Tars and datasets on disk: what is read of them, and that the rest is refused or said."""

import io
import json
import tarfile

import pyarrow as pa
import pytest
from PIL import Image

from headscope.sweep.plan.sources import expanded, open_source


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (level, 0, 0)).save(file, "png")
    return file.getvalue()


def test_webdataset_tars(tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"part-{shard:03d}.tar", "w") as archive:
            for sample in range(3):
                for suffix, content in (
                    ("png", png(10 * shard + sample)),
                    ("txt", f"sample {sample} of {shard}".encode()),
                ):
                    member = tarfile.TarInfo(f"{sample:05d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    assert len(expanded(str(tmp_path / "part-{000..001}.tar"))) == 2
    for pattern in ("part-{000..001}.tar", "part-*.tar"):
        group = open_source("mine", str(tmp_path / pattern), 16)
        assert len(group) == 6
        item = group.item(4)
        assert item.caption == "sample 1 of 1"
        assert item.image.shape == (16, 16, 3)
        assert item.image[0, 0].tolist() == [11, 0, 0]
    assert {item.split for item in map(group.item, range(6))} == {"discover", "confirm"}
    with pytest.raises(FileNotFoundError, match="expected existing tar files"):
        open_source("mine", str(tmp_path / "nothing-*.tar"), 16)


def write_tar(path, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for level, name in enumerate(names):
            member, content = tarfile.TarInfo(name), png(level)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_tars_of_one_name_are_all_read(tmp_path):
    """In different folders; a name that is alone stays as it is."""
    for folder in ("a", "b"):
        write_tar(tmp_path / folder / "part.tar", ["0.png", "1.png"])
    group = open_source("mine", str(tmp_path / "*" / "part.tar"), 8)
    assert group.sources() == ["a/part.tar/0", "a/part.tar/1", "b/part.tar/0", "b/part.tar/1"]
    assert open_source("mine", str(tmp_path / "a" / "*.tar"), 8).sources() == ["part.tar/0", "part.tar/1"]


def test_tars_that_are_counted_up_are_all_there(tmp_path):
    for number in (0, 2):
        write_tar(tmp_path / f"part-{number}[x].tar", ["0.png"])
    with pytest.raises(
        FileNotFoundError, match=r"part-1\[x\]\.tar' isn't there, expected existing tar files, all of \{0\.\.2\}"
    ):
        open_source("mine", str(tmp_path / "part-{0..2}[x].tar"), 8)
    assert open_source("mine", str(tmp_path / "part-{0..0}[x].tar"), 8).sources() == ["part-0[x].tar/0"]


def test_an_image_that_a_tar_holds_twice_is_an_error(tmp_path):
    write_tar(tmp_path / "part.tar", ["0.png", "0.png"])
    with pytest.raises(ValueError, match=r"part\.tar' holds '0\.png' twice, expected each once"):
        open_source("mine", str(tmp_path / "part.tar"), 8)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"splits": []}', '{"splits": [1]}'])
def test_a_dictionary_of_datasets_without_splits_is_named(content, tmp_path):
    (tmp_path / "dataset_dict.json").write_text(content)
    with pytest.raises(ValueError, match=r"dataset_dict\.json' lists no splits"):
        open_source("mine", str(tmp_path), 8)


def test_hugging_face_datasets_on_disk(tmp_path):
    """The files that `Dataset.save_to_disk` writes: an Arrow stream and state.json."""
    images = pa.array(
        [*({"bytes": png(level), "path": None} for level in (5, 6, 7)), None, {"bytes": None, "path": None}],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table({"image": images, "caption": ["a", "b", "c", "d", "e"]})
    with (
        pa.OSFile(str(tmp_path / "data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as writer,
    ):
        writer.write_table(table)
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    group = open_source("mine", str(tmp_path), 8)
    assert len(group) == 5
    assert group.item(2).caption == "c"
    assert group.item(2).image[0, 0].tolist() == [7, 0, 0]
    for index in (3, 4):
        with pytest.raises(ValueError, match=f"image 'row-000000{index}' of 'mine' can't be read: the row has none"):
            group.item(index)


def dataset(path, columns: dict, **state) -> str:
    """As Dataset.save_to_disk writes it."""
    path.mkdir()
    table = pa.table(columns)
    with pa.ipc.new_stream(str(path / "data.arrow"), table.schema) as file:
        file.write_table(table)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}], **state}))
    return str(path)


def images(*levels: int) -> pa.Array:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.array([{"bytes": png(level), "path": None} for level in levels], kind)


def test_the_columns_that_are_read_are_said(tmp_path):
    columns = {"image": images(1, 2), "mask": images(3, 4), "text": ["one", "two"]}
    group = open_source("mine", dataset(tmp_path / "several", columns), 8)
    assert group.description == "2 images of a dataset, its column 'image', captions from 'text'"
    assert group.note == "other columns of images are not read: mask"
    assert [group.item(index).image[0, 0, 0] for index in (0, 1)] == [1, 2]
    group = open_source("mine", dataset(tmp_path / "one", {"mask": images(5)}), 8)
    assert (group.description, group.note) == ("1 images of a dataset, its column 'mask'", "")


def test_a_selection_of_rows_is_refused(tmp_path):
    path = dataset(tmp_path / "data", {"image": images(1, 2)}, _indices_data_files=[{"filename": "indices.arrow"}])
    with pytest.raises(ValueError, match="is a selection of the rows in its files, expected all of them"):
        open_source("mine", path, 8)


def test_a_sample_is_one_image(tmp_path):
    write_tar(tmp_path / "a.tar", ["0.png", "0.jpg", "1.png"])
    with pytest.raises(ValueError, match=r"the sample 'a\.tar/0' has several images \(jpg, png\), expected one"):
        open_source("mine", str(tmp_path / "a.tar"), 8)
