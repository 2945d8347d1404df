"""Launches for a GPU that isn't there, up to the driver: run in a process without the interpreter.

Triton compiles for the target and hands its launcher's arguments to a driver that only writes them down. Prints a line
of JSON for each case: what the driver was given, with addresses as names of tensors.
"""

import gc
import json
import sys
import weakref
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from headscope_kernels.attention import (
    STATISTICS,
    BoundStatistic,
    attention_backward,
    attention_forward,
    choices,
    forward,
)
from headscope_kernels.attention.backward import DIFFERENTIABLE
from headscope_kernels.attention.backward_configs import backward_configurations
from headscope_kernels.attention.configs import ForwardConfiguration, forward_configuration
from headscope_kernels.attention.forward import _LAUNCHES
from headscope_kernels.attention.static_backward import BackwardProblem
from headscope_kernels.attention.static_backward import problem_arguments as backward_problem_arguments
from headscope_kernels.attention.static_report import TARGETS, Problem, ast_source, problem_arguments

launched: list[tuple[CompiledKernel, int, list[Any]]] = []


class Launcher:
    """What Triton makes of a binary to start it."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source = source

    def __call__(self, grid_x: int, grid_y: int, grid_z: int, stream: int, function: Any, *rest: Any) -> None:
        count = len(self.source.signature)
        launched.append((function, grid_x, list(rest[-count:])))


class Utilities:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple:
        return object(), kernel, 255, 0, 1024


class Driver:
    launcher_cls = Launcher
    utils = Utilities()

    def get_current_target(self) -> Any:
        return TARGETS["sm_90"]

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, name: str) -> str:
        return nvidia.ty_to_cpp(name)


def readable(value: Any, names: dict[int, str]) -> Any:
    """An argument with addresses as names."""
    if isinstance(value, Tensor):
        return names[value.data_ptr()]
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
        carried=sum(sum(bound.statistic.accumulators) for bound in statistics),
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


def backward(kernel: str, dim: int) -> dict[str, int]:
    """The binaries of one backward kernel, as a launch compiles it and as its report does."""
    problem = BackwardProblem(kernel=kernel, dim=dim)
    configurations = backward_configurations(
        problem.dtype, dim, dim, problem.queries, problem.keys, ("cuda", 90), exact=True, laden=False
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
    triton.runtime.driver.set_active(Driver())
    # asked of where a schedule isn't the plain one; tensors lie on the CPU
    forward.device_target = lambda tensor: ("cuda", 90)
    half = torch.float16
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
    cases["backward"] = {
        f"{kernel}, {dim}": backward(kernel, dim) for kernel in ("key_value", "query") for dim in (64, 128)
    }
    json.dump(cases, sys.stdout)


main()
