"""Files that are written once, by whoever comes first, on file systems with and without hard links."""

import contextlib
import errno
import os
import socket
import threading
from pathlib import Path

import pytest

from headscope import _files as module
from headscope._files import local_path, write_atomic, write_first

# what exFAT, some FUSE file systems and SMB say
REFUSALS = [errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("s3://bucket/x", "s3://bucket/x"),
        (Path("s3://bucket/x"), "s3://bucket/x"),
        ("hf://org/name", "hf://org/name"),
        ("HTTPS://host/a b", "HTTPS://host/a b"),
        ("file:///tmp/x", "file:///tmp/x"),
        ("memory://", "memory://"),
    ],
)
def test_an_address_is_no_path(given, named):
    with pytest.raises(ValueError, match=f"out: got the address '{named}', expected a path of the file system"):
        local_path("out", given)


@pytest.mark.parametrize("given", ["x", "/x/y", "org/name", "C:/x", "a:b", "./s3:/x", "x/s3://y", Path("x")])
def test_a_path_is_one(given):
    assert local_path("out", given) == Path(given)


def refusing(number: int):
    def link(*_):
        raise OSError(number, os.strerror(number))

    return link


@pytest.fixture(params=[None, *REFUSALS], ids=lambda number: errno.errorcode.get(number, "links"))
def links(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(os, "link", refusing(request.param))
    return request.param is None


@pytest.mark.parametrize("lasting", [True, False])
def test_the_first_writes_and_the_others_leave_it(tmp_path, links, lasting):
    file = tmp_path / "file"
    assert write_first(file, b"one", lasting=lasting)
    assert not write_first(file, b"two", lasting=lasting)
    assert file.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [file]


def test_of_many_at_once_one_wins_and_nobody_reads_a_part(tmp_path, links):
    content = [str(number).encode() * 50_000 for number in range(8)]
    for round in range(10):
        file, ready, won, read = tmp_path / str(round), threading.Barrier(9), [], []

        def write(number: int, file=file, ready=ready, won=won) -> None:
            ready.wait()
            if write_first(file, content[number], lasting=False):
                won.append(number)

        def look(file=file, ready=ready, read=read) -> None:
            ready.wait()
            while len(read) < 20:
                if file.exists():
                    read.append(file.read_bytes())

        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        threads.append(threading.Thread(target=look))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert set(read) == {content[won[0]]}


def test_a_process_that_was_killed_before_it_could_rename_holds_nobody_up(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refusing(errno.EPERM))
    monkeypatch.setattr(module, "_RENAMED_WITHIN", 0.05)
    (tmp_path / ".file.guard.tmp").touch()
    assert write_first(tmp_path / "file", b"one")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_another_error_than_missing_links_is_raised(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refusing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        write_first(tmp_path / "file", b"one")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_ordinary_file_is_not_opened(tmp_path):
    """Nor waited for, whatever the system says of it."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    # a socket's path is no longer than 108 bytes
    with contextlib.chdir(tmp_path), socket.socket(socket.AF_UNIX) as door:
        door.bind("socket")
    for name in ("folder", "pipe", "loop", "socket"):
        with pytest.raises(OSError, match="expected an ordinary file") as error:
            module.open_plain(tmp_path / name)
        assert error.value.errno == errno.EINVAL
        assert not write_first(tmp_path / name, b"one")


def test_a_file_system_without_permissions_or_flushed_folders_is_written_to(tmp_path, monkeypatch):
    """exFAT refuses chmod, and some network file systems fsync of a folder."""
    flush = os.fsync

    def of_files(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", of_files)
    monkeypatch.setattr(os, "chmod", refusing(errno.EPERM))
    write_atomic(tmp_path / "file", b"one")
    assert (tmp_path / "file").read_bytes() == b"one"
