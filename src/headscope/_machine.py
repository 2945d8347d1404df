"""Versions, the source code's revision and devices, on which numbers and speeds depend."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from headscope._version import __version__

if TYPE_CHECKING:
    import torch


def versions() -> dict[str, str]:
    """The versions of headscope, Python and the installed ones of some dependencies."""
    found = {"headscope": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", "diffusers", "transformers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """The commit of the checkout that headscope is imported from, "+changes" where files differ from it; None where
    it isn't in one."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # an installed package may lie inside somebody else's repository
        if not git("ls-files", "--", "__init__.py"):
            return None
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def checked_device(name: str) -> "torch.device":
    """Raises ValueError where torch has no such device."""
    import torch

    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: got {name!r}, expected one that torch sees (it sees no CUDA device)")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).fill_(0.0)
    # torch built without a kind of device asserts that it was
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device: got {name!r}, expected one that torch sees ({reason})") from None
    if device.type == "meta":
        raise ValueError(f"device: got {name!r}, expected one that computes numbers")
    return device


def device_name(device: str) -> str:
    """The model name of a torch device, "cpu" or "cuda:1"."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()


def memory_bytes() -> int:
    """The machine's memory, free or not."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def processor_name() -> str:
    """The CPU's model name where the system tells it, else its architecture."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
