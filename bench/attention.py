"""headscope.attention against what a user would pick otherwise, on the same work in the same run.

    python bench/attention.py [--device cpu|cuda] [--dtype float32] [--repeats 15] [--out bench/results]

Peers: torch's SDPA without statistics; two SDPA calls, the second with the keys as values, which is what
H = logsumexp - scale * q . (P K) takes (only their time counts: public SDPA returns no logsumexp); and the materialised
softmax. Calls are interleaved round by round, so that a busy machine slows all of them; a ratio is the median over
rounds, with its quartiles. Numbers are checked against float64 first: a wrong result stops the run.
"""

import argparse
import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from rich.console import Console
from rich.table import Table

import headscope
from headscope._machine import device_name, versions

# (batch, heads, queries, keys, dim): Stable Diffusion's self-attention at three sizes and its cross-attention, and a
# small model's
SHAPES = [(1, 8, 4096, 4096, 40), (2, 8, 1024, 1024, 80), (2, 10, 4096, 77, 64), (8, 4, 256, 256, 32)]


def materialised(query, key, value):
    """What a hook that stores the matrix does."""
    probabilities = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
    entropy = -(probabilities * probabilities.clamp_min(torch.finfo(query.dtype).tiny).log()).sum(-1)
    return probabilities @ value, entropy


def contenders(query, key, value) -> dict[str, Callable[[], object]]:
    gate = torch.ones(query.shape[:2], device=query.device)
    edit = headscope.HeadEdit(gate)
    return {
        "SDPA": lambda: functional.scaled_dot_product_attention(query, key, value),
        "headscope, entropy + gate": lambda: headscope.attention(query, key, value, statistics=["entropy"], edit=edit),
        "headscope, output only": lambda: headscope.attention(query, key, value),
        "two SDPA calls": lambda: (
            functional.scaled_dot_product_attention(query, key, value),
            functional.scaled_dot_product_attention(query, key, key),
        ),
        "materialised": lambda: materialised(query, key, value),
    }


def check(query, key, value) -> None:
    """Stops the run where entropy or output are wrong."""
    rows = slice(0, 64)
    result = headscope.attention(query[:, :, rows], key, value, statistics=["entropy"])
    expected = headscope.attention(query[:, :, rows], key, value, statistics=["entropy"], backend="reference")
    worst = float((result.statistics["entropy"] - expected.statistics["entropy"]).abs().max())
    if worst > 1e-4:
        raise SystemExit(f"entropy is off by {worst:.2g} nats: no speeds are reported")


def measure(calls: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, np.ndarray]:
    """Seconds of every call in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 2):
        for name, call in calls.items():
            if device != "cpu":
                torch.cuda.synchronize()
            started = time.perf_counter()
            call()
            if device != "cpu":
                torch.cuda.synchronize()
            # two rounds to warm up
            if round_ >= 2:
                seconds[name].append(time.perf_counter() - started)
    return {name: np.array(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    name = device_name(options.device)
    table = Table(
        "shape", "call", "ms (p20 p50 p80)", "over SDPA (p25 p50 p75)", "TFLOP/s", title=f"{name}, {options.dtype}"
    )
    rows = []
    for batch, heads, queries, keys, dim in SHAPES:
        torch.manual_seed(0)
        query = torch.randn(batch, heads, queries, dim, device=options.device, dtype=dtype)
        key, value = (torch.randn(batch, heads, keys, dim, device=options.device, dtype=dtype) for _ in range(2))
        flops = 4 * batch * heads * queries * keys * dim
        with torch.inference_mode():
            check(query, key, value)
            seconds = measure(contenders(query, key, value), options.repeats, options.device)
        for call, values in seconds.items():
            ratio = np.quantile(values / seconds["SDPA"], [0.25, 0.5, 0.75])
            spread = np.quantile(values, [0.2, 0.5, 0.8]) * 1e3
            rows.append(
                {
                    "shape": [batch, heads, queries, keys, dim],
                    "call": call,
                    "milliseconds": spread.tolist(),
                    "ratio": ratio.tolist(),
                    "flops": flops,
                }
            )
            table.add_row(
                f"({batch},{heads},{queries},{keys},{dim})",
                call,
                " ".join(f"{v:.2f}" for v in spread),
                " ".join(f"{v:.2f}" for v in ratio),
                f"{flops / spread[1] / 1e9:.3f}",
            )
    Console(width=120).print(table)
    backend = headscope.backend_status()
    record = {
        "what": "attention",
        "device": name,
        "threads": torch.get_num_threads(),
        "dtype": options.dtype,
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "backends": [name for name, reason in backend.items() if reason is None],
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"attention-{options.device}-{options.dtype}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
