"""Versions of what the numbers depend on."""

import platform
from importlib.metadata import PackageNotFoundError, version

import headscope


def versions() -> dict[str, str]:
    """headscope, Python, and those of its dependencies that are installed."""
    found = {"headscope": headscope.__version__, "python": platform.python_version()}
    for name in ("torch", "triton", "diffusers", "transformers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
