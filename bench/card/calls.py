"""The forward with entropy and gate as it is timed: its calls, what they may err by, and the row that tells of them."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

import headscope
from card.device import Tensors
from headscope.bench.timing import percentiles, ratio
from headscope_kernels.attention import STATISTICS, BoundStatistic, attention_forward
from headscope_kernels.attention.configuration import ForwardConfiguration
from peers import STOCK, Shape, fastest_stock, truth

DTYPE = torch.float16
CHECKED_ROWS = 64
# a statistic's, in nats, of logits of some units
ENTROPY_BOUND = 5e-5


def row_of(shape: Shape, name: str, times: Mapping[str, np.ndarray], *, backward: bool = False) -> dict[str, Any]:
    """A call's times beside those of torch's own calls; `times` holds the seconds of every round by name."""
    seconds, best = times[name], fastest_stock(times)
    median = float(np.median(seconds))
    return {
        "shape": str(shape),
        "where": shape.where,
        "milliseconds": percentiles(1e3 * seconds),
        "speed_over_default_stock": ratio(times[STOCK], seconds),
        "speed_over_best_stock": ratio(times[best], seconds),
        "best_stock": best,
        "tflops_per_second": shape.flops(backward) / median / 1e12,
        "gigabytes_per_second": shape.bytes(2, backward) / median / 1e9,
    }


def errors_of(shape: Shape, tensors: Tensors, output: Tensor, statistics: dict[str, Tensor]) -> dict[str, float]:
    """Output and entropy of some rows of every head over what they may err by, against float64.

    Half precision rounds the weights and the output: eight roundings of values of about 1.
    """
    query, key, value = tensors
    rows = torch.linspace(0, shape.queries - 1, min(shape.queries, CHECKED_ROWS), device=query.device).long()
    expected_output, expected_entropy, _ = truth(query, key, value, rows)
    errors = {
        "entropy": statistics["entropy"][:, :, rows] - expected_entropy,
        "output": output[:, :, rows] - expected_output,
    }
    bounds = {"entropy": ENTROPY_BOUND, "output": 8 * torch.finfo(query.dtype).eps}
    return {name: float(error.abs().max()) / bounds[name] for name, error in errors.items()}


def launcher(
    shape: Shape, configuration: ForwardConfiguration | None, tensors: Tensors
) -> Callable[[], tuple[Tensor, dict[str, Tensor]]]:
    """The kernel with entropy and gate, past the operator: nothing is allocated by a call."""
    query, key, value = tensors
    output, entropy = torch.empty_like(query), torch.empty(query.shape[:3], device=query.device)
    gate = torch.ones(query.shape[:2], device=query.device)

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        attention_forward(
            query,
            key,
            value,
            attn_mask=None,
            is_causal=False,
            scale=shape.dim**-0.5,
            gate=gate,
            statistics=[BoundStatistic(STATISTICS["entropy"](()))],
            statistic_outputs=[entropy],
            output=output,
            configuration=configuration,
        )
        return output, {"entropy": entropy}

    return run


def launch(shape: Shape, configuration: ForwardConfiguration | None) -> None:
    """To be compiled ahead."""
    launcher(shape, configuration, empty(shape))()


def output_only(shape: Shape) -> None:
    headscope.attention(*empty(shape), backend="triton")


def empty(shape: Shape) -> Tensors:
    """Tensors as Shape.tensors lays them out, never written."""
    query, key, value = (
        torch.empty(shape.batch, tokens, shape.heads, shape.dim, dtype=DTYPE).transpose(1, 2)
        for tokens in (shape.queries, shape.keys, shape.keys)
    )
    return query, key, value
