"""Recorded results: rows beside the date, the software and the device that they were measured with, as JSON."""

import datetime
import json
from pathlib import Path
from typing import Any

import torch

from headscope._files import write_atomic
from headscope._machine import device_name, versions


def software() -> dict[str, Any]:
    """The date and the versions."""
    return {"date": datetime.date.today().isoformat(), "versions": versions()}


def machine(device: str) -> dict[str, Any]:
    """`software`, and beside it the device's name and the number of torch's threads."""
    return {"device": device_name(device), "threads": torch.get_num_threads(), **software()}


def write(path: Path, record: dict[str, Any]) -> Path:
    """Write a record so that a reader finds the old one or the new one, never a part; return its path."""
    write_atomic(path, (json.dumps(record, indent=1) + "\n").encode())
    return path
