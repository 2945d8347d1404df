"""The tables of `headscope doctor` about a machine."""

import os

import torch
from rich.markup import escape
from rich.table import Table

from headscope._machine import processor_name, versions
from headscope.ops import cpu_library
from headscope.ops.backends import BACKENDS


def examination() -> list[Table | str]:
    """Versions, devices, which backends are available here or why they are not, and how the C++ kernel was built."""
    found: list[Table | str] = [_versions(), _devices(), _backends()]
    if cpu_library.unavailable_reason() is None:
        built = ", ".join(f"{name} {value}" for name, value in cpu_library.build_info().items())
        found.append(f"cpu kernel: {escape(built)}")
    return found


def _versions() -> Table:
    table = Table("package", "version", title="versions", title_justify="left")
    for name, version in versions().items():
        table.add_row(name, version)
    return table


def _devices() -> Table:
    table = Table("device", "what", title="devices", title_justify="left")
    table.add_row("cpu", f"{processor_name()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        table.add_row(f"cuda:{index}", f"{properties.name}, {memory}, sm_{properties.major}{properties.minor}")
    return table


def _backends() -> Table:
    table = Table("backend", "available", "what", title="backends", title_justify="left")
    for backend in BACKENDS.values():
        reason = backend.unavailable()
        table.add_row(backend.name, "yes" if reason is None else f"no: {reason}", backend.description)
    return table
