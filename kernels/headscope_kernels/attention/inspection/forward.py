"""Reports on what the compiler makes of the forward and of key_mass, without a GPU.

Compiles for a target, disassembles, and counts: registers, spills, shared memory, and what the loop over full key
tiles issues per logit. `python -m headscope_kernels.attention.inspection.forward --help`.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.experimental.gluon._runtime import GluonASTSource

from headscope_kernels.attention.configuration import ForwardConfiguration, chunk_widths
from headscope_kernels.attention.forward.arguments import forward_arguments, forward_features
from headscope_kernels.attention.forward.candidates import candidates
from headscope_kernels.attention.forward.configs import forward_configuration, key_mass_configuration
from headscope_kernels.attention.forward.kernel import attention_forward_kernel
from headscope_kernels.attention.hopper.schedules import GLUON_SCHEDULES, HOPPER, unserved
from headscope_kernels.attention.hopper.specialised import refuse_unspecialised
from headscope_kernels.attention.host import float32_precision
from headscope_kernels.attention.inspection.compiling import (
    DTYPES,
    TARGETS,
    ast_source,
    figures,
    mask_without_data,
    target_key,
    without_data,
)
from headscope_kernels.attention.inspection.machine_code import count_kinds, exponentials, exponentials_under_products
from headscope_kernels.attention.key_mass import attention_key_mass_kernel, key_mass_arguments
from headscope_kernels.attention.operands import misplaced_operands
from headscope_kernels.attention.statistics import STATISTICS, BoundStatistic

HEADS = 8


@dataclass(frozen=True)
class Problem:
    """A kernel to compile: [1, heads, queries, dim] against [1, heads, keys, dim], contiguous.

    Attributes:
        groups: how many the group statistics have.
        saved: the rows and the output before the gate are written for a backward.
        key_mass: the second pass, over queries, instead of the forward.
        configuration: None: chosen for the problem.
    """

    dtype: torch.dtype = torch.bfloat16
    dim: int = 64
    dim_v: int | None = None
    statistics: tuple[str, ...] = ("entropy",)
    groups: int = 77
    gate: bool = True
    fill: bool = False
    temperature: bool = False
    key_bias: bool = False
    key_scale: bool = False
    output: bool = True
    saved: bool = False
    key_mass: bool = False
    mask: str = "none"
    causal: bool = False
    queries: int = 4096
    keys: int = 4096
    configuration: ForwardConfiguration | None = None


@dataclass(frozen=True)
class StaticReport:
    """The figures of one compiled kernel.

    Attributes:
        registers: per thread.
        spill_bytes: stack of one thread, or spilled registers times 4 on AMD.
        shared_bytes: of one program.
        loop: instructions of one iteration over a full key tile by kind, one thread; empty on AMD.
        scores: logits of that iteration, per thread.
        misplaced: matrix products that read their operands from elsewhere (operands.py); empty but on sm_90.
        overlapped: the share of that iteration's powers of two that are issued while a matrix product of the same warps
            runs; Hopper only.
    """

    target: str
    problem: Problem
    configuration: ForwardConfiguration
    registers: int
    spill_bytes: int
    shared_bytes: int
    loop: dict[str, int] = field(default_factory=dict)
    scores: int = 0
    misplaced: list[str] = field(default_factory=list)
    overlapped: float = 0.0

    @property
    def instructions_per_score(self) -> float:
        return sum(self.loop.values()) / self.scores

    @property
    def tile(self) -> str:
        """Queries x keys, warps, stages, and the head dimension's chunks where there are two."""
        shape = self.configuration
        widths = shape.dim_widths or chunk_widths(self.problem.dim)
        chunks = f" {'+'.join(map(str, widths))}" if len(widths) > 1 else ""
        descriptors = " descriptors" if shape.descriptors else ""
        schedule = "" if shape.schedule == "plain" else f" {shape.schedule}"
        tile = f"{shape.block_queries}x{shape.block_keys}w{shape.num_warps}s{shape.num_stages}"
        return f"{tile}{chunks}{descriptors}{schedule}"

    @property
    def name(self) -> str:
        """The settings of the problem that aren't defaults."""
        problem = self.problem
        statistics = "key_mass" if problem.key_mass else ",".join(problem.statistics) or "-"
        if any(name.startswith("group_") for name in problem.statistics):
            statistics += f" ({problem.groups} groups)"
        flags = ("gate", "fill", "temperature", "key_bias", "key_scale", "saved", "causal")
        asked = [flag for flag in flags if getattr(problem, flag)]
        if problem.mask != "none":
            asked.append(f"{problem.mask} mask")
        return " + ".join((statistics, *asked))

    def row(self) -> str:
        """A line of the Markdown table that TABLE_HEAD begins."""
        kinds = ", ".join(
            f"{kind} {count / self.scores:.2f}" for kind, count in sorted(self.loop.items(), key=lambda item: -item[1])
        )
        figures = (
            self.target,
            str(self.problem.dtype)[6:],
            self.problem.dim,
            self.name,
            self.tile,
            self.registers,
            self.spill_bytes,
            self.shared_bytes,
            f"{self.instructions_per_score:.2f}" if self.loop else "",
            f"{self.overlapped:.0%}",
            kinds,
        )
        return f"| {' | '.join(map(str, figures))} |"


TABLE_HEAD = """\
| target | dtype | d | asked for | tile | registers | spilled, B | shared, B | per score | overlapped | by kind |
|---|---|---|---|---|---|---|---|---|---|---|"""


def bound_statistic(name: str, groups: int) -> BoundStatistic:
    """A statistic with made-up constants and data without content."""
    if name.startswith("group_"):
        return BoundStatistic(STATISTICS[name]((groups,)), (torch.empty(1, 1, 1, dtype=torch.int32, device="meta"),))
    return BoundStatistic(STATISTICS[name]((64, 64, 64, 64) if name == "distance" else ()))


def bound_statistics(problem: Problem) -> list[BoundStatistic]:
    return [bound_statistic(name, problem.groups) for name in problem.statistics]


def problem_pointers(problem: Problem) -> dict[str, Any]:
    """A call's tensors by the kernel's parameters, without data."""
    heads, queries, keys, dim = HEADS, problem.queries, problem.keys, problem.dim
    dim_v, rows = problem.dim_v or dim, (1, heads, queries)
    statistics, saved = bound_statistics(problem), problem.saved or problem.key_mass
    result = without_data(*rows, dim_v, dtype=problem.dtype)
    shapes = {"gate": (1, heads), "temperature": (1, heads), "key_bias": (1, 1, keys), "key_scale": (1, 1, keys)}
    pointers = {
        "query_ptr": without_data(*rows, dim, dtype=problem.dtype),
        "key_ptr": without_data(1, heads, keys, dim, dtype=problem.dtype),
        "mask_ptr": mask_without_data(problem.mask, queries, keys),
        **{f"{name}_ptr": without_data(*shape) if getattr(problem, name) else None for name, shape in shapes.items()},
        "row_max_ptr": without_data(*rows) if saved else None,
        "log2_sum_ptr": without_data(*rows) if saved else None,
    }
    if problem.key_mass:
        taken = ("query", "key", "mask", "temperature", "key_bias", "row_max", "log2_sum")
        return {f"{name}_ptr": pointers[f"{name}_ptr"] for name in taken} | {"output_ptr": without_data(1, heads, keys)}
    widths = [(bound.statistic.width,) if bound.statistic.width else () for bound in statistics]
    return {
        **pointers,
        "value_ptr": without_data(1, heads, keys, dim_v, dtype=problem.dtype),
        "fill_ptr": result if problem.fill else None,
        "output_ptr": result if problem.output else None,
        "attention_ptr": result if problem.saved else None,
        "statistic_ptrs": tuple(without_data(*rows, *width) for width in widths),
        "statistic_data": tuple(tensor for bound in statistics for tensor in bound.tensors),
    }


def problem_arguments(problem: Problem, configuration: ForwardConfiguration) -> dict[str, Any]:
    """The kernel's arguments for a problem, its tensors without data."""
    pointers, scale = problem_pointers(problem), problem.dim**-0.5
    call: dict[str, Any] = {"is_causal": problem.causal, "scale": scale, "configuration": configuration}
    if problem.key_mass:
        return key_mass_arguments(pointers, **call)
    return forward_arguments(pointers, statistics=bound_statistics(problem), **call)


def chosen_configuration(problem: Problem, gpu: GPUTarget) -> ForwardConfiguration:
    """The problem's own configuration, or the one that a launch would choose.

    Raises:
        ValueError: its own is of a schedule that can't serve it.
    """
    exact = float32_precision() == "ieee"
    lengths, target = (problem.queries, problem.keys), target_key(gpu)
    if problem.key_mass:
        return problem.configuration or key_mass_configuration(
            problem.dtype, problem.dim, *lengths, target, exact=exact
        )
    dim_v, statistics = problem.dim_v or problem.dim, bound_statistics(problem)
    features = forward_features(problem_pointers(problem), problem.causal, problem.dim**-0.5, statistics)
    if problem.configuration is None:
        return forward_configuration(
            problem.dtype,
            problem.dim,
            dim_v,
            *lengths,
            target,
            exact=exact,
            masked=problem.mask != "none",
            accumulated=sum(sum(bound.statistic.accumulators) for bound in statistics),
            features=features,
        )
    refusal = unserved(problem.configuration, problem.dtype, problem.dim, dim_v, problem.keys, target, features)
    if refusal:
        raise ValueError(refusal)
    return problem.configuration


def compile_problem(problem: Problem, configuration: ForwardConfiguration, gpu: GPUTarget) -> CompiledKernel:
    """The binary that a launch of this configuration would start.

    Raises:
        RuntimeError: Triton didn't specialise a kernel that should be.
    """
    if configuration.schedule in GLUON_SCHEDULES:
        return compile_pingpong(problem, configuration, gpu)
    kernel = attention_key_mass_kernel if problem.key_mass else attention_forward_kernel
    source = ast_source(kernel, problem_arguments(problem, configuration))
    compiled = triton.compile(source, target=gpu, options=configuration.options)
    if configuration.schedule == "specialised":
        refuse_unspecialised(compiled)
    return compiled


def compile_pingpong(problem: Problem, configuration: ForwardConfiguration, gpu: GPUTarget) -> CompiledKernel:
    """The same of the kernel in hopper/pingpong.py."""
    from headscope_kernels.attention.hopper.pingpong import OPTIONS, attention_pingpong_kernel
    from headscope_kernels.attention.hopper.pingpong_arguments import pingpong_arguments

    pointers = problem_pointers(problem)
    arguments = pingpong_arguments(
        *(pointers[f"{name}_ptr"] for name in ("query", "key", "value", "output")),
        scale=problem.dim**-0.5,
        gate=pointers["gate_ptr"],
        statistic_outputs=pointers["statistic_ptrs"],
        configuration=configuration,
    )
    source = ast_source(attention_pingpong_kernel, arguments, GluonASTSource)
    return triton.compile(source, target=gpu, options=OPTIONS)


def report(problem: Problem, target: str = "sm_90") -> StaticReport:
    """Compile the kernel for one of TARGETS and read the result.

    Raises:
        ValueError: the problem's configuration can't serve it.
        RuntimeError: Triton didn't specialise a kernel that should be.
    """
    gpu = TARGETS[target]
    configuration = chosen_configuration(problem, gpu)
    compiled = compile_problem(problem, configuration, gpu)
    # every schedule but the plain one gives four warps 64 queries
    warps = configuration.num_warps if configuration.schedule == "plain" else configuration.block_queries // 16
    found = figures(compiled, gpu, configuration, warps)
    return StaticReport(
        target,
        problem,
        configuration,
        found.registers,
        found.spill_bytes,
        found.shared_bytes,
        dict(count_kinds(found.code)),
        found.scores,
        misplaced_operands(compiled.asm["ptx"], found.assembly) if target == "sm_90" else [],
        exponentials_under_products(found.code) / max(exponentials(found.code), 1),
    )


def default_problems() -> Iterator[Problem]:
    """The kernels that matter most: head dimensions of image models, and what each statistic and edit adds."""
    for dim in (40, 64, 80, 128, 160, 256, 512):
        for statistics in ((), ("entropy",)):
            yield Problem(dim=dim, statistics=statistics)
    for name in STATISTICS:
        if name != "entropy":
            yield Problem(statistics=(name,), groups=16)
    yield Problem(statistics=("group_mass",), groups=77)
    yield Problem(key_mass=True, gate=False)
    for edit in ("fill", "temperature", "key_bias", "key_scale", "saved", "causal"):
        yield Problem(**{edit: True})
    for mask in ("bool", "additive"):
        yield Problem(mask=mask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=sorted(TARGETS), nargs="+", default=["sm_90"])
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--dim", type=int, help="head dimension; default: a table of several")
    parser.add_argument("--statistics", nargs="*", choices=sorted(STATISTICS), default=["entropy"])
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--key-mass", action="store_true", help="the second pass instead of the forward")
    parser.add_argument("--mask", choices=("none", "bool", "additive"), default="none")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--tile", type=int, nargs=4, metavar=("QUERIES", "KEYS", "WARPS", "STAGES"))
    parser.add_argument("--widths", type=int, nargs="+", help="the head dimension's chunks")
    parser.add_argument("--descriptors", action="store_true", help="with --tile: tensor descriptors")
    parser.add_argument("--candidates", action="store_true", help="with --dim: also what is timed against the choice")
    options = parser.parse_args()
    problems = [replace(problem, dtype=DTYPES[options.dtype]) for problem in default_problems()]
    if options.dim:
        widths = tuple(options.widths) if options.widths else None
        tile = ForwardConfiguration(*options.tile, widths, widths, options.descriptors) if options.tile else None
        problems = [
            Problem(
                dtype=DTYPES[options.dtype],
                dim=options.dim,
                statistics=tuple(options.statistics),
                groups=options.groups,
                key_mass=options.key_mass,
                mask=options.mask,
                causal=options.causal,
                configuration=tile,
            )
        ]
        if options.candidates:
            problem = problems[0]
            sizes = (problem.dim, problem.dim, problem.queries, problem.keys)
            for configuration in candidates(problem.dtype, *sizes, HOPPER).values():
                problems.append(replace(problem, configuration=configuration))
    print(f"Triton {triton.__version__}\n\n{TABLE_HEAD}")
    for target in options.target:
        for problem in problems:
            print(report(problem, target).row(), flush=True)


if __name__ == "__main__":
    main()
