"""Who works on which unit, so that several processes, on several machines, can share a run directory.

A claim is a small file named after the unit, made only where none is. It says who made it; its owner touches it while
it works. A claim whose owner is gone may be taken over: on this machine that is known at once, of another machine's
after its file was left untouched for two minutes.

Claims save work, they don't guard numbers: if two processes ever compute one unit, both write the same file.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from headscope.sweep.store import CLAIMS

TOUCHED_EVERY = 10.0
ABANDONED_AFTER = 120.0


class Claims:
    """The claims of one process.

    Args:
        path: the run directory.
        session: names the run_sweep call or cluster job that the process belongs to.
    """

    def __init__(self, path: Path, session: str = "") -> None:
        self._folder = path / CLAIMS
        self._owner = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "began": _beginning(os.getpid()),
            "session": session,
        }
        # what is ours: the file, and the token that was written into it
        self._held: dict[Path, str] = {}
        self._stop = threading.Event()
        self._toucher: threading.Thread | None = None

    def take(self, unit: str) -> dict[str, Any] | bool:
        """True if the unit is ours now, False if somebody works on it; the owner's description if it was taken over
        from one that is gone."""
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / unit
        if self._make(file):
            return True
        owner = self._abandoned(file)
        if owner is None:
            return False
        aside = self._folder / f".{unit}.{uuid.uuid4().hex}"
        try:
            os.rename(file, aside)
        except FileNotFoundError:
            # some network file systems say so of a rename that they did, where the answer to the first asking was lost
            if not aside.exists():
                return False
        aside.unlink(missing_ok=True)
        return owner if self._make(file) else False

    def release(self, unit: str) -> None:
        """Give up a claim, unless somebody has taken it over meanwhile."""
        file = self._folder / unit
        token = self._held.pop(file, None)
        if token is not None and _token(file) == token:
            file.unlink(missing_ok=True)

    def owners(self) -> dict[str, str]:
        """Unit: host and process, of all claims whose owner isn't gone."""
        found = {}
        for file in self._folder.glob("[!.]*"):
            owner = _read(file)
            if owner and self._abandoned(file) is None:
                found[file.name] = f"{owner['host']}, process {owner['process']}"
        return found

    def close(self) -> None:
        """Release what is held."""
        self._stop.set()
        for file in list(self._held):
            self.release(file.name)

    def _make(self, file: Path) -> bool:
        # written aside and linked: nobody ever reads half a claim
        token = uuid.uuid4().hex
        aside = self._folder / f".{file.name}.{token}"
        aside.write_text(json.dumps({**self._owner, "token": token}))
        try:
            os.link(aside, file)
        except FileExistsError:
            # a network file system says so of a link that it made, too, where the answer to the first asking was lost
            if _token(file) != token:
                return False
        finally:
            aside.unlink(missing_ok=True)
        self._held[file] = token
        if self._toucher is None:
            self._toucher = threading.Thread(target=self._touch, daemon=True)
            self._toucher.start()
        return True

    def _touch(self) -> None:
        while not self._stop.wait(TOUCHED_EVERY):
            for file, token in list(self._held.items()):
                with contextlib.suppress(OSError):
                    if _token(file) == token:
                        os.utime(file)

    def _abandoned(self, file: Path) -> dict[str, Any] | None:
        """The owner of a claim, if it is gone."""
        owner = _read(file)
        if owner and owner["host"] == self._owner["host"]:
            return owner if _beginning(owner["process"]) != owner["began"] else None
        try:
            untouched = time.time() - file.stat().st_mtime
        except FileNotFoundError:
            return None
        # a claim that can't be read was torn by a crash of the machine
        return (owner or {"session": ""}) if untouched > ABANDONED_AFTER else None


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _token(file: Path) -> str | None:
    """What tells one claim of a unit from every other."""
    return (_read(file) or {}).get("token")


def _beginning(process: int) -> str | None:
    """When a process of this machine began, in the kernel's ticks; None if there is none. A number that was given to
    another process since has another beginning."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    # a killed process whose parent hasn't asked for its end yet
    return None if fields[0] == "Z" else fields[19]
