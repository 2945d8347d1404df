"""A file that isn't what was written is found, wherever the difference is."""

import errno
import io
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save

from headscope.sweep.store import seals

NAME = "ablations/one"


def parquet(name: str = NAME) -> bytes:
    # a label that looks like a seal is not taken for one
    labels = pa.array([seals.blank("other"), "b"] * 8)
    table = pa.table({"loss": [0.5] * 16, "source": labels}).replace_schema_metadata({"seal": seals.blank(name)})
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def safetensors(name: str = NAME) -> bytes:
    return save({seals.blank("other"): torch.arange(6.0)}, {"seal": seals.blank(name)})


def json(name: str = NAME) -> bytes:
    return f'{{"seal": "{seals.blank(name)}", "rows": 3}}'.encode()


CONTENTS = {".parquet": parquet, ".safetensors": safetensors, ".json": json}


@pytest.mark.parametrize("suffix", CONTENTS)
def test_flipped_bits_and_cuts_are_found(suffix, tmp_path):
    path = tmp_path / f"file{suffix}"
    whole = b"".join(seals.sealed(CONTENTS[suffix](), suffix))
    assert len(whole) == len(CONTENTS[suffix]())
    path.write_bytes(whole)
    assert seals.problem(path, NAME) is None
    # an odd step, so that over all each bit of a byte has its turn
    step = 1 + 2 * (len(whole) // 400)
    for place in range(0, len(whole), step):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        assert seals.problem(path, NAME) == "torn", place
    for length in range(0, len(whole), step):
        path.write_bytes(whole[:length])
        assert seals.problem(path, NAME) == "torn", length
    path.write_bytes(whole + b"\0")
    assert seals.problem(path, NAME) == "torn"
    path.write_bytes(CONTENTS[suffix]())
    assert seals.problem(path, NAME) == "torn"


@pytest.mark.parametrize("suffix", CONTENTS)
def test_whole_files_of_another_name_are_foreign(suffix, tmp_path):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(b"".join(seals.sealed(CONTENTS[suffix]("ablations/two"), suffix)))
    assert seals.problem(path, NAME) == "foreign"


def test_a_sealed_file_is_read_by_others(tmp_path):
    path = tmp_path / "file.parquet"
    path.write_bytes(b"".join(seals.sealed(parquet(), ".parquet")))
    assert pq.read_table(path)["loss"].to_pylist() == [0.5] * 16


def test_what_is_no_file_is_not_waited_for(tmp_path):
    assert seals.problem(tmp_path / "none.json", NAME) == "missing"
    os.mkfifo(tmp_path / "pipe.json")
    assert seals.problem(tmp_path / "pipe.json", NAME) == "foreign"
    (tmp_path / "folder.json").mkdir()
    assert seals.problem(tmp_path / "folder.json", NAME) == "foreign"
    (tmp_path / "link.json").symlink_to("/dev/zero")
    assert seals.problem(tmp_path / "link.json", NAME) == "foreign"


@pytest.mark.parametrize("name", ["pread", "preadv"])
def test_a_bad_sector_is_damage(tmp_path, monkeypatch, name):
    path = tmp_path / "file.parquet"
    path.write_bytes(b"".join(seals.sealed(parquet(), ".parquet")))

    def fail(*given):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, name, fail)
    assert seals.problem(path, NAME) == "torn"


def test_long_files_are_read_in_pieces(tmp_path, monkeypatch):
    path = tmp_path / "file.safetensors"
    path.write_bytes(b"".join(seals.sealed(safetensors(), ".safetensors")))
    monkeypatch.setattr(seals, "_PIECE", 7)
    assert seals.problem(path, NAME) is None
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert seals.problem(path, NAME) == "torn"
