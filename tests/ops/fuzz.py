"""Random calls of the operator against the contract: every result's largest error, over what it may err by.

    PYTHONPATH=tests python -m ops.fuzz --calls 20000 --backend cpu

prints them by name. A call depends on its number only, so that one that errs can be run again: --first N --calls 1.
"""

import argparse
import contextlib
import math
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from contract import FINFO_MIN, Inputs, Truth, statistic_tolerance, truth
from headscope.ops import cpu_library
from interpreter import replace_once_a_launch
from ops.fuzz_backward import draw_backward, gradient_ratios

BACKENDS = ("reference", "portable", "cpu", "triton")
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
# those that keep float64's precision, and what remains of the bounds there
PRECISE = ("reference", "portable")
PRECISE_BOUND = 2.0**-29
# the most queries, keys and rows in all: the interpreter takes a call apart number by number
SIZES = {"triton": (40, 70, 100)}
OTHER_SIZES = (150, 700, 600)


def draw(number: int, backend: str = "cpu") -> Inputs:
    """The call of this number; backends differ in sizes, and float64 is for those that keep it."""
    choice = random.Random(f"{number} {backend}")
    torch.manual_seed(choice.getrandbits(62))
    most_queries, most_keys, most_rows = SIZES.get(backend, OTHER_SIZES)
    queries = choice.choice([1, _size(choice, most_queries), choice.randint(1, most_queries)])
    keys = choice.choice([queries, _size(choice, most_keys), choice.randint(1, min(80, most_keys))])
    if choice.random() < 0.02:
        keys = 0
    kv_heads = choice.randint(1, 2)
    heads = kv_heads * choice.choice([1, 1, 2, 3])
    batch = choice.randint(1, max(1, min(3, most_rows // (queries * heads))))
    dim, dim_v = _size(choice, 512), _size(choice, 256)
    dtype = torch.float64 if backend in PRECISE and choice.random() < 0.15 else choice.choice(DTYPES)
    query = _query(choice, torch.randn(batch, heads, queries, dim))
    key, value = torch.randn(batch, kv_heads, keys, dim), torch.randn(batch, kv_heads, keys, dim_v)
    if keys and choice.random() < 0.25:
        # keys along queries, as in self-attention: products of one sign, whose partial sums grow to the logit
        picked = torch.randint(queries, (keys,))
        key = query[:, :: heads // kv_heads][:, :, picked] / query.abs().amax().clamp(min=1.0) + 0.1 * key
    poisoned = choice.random() < 0.06
    if poisoned:
        query[-1, -1, queries // 2, 0] = math.nan
    query, key, value = (_laid_out(choice, tensor.to(dtype)) for tensor in (query, key, value))
    gate = _maybe(choice, lambda: torch.randint(0, 3, (choice.choice([1, batch]), heads)) / 2)
    fill = None
    if gate is not None:
        shape = [choice.choice([1, size]) for size in (batch, heads, queries, dim_v)]
        fill = choice.choice([None, "uniform", torch.randn(shape), *(["identity"] if queries == keys else [])])
    inputs = Inputs(
        query,
        key,
        value,
        _options(choice, batch, heads, queries, keys, dtype, poisoned),
        gate,
        fill,
        _maybe(choice, lambda: choice.choice([0.1, 1.0]) + 2 * torch.rand(choice.choice([1, batch]), heads)),
        None
        if poisoned
        else _maybe(choice, lambda: _bias(choice, choice.choice([1, batch]), choice.choice([1, heads]), keys)),
        _maybe(choice, lambda: 2 * torch.randn(choice.choice([1, batch]), choice.choice([1, heads]), keys)),
        torch.randint(-1, 5, (batch, keys)),
        5,
    )
    return inputs


def _size(choice: random.Random, most: int) -> int:
    """1 to most, small sizes and multiples of 8 often."""
    size = round(math.exp(choice.uniform(0.0, math.log(most))))
    return min(most, 8 * size) if choice.random() < 0.3 else size


def _maybe(choice: random.Random, make: Callable[[], Tensor], chance: float = 0.3) -> Tensor | None:
    return make() if choice.random() < chance else None


def _query(choice: random.Random, query: Tensor) -> Tensor:
    """Of any size: logits of 1e-3 to 1e4; in some calls the rows differ, or all numbers have one sign."""
    largest = 10 ** choice.uniform(-3.0, 4.0) if choice.random() < 0.5 else 1.0
    # the largest of many logits is some four times their deviation
    size = largest / 4 if choice.random() < 0.5 else largest / 4 * torch.rand(query.shape[2], 1)
    return size * (query.abs() if choice.random() < 0.1 else query)


def _laid_out(choice: random.Random, tensor: Tensor) -> Tensor:
    """The same numbers in some memory layout."""
    layout = choice.choice(["contiguous", "contiguous", "heads last", "sliced", "transposed", "offset"])
    if layout == "heads last":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    batch, heads, tokens, channels = tensor.shape
    if layout == "sliced":
        wide = tensor.new_full((batch, heads, 2 * tokens, channels + 3), math.nan)
        wide[:, :, ::2, 1 : channels + 1] = tensor
        return wide[:, :, ::2, 1 : channels + 1]
    if layout == "offset":
        # an address that isn't a multiple of a vector's
        flat = tensor.new_empty(tensor.numel() + 1)[1:]
        return flat.copy_(tensor.flatten()).view(tensor.shape)
    return tensor


def _bias(choice: random.Random, *shape: int) -> Tensor:
    bias = torch.randn(shape) * choice.choice([1.0, 30.0])
    return torch.where(torch.rand(shape) < 0.3, -math.inf, bias) if choice.random() < 0.4 else bias


def _options(
    choice: random.Random, batch: int, heads: int, queries: int, keys: int, dtype: torch.dtype, poisoned: bool
) -> dict:
    """Masks, causal or not, and scale.

    What a row with a NaN gives to keys that it doesn't see isn't in the contract, nor whether adding -inf hides a NaN.
    """
    shape = [choice.choice([1, size]) for size in (batch, heads, queries, keys)]
    if choice.random() < 0.5:
        shape[2:] = queries, keys
    kinds = ["none", "none", "bool", "lowest"]
    kind = choice.choice(kinds if poisoned else [*kinds, "additive", "causal", "causal"])
    mask = None
    if kind == "bool":
        mask = torch.rand(shape) > choice.choice([0.05, 0.5, 0.95])
    elif kind == "additive":
        mask = _bias(choice, *shape)
    elif kind == "lowest" and dtype != torch.float64:
        mask = torch.where(torch.rand(shape[0], shape[1], shape[2], 1) < 0.5, FINFO_MIN, 0.0).expand(shape)
        mask = torch.where(torch.rand(shape) < choice.choice([0.0, 0.5]), FINFO_MIN, mask)
    scale = choice.choice([None, None, None, -0.3, 0.0, 1.0 / 32])
    return {"attn_mask": mask, "is_causal": kind == "causal", "scale": scale, "enable_gqa": True}


def ratios(inputs: Inputs, backend: str) -> dict[str, float]:
    """For the output and each statistic the largest error over its bound; infinite where NaN or infinities differ."""
    expected = truth(inputs, precise=True if backend == "reference" else None)
    # kernels that aren't interpreted need a GPU
    compiled = backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1"
    result = (inputs.to("cuda") if compiled else inputs).attend(backend)
    found = {"output": ratio(result.output.cpu(), expected.output, expected.output_tolerance)}
    for name, values in result.statistics.items():
        values = values.cpu()
        found[name] = ratio(values, expected.statistics[name], bound(expected, name, inputs.query.dtype))
        if name == "group_entropy":
            found[name] = max(found[name], _faint(inputs, values, expected))
    return found


def bound(expected: Truth, name: str, dtype: torch.dtype) -> Tensor:
    """The stated one, without limit for entropies that float32 isn't held to."""
    tolerance = torch.tensor(statistic_tolerance(expected, name))
    if dtype == torch.float64:
        # exponents reach further there
        tolerance = PRECISE_BOUND * (10 * tolerance if name == "group_entropy" else tolerance)
    if name == "group_entropy" and expected.faint is not None:
        return torch.where(expected.faint, math.inf, tolerance)
    return tolerance


def _faint(inputs: Inputs, values: Tensor, expected: Truth) -> float:
    """Infinite where a faint group's entropy isn't one of its keys at all."""
    assert inputs.groups is not None
    assert expected.faint is not None
    counts = torch.stack([(inputs.groups == group).sum(-1) for group in range(inputs.group_count)], -1)
    most = counts.clamp(min=1).log()[:, None, None] + 1e-4
    wrong = expected.faint & ~((values >= 0) & (values <= most))
    return math.inf if bool(wrong.any()) else 0.0


def ratio(got: Tensor, expected: Tensor, tolerance: Tensor) -> float:
    """The largest error over what is allowed; infinite where NaN or infinities differ."""
    got = got.double()
    special = ~expected.isfinite()
    if not torch.equal(got[special].nan_to_num(7.0), expected[special].nan_to_num(7.0)) or bool(
        got[~special].isnan().any()
    ):
        return math.inf
    if not got.numel():
        return 0.0
    error = torch.where(special, 0.0, got - expected).abs()
    # where nothing may err, anything is too much
    least = torch.where(special, 1.0, tolerance.clamp(min=torch.finfo(torch.float64).tiny))
    return float((error / least).max())


@dataclass
class Tally:
    """By name of result: calls, the worst ratio and its call, and the calls past the bound."""

    calls: dict[str, int] = field(default_factory=dict)
    worst: dict[str, tuple[float, int]] = field(default_factory=dict)
    past: dict[str, list[int]] = field(default_factory=dict)

    def add(self, number: int, found: dict[str, float]) -> None:
        for name, ratio in found.items():
            self.calls[name] = self.calls.get(name, 0) + 1
            self.worst[name] = max(self.worst.get(name, (0.0, number)), (ratio, number))
            if not ratio <= 1.0:
                self.past.setdefault(name, []).append(number)

    def __str__(self) -> str:
        lines = [f"{'result':20} {'calls':>7} {'past':>5} {'worst error / bound':>20}  in call"]
        for name, (ratio, number) in self.worst.items():
            past = len(self.past.get(name, []))
            lines.append(f"{name:20} {self.calls[name]:7} {past:5} {ratio:20.3f}  {number}")
        return "\n".join(lines)


def run(backend: str, numbers: Iterable[int], tally: Tally | None = None) -> Tally:
    """Every call of these numbers through a backend, into a tally."""
    tally = Tally() if tally is None else tally
    for number in numbers:
        inputs = draw(number, backend)
        tally.add(number, ratios(inputs, backend))
        backward = draw_backward(number, backend, inputs)
        if backward is not None:
            tally.add(number, gradient_ratios(backward, backend))
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ops.fuzz", description="Random calls against the contract.")
    parser.add_argument("--backend", choices=BACKENDS, required=True)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first call")
    parser.add_argument("--library", help="the cpu backend's, such as one built with sanitizers")
    options = parser.parse_args()
    if options.library:
        cpu_library.library_path = lambda: options.library
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if options.backend == "triton":
        replace_once_a_launch()
    tally = Tally()
    # Ctrl-C ends it with what was found so far
    with contextlib.suppress(KeyboardInterrupt):
        run(options.backend, range(options.first, options.first + options.calls), tally)
    print(tally)
    for name, numbers in tally.past.items():
        print(f"past the bound of {name}: calls {', '.join(map(str, numbers[:20]))}")
    return 1 if tally.past else 0


if __name__ == "__main__":
    raise SystemExit(main())
