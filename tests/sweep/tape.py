"""What a CUDA graph is, without a GPU: operators with the tensors they worked on, done again on the same memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READ_BACK = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)


class Tape(TorchDispatchMode):
    """Records the operators that run inside. `replay` runs them again, and no Python between them: what Python decided
    or read while it was recorded stays as it was."""

    def __init__(self) -> None:
        super().__init__()
        self._operators: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in READ_BACK:
            raise RuntimeError("operation not permitted when stream is capturing")
        output = function(*args, **(kwargs or {}))
        self._operators.append((function, args, kwargs or {}, output))
        return output

    def replay(self) -> None:
        for function, args, kwargs, output in self._operators:
            changes = function._schema.is_mutable
            given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
            own = _tensors(output)
            # views, and those that would be copies elsewhere (reshape, to), share their memory already
            if not changes and all(tensor.untyped_storage().data_ptr() in given for tensor in own):
                continue
            again = function(*args, **kwargs)
            if not changes and "empty" not in function.__name__:
                for tensor, new in zip(own, _tensors(again), strict=True):
                    tensor.copy_(new)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def on_tape(compute: Callable[[], None]) -> Callable[[], None]:
    """Captures as `compute.graphs.CudaCapture` does: once to warm up, once to record, whose numbers are no good before
    they are replayed."""
    compute()
    with Tape() as tape:
        compute()
    return tape.replay
