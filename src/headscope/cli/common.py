"""Shared by the commands: options, the console for messages, and errors in one line instead of a traceback."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from headscope._extras import require
from headscope._signals import INTERRUPTED, TERMINATED, Terminated, sigterm_interrupts

console = Console(stderr=True)

Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, ...")]
DType = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Batch = Annotated[
    int | None, typer.Option(help="Rows that pass through the denoiser at once, at most; default: what fits.")
]
Seed = Annotated[int, typer.Option(help="The noise replicate: the same seed gives the same noise everywhere.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]


def need(extra: str, *modules: str) -> None:
    """Raise ImportError, naming the extra that brings it, if a module can't be imported."""
    for module in modules:
        require(module, extra)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Print one line instead of a traceback for errors that a user can repair, and exit; SIGTERM is as Ctrl-C.

    HEADSCOPE_TRACEBACK=1 shows the traceback.
    """
    try:
        with sigterm_interrupts():
            yield
    except (ValueError, TypeError, KeyError, ImportError, RuntimeError, OSError) as error:
        if os.environ.get("HEADSCOPE_TRACEBACK") == "1":
            raise
        console.print(f"[bold red]error[/] {escaped(_sentence(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt as error:
        console.print("stopped; what is finished is kept, and the same command goes on from there")
        raise typer.Exit(TERMINATED if isinstance(error, Terminated) else INTERRUPTED) from None


def _sentence(error: Exception) -> str:
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def escaped(text: str) -> str:
    """Text that a terminal shows as it is: neither markup nor characters that would steer it."""
    # names of files may be anything
    readable = text.encode("utf-8", "backslashreplace").decode()
    return escape("".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in readable))
