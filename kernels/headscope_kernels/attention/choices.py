"""Configurations of the forward that were measured to be faster than the rule's: a table, read once.

`choices.json` beside this file, if there is one. An entry stands for calls of its target, Triton version and head
dimension, in float16 or bfloat16, with up to twice or half as many queries and keys; `forward_configuration` follows it
where its schedule serves the call.
"""

import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import torch
import triton

from headscope_kernels.attention.configuration import ForwardConfiguration, Schedule

PATH = Path(__file__).with_name("choices.json")
FORMAT = 1
# faster by less than this is noise
MARGIN = 0.02
DTYPES = ("float16", "bfloat16")
SCHEDULES = get_args(Schedule)


@dataclass(frozen=True)
class Choice:
    """One entry.

    Attributes:
        target: backend and architecture, ("cuda", 90).
        triton: the version it was compiled by, "3.6".
        dtype: "float16" or "bfloat16".
        dim: of query, key and value.
        queries, keys: sequence lengths.
        name: the candidate's (forward/candidates.py).
        configuration: what to launch.
        milliseconds, default_milliseconds: medians of it and of the rule's choice.
    """

    target: tuple[str, int]
    triton: str
    dtype: str
    dim: int
    queries: int
    keys: int
    name: str
    configuration: ForwardConfiguration
    milliseconds: float
    default_milliseconds: float

    @property
    def problem(self) -> tuple[Any, ...]:
        return self.target, self.triton, self.dtype, self.dim, self.queries, self.keys


def triton_version() -> str:
    """Major and minor: "3.6"."""
    return ".".join(triton.__version__.split(".")[:2])


def nearest(
    choices: Sequence[Choice], dtype: torch.dtype, dim: int, queries: int, keys: int, target: tuple[str, int]
) -> Iterator[ForwardConfiguration]:
    """The configurations of the entries that stand for such a call, the nearest lengths first."""
    name, version = str(dtype).removeprefix("torch."), triton_version()
    if name not in DTYPES or min(queries, keys) < 1:
        return
    found = []
    for choice in choices:
        distances = abs(math.log2(choice.keys / keys)), abs(math.log2(choice.queries / queries))
        if (choice.target, choice.triton, choice.dim) == (target, version, dim) and max(distances) <= 1:
            found.append((distances, choice.dtype != name, choice.milliseconds, choice))
    for *_, choice in sorted(found, key=lambda entry: entry[:3]):
        yield choice.configuration


@lru_cache
def packaged() -> tuple[Choice, ...]:
    """The table that came with the package; empty if there is none."""
    return read(PATH) if PATH.exists() else ()


def read(path: Path) -> tuple[Choice, ...]:
    """The entries of a table.

    Raises:
        ValueError: it is malformed; the message says where, what came and what was expected.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    _check(str(path), content, {"format": (_integer(FORMAT, FORMAT), FORMAT), "entries": (_is(list), "a list")})
    choices = [_choice(f"{path}: entry {number}", entry) for number, entry in enumerate(content["entries"])]
    seen: dict[tuple[Any, ...], int] = {}
    for number, choice in enumerate(choices):
        if seen.setdefault(choice.problem, number) != number:
            raise ValueError(f"{path}: entry {number}: expected another problem than entry {seen[choice.problem]}'s")
    return tuple(choices)


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> tuple[Choice, ...]:
    """Makes a table of measured candidates, whole or not at all; returns its entries.

    An entry is the fastest sound row of its problem, if it beats the rule's choice by more than MARGIN.

    Args:
        path: where to; what was there is replaced.
        rows: the fields of Choice, `target` and `configuration` as lists and dictionaries if they come from JSON, and
            `sound`: whether the results were right.

    Raises:
        ValueError: a row is malformed.
    """
    best: dict[tuple[Any, ...], Choice] = {}
    for number, row in enumerate(rows):
        place, sound = f"row {number}", row.get("sound")
        if not isinstance(sound, bool):
            raise ValueError(f"{place}: sound is {sound!r}, expected true or false")
        if not sound:
            continue
        choice = _choice(place, {name: value for name, value in row.items() if name != "sound"}, faster=False)
        if choice.milliseconds >= (1 - MARGIN) * choice.default_milliseconds:
            continue
        known = best.setdefault(choice.problem, choice)
        if choice.milliseconds / choice.default_milliseconds < known.milliseconds / known.default_milliseconds:
            best[choice.problem] = choice
    text = json.dumps({"format": FORMAT, "entries": [asdict(choice) for choice in best.values()]}, indent=1)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise
    return tuple(best.values())


# a field's test, and what it expects
_Rules = Mapping[str, tuple[Callable[[Any], bool], Any]]


def _choice(place: str, entry: Any, faster: bool = True) -> Choice:
    _check(place, entry, _ENTRY)
    _check(f"{place}: configuration", entry["configuration"], _CONFIGURATION)
    if faster and entry["milliseconds"] >= entry["default_milliseconds"]:
        raise ValueError(
            f"{place}: milliseconds is {entry['milliseconds']}, expected less than default_milliseconds, "
            f"{entry['default_milliseconds']}"
        )
    values = dict(entry["configuration"])
    for name in ("dim_widths", "value_widths"):
        widths = values[name]
        if widths is not None and sum(widths) < entry["dim"]:
            raise ValueError(f"{place}: configuration: {name} is {widths}, expected to hold {entry['dim']} channels")
        values[name] = None if widths is None else tuple(widths)
    rows = values["block_queries"]
    if values["schedule"] == "plain" and not _power(16, 256)(rows):
        raise ValueError(f"{place}: configuration: block_queries is {rows}, expected a power of two from 16 to 256")
    return Choice(**{**entry, "target": tuple(entry["target"]), "configuration": ForwardConfiguration(**values)})


def _check(place: str, value: Any, rules: _Rules) -> None:
    """A dictionary of exactly these fields.

    Raises:
        ValueError: it isn't one, or a field fails its test.
    """
    if not isinstance(value, Mapping) or set(value) != set(rules):
        got = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
        raise ValueError(f"{place}: expected the fields {sorted(rules)}, got {got}")
    for name, (test, expected) in rules.items():
        if not test(value[name]):
            raise ValueError(f"{place}: {name} is {value[name]!r}, expected {expected}")


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: type(value) is kind


def _integer(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _power(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: _integer(least, most)(value) and value & (value - 1) == 0


def _widths(value: Any) -> bool:
    return value is None or (isinstance(value, list | tuple) and len(value) > 0 and all(map(_power(16, 512), value)))


def _target(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and _is(str)(value[0]) and _integer(1, 9999)(value[1])


def _time(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


_LENGTH = (_integer(1, 2**31 - 1), "an integer from 1 to 2^31 - 1")
_ENTRY: _Rules = {
    "target": (_target, "a backend and an architecture"),
    "triton": (lambda value: _is(str)(value) and bool(re.fullmatch(r"\d+\.\d+", value)), "a version such as '3.6'"),
    "dtype": (lambda value: value in DTYPES, f"one of {DTYPES}"),
    "dim": (_integer(1, 512), "an integer from 1 to 512"),
    "queries": _LENGTH,
    "keys": _LENGTH,
    "name": (lambda value: _is(str)(value) and value != "", "a candidate's name"),
    "configuration": (lambda value: isinstance(value, Mapping), "a ForwardConfiguration's fields"),
    "milliseconds": (_time, "a positive number"),
    "default_milliseconds": (_time, "a positive number"),
}
_CONFIGURATION: _Rules = {
    "block_queries": (lambda value: _integer(16, 256)(value) and value % 16 == 0, "a multiple of 16 from 16 to 256"),
    "block_keys": (_power(16, 256), "a power of two from 16 to 256"),
    "num_warps": (_power(1, 16), "a power of two from 1 to 16"),
    "num_stages": (_integer(1, 8), "an integer from 1 to 8"),
    "dim_widths": (_widths, "null or a list of powers of two from 16 to 512"),
    "value_widths": (_widths, "null or a list of powers of two from 16 to 512"),
    "descriptors": (_is(bool), "true or false"),
    "schedule": (lambda value: value in SCHEDULES, f"one of {SCHEDULES}"),
}
