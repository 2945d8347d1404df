"""The C++ backward against torch's SDPA backward, on a CPU.

    python bench/cpu_backward.py [--dtype float32] [--rounds 11]

Every call is `torch.autograd.grad` of query, key and value from one output's cotangent, the graph kept; SDPA's is
without statistics. headscope's beside it: with the entropy's cotangent and the gradient of a gate too, AVX2 forced,
portable's plain torch, the materialised softmax; and four cotangents at once (`is_grads_batched=True`) against four
calls. Rounds ask every call in turn and each begins with another one; a ratio is the median over rounds. Numbers are
checked against float64 before anything is timed. Memory is the largest that is resident during a process's first call,
beyond what was before it and the results. Writes results/cpu-backward-<dtype>.json and prints a table.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from rich.console import Console
from rich.table import Table
from torch import Tensor

import headscope
from cpu_peaks import peaks
from headscope.bench import records, timing
from headscope.bench.memory import peak_bytes
from headscope.ops import cpu_library
from peers import materialised

# (batch, heads, queries, keys, dim): at most this over SDPA, float32 and bfloat16
AIMS = {
    (1, 8, 4096, 4096, 40): (0.90, 0.60),
    (1, 10, 4096, 4096, 64): (0.90, 0.60),
    (2, 8, 1024, 1024, 80): (0.90, 0.60),
    (2, 10, 4096, 77, 64): (0.80, 0.60),
    (8, 4, 256, 256, 32): (0.80, 0.60),
    (32, 8, 64, 64, 16): (0.80, 0.60),
}
# where the plain forms are too slow to be asked every round
LARGE = 4096 * 4096
SDPA, KERNEL, WITH_ENTROPY = "SDPA", "headscope", "headscope, entropy + gate"
MEASURED = (SDPA, KERNEL, "portable", "materialised")
FOUR, ONE_BY_ONE = "headscope, four cotangents", "headscope, four calls"

Calls = dict[str, Callable[[], object]]


def problem(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key and value that require gradients, and four cotangents of the output."""
    batch, heads, queries, keys, dim = shape
    torch.manual_seed(0)
    query = torch.randn(batch, heads, queries, dim, dtype=dtype).requires_grad_()
    key, value = (torch.randn(batch, heads, keys, dim, dtype=dtype).requires_grad_() for _ in range(2))
    return query, key, value, torch.randn(4, batch, heads, queries, dim, dtype=dtype)


def contenders(shape: tuple[int, ...], dtype: torch.dtype) -> Calls:
    query, key, value, cotangents = problem(shape, dtype)
    inputs = (query, key, value)
    gate = torch.ones(shape[:2], requires_grad=True)
    entropy_cotangent = torch.randn(shape[:3])

    def gradients(outputs: list[Tensor], leaves: tuple[Tensor, ...], grads: list[Tensor], **options: Any):
        return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True, **options)

    def ours(backend: str) -> Callable[[], object]:
        return gradients([headscope.attention(*inputs, backend=backend).output], inputs, [cotangents[0]])

    output = headscope.attention(*inputs, backend="cpu").output
    watched = headscope.attention(*inputs, statistics=["entropy"], edit=headscope.HeadEdit(gate), backend="cpu")
    library = cpu_library.load()

    def avx2() -> None:
        before, library.instruction_set = library.instruction_set, "avx2"
        try:
            calls[KERNEL]()
        finally:
            library.instruction_set = before

    calls: Calls = {
        SDPA: gradients([functional.scaled_dot_product_attention(*inputs)], inputs, [cotangents[0]]),
        KERNEL: ours("cpu"),
        WITH_ENTROPY: gradients(
            [watched.output, watched.statistics["entropy"]], (*inputs, gate), [cotangents[0], entropy_cotangent]
        ),
        FOUR: gradients([output], inputs, [cotangents], is_grads_batched=True),
        ONE_BY_ONE: lambda: [torch.autograd.grad(output, inputs, one, retain_graph=True) for one in cotangents],
    }
    if "avx" in library.instruction_set_name():
        calls["headscope, AVX2"] = avx2
    if shape[2] * shape[3] < LARGE:
        calls["portable"] = ours("portable")
        calls["materialised"] = gradients([materialised(query, key, value)[0]], inputs, [cotangents[0]])
    return calls


def check(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Gradients of one head against float64: the root mean square error within twice SDPA's own.

    Raises:
        SystemExit: they aren't.
    """
    query, key, value, cotangents = problem((1, 1, *shape[2:]), dtype)
    found = {}
    for name, precision in (("headscope", dtype), ("SDPA", dtype), ("float64", torch.float64)):
        leaves = [tensor.detach().to(precision).requires_grad_() for tensor in (query, key, value)]
        if name == "headscope":
            output = headscope.attention(*leaves, backend="cpu").output
        else:
            output = functional.scaled_dot_product_attention(*leaves)
        found[name] = torch.autograd.grad(output, leaves, cotangents[0].to(precision))
    for name, ours, stock, expected in zip(("query", "key", "value"), *found.values(), strict=True):
        worst, stocks = (float((got.double() - expected).square().mean().sqrt()) for got in (ours, stock))
        if not worst <= 2 * stocks:
            raise SystemExit(
                f"{shape}: {name}'s gradient errs by {worst:.2g}, SDPA's by {stocks:.2g}: nothing is timed"
            )


def working_bytes(shape: tuple[int, ...], dtype: torch.dtype, name: str) -> int | None:
    """Resident memory of a fresh process's first call beside its results; None where the system doesn't tell.

    malloc gives large buffers back at once there, so that what was freed before doesn't hide what the call takes.
    """
    arguments = ["--memory-of", name, "--shape", *map(str, shape), "--dtype", str(dtype).removeprefix("torch.")]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, __file__, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def memory_of(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> int | None:
    """What `working_bytes` asks of the process it starts."""
    # whatever torch loads with the first backward of all
    contenders((1, 1, 32, 32, 16), dtype)["materialised"]()
    calls = contenders(shape, dtype)
    peak = peak_bytes(calls[name], "cpu")
    batch, heads, queries, keys, dim = shape
    return None if peak is None else peak - dtype.itemsize * batch * heads * dim * (queries + 2 * keys)


def measure(shape: tuple[int, ...], dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """A row per call."""
    check(shape, dtype)
    calls = contenders(shape, dtype)
    clocks = {name: lambda call=call: timing.seconds_and_processor(call) for name, call in calls.items()}
    samples = timing.interleaved(clocks, rounds if shape[2] * shape[3] >= 1024**2 else 5 * rounds, rotated=True)
    batch, heads, queries, keys, dim = shape
    rows = []
    for name, taken in samples.items():
        peer = ONE_BY_ONE if name == FOUR else SDPA
        flops = (4 if name in (FOUR, ONE_BY_ONE) else 1) * 10 * batch * heads * queries * keys * dim
        rows.append(
            {
                "shape": list(shape),
                "call": name,
                "over": peer,
                "rounds": len(taken),
                "milliseconds": timing.percentiles(1e3 * taken[:, 0]),
                "ratio": timing.percentiles(taken[:, 0] / samples[peer][:, 0]),
                "processor_ratio": float(np.median(taken[:, 1] / samples[peer][:, 1])),
                "aim": AIMS[shape][dtype == torch.bfloat16] if name == KERNEL else None,
                "flops": flops,
                "gflops_per_second": float(flops / np.median(taken[:, 0]) / 1e9),
                "working_bytes": working_bytes(shape, dtype, name) if name in MEASURED else None,
            }
        )
    return rows


def table(rows: list[dict[str, Any]], title: str) -> Table:
    columns = ("shape", "call", "ms (p20 p50 p80)", "over", "ratio (p20 p50 p80)", "CPU time", "aim", "GFLOP/s", "MiB")
    result = Table(*columns, title=title)
    for row in rows:
        result.add_row(
            str(tuple(row["shape"])),
            row["call"],
            " ".join(f"{value:.2f}" for value in row["milliseconds"]),
            row["over"],
            " ".join(f"{value:.2f}" for value in row["ratio"]),
            f"{row['processor_ratio']:.2f}",
            "" if row["aim"] is None else f"{row['aim']:.2f}",
            f"{row['gflops_per_second']:.0f}",
            "" if row["working_bytes"] is None else f"{row['working_bytes'] / 2**20:.1f}",
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append", help="both by default")
    parser.add_argument("--rounds", type=int, default=11, help="five times as many for small shapes")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=int, nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(memory_of(options.memory_of, tuple(options.shape), getattr(torch, options.dtype[0]))))
        return
    for dtype in options.dtype or ("float32", "bfloat16"):
        rows: list[dict[str, Any]] = []
        for shape in AIMS:
            rows += measure(shape, getattr(torch, dtype), options.rounds)
            print(f"{dtype} {shape}: done", flush=True)
        record = {
            "what": "cpu backward",
            **records.machine("cpu"),
            "dtype": dtype,
            "kernel": {name: value for name, value in cpu_library.build_info().items() if name != "path"},
            "peaks": peaks(),
            "rows": rows,
        }
        Console(width=170).print(table(rows, f"{record['device']}, {record['threads']} threads, {dtype}"))
        print(records.write(options.out / f"cpu-backward-{dtype}.json", record))


if __name__ == "__main__":
    main()
