"""Functions that a user names as "module:function", and classes of a user's: known by a digest of their code."""

import hashlib
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

# in an identity, before the name of such a function
CODE = "code of "


def imported(field: str, name: str) -> Callable[..., Any]:
    """The function that "module:function" names.

    Raises:
        ValueError: there is none.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    # whatever a module of the user's does wrong while it is imported
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{field}: got {name!r}, expected an importable module:function ({reason})") from error
    if not callable(found):
        raise ValueError(f"{field}: got {name!r}, which is {type(found).__name__}, expected a function")
    return found


def code_of(names: Sequence[str]) -> dict[str, str]:
    """Of every "module:function" among the names, a digest of its code: that of its module and, where that one has it
    from elsewhere, of the module that defines it. Code that those modules import isn't in it.

    Functions without Python source (compiled ones, builtins) have none, and are left out.

    Raises:
        ValueError: there is no such function.
    """
    found = {}
    for name in names:
        if ":" not in name:
            continue
        function = imported("scores", name)
        sources = [_source(importlib.import_module(name.partition(":")[0])), _source(inspect.getmodule(function))]
        # written into a notebook, where there is no module's source
        sources = [source for source in sources if source is not None] or [_source(function)]
        if sources != [None]:
            found[name] = hashlib.sha256("\0".join(map(str, dict.fromkeys(sources))).encode()).hexdigest()
    return found


def code_of_class(kind: type) -> dict[str, str]:
    """A class of the user's by its name, with a digest of its module's code or, from a notebook, of its own; nothing
    for headscope's classes, which the version stands for."""
    if kind.__module__.partition(".")[0] == "headscope":
        return {}
    source = _source(inspect.getmodule(kind)) or _source(kind) or ""
    # a script's classes have this module in the processes that it starts
    module = "__main__" if kind.__module__ == "__mp_main__" else kind.__module__
    return {f"{CODE}{module}.{kind.__qualname__}": hashlib.sha256(source.encode()).hexdigest()}


def _source(code: Any) -> str | None:
    """The source of a module or function, None where there isn't any."""
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):
        return None
