"""Settings that people write, as a dataclass: each value has the type of its annotation, or an error names it.

Nothing is turned into something else: "3" is no number, true isn't 1, 2.0 counts nothing. Only lists become tuples,
tables dataclasses, whole numbers floats where a float is expected, NumPy's numbers Python's, and paths texts.
"""

import os
from collections.abc import Iterable, Mapping, Set
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from headscope._files import check_text

_EXPECTED = {str: "some text in quotes", bool: "true or false", int: "a whole number", float: "a number"}


def settle(owner: Any) -> None:
    """Give every field of a dataclass what its annotation says, from what it was made with.

    Raises:
        ValueError: a value of another kind; names the field, as in "timesteps.1".
    """
    for name, kind in get_type_hints(type(owner)).items():
        # frozen for everybody else
        object.__setattr__(owner, name, _of_kind(kind, getattr(owner, name), name))


def from_table(kind: type, values: Any, where: str = "") -> Any:
    """A dataclass from a table: a mapping of its fields' names.

    Args:
        where: what the table is called, as in "sets.0."; stands before the names of its fields.

    Raises:
        ValueError: an unknown name, one that is missing, or a value that can't be; says which.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where.removesuffix('.') or 'plan'}: got {values!r}, expected a table")
    known = {field.name: field for field in fields(kind)}
    for name in values:
        if name not in known:
            close = get_close_matches(str(name), known, 1)
            expected = f"{close[0]!r}, or another of " if close else "one of "
            raise ValueError(f"{where}{name}: unknown key, expected {expected}{', '.join(known)}")
    for name, field in known.items():
        if name not in values and field.default is MISSING:
            raise ValueError(f"{where}{name}: got none, expected {_EXPECTED.get(field.type, 'a value')}")
    hints = get_type_hints(kind)
    return kind(**{name: _of_kind(hints[name], value, f"{where}{name}") for name, value in values.items()})


def _of_kind(kind: Any, value: Any, where: str) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(kind, UnionType):
        if value is None and NoneType in get_args(kind):
            return None
        kind = next(option for option in get_args(kind) if option is not NoneType)
    if get_origin(kind) is tuple:
        return _list(get_args(kind), value, where)
    if is_dataclass(kind):
        return value if isinstance(value, kind) else from_table(kind, value, f"{where}.")
    if kind is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    # a bool is an int
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where}: got {value!r}, expected {_EXPECTED[kind]}")
    if kind is str:
        check_text(where, value)
    return value


def _list(parts: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    # the order of a set is nobody's
    if isinstance(value, (str, bytes, Mapping, Set)) or not isinstance(value, Iterable):
        raise ValueError(f"{where}: got {value!r}, expected a list")
    found = tuple(value)
    if parts[-1] is ...:
        parts = parts[:1] * len(found)
    if len(found) != len(parts):
        raise ValueError(f"{where}: got {list(found)!r}, expected a list of {len(parts)}")
    return tuple(
        _of_kind(part, one, f"{where}.{number}") for number, (part, one) in enumerate(zip(parts, found, strict=True))
    )
