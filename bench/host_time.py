"""The host's time of a call of headscope.attention, layer by layer, from the function down to the driver.

    python bench/host_time.py [--dim 64] [--dtype float16] [--rounds 200] [--out FILE.json]

On a GPU the kernels run, and torch's SDPA stands beside. Without one Triton compiles for an H100 and launches on a
driver that does nothing (tests/stand_in.py); the tensors are on the CPU. Then the tensor's device isn't looked up, the
driver's own work isn't in the figures (descriptors encoded, pointers checked, the launch), and memory comes from the
CPU's allocator; the thread's own time counts, so that a busy machine disturbs less. Microseconds of a call: 20th, 50th
and 80th percentile of samples of 20 calls, all layers in turn. A layer contains those below it. A Python loop of 1,000
steps says how fast the machine was.
"""

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import headscope
import headscope.ops.triton as backend
import headscope_kernels.attention.backward.launch as backward_kernels
import headscope_kernels.attention.forward.launch as forward_kernel
from headscope.bench import records, timing
from headscope.ops import backends

CALLS = 20
# by name: the context that calls run in, and the call
Layers = dict[str, tuple[Callable[[], AbstractContextManager], Callable[[], object]]]


def pretend() -> None:
    """Tensors on the CPU are served as if they were on an H100, up to the driver."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    import stand_in

    stand_in.install(stand_in.Deaf)
    taken = replace(backends.BACKENDS["triton"], unavailable=lambda: None, rejects=lambda problem: None)
    backends.BACKENDS["triton"] = taken
    for module in (forward_kernel, backward_kernels):
        vars(module).update(device_target=lambda tensor: ("cuda", 90), launch_context=lambda tensor: _NOTHING)


_NOTHING = nullcontext()


def arguments_of(owner: Any, name: str, call: Callable[[], object]) -> tuple[tuple, dict[str, Any]]:
    """The arguments that a function or method receives in a call of another."""
    received: list[tuple[tuple, dict[str, Any]]] = []
    function = getattr(owner, name)

    def recorded(*arguments: Any, **options: Any) -> Any:
        received.append((arguments, options))
        return function(*arguments, **options)

    setattr(owner, name, recorded)
    call()
    setattr(owner, name, function)
    return received[0]


def layers(dim: int, dtype: torch.dtype, device: str) -> Layers:
    """The calls to time, on tensors too small for their size to matter."""
    shape = (2, 8, 16, dim)
    query, key, value = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(3))
    gate = torch.ones(2, 8, device=device)
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value, gate)]
    cotangents = [torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape[:3], device=device)]

    def attention(query: Any, key: Any, value: Any, gate: Any) -> headscope.ops.api.AttentionResult:
        edit = headscope.HeadEdit(gate)
        return headscope.attention(query, key, value, statistics=["entropy"], edit=edit, backend="triton")

    def whole() -> object:
        return attention(query, key, value, gate)

    def gradients() -> object:
        result = attention(*leaves)
        return torch.autograd.grad([result.output, result.statistics["entropy"]], leaves, cotangents)

    with torch.no_grad():
        (call,), _ = arguments_of(backend, "forward", whole)
        positional, named = arguments_of(backend, "attention_forward", whole)
        launch, _ = arguments_of(forward_kernel._LAUNCHES, "repeat", whole)
    operator, forward = torch.ops.headscope.triton_attention.default, backend.forward
    kernel, repeat = backend.attention_forward, forward_kernel._LAUNCHES.repeat
    found: Layers = {
        "headscope.attention, no_grad": (torch.no_grad, whole),
        "headscope.attention, inference_mode": (torch.inference_mode, whole),
        "headscope.attention, gradients possible, none needed": (nullcontext, whole),
        "  the operator, by torch's dispatcher": (torch.no_grad, lambda: operator(*call)),
        "  ops/triton.py: forward": (torch.no_grad, lambda: forward(call)),
        "    attention_forward": (torch.no_grad, lambda: kernel(*positional, **named)),
        "      a remembered launch": (torch.no_grad, lambda: repeat(*launch)),
        "headscope.attention, gradients needed": (nullcontext, lambda: attention(*leaves)),
        "the same, and its backward": (nullcontext, gradients),
        "1,000 steps of a Python loop": (nullcontext, lambda: [None for _ in range(1000)]),
    }
    if device != "cpu":
        stock = torch.nn.functional.scaled_dot_product_attention
        found["torch's SDPA, no_grad"] = (torch.no_grad, lambda: stock(query, key, value))
    return found


def measure(calls: Layers, rounds: int, device: str) -> dict[str, list[float]]:
    """Microseconds of one call by name: the 20th, 50th and 80th percentile."""
    # on a GPU a thread of torch's runs the backward
    now = time.thread_time if device == "cpu" else time.perf_counter

    def clock(context: Callable[[], AbstractContextManager], call: Callable[[], object]) -> float:
        # an empty queue: a full one would make the host wait
        timing.wait(device)
        with context():
            started = now()
            for _ in range(CALLS):
                call()
            return (now() - started) / CALLS * 1e6

    clocks = {name: lambda layer=layer: clock(*layer) for name, layer in calls.items()}
    return {name: timing.percentiles(taken) for name, taken in timing.interleaved(clocks, rounds, warm_up=10).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=64, help="from 96 on keys and values come by tensor descriptors")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        pretend()
    found = measure(layers(options.dim, getattr(torch, options.dtype), device), options.rounds, device)
    record = {**records.machine(device), "microseconds": found}
    software = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    print(f"{record['device']}, {software}; {options.dtype}, {options.dim} channels")
    print(f"{'microseconds of a call':56s}{'p20':>8s}{'p50':>8s}{'p80':>8s}")
    for name, times in found.items():
        print(f"{name:56s}" + "".join(f"{time:8.1f}" for time in times))
    if options.out:
        records.write(options.out, record)


if __name__ == "__main__":
    main()
