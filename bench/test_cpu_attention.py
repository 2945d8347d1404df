"""The CPU kernel against what a user would pick otherwise, with pytest-benchmark.

    python -m pytest -o addopts="" --import-mode=importlib bench/test_cpu_attention.py -q [-k float32]

Peers: torch's SDPA without statistics; two SDPA calls, the second with the keys as values, which is what
H = logsumexp - scale * q . (P K) takes; and the materialised softmax. Every call allocates what it returns. Peers run
in each benchmark round's setup, so that all calls of a round follow one another and a busy machine slows all of them; a
ratio is the median over rounds. Process CPU time stands beside wall time. Each test checks numbers against float64
before it times anything, and one red test keeps the whole report back.

The kernel and SDPA follow each other, A B A B. Written to bench/results: cpu-attention-<dtype>.json, and
cpu-attention.html, a table and a plot of all such files.
"""

import html
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import plotly.graph_objects as plots
import pytest
import torch
import torch.nn.functional as functional
from bench.cpu_peaks import peaks
from bench.peers import materialised, truth

import headscope
from headscope.bench import records
from headscope.bench.timing import percentiles, seconds_and_processor
from headscope.ops import cpu_library

HERE = Path(__file__).parent
RESULTS = HERE / "results"
# (batch, heads, queries, keys, dim): at most this over SDPA, float32 and bfloat16, with output, entropy and gate
TARGETS = {
    (1, 8, 4096, 4096, 40): (0.82, 0.55),
    (1, 10, 4096, 4096, 64): (0.82, 0.55),
    (2, 8, 1024, 1024, 80): (0.90, 0.55),
    (8, 4, 256, 256, 32): (0.78, 0.55),
    (2, 10, 4096, 77, 64): (0.65, None),
    (32, 8, 64, 64, 16): (0.65, None),
}
LARGE = {(1, 8, 4096, 4096, 40), (1, 10, 4096, 4096, 64), (2, 8, 1024, 1024, 80)}
SWEEP = [(1, 8, tokens, tokens, 64) for tokens in (128, 256, 512, 1024, 2048, 4096)]
# seconds that the rounds of one shape may take
BUDGET = 3.0
KERNEL, SDPA = "headscope, entropy + gate", "SDPA"


def every_statistic(query, keys: int) -> tuple[tuple, Callable[[], list[torch.Tensor]]]:
    """All one-pass statistics, eight groups included, and what allocates their results."""
    rows = query.shape[:3]
    grids = (rows[2] // 8, 8, keys // 7 + 1, 7)
    groups = (torch.arange(keys) * 8 // keys).int()[None, None]
    names = ("entropy", "logsumexp", "max_logit", "max_prob", "collision_entropy")
    statistics = (*names, ("distance", grids, ()), ("group_mass", (8,), (groups,)), ("group_entropy", (8,), (groups,)))
    return (
        statistics,
        lambda: (
            [*(query.new_empty(rows, dtype=torch.float32) for _ in range(6))]
            + [query.new_empty((*rows, 8), dtype=torch.float32) for _ in range(2)]
        ),
    )


def contenders(shape, dtype) -> dict[str, Callable[[], object]]:
    batch, heads, queries, keys, dim = shape
    torch.manual_seed(0)
    query = torch.randn(batch, heads, queries, dim, dtype=dtype)
    key, value = (torch.randn(batch, heads, keys, dim, dtype=dtype) for _ in range(2))
    edit = headscope.HeadEdit(torch.ones(batch, heads))
    half = headscope.HeadEdit((torch.arange(heads) % 2).float().repeat(batch, 1))
    statistics, allocate = every_statistic(query, keys)
    library = cpu_library.load()

    def everything():
        output, values = torch.empty_like(query), allocate()
        cpu_library.attention_forward(
            query,
            key,
            value,
            attn_mask=None,
            is_causal=False,
            scale=dim**-0.5,
            gate=edit.gate,
            statistics=statistics,
            output=output,
            statistic_outputs=values,
        )
        return output, values

    def kernel():
        return headscope.attention(query, key, value, statistics=["entropy"], edit=edit, backend="cpu")

    def avx2():
        before, library.instruction_set = library.instruction_set, "avx2"
        try:
            return kernel()
        finally:
            library.instruction_set = before

    calls = {
        SDPA: lambda: functional.scaled_dot_product_attention(query, key, value),
        KERNEL: kernel,
        "headscope, output only": lambda: headscope.attention(query, key, value, backend="cpu"),
        "headscope, all one-pass statistics": everything,
        # up to 512 keys with the output, beyond from a second pass
        "headscope, key_mass": lambda: headscope.attention(query, key, value, statistics=["key_mass"], backend="cpu"),
        "headscope, half the heads removed": lambda: headscope.attention(query, key, value, edit=half, backend="cpu"),
        "two SDPA calls": lambda: (
            functional.scaled_dot_product_attention(query, key, value),
            functional.scaled_dot_product_attention(query, key, key),
        ),
        "materialised": lambda: materialised(query, key, value),
    }
    if shape in LARGE and dtype == torch.float32:
        calls[f"{KERNEL}, AVX2"] = avx2
    check(kernel(), query, key, value)
    return calls


def check(result, query, key, value) -> None:
    """Output and entropy of some rows against float64, within the numeric contract."""
    rows = slice(0, 32)
    expected, entropy, logits = truth(query, key, value, rows)
    tolerance = 1e-5 + 4 * 2.0**-24 * float(logits.abs().max())
    assert float((result.statistics["entropy"][:, :, rows] - entropy).abs().max()) <= tolerance
    stock = functional.scaled_dot_product_attention(query[:, :, rows], key, value)
    bound = 2 * float((stock - expected).abs().max()) + 2 * torch.finfo(query.dtype).eps * float(expected.abs().max())
    assert float((result.output[:, :, rows] - expected).abs().max()) <= bound


def measure(benchmark, shape, dtype, names: list[str] | None = None) -> list[dict]:
    """A row per call; pytest-benchmark times the kernel, each round's setup the others."""
    calls = contenders(shape, dtype)
    if names:
        calls = {name: calls[name] for name in names}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    with torch.inference_mode():
        round_seconds = sum(seconds_and_processor(call)[0] for call in calls.values())

        def others():
            for name, call in calls.items():
                if name not in (KERNEL, SDPA):
                    seconds[name].append(seconds_and_processor(call))
            # the two that are compared follow each other, so that neither pays for what a larger call left behind
            calls[KERNEL]()
            seconds[SDPA].append(seconds_and_processor(calls[SDPA]))

        def kernel():
            seconds[KERNEL].append(seconds_and_processor(calls[KERNEL]))

        rounds = int(min(200, max(5, BUDGET / round_seconds)))
        benchmark.pedantic(kernel, setup=others, rounds=rounds, warmup_rounds=1)
    batch, heads, queries, keys, dim = shape
    flops = 4 * batch * heads * queries * keys * dim
    width = torch.finfo(dtype).bits // 8
    found = []
    stock = np.array(seconds[SDPA][1:])
    for name, values in seconds.items():
        array = np.array(values[1:])
        wall, processor = np.median(array / stock, 0)
        found.append(
            {
                "shape": list(shape),
                "dtype": str(dtype).removeprefix("torch."),
                "call": name,
                "rounds": len(array),
                "milliseconds": [round(time, 4) for time in percentiles(1e3 * array[:, 0])],
                "over_sdpa": round(float(wall), 4),
                "over_sdpa_processor_time": round(float(processor), 4),
                "flops": flops,
                "least_bytes": width * batch * heads * dim * (2 * queries + 2 * keys),
                "gflops_per_second": round(float(flops / np.median(array[:, 0]) / 1e9), 1),
            }
        )
    benchmark.extra_info.update({"over_sdpa": {row["call"]: row["over_sdpa"] for row in found}})
    return found


@pytest.fixture(scope="module")
def report(request):
    """Collects rows; written at the end, unless a test failed."""
    rows: list[dict] = []
    measured = peaks()
    yield rows
    if request.session.testsfailed or not rows:
        print("\na check failed: no speeds are reported")
        return
    for dtype in sorted({row["dtype"] for row in rows}):
        record = {
            "what": "cpu attention",
            **records.machine("cpu"),
            "kernel": {name: value for name, value in cpu_library.build_info().items() if name != "path"},
            "peaks": measured,
            "rows": [row for row in rows if row["dtype"] == dtype],
        }
        records.write(RESULTS / f"cpu-attention-{dtype}.json", record)
    write_page()


def write_page() -> None:
    """One page of all recorded runs: a table for each dtype, and the length sweep."""
    parts = ["<!doctype html><meta charset=utf-8><title>CPU attention</title>"]
    parts.append("<style>body{font-family:sans-serif;margin:2em}td,th{padding:.2em .8em;text-align:right}</style>")
    figure = plots.Figure(layout={"xaxis": {"type": "log", "title": "tokens"}, "template": "plotly_white"})
    figure.update_layout(yaxis={"title": "GFLOP/s of 4 * queries * keys * dim"}, title="8 heads of 64 channels")
    for path in sorted(RESULTS.glob("cpu-attention-*.json")):
        record = json.loads(path.read_text())
        rows = record["rows"]
        title = f"{rows[0]['dtype']}: {record['device']}, {record['threads']} threads, {record['date']}"
        parts.append(f"<h2>{html.escape(title)}</h2><p>peaks: {html.escape(json.dumps(record['peaks']))}</p><table>")
        parts.append("<tr><th>shape<th>call<th>ms (p20 p50 p80)<th>over SDPA<th>CPU time<th>target<th>GFLOP/s")
        for row in rows:
            shape = tuple(row["shape"])
            target = TARGETS.get(shape, (None, None))[row["dtype"] == "bfloat16"] if row["call"] == KERNEL else None
            spread = " ".join(f"{value:.2f}" for value in row["milliseconds"])
            cells = (shape, row["call"], spread, f"{row['over_sdpa']:.3f}", f"{row['over_sdpa_processor_time']:.3f}")
            cells = (*cells, target or "", row["gflops_per_second"])
            parts.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}" for cell in cells))
        parts.append("</table>")
        for call in (SDPA, KERNEL):
            line = [row for row in rows if tuple(row["shape"]) in SWEEP and row["call"] == call]
            line.sort(key=lambda row: row["shape"][2])
            tokens, speeds = [row["shape"][2] for row in line], [row["gflops_per_second"] for row in line]
            figure.add_scatter(x=tokens, y=speeds, name=f"{call}, {rows[0]['dtype']}")
    parts.append(figure.to_html(full_html=False, include_plotlyjs="cdn"))
    (RESULTS / "cpu-attention.html").write_text("\n".join(parts))


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@DTYPES
@pytest.mark.parametrize("shape", TARGETS, ids=str)
def test_shapes(shape, dtype, benchmark, report):
    report += measure(benchmark, shape, dtype)


@DTYPES
@pytest.mark.parametrize("shape", SWEEP, ids=str)
def test_lengths(shape, dtype, benchmark, report):
    report += measure(benchmark, shape, dtype, [SDPA, KERNEL])
