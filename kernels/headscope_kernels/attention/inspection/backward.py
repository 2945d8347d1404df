"""Reports on what the compiler makes of the backward's kernels, without a GPU, as forward.py of the forward's.

`python -m headscope_kernels.attention.inspection.backward --help`.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton

from headscope_kernels.attention.arguments import kernel_arguments
from headscope_kernels.attention.backward.arguments import shared_arguments
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
from headscope_kernels.attention.inspection.compiling import (
    DTYPES,
    TARGETS,
    ast_source,
    figures,
    mask_without_data,
    target_key,
    without_data,
)
from headscope_kernels.attention.inspection.machine_code import count_kinds
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
    """A kernel to compile: [1, heads, queries, dim] against [1, kv_heads, keys, dim], contiguous; all gradients needed.

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


def problem_pointers(problem: BackwardProblem) -> dict[str, Any]:
    """A pass's tensors by the kernels' parameters, without data."""
    heads, keys, dim_v = problem.heads, problem.keys, problem.dim_v or problem.dim
    rows = without_data(1, heads, problem.queries)
    output = without_data(*rows.shape, dim_v, dtype=problem.dtype)
    edits = {
        "fill": (1, heads, 1, dim_v),
        "temperature": (1, heads),
        "key_bias": (1, 1, keys),
        "key_scale": (1, 1, keys),
    }
    statistics = bound_statistics(problem)
    return {
        "query_ptr": without_data(*rows.shape, problem.dim, dtype=problem.dtype),
        "key_ptr": without_data(1, problem.kv_heads, keys, problem.dim, dtype=problem.dtype),
        "value_ptr": without_data(1, problem.kv_heads, keys, dim_v, dtype=problem.dtype),
        "mask_ptr": mask_without_data(problem.mask, problem.queries, keys),
        "gate_ptr": without_data(1, heads),
        **{f"{name}_ptr": without_data(*shape) if problem.edits else None for name, shape in edits.items()},
        "grad_output_ptr": output,
        "attention_ptr": output,
        "row_max_ptr": rows,
        "log2_sum_ptr": rows,
        "row_constants_ptr": rows if statistics else None,
        "grad_ptrs": tuple(
            without_data(*rows.shape, *([bound.statistic.width] if bound.statistic.width else []))
            for bound in statistics
        ),
        "statistic_data": tuple(tensor for bound in statistics for tensor in bound.tensors),
    }


def bound_statistics(problem: BackwardProblem) -> list[BoundStatistic]:
    """The problem's statistics, their data without content."""
    data = {"group_mass": (without_data(1, 1, problem.keys, dtype=torch.int32),)}
    constants = {"group_mass": (GROUPS,)}
    return [
        BoundStatistic(STATISTICS[name](constants.get(name, ())), data.get(name, ())) for name in problem.statistics
    ]


def problem_arguments(
    problem: BackwardProblem, configurations: BackwardConfigurations
) -> tuple[Any, dict[str, Any], BackwardConfiguration]:
    """The kernel, its arguments for a problem, its tensors without data, and its configuration."""
    pointers, edits = problem_pointers(problem), problem.edits
    shared = shared_arguments(
        pointers,
        is_causal=problem.causal,
        scale=problem.dim**-0.5,
        statistics=bound_statistics(problem),
        configurations=configurations,
    )
    query, key, value, rows = (pointers[f"{name}_ptr"] for name in ("query", "key", "value", "row_max"))
    unit = stride_unit((query, key, value))
    mask_grad = without_data(1, 1, problem.queries, problem.keys)
    sums = rows if edits else None
    own = {
        "delta_ptr": rows,
        "offset_ptr": rows,
        "key_grad_ptr": key,
        "value_grad_ptr": value,
        "query_grad_ptr": query,
        "mask_grad_ptr": mask_grad,
        "gate_grad_ptr": sums,
        "column_sums_ptr": sums,
        "key_scale_grad_ptr": sums,
        "row_sums_ptr": None,
        "temperature_grad_ptr": sums,
        "key_grad_strides": in_units(key, unit),
        "value_grad_strides": in_units(value, unit),
        "query_grad_strides": in_units(query, unit),
        "mask_grad_strides": mask_grad.stride(),
        "mask_heads": 1,
        "batch_repeats": 1,
        "head_repeats": problem.heads,
        "batches": 1,
        "splits": 1,
        "split_queries": problem.queries,
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
    return kernel, kernel_arguments(kernel, {**shared, **own}, configuration), configuration


def backward_report(problem: BackwardProblem, target: str = "sm_90") -> BackwardReport:
    """Compile one backward kernel for one of TARGETS and read the result."""
    gpu = TARGETS[target]
    configurations = problem.configurations or backward_configurations(
        problem.dtype,
        problem.dim,
        problem.dim_v or problem.dim,
        problem.queries,
        problem.keys,
        target_key(gpu),
        exact=float32_precision() == "ieee",
        extra_terms=problem.edits or problem.mask != "none" or "group_mass" in problem.statistics,
    )
    kernel, arguments, configuration = problem_arguments(problem, configurations)
    options = configuration.options
    if problem.kernel == "rows":
        del options["num_stages"]
    compiled = triton.compile(ast_source(kernel, arguments), target=gpu, options=options)
    if getattr(compiled.metadata, "tmem_size", None) and compiled.metadata.tmem_size > TENSOR_MEMORY:
        # what was compiled is a trap
        raise ValueError(f"{configuration} takes {compiled.metadata.tmem_size} columns of {TENSOR_MEMORY}")
    found = figures(compiled, gpu, configuration, configuration.num_warps)
    return BackwardReport(
        target,
        problem,
        configuration,
        found.registers,
        found.spill_bytes,
        found.shared_bytes,
        dict(count_kinds(found.code)),
        dict(Counter(line.split()[0] for line in found.code)),
        found.scores,
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
