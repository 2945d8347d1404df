"""Files that are written whole or not at all, and the paths that they may have."""

import contextlib
import errno
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

# two letters at least: one and a colon is a drive. Path makes one slash of two
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")


def local_path(field: str, path: str | os.PathLike[str]) -> Path:
    """A path that a user gave, which must be one of the file system: an address (s3://, hf://, https://, file://, ...)
    would else be taken for a folder called "s3:".

    Args:
        field: what the path is called where it was given.

    Raises:
        ValueError: it is an address or no path at all, or its name isn't UTF-8.
    """
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str) or not text:
        raise ValueError(f"{field}: got {path!r}, expected a path")
    check_text(field, text)
    address = _ADDRESS.match(text)
    if address:
        written = text if "//" in address[0] else f"{address[1]}://{text[address.end() :]}"
        raise ValueError(
            f"{field}: got the address {written!r}, expected a path of the file system; copy or mount what is there"
        )
    return Path(path)


def check_text(field: str, text: str) -> None:
    """Raises ValueError where a name isn't UTF-8, as tables and manifests hold no other text, or can be no file's."""
    if "\0" in text:
        raise ValueError(f"{field}: got {text!r}, which holds a zero byte, expected another name")
    if not is_utf8(text):
        raise ValueError(f"{field}: got {os.fsencode(text)!r}, whose name isn't UTF-8, expected another name")


def is_utf8(text: str) -> bool:
    """True if text can be encoded: names of files may hold any bytes, which Python represents as half characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_atomic(path: Path, content: bytes | Callable[[IO[bytes]], Any]) -> None:
    """Write a file so that a reader finds the old content or the new, never a part.

    Temporary name beside it, flush to disk, rename, flush the directory. Folders on the way are made.

    Args:
        content: the bytes, or a function that writes them to an open file.

    Raises:
        OSError: it can't be written; names the file.
    """
    with _naming(path):
        _write_atomic(path, content)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors name the file that was to be written: of an open one the system says nothing, else the name aside."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write_atomic(path: Path, content: bytes | Callable[[IO[bytes]], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; a result is as readable as any other file of the user's. exFAT has no permissions
        # and refuses to change them
        with contextlib.suppress(PermissionError):
            os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def read_plain(path: Path) -> bytes:
    """A file's content.

    Raises:
        OSError: it can't be read, or is no ordinary file: a pipe would never end.
    """
    with os.fdopen(open_plain(path), "rb") as file:
        return file.read()


def open_plain(path: Path) -> int:
    """The descriptor of an ordinary file, for reading.

    Raises:
        OSError: it can't be opened, or is something else, which might block whoever reads it (EINVAL).
    """
    other = OSError(errno.EINVAL, "expected an ordinary file", str(path))
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        # a socket, a link to itself
        raise other if error.errno in (errno.ENXIO, errno.ELOOP) else error from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise other
    return descriptor


def write_first(path: Path, content: bytes, *, lasting: bool = True) -> bool:
    """Write a file unless there is one: of several processes at once, one wins, and nobody ever reads a part of it.

    Args:
        content: what nobody else writes there, where the answer matters.
        lasting: flush it to disk, as what must survive a crash of the machine is.

    Returns:
        Whether this call wrote it.

    Raises:
        OSError: it can't be written; names the file.
    """
    with _naming(path):
        return _write_first(path, content, lasting)


def _write_first(path: Path, content: bytes, lasting: bool) -> bool:
    aside = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    try:
        if lasting:
            _write_atomic(aside, content)
        else:
            aside.write_bytes(content)
        try:
            os.link(aside, path)
        except FileExistsError:
            # a network file system says so of a link that it made, too, where the answer to the first asking was lost
            return _holds(path, content)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if not _moved_first(aside, path):
                return False
        if lasting:
            _flush_folder(path.parent)
        return True
    finally:
        aside.unlink(missing_ok=True)


# what file systems without hard links say of them: exFAT and FAT, FUSE, SMB, and those with a limit of one
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK}
# seconds that a process may take to rename a file, before another takes it for dead
_RENAMED_WITHIN = 10.0


def _moved_first(aside: Path, path: Path) -> bool:
    """`write_first` without hard links: whoever makes a second file, empty and short-lived, may rename."""
    guard = path.with_name(f".{path.name}.guard.tmp")
    patience = time.monotonic() + _RENAMED_WITHIN
    while not path.exists():
        try:
            os.close(os.open(guard, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            if time.monotonic() > patience:
                # its maker was killed between two lines of this function
                guard.unlink(missing_ok=True)
                patience = time.monotonic() + _RENAMED_WITHIN
            time.sleep(0.01)
            continue
        try:
            if path.exists():
                return False
            os.replace(aside, path)
        finally:
            guard.unlink(missing_ok=True)
        return True
    return False


def _holds(path: Path, content: bytes) -> bool:
    try:
        return read_plain(path) == content
    except OSError as error:
        # gone by now, or something else in its place
        if error.errno not in (errno.ENOENT, errno.EINVAL):
            raise
        return False


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network and FUSE file systems know no such thing
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
