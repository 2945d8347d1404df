"""The source of functions, parsed, from which one learns what models and pipelines do before they run."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any


def source_tree(function: Callable[..., Any]) -> ast.Module:
    """A function's source, parsed, beneath its decorators; empty where there is none."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])
