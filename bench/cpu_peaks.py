"""What the cores can do at the most, measured by cpu/peaks.cpp: float32 and bfloat16 products, copying."""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).parent / "cpu" / "peaks.cpp"


def peaks() -> dict | None:
    """The peaks of torch's threads, measured now; None without a compiler."""
    compiler = shutil.which("c++")
    if compiler is None:
        return None
    flags = ["-O3", "-march=native", "-fopenmp", "-std=c++17"]
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peaks"
        subprocess.run([compiler, *flags, str(SOURCE), "-o", str(program)], check=True)
        threads = str(torch.get_num_threads())
        result = subprocess.run([str(program), threads], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)
