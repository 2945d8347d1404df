"""Image groups from what people have: folders, Hugging Face datasets on disk, WebDataset tars.

Half of a group's sources are for discovery and half for confirmation, by a hash of their names, as in a folder. Nothing
but pyarrow and Pillow reads them: neither `datasets` nor `webdataset` is needed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import re
import tarfile
from functools import cached_property
from pathlib import Path
from typing import Any

from headscope._extras import require
from headscope._files import local_path, read_plain
from headscope._images import read_square
from headscope.sweep.plan.texts import decoded
from headscope.zoo import FolderGroup, ImageGroup, Item, open_group
from headscope.zoo.folders import check_names

CAPTION_COLUMNS = ("caption", "text", "prompt", "caption_0")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


def open_source(name: str, path: str, size: int) -> ImageGroup:
    """The images at a path, by what is there.

    Args:
        path: a folder of images; a folder that `Dataset.save_to_disk` wrote; a tar, or a pattern of tars with * or
            {000..009}.
        size: pixels to a side of the square images.

    Raises:
        FileNotFoundError, ValueError: nothing usable is there.
    """
    local_path("groups", path)
    if path.endswith(".tar"):
        return TarGroup(name, path, size)
    if any((Path(path) / file).is_file() for file in ("state.json", "dataset_dict.json")):
        return DatasetGroup(name, Path(path), size)
    return open_group(name, path, size=size)


class _NamedGroup(ImageGroup):
    """Images with a name each, which is their source."""

    def __init__(self, name: str, names: list[str], size: int) -> None:
        check_names(names)
        self.name = name
        self._names = names
        super().__init__(len(names), size)

    @cached_property
    def _splits(self) -> list[str]:
        order = sorted(range(len(self)), key=lambda index: hashlib.sha256(self._names[index].encode()).digest())
        splits = ["confirm"] * len(order)
        for index in order[: math.ceil(len(order) / 2)]:
            splits[index] = "discover"
        return splits

    def _source(self, index: int) -> tuple[str, str]:
        return self._names[index], self._splits[index]

    def _content(self, index: int) -> tuple[bytes, str]:
        """An image file's bytes, and its caption."""
        raise NotImplementedError

    def _load(self, index: int) -> Item:
        source, split = self._source(index)
        try:
            encoded, caption = self._content(index)
            image = read_square(encoded, self.size)
        except (OSError, ValueError) as error:
            raise ValueError(f"groups: image {source!r} of {self.name!r} can't be read: {error}") from error
        return Item(self.name, index, source, split, image, caption)


class DatasetGroup(_NamedGroup):
    """A dataset that Hugging Face's `save_to_disk` wrote: an image column, and a caption where there is one.

    Of a dictionary of datasets the one called train is taken, or the only one.
    """

    def __init__(self, name: str, path: Path, size: int) -> None:
        pa, ipc = require("pyarrow", "diffusers"), require("pyarrow.ipc", "diffusers")
        path = _one_of_dictionary(path)
        self._folder = path
        try:
            state = json.loads(read_plain(path / "state.json"))
            files = [entry["filename"] for entry in state["_data_files"]]
            selected = state.get("_indices_data_files")
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"groups: {str(path / 'state.json')!r} lists no data files, expected what Dataset.save_to_disk writes"
            ) from None
        tables = []
        if not files or not all(isinstance(file, str) for file in files):
            raise ValueError(f"groups: {str(path / 'state.json')!r} lists no data files, expected some")
        if selected:
            raise ValueError(
                f"groups: {str(path)!r} is a selection of the rows in its files, expected all of them: save what"
                " flatten_indices() gives"
            )
        for file in files:
            # mapped, not read: the images of a large dataset stay on disk
            tables.append(ipc.open_stream(pa.memory_map(str(path / file))).read_all())
        self._table = pa.concat_tables(tables)
        columns = self._table.schema
        images = [field.name for field in columns if _is_image(field.type)]
        if not images:
            raise ValueError(f"groups: {str(path)!r} has the columns {', '.join(columns.names)}, expected an image")
        self._image = images[0]
        self._caption = next((column for column in CAPTION_COLUMNS if column in columns.names), None)
        if not len(self._table):
            raise ValueError(f"groups: {str(path)!r} holds no rows")
        captions = f", captions from {self._caption!r}" if self._caption else ""
        self.description = f"{len(self._table)} images of a dataset, its column {self._image!r}{captions}"
        if len(images) > 1:
            self.note = f"other columns of images are not read: {', '.join(images[1:])}"
        super().__init__(name, [f"row-{index:07d}" for index in range(len(self._table))], size)

    def _content(self, index: int) -> tuple[bytes, str]:
        entry = self._table[self._image][index].as_py() or {}
        encoded = entry.get("bytes")
        if encoded is None:
            if not entry.get("path"):
                raise ValueError("the row has none")
            encoded = read_plain(self._folder / entry["path"])
        caption = self._table[self._caption][index].as_py() if self._caption else ""
        return encoded, _first(caption)


def _first(caption: Any) -> str:
    """A caption, or the first of several of one image."""
    return str((caption[0] if isinstance(caption, list) and caption else caption) or "")


def _one_of_dictionary(path: Path) -> Path:
    if not (path / "dataset_dict.json").is_file():
        return path
    file = path / "dataset_dict.json"
    try:
        splits = json.loads(file.read_text(encoding="utf-8"))["splits"]
    except (ValueError, KeyError, TypeError):
        splits = None
    if not isinstance(splits, list) or not splits or not all(isinstance(split, str) for split in splits):
        raise ValueError(f"groups: {str(file)!r} lists no splits, expected what DatasetDict.save_to_disk writes")
    if "train" not in splits and len(splits) != 1:
        raise ValueError(f"groups: {str(path)!r} holds {', '.join(splits)}; name the folder of one of them")
    return path / ("train" if "train" in splits else splits[0])


def _is_image(kind: Any) -> bool:
    types = require("pyarrow", "diffusers").types
    return types.is_struct(kind) and {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}


class TarGroup(_NamedGroup):
    """WebDataset tars: files that share a name up to the first dot are one sample: an image and, as .txt, .caption or
    the caption of a .json, its text."""

    def __init__(self, name: str, pattern: str, size: int) -> None:
        files = expanded(pattern)
        if not files:
            raise FileNotFoundError(f"groups: got {pattern!r}, expected existing tar files")
        samples: dict[str, dict[str, tuple[str, int, int]]] = {}
        names = _told_apart(files)
        for file in files:
            try:
                with tarfile.open(file, "r:") as archive:
                    for member in archive:
                        if member.isfile():
                            folder, _, base = member.name.rpartition("/")
                            stem, _, suffix = base.partition(".")
                            key = f"{names[file]}/{folder}/{stem}" if folder else f"{names[file]}/{stem}"
                            place = (file, member.offset_data, member.size)
                            if suffix.lower() in samples.get(key, {}):
                                raise ValueError(f"groups: {file!r} holds {member.name!r} twice, expected each once")
                            samples.setdefault(key, {})[suffix.lower()] = place
            except tarfile.TarError as error:
                raise ValueError(f"groups: {file!r} can't be read as a tar ({error})") from error
        suffixes = {suffix.removeprefix(".") for suffix in FolderGroup.suffixes}
        self._samples = {key: parts for key, parts in samples.items() if suffixes & set(parts)}
        self._suffixes = suffixes
        for key, parts in self._samples.items():
            several = sorted(suffixes & set(parts))
            if len(several) > 1:
                raise ValueError(f"groups: the sample {key!r} has several images ({', '.join(several)}), expected one")
        if not self._samples:
            raise ValueError(f"groups: {pattern!r} holds no image, expected members ending in .png, .jpg, ...")
        self.description = f"{len(self._samples)} images of {len(files)} tar file(s)"
        super().__init__(name, list(self._samples), size)

    def _content(self, index: int) -> tuple[bytes, str]:
        parts = self._samples[self._names[index]]
        image = next(place for suffix, place in parts.items() if suffix in self._suffixes)
        for suffix in ("txt", "caption"):
            if suffix in parts:
                return _read(image), _caption(parts[suffix], suffix)
        if "json" in parts:
            described = json.loads(_caption(parts["json"], "json"))
            if not isinstance(described, dict):
                raise ValueError(f"its .json is a {type(described).__name__}, expected an object with a caption")
            return _read(image), _first(next((described[key] for key in CAPTION_COLUMNS if described.get(key)), ""))
        return _read(image), ""


def _caption(place: tuple[str, int, int], suffix: str) -> str:
    try:
        return decoded(_read(place)).strip()
    except ValueError as error:
        raise ValueError(f"its .{suffix} {error}") from None


def _read(place: tuple[str, int, int]) -> bytes:
    file, offset, size = place
    with open(file, "rb") as opened:
        opened.seek(offset)
        return opened.read(size)


def _told_apart(files: list[str]) -> dict[str, str]:
    """The files' names; where several folders have one of a name, with as many of the folders as tell them apart."""
    depth, longest = 1, max(len(Path(file).parts) for file in files)
    while depth < longest and len({Path(file).parts[-depth:] for file in files}) < len(files):
        depth += 1
    return {file: "/".join(Path(file).parts[-depth:]) for file in files}


def expanded(pattern: str) -> list[str]:
    """The files that a pattern with {first..last}, * and ? names, sorted.

    Raises:
        FileNotFoundError: one of the files that {first..last} counts up isn't there.
    """
    braces = _BRACES.search(pattern)
    if braces:
        first, last = braces.groups()
        found = []
        for number in range(int(first), int(last) + 1):
            one = f"{pattern[: braces.start()]}{number:0{len(first)}d}{pattern[braces.end() :]}"
            files = expanded(one)
            if not files:
                raise FileNotFoundError(f"groups: {one!r} isn't there, expected existing tar files, all of {braces[0]}")
            found += files
        return list(dict.fromkeys(found))
    # brackets are part of a name
    return sorted(glob.glob(pattern.replace("[", "[[]")))
