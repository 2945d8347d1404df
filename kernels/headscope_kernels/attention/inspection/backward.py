"""What the compiler makes of the backward kernels, without a GPU: see inspection/forward.py for the forward's.

`python -m headscope_kernels.attention.inspection.backward --help`.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
from torch import Tensor

from headscope_kernels.attention.backward.arguments import kernel_arguments, shared_arguments
from headscope_kernels.attention.backward.configs import (
    BackwardConfiguration,
    BackwardConfigurations,
    backward_configurations,
)
from headscope_kernels.attention.backward.key_value_gradient import key_value_gradient_kernel
from headscope_kernels.attention.backward.mask_gradient import mask_gradient_kernel
from headscope_kernels.attention.backward.query_gradient import query_gradient_kernel
from headscope_kernels.attention.backward.row_terms import row_terms_kernel
from headscope_kernels.attention.host import float32_precision, in_units, stride_unit
from headscope_kernels.attention.inspection.compiling import DTYPES, TARGETS, ast_source, target_key
from headscope_kernels.attention.inspection.machine_code import (
    count_kinds,
    densest_matrix_loop,
    disassemble,
    exponentials,
    figure,
)
from headscope_kernels.attention.statistics import STATISTICS, BoundStatistic

KERNELS = {
    "key_value": key_value_gradient_kernel,
    "query": query_gradient_kernel,
    "mask": mask_gradient_kernel,
    "rows": row_terms_kernel,
}
GROUPS = 8
# columns of an sm_100 multiprocessor
TENSOR_MEMORY = 512


@dataclass(frozen=True)
class BackwardProblem:
    """What is compiled: [1, heads, queries, dim] against [1, kv_heads, keys, dim], contiguous; all gradients needed.

    Attributes:
        kernel: one of KERNELS.
        statistics: of entropy and group_mass, those with a cotangent.
        edits: gate, fill, temperature, key_bias and key_scale are given, and their gradients needed; else only the
            gate, without its gradient.
    """

    kernel: str = "key_value"
    dtype: torch.dtype = torch.bfloat16
    dim: int = 64
    dim_v: int | None = None
    statistics: tuple[str, ...] = ("entropy",)
    edits: bool = False
    mask: str = "none"
    causal: bool = False
    heads: int = 8
    kv_heads: int = 8
    queries: int = 4096
    keys: int = 4096
    configurations: BackwardConfigurations | None = None


@dataclass(frozen=True)
class BackwardReport:
    """The figures of one compiled kernel.

    Attributes:
        registers: per thread.
        spill_bytes: stack of one thread, or spilled registers times 4 on AMD.
        shared_bytes: of one program.
        loop: instructions of one iteration over a full tile by kind, one thread; empty on AMD.
        opcodes: the same by opcode.
        scores: scores of that iteration, per thread.
    """

    target: str
    problem: BackwardProblem
    configuration: BackwardConfiguration
    registers: int
    spill_bytes: int
    shared_bytes: int
    loop: dict[str, int] = field(default_factory=dict)
    opcodes: dict[str, int] = field(default_factory=dict)
    scores: int = 0

    @property
    def instructions_per_score(self) -> float:
        return sum(self.loop.values()) / self.scores

    def __str__(self) -> str:
        problem, tile = self.problem, self.configuration
        statistics = ",".join(problem.statistics) or "-"
        line = (
            f"{self.target} {problem.kernel} {str(problem.dtype)[6:]} d{problem.dim} "
            f"{tile.block_queries}x{tile.block_keys}w{tile.num_warps}s{tile.num_stages}{'d' * tile.descriptors} "
            f"{statistics} "
            f"mask={problem.mask} causal={problem.causal} edits={problem.edits}: "
            f"{self.registers} registers, {self.spill_bytes} B spilled, {self.shared_bytes} B shared"
        )
        if self.loop:
            kinds = " ".join(f"{kind} {count}" for kind, count in sorted(self.loop.items(), key=lambda item: -item[1]))
            line += f", {self.instructions_per_score:.2f} instructions per score ({kinds})"
        return line


def problem_arguments(
    problem: BackwardProblem, configurations: BackwardConfigurations
) -> tuple[Any, dict[str, Any], BackwardConfiguration]:
    """The kernel, its arguments for a problem, its tensors without data, and its configuration."""
    heads, kv_heads, queries, keys = problem.heads, problem.kv_heads, problem.queries, problem.keys
    dim, dim_v = problem.dim, problem.dim_v or problem.dim

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    mask = None
    if problem.mask != "none":
        mask = empty(1, 1, queries, keys, dtype=torch.bool if problem.mask == "bool" else torch.float32)
    statistics, grads = [], []
    for name in problem.statistics:
        if name == "group_mass":
            groups = empty(1, 1, keys, dtype=torch.int32)
            statistics.append(BoundStatistic(STATISTICS[name]((GROUPS,)), (groups,)))
            grads.append(empty(1, heads, queries, GROUPS))
        else:
            statistics.append(BoundStatistic(STATISTICS[name](())))
            grads.append(empty(1, heads, queries))
    query = empty(1, heads, queries, dim, dtype=problem.dtype)
    key, value = (
        empty(1, kv_heads, keys, dim, dtype=problem.dtype),
        empty(1, kv_heads, keys, dim_v, dtype=problem.dtype),
    )
    output, rows = empty(1, heads, queries, dim_v, dtype=problem.dtype), empty(1, heads, queries)
    edits = problem.edits
    shared = shared_arguments(
        output,
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=problem.causal,
        scale=dim**-0.5,
        gate=empty(1, heads),
        fill=empty(1, heads, 1, dim_v) if edits else None,
        temperature=empty(1, heads) if edits else None,
        key_bias=empty(1, 1, keys) if edits else None,
        key_scale=empty(1, 1, keys) if edits else None,
        attention=output,
        row_max=rows,
        log2_sum=rows,
        row_constants=rows if statistics else None,
        statistics=statistics,
        statistic_grads=grads,
        configurations=configurations,
    )
    unit = stride_unit((query, key, value))
    mask_grad = empty(1, 1, queries, keys)
    own = {
        "delta_ptr": rows,
        "offset_ptr": rows,
        "key_grad_ptr": key,
        "value_grad_ptr": value,
        "query_grad_ptr": query,
        "mask_grad_ptr": mask_grad,
        "gate_grad_ptr": rows if edits else None,
        "column_sums_ptr": rows if edits else None,
        "key_scale_grad_ptr": rows if edits else None,
        "row_sums_ptr": None,
        "temperature_grad_ptr": rows if edits else None,
        "key_grad_strides": in_units(key, unit),
        "value_grad_strides": in_units(value, unit),
        "query_grad_strides": in_units(query, unit),
        "mask_grad_strides": mask_grad.stride(),
        "mask_heads": 1,
        "batch_repeats": 1,
        "head_repeats": heads,
        "batches": 1,
        "splits": 1,
        "split_queries": queries,
        "GRAD_UNIT": unit,
        "NEED_DELTA": True,
        "NEED_GATE": edits,
        "NEED_KEY": True,
        "NEED_VALUE": not configurations.separate,
        "NEED_COLUMN_SUMS": edits,
        "NEED_KEY_SCALE": edits,
        "NEED_QUERY": True,
        "NEED_ROW_SUMS": False,
        "NEED_TEMPERATURE": edits,
    }
    kernel = KERNELS[problem.kernel]
    rows_configuration = BackwardConfiguration(configurations.block_rows, configurations.block_rows)
    configuration = getattr(configurations, problem.kernel, rows_configuration)
    return kernel, kernel_arguments(kernel, shared, configuration, own), configuration


def backward_report(problem: BackwardProblem, target: str = "sm_90") -> BackwardReport:
    """Compiles one backward kernel for one of TARGETS and reads the result."""
    gpu = TARGETS[target]
    configurations = problem.configurations or backward_configurations(
        problem.dtype,
        problem.dim,
        problem.dim_v or problem.dim,
        problem.queries,
        problem.keys,
        target_key(gpu),
        exact=float32_precision() == "ieee",
        laden=problem.edits or problem.mask != "none" or "group_mass" in problem.statistics,
    )
    kernel, arguments, configuration = problem_arguments(problem, configurations)
    options: dict[str, Any] = {"num_warps": configuration.num_warps, "enable_fp_fusion": True}
    if problem.kernel != "rows":
        options["num_stages"] = configuration.num_stages
    compiled = triton.compile(ast_source(kernel, arguments), target=gpu, options=options)
    shared = compiled.metadata.shared
    if getattr(compiled.metadata, "tmem_size", None) and compiled.metadata.tmem_size > TENSOR_MEMORY:
        # what was compiled is a trap
        raise ValueError(f"{configuration} takes {compiled.metadata.tmem_size} columns of {TENSOR_MEMORY}")
    if gpu.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers = figure(r"\.vgpr_count:\s*(\d+)", text)
        spilled = figure(r"\.vgpr_spill_count:\s*(\d+)", text)
        return BackwardReport(target, problem, configuration, registers, 4 * spilled, shared)
    usage, assembly = disassemble(compiled.asm["cubin"])
    registers, stack = figure(r"REG:(\d+)", usage), figure(r"STACK:(\d+)", usage)
    threads = 32 * configuration.num_warps
    tile_scores = configuration.block_queries * configuration.block_keys // threads
    loop = densest_matrix_loop(assembly)
    # ptxas may unroll: every score takes one power of two
    unrolled = max(1, exponentials(loop) // tile_scores) if tile_scores >= 16 else 1
    return BackwardReport(
        target,
        problem,
        configuration,
        registers,
        stack,
        shared,
        dict(count_kinds(loop)),
        dict(Counter(line.split()[0] for line in loop)),
        tile_scores * unrolled,
    )


def default_problems() -> Iterator[BackwardProblem]:
    """Both main loops at the head dimensions of image models, with and without an entropy cotangent."""
    for dim in (40, 64, 80, 128):
        for statistics in ((), ("entropy",)):
            for kernel in ("key_value", "query"):
                yield BackwardProblem(kernel=kernel, dim=dim, statistics=statistics)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=sorted(TARGETS), default="sm_90")
    parser.add_argument("--kernel", choices=sorted(KERNELS), default="key_value")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--dim", type=int, help="head dimension; default: a table of several")
    parser.add_argument("--statistics", nargs="*", choices=("entropy", "group_mass"), default=["entropy"])
    parser.add_argument("--mask", choices=("none", "bool", "additive"), default="none")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--edits", action="store_true")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--tile", type=int, nargs=4, metavar=("QUERIES", "KEYS", "WARPS", "STAGES"))
    parser.add_argument("--widths", type=int, nargs="*", help="chunks of the head dimension")
    options = parser.parse_args()
    problems = list(default_problems())
    if options.dim:
        configurations = None
        if options.tile:
            configuration = BackwardConfiguration(*options.tile)
            configurations = BackwardConfigurations(configuration, configuration, configuration)
            if options.widths:
                widths = tuple(options.widths)
                configurations = replace(configurations, dim_widths=widths, value_widths=widths)
        problems = [
            BackwardProblem(
                kernel=options.kernel,
                dtype=DTYPES[options.dtype],
                dim=options.dim,
                statistics=tuple(options.statistics),
                edits=options.edits,
                mask=options.mask,
                causal=options.causal,
                kv_heads=options.kv_heads,
                configurations=configurations,
            )
        ]
    for problem in problems:
        print(backward_report(problem, options.target), flush=True)


if __name__ == "__main__":
    main()
