"""A GPU that isn't there: Triton compiles for sm_90 and hands each launch's arguments to a driver that keeps them."""

from typing import Any

import triton
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel

from headscope_kernels.attention.inspection.compiling import TARGETS

# what was launched: the binary, its programs, the kernel's arguments
launched: list[tuple[CompiledKernel, int, list[Any]]] = []


class Launcher:
    """What Triton makes of a binary to start it."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.count = len(source.signature)

    def __call__(self, grid_x: int, grid_y: int, grid_z: int, stream: int, function: Any, *rest: Any) -> None:
        launched.append((function, grid_x, list(rest[-self.count :])))


class Deaf(Launcher):
    """One that keeps nothing, for timing what comes before it."""

    def __call__(self, *arguments: Any) -> None:
        pass


class Utilities:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple:
        return object(), kernel, 255, 0, 1024


class Driver:
    utils = Utilities()

    def __init__(self, launcher: type[Launcher]) -> None:
        self.launcher_cls = launcher

    def get_current_target(self) -> Any:
        return TARGETS["sm_90"]

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, name: str) -> str:
        return nvidia.ty_to_cpp(name)


def install(launcher: type[Launcher] = Launcher) -> None:
    """From now on kernels are launched on it."""
    triton.runtime.driver.set_active(Driver(launcher))
