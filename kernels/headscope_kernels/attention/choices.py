"""The measured table from which configurations are chosen."""

import json
from pathlib import Path
from typing import Any


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows of candidates, as bench/gpu.py measures them."""
    path.write_text(json.dumps(rows, indent=1) + "\n")
