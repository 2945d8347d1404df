"""Room for results: a full disk is told from every other error."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class DiskFull(OSError):
    """There is no room for results: nothing is lost, but going on is of no use."""


@contextmanager
def room() -> Iterator[None]:
    """Raises DiskFull where there is none for what is written in here."""
    try:
        yield
    except OSError as error:
        if not is_full(error) or isinstance(error, DiskFull):
            raise
        where = f"{error.strerror}: {error.filename!r}" if error.filename else error.strerror
        raise DiskFull(
            error.errno, f"out: no room to write results ({where}); make some and run the same command again"
        ) from error


def is_full(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
