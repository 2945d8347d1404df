"""headscope.attention against what a user would pick otherwise, on the same work in the same run.

    python bench/attention.py [--device cpu|cuda] [--dtype float32] [--rounds 15] [--out bench/results]

Peers: torch's SDPA without statistics, by its own choice and (on a GPU) each of its kernels; two SDPA calls, the second
with the keys as values, which an entropy takes at the least; FlexAttention; and the materialised softmax. Calls are
interleaved round by round; a ratio is over the fastest stock SDPA, round by round, with its quartiles. Output, entropy
and gradients are checked against float64 first: a wrong one stops the run before any speed is reported.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import attention_page
import headscope
from headscope.bench import records, timing
from headscope.bench.memory import peak_bytes
from peers import MODELS, SMALL_MODELS, Shape, backwards, fastest_stock, forwards, lengths


def check(shape: Shape, device: str, dtype: torch.dtype) -> None:
    """Output, entropy and gradients of a shape's first rows against float64; a wrong one ends the program."""
    query, key, value = (tensor[:1, :2] for tensor in shape.tensors(device, dtype))
    query = query[:, :, :64]
    found = {}
    for backend in (None, "reference"):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (query, key, value)]
        result = headscope.attention(*leaves, statistics=["entropy"], backend=backend)
        total = result.output.float().sum() + result.statistics["entropy"].sum()
        found[backend] = [result.output, result.statistics["entropy"], *torch.autograd.grad(total, leaves)]
    rounding = torch.finfo(dtype).eps
    names = ("output", "entropy", "query's gradient", "key's gradient", "value's gradient")
    for name, got, expected in zip(names, found[None], found["reference"], strict=True):
        got, expected = got.detach(), expected.detach()
        size = float(expected.abs().max())
        # sums of rounded products, relative to the largest; the entropy is float32 for every dtype
        bound = 1e-4 if name == "entropy" else 8 * rounding * max(1.0, size) + 1e-5
        worst = float((got.double() - expected.double()).abs().max())
        if not worst <= bound:
            raise SystemExit(f"{shape}: {name} is off by {worst:.2g}, more than {bound:.2g}: no speeds are reported")


def measure(shape: Shape, options: argparse.Namespace, backward: bool) -> list[dict[str, Any]]:
    """One row for each contender."""
    dtype = getattr(torch, options.dtype)
    tensors = shape.tensors(options.device, dtype)
    with torch.set_grad_enabled(backward):
        calls = (backwards if backward else forwards)(*tensors, flex=options.flex)
        clocks = {
            name: lambda call=call: timing.seconds_and_processor(call, options.device) for name, call in calls.items()
        }
        samples = timing.interleaved(clocks, options.rounds)
        peaks = {name: peak_bytes(call, options.device) for name, call in calls.items()}
    times = {name: taken[:, 0] for name, taken in samples.items()}
    stock = fastest_stock(times)
    # CPU times may be too short to be counted
    processor = {name: np.maximum(taken[:, 1], 1e-9) for name, taken in samples.items()}
    cpu = {name: float(np.median(taken / processor[stock])) for name, taken in processor.items()}
    flops, moved = shape.flops(backward), shape.bytes(dtype.itemsize, backward)
    rows = []
    for name, seconds in times.items():
        median = float(np.median(seconds))
        rows.append(
            {
                "pass": "backward" if backward else "forward",
                "where": shape.where,
                "shape": [shape.batch, shape.heads, shape.queries, shape.keys, shape.dim],
                "call": name,
                "over": stock,
                "milliseconds": timing.percentiles(1e3 * seconds),
                "ratio": timing.ratio(seconds, times[stock]),
                "cpu_ratio": cpu[name] if options.device == "cpu" else None,
                "flops": flops,
                "bytes": moved,
                "tflops_per_second": flops / median / 1e12,
                "gigabytes_per_second": moved / median / 1e9,
                "peak_bytes": peaks[name],
            }
        )
    return rows


def table(rows: list[dict[str, Any]], title: str) -> Table:
    columns = ("pass", "shape", "call", "ms (p20 p50 p80)", "over SDPA (p25 p50 p75)", "TFLOP/s", "GB/s", "peak MiB")
    result = Table(*columns, title=title)
    for row in rows:
        peak = row["peak_bytes"]
        result.add_row(
            row["pass"],
            str(tuple(row["shape"])),
            row["call"],
            " ".join(f"{value:.2f}" for value in row["milliseconds"]),
            " ".join(f"{value:.2f}" for value in row["ratio"]),
            f"{row['tflops_per_second']:.3g}",
            f"{row['gigabytes_per_second']:.3g}",
            "-" if peak is None else f"{peak / 2**20:.1f}",
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", choices=["models", "lengths", "all"], default="all")
    parser.add_argument("--passes", choices=["forward", "backward", "both"], default="both")
    parser.add_argument("--no-flex", dest="flex", action="store_false", help="leave FlexAttention out (it compiles)")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    shapes = [] if options.shapes == "lengths" else list(SMALL_MODELS if options.device == "cpu" else MODELS)
    if options.shapes != "models":
        shapes += lengths(options.device)
    directions = {"forward": [False], "backward": [True], "both": [False, True]}[options.passes]
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        check(shape, options.device, getattr(torch, options.dtype))
        for backward in directions:
            rows += measure(shape, options, backward)
            print(f"{shape} {'backward' if backward else 'forward'}: done", flush=True)
    record = {
        "what": "attention",
        **records.machine(options.device),
        "dtype": options.dtype,
        "rounds": options.rounds,
        "backends": [backend for backend, reason in headscope.backend_status().items() if reason is None],
        "rows": rows,
    }
    Console(width=160).print(table(rows, f"{record['device']}, {options.dtype}"))
    path = records.write(options.out / f"attention-{options.device}-{options.dtype}.json", record)
    attention_page.write(path.with_suffix(".html"), record)
    print(path)


if __name__ == "__main__":
    main()
