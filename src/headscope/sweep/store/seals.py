"""Checksums that files carry in themselves, so that a damaged one is found before its numbers are used.

A sealed file holds the text

    headscope seal <name> crc32 <8 hex digits>

where its format keeps notes: a Parquet file in its footer, a safetensors file in its header, JSON anywhere. The digits
are the CRC-32 of all other bytes. As the seal is part of the file, both appear in one rename: no kill comes between
them, and a copied file is still sealed.

CRC-32 finds every change of up to 32 bits in a row, and all but one in 4e9 others; it is read at several GB/s. It
guards against faulty disks and copies, not against forgers.
"""

import errno
import json
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headscope._files import open_plain

DIGITS = 8
_MARK = b"headscope seal "
_SEAL = re.compile(rb"headscope seal (\S+) crc32 [0-9a-f]{8}")
# read in pieces that a processor's cache holds
_PIECE = 1 << 20
_MAGIC = b"PAR1"


def blank(name: str) -> str:
    """The seal of a file that is about to be written, its digits still zeros. `name` has no spaces."""
    return f"headscope seal {name} crc32 {'0' * DIGITS}"


def sealed(content: bytes, suffix: str) -> tuple[memoryview, bytes, memoryview]:
    """A file's content, in three parts, with the digits of its seal, which was blank, filled in.

    Args:
        suffix: of the file's name, which says where its notes are.
    """
    whole = memoryview(content)
    start, end = _notes(suffix, len(content), lambda first, last: content[first:last])
    seal = _found(content[start:end], suffix)
    assert seal is not None
    place = start + seal.end() - DIGITS
    before, after = whole[:place], whole[place + DIGITS :]
    return before, b"%08x" % zlib.crc32(after, zlib.crc32(before)), after


def to_json(content: dict[str, Any], name: str) -> bytes:
    """Sealed JSON: an object with the seal before all else."""
    text = json.dumps({"seal": blank(name), **content}, indent=1)
    return b"".join(sealed(text.encode(), ".json"))


def from_json(content: bytes, name: str) -> dict[str, Any] | None:
    """The object that `to_json` wrote under that name, its seal included; None where these aren't its bytes."""
    seal = _found(content, ".json")
    # sealed anew, it is as it was
    if seal is None or seal[1] != name.encode() or b"".join(sealed(content, ".json")) != content:
        return None
    # a whole one may have been made elsewhere
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def problem(path: Path, name: str) -> str | None:
    """The fault of a file that was sealed under that name: "missing", "torn" (its bytes aren't those that were
    sealed, or it has no seal), "foreign" (it is whole and something else); None if nothing is.

    Raises:
        OSError: it can't be read at all, for a reason that isn't its content.
    """
    try:
        file = open_plain(path)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # a pipe, a device, a folder
        return "foreign"
    try:
        size = os.fstat(file).st_size
        start, end = _notes(path.suffix, size, lambda first, last: os.pread(file, last - first, first))
        seal = _found(os.pread(file, end - start, start), path.suffix)
        if seal is None:
            return "torn"
        place = start + seal.end() - DIGITS
        checksum = _crc32(file, place + DIGITS, size, _crc32(file, 0, place, 0))
        if seal[0][-DIGITS:] != b"%08x" % checksum:
            return "torn"
    except OSError as error:
        # a bad sector
        if error.errno != errno.EIO:
            raise
        return "torn"
    finally:
        os.close(file)
    return None if seal[1] == name.encode() else "foreign"


def _notes(suffix: str, size: int, read: Callable[[int, int], bytes]) -> tuple[int, int]:
    """From where to where a file's notes reach; an empty range in one that is torn there."""
    if suffix == ".parquet":
        ending = read(max(0, size - 8), size)
        start = size - 8 - int.from_bytes(ending[:4], "little")
        return (start, size - 8) if ending[4:] == _MAGIC and start >= 0 else (0, 0)
    if suffix == ".safetensors":
        end = 8 + int.from_bytes(read(0, 8), "little")
        return (8, end) if end <= size else (0, 0)
    return 0, size


def _found(notes: bytes, suffix: str) -> re.Match[bytes] | None:
    # a footer's notes come after what it says of the columns, a header's before what it says of the tensors
    place = notes.rfind(_MARK) if suffix == ".parquet" else notes.find(_MARK)
    return _SEAL.match(notes, place) if place >= 0 else None


def _crc32(file: int, start: int, end: int, checksum: int) -> int:
    """Of a file's bytes from start to end, going on from a checksum."""
    buffer = memoryview(bytearray(min(_PIECE, end - start)))
    while start < end:
        count = os.preadv(file, [buffer[: end - start]], start)
        if not count:
            break
        checksum = zlib.crc32(buffer[:count], checksum)
        start += count
    return checksum
