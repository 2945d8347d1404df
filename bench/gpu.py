"""First contact with a GPU: correctness, then speed, printed and written as they come.

    PYTHONPATH=src:kernels python bench/gpu.py [--budget 420] [--out DIR] [--stages smoke,speed,host,contract]

Every stage writes `gpu-STAGE.json` into DIR and prints a line for each result at once, so that a run cut off at any
moment has told all it learned; one failure stops nothing. Needs torch and Triton only. Kernels are compiled ahead by
16 processes, so that the card doesn't wait for a compiler.

Speeds: graph replays of many calls over inputs rotated beyond the L2 cache, contenders interleaved round by round;
a ratio is over the fastest stock SDPA of the same round, with its quartiles. What is timed was checked first, on the
whole shape, against float64 rows.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "0")

import numpy as np
import torch

import headscope
from headscope._machine import device_name, versions
from headscope.ops import Distance, GroupEntropy, GroupMass, HeadEdit, attention
from peers import MODELS, OURS, STOCK, Shape, forwards

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = 16
ROUNDS = 15
# inputs of one replay together, beyond the L2 of an H200 (60 MB)
ROTATED_BYTES = 192 * 2**20
REPLAY_SECONDS = 2e-3
DTYPES = ("float16", "bfloat16", "float32")
LENGTHS = [Shape(4, 16, size, size, 64, "length") for size in (1024, 4096, 16384)]
WIDE = [Shape(4, 16, size, size, 128, "length") for size in (1024, 4096, 16384)]
SHAPES = [*MODELS, *LENGTHS, *WIDE]
SMOKE = [
    (dim, queries, keys, dtype, causal)
    for dim, queries, keys in ((40, 300, 300), (64, 517, 77), (80, 130, 257), (128, 260, 260), (160, 65, 100))
    for dtype in DTYPES
    for causal in (False, True)
]


def smoke(case: tuple[int, int, int, str, bool]) -> dict[str, float]:
    """The largest error of each output, statistic and gradient of one call over what is allowed, against float64."""
    dim, queries, keys, name, causal = case
    dtype = getattr(torch, name)
    torch.manual_seed(0)
    query = torch.randn(2, 4, queries, dim, device="cuda", dtype=dtype)
    key, value = (torch.randn(2, 2, keys, dim, device="cuda", dtype=dtype) for _ in range(2))
    mask = None if causal else torch.randn(1, 4, queries, keys, device="cuda")
    gate = torch.tensor([[1.0, 0.0, 0.5, 1.0]], device="cuda")
    fill, temperature = torch.randn(4, queries, dim, device="cuda"), torch.rand(2, 4, device="cuda") + 0.5
    groups = torch.randint(-1, 3, (2, keys), device="cuda")
    names = ["entropy", "logsumexp", "max_logit", "max_prob", "collision_entropy", "key_mass"]
    statistics = [*names, Distance((1, queries), (1, keys)), GroupMass(groups, 3), GroupEntropy(groups, 3)]
    found = {}
    for backend in ("triton", "reference"):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (query, key, value, gate, temperature)]
        result = attention(
            *leaves[:3],
            attn_mask=mask,
            is_causal=causal,
            enable_gqa=True,
            edit=HeadEdit(leaves[3], fill, leaves[4]),
            statistics=statistics,
            backend=backend,
        )
        total = result.output.float().square().sum() + result.statistics["entropy"].sum()
        gradients = torch.autograd.grad(total, leaves)
        named = zip(("d_query", "d_key", "d_value", "d_gate", "d_temperature"), gradients, strict=True)
        found[backend] = {"output": result.output, **result.statistics, **dict(named)}
    # float32 products may take tf32 nowhere: its errors would be 1e-3
    unit = torch.finfo(dtype).eps
    errors = {}
    for what, expected in found["reference"].items():
        got, expected = found["triton"][what].detach().double(), expected.detach().double()
        size = float(expected.abs().nan_to_num(posinf=0.0).max())
        own = what in ("output", "d_query", "d_key", "d_value", "d_gate", "d_temperature")
        # 16-bit cotangents and probabilities are rounded before their products
        bound = (16 * unit + 1e-5) * max(size, 1.0) if own else (1e-5 + 4 * 2**-24 * 40) * max(size, 1.0)
        difference = (got - expected).abs()
        difference[(got == expected)] = 0.0
        errors[what] = float(difference.max()) / bound
    return errors


def warm(arguments: tuple[Shape, str]) -> dict[str, float]:
    """Compile and check what will be timed: entropy and output of the whole shape, 64 rows of it against float64."""
    shape, dtype = arguments
    query, key, value = shape.tensors("cuda", getattr(torch, dtype))
    edit = HeadEdit(torch.ones(query.shape[:2], device="cuda"))
    result = attention(query, key, value, statistics=["entropy"], edit=edit, backend="triton")
    attention(query, key, value, backend="triton")
    rows = torch.linspace(0, shape.queries - 1, 64, device="cuda").long()
    logits = query[:, :, rows].double() @ key.double().transpose(-1, -2) * shape.dim**-0.5
    log = logits.log_softmax(-1)
    entropy = -(log.exp() * log).sum(-1)
    output = log.exp() @ value.double()
    return {
        "entropy": float((result.statistics["entropy"][:, :, rows] - entropy).abs().max()) / 5e-5,
        "output": float((result.output[:, :, rows] - output).abs().max()) / (8 * torch.finfo(query.dtype).eps),
    }


def in_processes(function, cases: list, seconds: float) -> list[dict[str, Any]]:
    """Each case in one of many processes, told as it ends."""
    rows = []
    pool = ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn"))
    futures = {pool.submit(function, case): case for case in cases}
    try:
        for future in as_completed(futures, timeout=max(1.0, seconds)):
            case = str(futures[future])
            try:
                errors = future.result()
                worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
                ok = all(error <= 1 for error in errors.values())
                rows.append({"case": case, "ok": ok, "errors_over_bound": errors})
                if not ok:
                    bad = {name: round(error, 2) for name, error in errors.items() if not error <= 1}
                    print(f"  WRONG {case}: {bad}", flush=True)
                else:
                    print(f"  ok {case}: worst {worst} {errors[worst]:.2f} of the bound", flush=True)
            except Exception as error:
                rows.append({"case": case, "ok": False, "error": str(error)[-1500:]})
                print(f"  FAILED {case}: {type(error).__name__}: {str(error)[-700:]}", flush=True)
    except TimeoutError:
        print(f"  out of time: {len(cases) - len(rows)} cases left", flush=True)
    for process in list(pool._processes.values()):
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)
    return rows


def captured(shape: Shape, dtype: torch.dtype, name: str) -> tuple[torch.cuda.CUDAGraph, int, float]:
    """A graph of calls over rotated inputs, how many, and the host's seconds for one call."""
    first = shape.tensors("cuda", dtype)
    sets = max(1, min(8, ROTATED_BYTES // shape.bytes(dtype.itemsize, False)))
    inputs = [first] + [tuple(tensor.clone() for tensor in first) for _ in range(sets - 1)]
    calls = []
    for tensors in inputs:
        available = forwards(*tensors, flex=False)
        if name not in available:
            raise LookupError("can't take these tensors")
        calls.append(available[name])
    for call in calls:
        call()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(20):
        calls[0]()
    host = (time.perf_counter() - started) / 20
    torch.cuda.synchronize()
    device = (time.perf_counter() - started) / 20
    count = int(np.clip(REPLAY_SECONDS / device, sets, 200))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            calls[index % sets]()
    graph.replay()
    torch.cuda.synchronize()
    graph.inputs = calls  # the graph reads them
    return graph, count, host


def speed(options: argparse.Namespace, end: float) -> list[dict[str, Any]]:
    """Forward times of every contender on every shape."""
    rows, dtype = [], torch.float16
    for shape in SHAPES:
        if time.monotonic() > end:
            print(f"  {shape}: out of time", flush=True)
            continue
        graphs = {}
        names = [STOCK, OURS, "headscope, output only", "SDPA flash", "SDPA cuDNN", "SDPA efficient", "two SDPA calls"]
        for name in [*names, *(["materialised"] if shape.queries * shape.keys <= 2**22 else [])]:
            try:
                graphs[name] = captured(shape, dtype, name)
            except Exception as error:
                print(f"  {shape} {name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
                torch.cuda.synchronize()
        times: dict[str, list[float]] = {name: [] for name in graphs}
        for round_ in range(ROUNDS + 2):
            for name, (graph, count, _) in graphs.items():
                begin, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                graph.replay()
                done.record()
                done.synchronize()
                if round_ >= 2:
                    times[name].append(begin.elapsed_time(done) / count)
        milliseconds = {name: np.array(values) for name, values in times.items()}
        stock = [name for name in milliseconds if name.startswith(STOCK)]
        best = min(stock, key=lambda name: np.median(milliseconds[name]))
        for name, values in milliseconds.items():
            p20, p50, p80 = np.quantile(values, [0.2, 0.5, 0.8])
            speedup = np.quantile(milliseconds[best] / values, [0.25, 0.5, 0.75]).tolist()
            default = np.quantile(milliseconds[STOCK] / values, [0.25, 0.5, 0.75]).tolist() if STOCK in times else None
            rows.append(
                {
                    "shape": str(shape),
                    "where": shape.where,
                    "call": name,
                    "best_stock": best,
                    "milliseconds": [p20, p50, p80],
                    "speed_over_best_stock": speedup,
                    "speed_over_default_stock": default,
                    "tflops_per_second": shape.flops(False) / p50 / 1e9,
                    "gigabytes_per_second": shape.bytes(2, False) / p50 / 1e6,
                    "host_microseconds": graphs[name][2] * 1e6,
                }
            )
            print(
                f"  {shape!s:24} {name:24} {p50 * 1e3:9.1f} us  {rows[-1]['tflops_per_second']:6.0f} TF"
                f"  {speedup[1]:.2f}x best ({best})  host {graphs[name][2] * 1e6:.0f} us",
                flush=True,
            )
        write(options, "speed", rows)
        del graphs
        torch.cuda.empty_cache()
    return rows


def ceilings() -> list[dict[str, Any]]:
    """What the card reaches: a large matrix product, a large copy."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
    block = torch.empty(2**31, device="cuda", dtype=torch.int8)
    other = torch.empty_like(block)
    found = []
    for name, call, work in (
        ("matmul, TFLOP/s", lambda: left @ right, 2 * 8192**3 / 1e12),
        ("copy, GB/s read and written", lambda: other.copy_(block), 2 * 2**31 / 1e9),
    ):
        for _ in range(3):
            call()
        begin, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(20):
            call()
        done.record()
        done.synchronize()
        found.append({"what": name, "value": work * 20 / (begin.elapsed_time(done) / 1e3)})
        print(f"  {name}: {found[-1]['value']:.0f}", flush=True)
    return found


def contract(end: float) -> list[dict[str, Any]]:
    """The operator's contract and the device's own tests, over processes."""
    paths = [str(ROOT / "src"), str(ROOT / "kernels"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    seconds = max(20, int(end - time.monotonic()))
    command = ["timeout", "-s", "INT", str(seconds), sys.executable, "-m", "pytest", "-q", "-n", str(PROCESSES)]
    command += ["-m", "gpu", "--tb=line", "-W", "default", "-p", "no:cacheprovider", "--maxfail=60"]
    command += ["tests/gpu/test_device.py", "tests/gpu/test_contract.py"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = run.stdout.splitlines()
    for line in lines[-45:]:
        print("  " + line[:300], flush=True)
    return [{"code": run.returncode, "output": lines[-400:]}]


def write(options: argparse.Namespace, stage: str, rows: list[dict[str, Any]]) -> None:
    record = {
        "what": f"GPU, {stage}",
        "device": device_name("cuda"),
        "dtype": "float16",
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"gpu-{stage}.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=420.0, help="seconds")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--stages", default="smoke,ceilings,warm,speed,contract")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: torch.cuda.is_available() is False")
    started = time.monotonic()
    end = started + options.budget
    print(device_name("cuda"), versions(), headscope.backend_status(), flush=True)
    stages = {
        "smoke": lambda: in_processes(smoke, SMOKE, min(100.0, end - time.monotonic())),
        "ceilings": ceilings,
        "warm": lambda: in_processes(
            warm, [(shape, "float16") for shape in SHAPES], min(100.0, end - time.monotonic())
        ),
        "speed": lambda: speed(options, min(end - 60, time.monotonic() + 150)),
        "contract": lambda: contract(end),
    }
    for name in options.stages.split(","):
        print(f"== {name}, {time.monotonic() - started:.0f} s", flush=True)
        try:
            write(options, name, stages[name]())
        except Exception:
            traceback.print_exc()
            sys.stderr.flush()
    print(f"== done, {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
