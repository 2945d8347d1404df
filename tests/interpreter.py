"""Triton's interpreter, with a third less to do.

At every launch it puts functions of its own in the place of triton.language's, and takes them away afterwards. It
does so at each call of one `triton.jit` function by another, too, where they are in place already: looking for what
there was to replace took a third of the time.
"""

import importlib.util
import inspect
import os
from typing import Any


def replace_once_a_launch() -> None:
    """From now on each launch replaces the functions of every module of triton.language once.

    Triton's own names, which aren't public: where they aren't as they are in Triton 3.7, nothing is changed; nor where
    kernels aren't interpreted, or Triton isn't installed (it is for Linux only).
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope") or hasattr(interpreter._patch_lang, "stock"):
        return
    stock, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[frozenset[int]] = set()

    def once(function: Any) -> Any:
        # what the stock function looks through
        modules = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        seen = frozenset(id(module) for module in modules if module in (tl, tl.core))
        if seen in replaced:
            return interpreter._LangPatchScope()
        replaced.add(seen)
        return stock(function)

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        replaced.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            replaced.clear()

    once.stock = stock
    interpreter._patch_lang = once
    interpreter.GridExecutor.__call__ = launched
