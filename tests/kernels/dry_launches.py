"""Launches for a GPU that isn't there, up to the driver: run in a process without the interpreter.

Triton compiles for the target and hands its launcher's arguments to a driver that only writes them down. Prints a line
of JSON for each case: what the driver was given, with addresses as names of tensors.
"""

import gc
import json
import sys
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia import hopper
from triton.tools.tensor_descriptor import TensorDescriptor

import stand_in
from headscope_kernels.attention import (
    STATISTICS,
    BoundStatistic,
    attention_backward,
    attention_forward,
    attention_key_mass,
    choices,
)
from headscope_kernels.attention import key_mass as key_mass_module
from headscope_kernels.attention.backward.configs import backward_configurations
from headscope_kernels.attention.backward.passes import DIFFERENTIABLE, KEY_VALUE, MASK, QUERY, ROW_TERMS
from headscope_kernels.attention.configuration import ForwardConfiguration
from headscope_kernels.attention.forward import launch as forward
from headscope_kernels.attention.forward.configs import forward_configuration, key_mass_configuration
from headscope_kernels.attention.forward.launch import _LAUNCHES
from headscope_kernels.attention.inspection.backward import BackwardProblem
from headscope_kernels.attention.inspection.backward import problem_arguments as backward_problem_arguments
from headscope_kernels.attention.inspection.compiling import TARGETS, ast_source
from headscope_kernels.attention.inspection.forward import Problem, problem_arguments
from headscope_kernels.attention.launches import Launches
from stand_in import launched

HALF = torch.float16
BACKWARD = (ROW_TERMS, KEY_VALUE, QUERY, MASK)


def readable(value: Any, names: dict[int, str]) -> Any:
    """An argument with addresses as names."""
    if isinstance(value, Tensor):
        # what the call itself allocated, in the order in which kernels get it
        return names.setdefault(value.data_ptr(), f"own {len(names)}")
    if isinstance(value, TensorDescriptor):
        return [names[value.base.data_ptr()], list(value.shape), list(value.strides), list(value.block_shape)]
    if isinstance(value, tuple):
        return [readable(element, names) for element in value]
    return value if isinstance(value, (int, float, str, type(None))) else str(value)


def tensors(dim: int, dtype: torch.dtype, offset: int = 0, keys: int = 256) -> dict[str, Tensor]:
    """A call's tensors; `offset` moves the query off an address that is a multiple of 16 bytes."""
    whole = torch.zeros(2 * 8 * 256 * dim + offset, dtype=dtype)[offset:]
    return {
        "query": whole.view(2, 8, 256, dim),
        "key": torch.zeros(2, 8, keys, dim, dtype=dtype),
        "value": torch.zeros(2, 8, keys, dim, dtype=dtype),
        "output": torch.zeros(2, 8, 256, dim, dtype=dtype),
        "entropy": torch.zeros(2, 8, 256),
        "group_mass": torch.zeros(2, 8, 256, 3),
        "groups": torch.zeros(1, 1, keys, dtype=torch.int32),
        "mask": torch.ones(1, 1, 256, keys, dtype=torch.bool),
        "gate": torch.ones(2, 8),
        "fill": torch.zeros(1, 8, 1, dim),
        "temperature": torch.ones(1, 8),
    }


def launch(
    own: dict[str, Tensor],
    asked: tuple[str, ...],
    configuration: ForwardConfiguration | None = None,
    choose: bool = False,
) -> dict[str, Any]:
    """What the driver gets for a call on these tensors with what is asked for; `choose`: the launcher chooses."""
    query, key, value = own["query"], own["key"], own["value"]
    statistics = [BoundStatistic(STATISTICS["entropy"](()), ())]
    outputs = [own["entropy"]]
    if "groups" in asked:
        statistics.append(BoundStatistic(STATISTICS["group_mass"]((3,)), (own["groups"],)))
        outputs.append(own["group_mass"])
    configuration = configuration or forward_configuration(
        query.dtype,
        query.shape[3],
        value.shape[3],
        query.shape[2],
        key.shape[2],
        ("cuda", 90),
        exact=True,
        masked="mask" in asked,
        accumulated=sum(sum(bound.statistic.accumulators) for bound in statistics),
    )
    before = len(_LAUNCHES._known)
    attention_forward(
        query,
        key,
        value,
        attn_mask=own["mask"] if "mask" in asked else None,
        is_causal=False,
        scale=query.shape[3] ** -0.5,
        **{name: own[name] for name in ("gate", "fill", "temperature") if name in asked},
        statistics=statistics,
        statistic_outputs=outputs,
        output=own["output"],
        configuration=None if choose else configuration,
    )
    function, programs, arguments = launched[-1]
    names = {tensor.data_ptr(): name for name, tensor in own.items()}
    return {
        "new": len(_LAUNCHES._known) - before,
        "binary": hash(function),
        "programs": programs,
        "arguments": [readable(argument, names) for argument in arguments],
    }


def twice(
    dim: int, dtype: torch.dtype, *asked: str, configuration: ForwardConfiguration | None = None
) -> dict[str, Any]:
    """The same call on other tensors of the same layout."""
    own = tensors(dim, dtype)
    first = launch(own, asked, configuration)
    alive = [weakref.ref(tensor) for tensor in own.values()]
    again = launch(tensors(dim, dtype), asked, configuration)
    launched.clear()
    del own
    gc.collect()
    return {"first": first, "again": again, "alive": sum(ref() is not None for ref in alive)}


def backward_tensors(dim: int, dtype: torch.dtype = HALF, offset: int = 0, keys: int = 256) -> dict[str, Tensor]:
    """What a backward pass starts from."""
    own = tensors(dim, dtype, offset, keys)
    return {
        **{name: own[name] for name in ("query", "key", "value", "gate", "fill", "temperature")},
        "grad_output": own["output"],
        "attention": torch.zeros(2, 8, 256, dim, dtype=dtype),
        "attn_mask": torch.zeros(1, 1, 256, keys, dtype=dtype),
        "key_bias": torch.zeros(1, 8, keys),
        "key_scale": torch.ones(1, 8, keys),
        "groups": own["groups"],
        **{name: torch.zeros(2, 8, 256) for name in ("row_max", "log2_sum", "row_constants", "entropy_grad")},
        "mass_grad": own["group_mass"],
    }


def launch_backward(own: dict[str, Tensor], needed: tuple[str, ...] = DIFFERENTIABLE, **changes: Any) -> dict[str, Any]:
    """What the driver gets for a backward pass with everything, launch by launch."""
    query, key = own["query"], own["key"]
    dim = query.shape[3]
    given = {name: tensor for name, tensor in own.items() if name not in ("groups", "entropy_grad", "mass_grad")}
    options: dict[str, Any] = {
        "scale": dim**-0.5,
        "statistics": [
            BoundStatistic(STATISTICS["entropy"](())),
            BoundStatistic(STATISTICS["group_mass"]((3,)), (own["groups"],)),
        ],
        "statistic_grads": [own["entropy_grad"], own["mass_grad"]],
        "needed": {name: name in needed for name in DIFFERENTIABLE},
        "configurations": backward_configurations(
            query.dtype, dim, dim, query.shape[2], key.shape[2], ("cuda", 90), exact=True, extra_terms=True
        ),
    }
    return observed(lambda: attention_backward(**{**given, **options, **changes}), own, BACKWARD)


def launch_key_mass(own: dict[str, Tensor], **changes: Any) -> dict[str, Any]:
    """What the driver gets for a pass of key_mass."""
    query, key = own["query"], own["key"]
    options: dict[str, Any] = {
        "is_causal": False,
        "scale": 0.125,
        "configuration": key_mass_configuration(
            query.dtype, query.shape[3], query.shape[2], key.shape[2], ("cuda", 90), exact=True
        ),
    }
    own = {**own, "output": torch.zeros(2, 8, key.shape[2])}
    given = {name: own[name] for name in ("row_max", "log2_sum", "temperature", "key_bias", "attn_mask", "output")}
    call = {**given, **options, **changes}
    return observed(lambda: attention_key_mass(query, key, **call), own, (key_mass_module._LAUNCHES,))


def observed(call: Callable[[], Any], own: dict[str, Tensor], memories: tuple[Launches, ...]) -> dict[str, Any]:
    """What the driver gets in a call, launch by launch, and how many of the launches are new to the memories."""
    launched.clear()
    before = sum(len(memory._known) for memory in memories)
    result = call()
    names = {tensor.data_ptr(): name for name, tensor in own.items()}
    launches = [
        {"binary": hash(function), "programs": programs, "arguments": [readable(value, names) for value in arguments]}
        for function, programs, arguments in launched
    ]
    launched.clear()
    del result
    return {"new": sum(len(memory._known) for memory in memories) - before, "launches": launches}


def repeated(launch: Callable[..., dict[str, Any]], *arguments: Any, **options: Any) -> dict[str, Any]:
    """The same call twice, on other tensors of the same layout."""
    own = backward_tensors(*arguments)
    first = launch(own, **options)
    alive = [weakref.ref(tensor) for tensor in own.values()]
    again = launch(backward_tensors(*arguments), **options)
    del own
    gc.collect()
    return {"first": first, "again": again, "alive": sum(ref() is not None for ref in alive)}


def passes() -> dict[str, Any]:
    """Backward passes and passes of key_mass: repeated ones, and ones that differ from them in one thing."""
    same = backward_tensors(64)
    same["value"] = same["key"]
    plain = backward_configurations(HALF, 128, 128, 256, 256, ("cuda", 90))
    without = {"attn_mask": None, "key_bias": None, "key_scale": None, "configurations": plain}
    return {
        "everything": repeated(launch_backward, 64),
        "descriptors": repeated(
            launch_backward, 128, needed=("query", "key", "value"), statistics=[], statistic_grads=[], **without
        ),
        "aliased": launch_backward(same),
        "unaligned": launch_backward(backward_tensors(64, offset=1), needed=("query",)),
        "longer": launch_backward(backward_tensors(64, keys=512), needed=("query",)),
        "scale": launch_backward(backward_tensors(64), scale=0.25, needed=("query",)),
        "needed": launch_backward(backward_tensors(64), needed=("query",)),
        "statistics": launch_backward(
            backward_tensors(64),
            needed=("query",),
            statistics=[BoundStatistic(STATISTICS["entropy"](()))],
            statistic_grads=[torch.zeros(2, 8, 256)],
        ),
        "key_mass": repeated(launch_key_mass, 64),
        "key_mass, scale": launch_key_mass(backward_tensors(64), scale=0.25),
        "key_mass, causal": launch_key_mass(backward_tensors(64), is_causal=True, attn_mask=None),
    }


def other_descriptors() -> dict[str, Any]:
    """A launch whose tensor descriptor is of Gluon's class, repeated on another tensor."""
    given: list[Any] = []
    compiled = SimpleNamespace(hash="none", metadata=SimpleNamespace(target=SimpleNamespace(backend="none")))

    class Compiled(SimpleNamespace):
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *values: given.append((grid, *values))

    class Kernel:
        params = (SimpleNamespace(name="x_descriptor"), SimpleNamespace(name="x_ptr"), SimpleNamespace(name="count"))

        def __getitem__(self, grid: tuple[int]) -> Callable[..., Any]:
            return lambda **arguments: Compiled(**vars(compiled))

    launches = Launches(Kernel(), {"x_descriptor": "x_ptr"})
    first, again = torch.zeros(64, 64, dtype=HALF), torch.zeros(64, 64, dtype=HALF)
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    descriptor = hopper.TensorDescriptor(first, [64, 64], [64, 1], [64, 64], layout)
    arguments = {"x_descriptor": descriptor, "x_ptr": first, "count": 7}
    launches.first("key", {"x_ptr": first}, 3, arguments, {})
    launches.repeat("key", {"x_ptr": again})
    (grid, found, pointer, count) = given[0]
    expected = hopper.TensorDescriptor(again, [64, 64], [64, 1], [64, 64], layout)
    same = {name: vars(found)[name] == vars(expected)[name] for name in vars(expected) if name != "base"}
    return {
        "grid": grid,
        "class": type(found) is hopper.TensorDescriptor,
        "base": found.base is again and pointer is again,
        "first's": descriptor.base is first,
        "fields": same,
        "count": count,
    }


def backward(kernel: str, dim: int) -> dict[str, int]:
    """The binaries of one backward kernel, as a launch compiles it and as its report does."""
    problem = BackwardProblem(kernel=kernel, dim=dim)
    configurations = backward_configurations(
        problem.dtype, dim, dim, problem.queries, problem.keys, ("cuda", 90), exact=True, extra_terms=False
    )
    query, key, value, attention = (torch.zeros(1, 8, 4096, dim, dtype=problem.dtype) for _ in range(4))
    rows = torch.zeros(1, 8, 4096)
    needed = ("key", "value") if kernel == "key_value" else ("query",)
    attention_backward(
        attention,
        query,
        key,
        value,
        scale=dim**-0.5,
        gate=torch.ones(1, 8),
        attention=attention,
        row_max=rows,
        log2_sum=rows.clone(),
        row_constants=rows.clone(),
        statistics=[BoundStatistic(STATISTICS["entropy"](()))],
        statistic_grads=[rows.clone()],
        needed={name: name in needed for name in DIFFERENTIABLE},
        configurations=configurations,
    )
    jit_function, arguments, configuration = backward_problem_arguments(problem, configurations)
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    source = ast_source(jit_function, arguments)
    compiled = triton.compile(source, target=TARGETS["sm_90"], options={**options, "enable_fp_fusion": True})
    return {"launched": hash(launched[-1][0]), "static": hash(compiled.asm["cubin"])}


def main() -> None:
    """Prints the forward's cases, or with "backward" as an argument those of gradients and key_mass."""
    stand_in.install()
    json.dump(backward_cases() if "backward" in sys.argv else forward_cases(), sys.stdout)


def forward_cases() -> dict[str, Any]:
    # asked of where a schedule isn't the plain one; tensors lie on the CPU
    forward.device_target = lambda tensor: ("cuda", 90)
    half = HALF
    specialised = ForwardConfiguration(128, 128, num_warps=4, descriptors=True, schedule="specialised")
    cases: dict[str, Any] = {
        "plain": twice(64, half),
        "descriptors": twice(128, half),
        "split": twice(40, torch.bfloat16, "gate", "fill"),
        "specialised": twice(64, half, "gate", configuration=specialised),
        "everything": twice(64, half, "mask", "gate", "fill", "temperature", "groups"),
        "unaligned": launch(tensors(64, half, offset=1), ()),
        "longer": launch(tensors(64, half, keys=512), ()),
    }
    entry = choices.Choice(
        ("cuda", 90), choices.triton_version(), "float16", 64, 256, 256, "specialised", specialised, 1.0, 2.0
    )
    choices.packaged = lambda: (entry,)
    cases["by table"] = launch(tensors(64, half), ("gate",), choose=True)
    cases["not in table"] = launch(tensors(64, half), ("gate", "mask"), choose=True)
    same = tensors(64, half)
    same["value"] = same["key"]
    cases["aliased"] = launch(same, ())
    cases["apart"] = launch(tensors(64, half), ())
    for name, dim, own_configuration in (
        ("static", 64, None),
        ("static, descriptors", 128, None),
        ("static, specialised", 64, specialised),
    ):
        own = tensors(dim, half)
        problem = Problem(dim=dim, dtype=half, queries=256, keys=256, statistics=("entropy",), gate=True)
        launch(own, ("gate",), own_configuration)
        configuration = own_configuration or list(_LAUNCHES._known)[-1][-1]
        source = ast_source(_LAUNCHES.kernel, problem_arguments(problem, configuration))
        options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
        compiled = triton.compile(source, target=TARGETS["sm_90"], options={**options, "enable_fp_fusion": True})
        cases[name] = {"launched": hash(launched[-1][0]), "static": hash(compiled.asm["cubin"])}
    cases["other descriptors"] = other_descriptors()
    return cases


def backward_cases() -> dict[str, Any]:
    kernels = [(kernel, dim) for kernel in ("key_value", "query") for dim in (64, 128)]
    return {
        "backward": {f"{kernel}, {dim}": backward(kernel, dim) for kernel, dim in kernels},
        "passes": passes(),
    }


if __name__ == "__main__":
    main()
