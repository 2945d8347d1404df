"""Checks that torch's dispatcher would only hand a call on to its implementation, which then may be called directly.

An operator in Python takes the dispatcher through several Python functions: some 60 microseconds for a call without
gradients, 300 with them (bench/NOTES.md), where a small kernel takes ten. They are for nothing where nobody listens: no
mode or transform of torch is active, no profiler runs, and all tensors are ordinary ones.
"""

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

_KEY = torch._C.DispatchKey


def _key_set(*keys: Any) -> int:
    found = torch._C.DispatchKeySet(keys[0])
    for key in keys[1:]:
        found = found.add(key)
    return found.raw_repr()


# the dispatch keys of a dense tensor on a CPU or GPU, and of one that was made in inference mode. Whatever
# isn't just that (a fake or functional one, one with its sign pending, a transform's) has other keys
_ORDINARY = frozenset(
    _key_set(*keys)
    for device in ("CPU", "CUDA")
    for own in [(getattr(_KEY, device), getattr(_KEY, f"Autocast{device}"))]
    for keys in (own, (*own, _KEY.ADInplaceOrView, getattr(_KEY, f"Autograd{device}")))
)
# the dispatch keys beside those of a call's tensors while no mode is active, outside and inside inference mode
_QUIET = frozenset((_key_set(_KEY.BackendSelect), _key_set(_KEY.BackendSelect, _KEY.ADInplaceOrView)))
_AUTOGRAD = _KEY.AutogradFunctionality
_CLASSES = (Tensor, torch.nn.Parameter)


class Bystander(TorchFunctionMode):
    """A torch function mode of headscope's own that leaves attention alone."""


def unobserved() -> bool:
    """True if no mode, transform or profiler of torch is active, nor anything that traces."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._dispatch_tls_local_include_set().raw_repr() in _QUIET
        and not (torch.is_grad_enabled() and torch._C._dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD))
        and (torch._C._len_torch_function_stack() == 0 or _only_bystanders())
        and forward_ad._current_level < 0
        and not profiler._is_profiler_enabled
    )


def _only_bystanders() -> bool:
    return all(isinstance(mode, Bystander) for mode in _get_current_function_mode_stack())


def looks(tensors: Iterable[Any]) -> Hashable | None:
    """All of each tensor (or None) that checks and choices may depend on; None if one isn't an ordinary tensor."""
    found = []
    for tensor in tensors:
        if tensor is None:
            found.append(None)
            continue
        if type(tensor) not in _CLASSES or torch._C._dispatch_keys(tensor).raw_repr() not in _ORDINARY:
            return None
        found.append((tensor.dtype, tensor.shape, tensor.get_device(), tensor.requires_grad))
    return tuple(found)
