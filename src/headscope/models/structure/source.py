"""The source of functions, parsed, from which one learns what models and pipelines do before they run."""

import ast
import inspect
import textwrap
import threading
from collections.abc import Callable
from typing import Any

# One thread at a time: CPython before 3.11.8 and 3.12.2 counts the depth of the tree that it builds in one place for
# all threads, and two that parse at once may get a SystemError (python/cpython#113035); linecache takes no lock either.
_READING = threading.Lock()


def source_tree(function: Callable[..., Any]) -> ast.Module:
    """A function's source, parsed, beneath its decorators; empty where there is none."""
    try:
        with _READING:
            return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])
