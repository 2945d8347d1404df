"""Claims, which say who works on which unit, so that several processes, on several machines, can share a run directory.

A claim is a small file named after the unit, made only where none is. It is sealed JSON that says who made it, and a
number below, on which its owner counts while it works. A claim whose owner is gone may be taken over: on this machine
that is known at once; of another machine's, and of one that can't be read, once it has stayed as it is for two minutes.
These are minutes of the process that waits, from its first look at the claim: clocks of different machines and file
servers are never compared.

Claims save work, they don't guard numbers: if two processes ever compute one unit, both write the same file.
"""

import contextlib
import datetime
import os
import shutil
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from headscope._files import read_plain, write_first
from headscope.sweep.plan.units import CLAIMS
from headscope.sweep.store import seals

# seconds
COUNTED_EVERY = 10.0
ABANDONED_AFTER = 120.0
# when people hear of a claim that isn't counted on
QUIET_FOR = 30.0


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
            "machine": _machine(),
            "process": os.getpid(),
            "began": _beginning(os.getpid()),
            "session": session,
        }
        # what is ours, as it was written
        self._held: dict[Path, dict[str, Any]] = {}
        # of claims whose owner can't be looked up here: what they were, and since when
        self._watched: dict[str, tuple[bytes, float]] = {}
        self._stop = threading.Event()
        self._counter: threading.Thread | None = None

    def take(self, unit_id: str) -> dict[str, Any] | bool:
        """True if the unit is ours now, False if somebody works on it; the owner's description if it was taken over
        from one that is gone."""
        try:
            return self._take(unit_id)
        except FileNotFoundError:
            # whoever has found every unit finished removes the folder
            return False

    def _take(self, unit_id: str) -> dict[str, Any] | bool:
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / unit_id
        if self._make(file):
            return True
        owner = self._abandoned(file)
        if owner is None:
            return False
        aside = self._folder / f".{unit_id}.{uuid.uuid4().hex}"
        try:
            os.rename(file, aside)
        except FileNotFoundError:
            # some network file systems say so of a rename that they did, where the answer to the first asking was lost
            if not aside.exists():
                return False
        try:
            if _token(_content(aside), unit_id) == owner.get("token"):
                return owner if self._make(file) else False
            # somebody was quicker, and this is the claim that they have made since
            write_first(file, aside.read_bytes(), lasting=False)
            return False
        finally:
            if aside.is_dir() and not aside.is_symlink():
                # no process's claim, so nobody's
                shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.unlink(missing_ok=True)

    def release(self, unit_id: str) -> None:
        """Give up a claim, unless somebody has taken it over meanwhile."""
        file = self._folder / unit_id
        claim = self._held.get(file)
        if claim is not None and _token(_content(file), unit_id) == claim["token"]:
            file.unlink(missing_ok=True)
        # after an interrupt before here it is released again
        self._held.pop(file, None)

    def owners(self) -> dict[str, str]:
        """Unit: host and process, of all claims but those whose owner is known to be gone."""
        found = {}
        for file, owner in self._claimed():
            if owner is None:
                found[file.name] = "somebody whose claim can't be read"
                continue
            found[file.name] = f"{owner['host']}, process {owner['process']}, since {owner['since']}"
            if not self._is_here(owner):
                found[file.name] += " (from another machine it can't be told whether it still works)"
        return found

    def waits(self) -> dict[str, str]:
        """Unit: who works on it and what ends the waiting, of the claims that can't be read, that other sessions'
        processes hold, or one of this session on another machine that may be gone."""
        found = {}
        patience = f"; should that claim stay as it is for {ABANDONED_AFTER:.0f} s, its work is done here"
        for file, owner in self._claimed():
            if owner is None:
                found[file.name] = f"its claim {str(file)!r} can't be read{patience}"
            elif owner["session"] != self._owner["session"] or self._quiet(file) > QUIET_FOR:
                found[file.name] = (
                    f"process {owner['process']} of the machine {owner['host']} has claimed it since {owner['since']}"
                    f"{'' if self._is_here(owner) else patience}"
                )
        return found

    def damaged(self) -> list[Path]:
        """The claims that can't be read."""
        contents = {file: _content(file) for file in self._files()}
        return [file for file, said in contents.items() if said is not None and _parsed(said, file.name) is None]

    def close(self) -> None:
        """Release what is held."""
        self._stop.set()
        for file in list(self._held):
            self.release(file.name)

    def _make(self, file: Path) -> bool:
        # by this machine's clock, for people: nothing is decided by it
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        claim = {**self._owner, "since": since, "token": uuid.uuid4().hex}
        if file.exists():
            return False
        # before it is written: whatever comes between the two, it is released
        self._held[file] = claim
        if not write_first(file, _written(claim, file.name), lasting=False):
            del self._held[file]
            return False
        self._watched.pop(file.name, None)
        if self._counter is None:
            self._counter = threading.Thread(target=self._count, daemon=True)
            self._counter.start()
        return True

    def _count(self) -> None:
        counted = 0
        while not self._stop.wait(COUNTED_EVERY):
            counted += 1
            for file, claim in list(self._held.items()):
                with contextlib.suppress(OSError), file.open("r+b") as opened:
                    content = opened.read()
                    if _token(content, file.name) == claim["token"]:
                        opened.seek(content.rindex(b"\n"))
                        opened.write(_last_line(counted))

    def _claimed(self) -> list[tuple[Path, dict[str, Any] | None]]:
        """All claims but those whose owner is gone, with their owners."""
        found = []
        for file in self._files():
            content = _content(file)
            if content is not None and self._abandoned(file) is None:
                found.append((file, _parsed(content, file.name)))
        return found

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("[!.]*"))

    def _quiet(self, file: Path) -> float:
        """For how many seconds a claim from elsewhere hasn't changed."""
        return time.monotonic() - self._watched[file.name][1] if file.name in self._watched else 0.0

    def _is_here(self, owner: dict[str, Any]) -> bool:
        """True if this process can look up whether that one runs."""
        return all(owner[name] == self._owner[name] for name in ("host", "machine")) and owner["began"] is not None

    def _abandoned(self, file: Path) -> dict[str, Any] | None:
        """The owner of a claim, if it is gone."""
        content = _content(file)
        if content is None:
            self._watched.pop(file.name, None)
            return None
        owner = _parsed(content, file.name)
        if owner is not None and self._is_here(owner):
            self._watched.pop(file.name, None)
            return owner if _beginning(owner["process"]) != owner["began"] else None
        now = time.monotonic()
        seen, since = self._watched.get(file.name, (None, now))
        if content != seen:
            self._watched[file.name] = content, now
            return None
        # a claim that can't be read was torn by a crash of the machine
        return (owner or {"session": ""}) if now - since > ABANDONED_AFTER else None


def _written(claim: dict[str, Any], unit_id: str) -> bytes:
    return seals.to_json(claim, _name(unit_id)) + _last_line(0)


def _last_line(number: int) -> bytes:
    """A claim's last line, which is written over and always as long: nothing is cut off, whenever it is read."""
    return b"\n%012d" % number


def _name(unit_id: str) -> str:
    """The name that a unit's claim is sealed under."""
    return f"{CLAIMS}/{unit_id}"


def _content(file: Path) -> bytes | None:
    """A claim's content; None where there is none, empty where something is there and can't be read."""
    try:
        return read_plain(file)
    except FileNotFoundError:
        return b"" if file.is_symlink() else None
    except OSError:
        return b""


def _parsed(content: bytes, unit_id: str) -> dict[str, Any] | None:
    """The content of a unit's claim; None where that isn't one."""
    claim = seals.from_json(content.rpartition(b"\n")[0], _name(unit_id))
    texts = ("host", "machine", "session", "token", "since")
    if claim is None or not all(isinstance(claim.get(name), str) for name in texts):
        return None
    fits = isinstance(claim.get("process"), int) and isinstance(claim.get("began", 0), (str, type(None)))
    return claim if fits else None


def _token(content: bytes | None, unit_id: str) -> str | None:
    """The token that tells one claim of a unit from every other."""
    claim = _parsed(content, unit_id) if content is not None else None
    return claim["token"] if claim is not None else None


def _machine() -> str:
    """Tells machines and containers of one host name apart: within one, a process is known by its number."""
    parts = []
    with contextlib.suppress(OSError):
        parts.append(Path("/etc/machine-id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _beginning(process: int) -> str | None:
    """When a process of this machine began, in the kernel's ticks; None if there is none. A number that was given to
    another process since has another beginning."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    # a killed process whose parent hasn't asked for its end yet
    return None if fields[0] == "Z" else fields[19]
