"""Named dimensions are checked while tests run: those of arguments and results of headscope's functions.

An import hook wraps the functions of the packages in CHECKED. When a call returns, its arguments and its result are
compared with their annotations, so that bad arguments get the function's own error first and whatever it lets through
is an error here. The fields of named tuples and dataclasses count as arguments of the functions that take them. Outside
of the tests nothing is wrapped, and beartype isn't imported.

jaxtyping has an import hook, too: it checks arguments before the call, wraps every function, and torch.compile can't
trace its wrappers.
"""

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from io import StringIO
from types import FunctionType, ModuleType
from typing import Any, get_args, get_origin

import torch
from beartype.door import is_bearable
from jaxtyping import AbstractArray, jaxtyped, print_bindings

CHECKED = (
    "headscope.features",
    "headscope.ops",
    "headscope.models.attending",
    "headscope.models.editing.combining",
    "headscope.models.tasks",
    "headscope.sweep.compute.scores",
)


class ShapeError(Exception):
    """A tensor that isn't as its annotation says."""


def install() -> None:
    """Check the modules that are imported from here on."""
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if not any(f"{fullname}.".startswith(f"{package}.") for package in CHECKED):
            return None
        spec: ModuleSpec | None = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _check_functions(module, module.__name__)


def _check_functions(owner: Any, module: str) -> None:
    """Wrap the functions that a module, or a class of it, defines."""
    for name, value in list(vars(owner).items()):
        if isinstance(value, type) and value.__module__ == module:
            _check_functions(value, module)
        elif isinstance(value, (staticmethod, classmethod)):
            setattr(owner, name, type(value)(checked(value.__func__)))
        elif isinstance(value, property) and value.fget is not None:
            setattr(owner, name, property(checked(value.fget), value.fset, value.fdel, value.__doc__))
        # what makes a dataclass lets everything through
        elif isinstance(value, FunctionType) and value.__module__ == module and name != "__init__":
            setattr(owner, name, checked(value))


def checked(function: Any) -> Any:
    """The function with its named dimensions checked at each call; the function itself if it names none."""
    if not _annotations(function):
        return function

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        # what is compiled or exported is the function alone
        if not torch.compiler.is_compiling():
            _compare(function, arguments, options, result)
        return result

    return call


def _compare(function: Any, arguments: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
    values = {**_signature(function).bind(*arguments, **options).arguments, "return": result}
    hints = _annotations(function)
    kinds = [hint for name, hint in hints.items() if name != "return" and _fields(hint)]
    with jaxtyped("context"):
        for name, hint in hints.items():
            # a call made of another call has its own sizes
            with jaxtyped("context") if name == "return" and hint in kinds else nullcontext():
                if name in values:
                    _check(f"{function.__module__}.{function.__qualname__}: {name}", values[name], hint)


_signature = functools.cache(inspect.signature)


@functools.cache
def _annotations(owner: Any) -> dict[str, Any]:
    """The annotations of a function, or of a class's fields, that name dimensions; quoted ones don't."""
    kinds = reversed(owner.__mro__) if isinstance(owner, type) else [owner]
    hints = {name: hint for kind in kinds for name, hint in inspect.get_annotations(kind).items()}
    return {name: hint for name, hint in hints.items() if _names_dimensions(hint)}


def _names_dimensions(hint: Any) -> bool:
    # a function's arguments aren't at hand
    if get_origin(hint) is Callable:
        return False
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return bool(_fields(hint)) or any(map(_names_dimensions, get_args(hint)))


def _fields(kind: Any) -> dict[str, Any]:
    """The annotations that name dimensions of a named tuple's or a dataclass's fields; none of other types."""
    has_fields = isinstance(kind, type) and (dataclasses.is_dataclass(kind) or hasattr(kind, "_fields"))
    return _annotations(kind) if has_fields else {}


def _check(name: str, value: Any, hint: Any) -> None:
    """Compare a value with its annotation, in the dimensions that the call's other values have."""
    if not is_bearable(value, hint):
        raise ShapeError(f"{name}: got {_described(value)}, annotated {hint}{_sizes()}")
    # beartype looks at one entry of a list
    if isinstance(value, (list, tuple)) and get_origin(hint) in (list, tuple, Sequence) and len(get_args(hint)) == 1:
        for position, entry in enumerate(value):
            _check(f"{name}[{position}]", entry, get_args(hint)[0])
    for field, kind in _fields(type(value)).items():
        _check(f"{name}.{field}", getattr(value, field), kind)


def _described(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if hasattr(value, "shape") else f"a {type(value).__name__}"


def _sizes() -> str:
    """The sizes that the call's dimensions have so far."""
    with redirect_stdout(StringIO()) as printed:
        print_bindings()
    _, *sizes = printed.getvalue().rstrip("\n").split("\n")
    return f" with {', '.join(sizes)}" if sizes else ""
