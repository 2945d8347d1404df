"""Others that act on attention: a function in place of torch's, torch function modes, classes of tensors.

SageAttention is used by putting its function into torch.nn.functional, diffusers' guiders perturb attention with a
mode. What they do belongs to the model: it is left to them, and where it can't be seen, they are named.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
    has_torch_function,
)
from torch.utils._device import DeviceContext

from headscope.ops.ordinary import Bystander

TORCHS_OWN: Callable[..., Tensor] = torch._C._nn.scaled_dot_product_attention
# torch.set_default_device leaves the first active for good; it places new tensors, and passes all else on
_PASSIVE = (DeviceContext, Bystander)


def anyone_acts(args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """True if a torch function mode, or the class of one of the call's tensors, may act on it."""
    # torch.compile keeps the modes of what it traces where has_torch_function doesn't look
    if torch.compiler.is_compiling():
        return bool(acting_modes())
    return has_torch_function((*args, *kwargs.values())) and bool(acting_modes() or acting_classes(args, kwargs))


def acting_modes() -> list[TorchFunctionMode]:
    """The torch function modes that may act on attention, outermost first."""
    return [mode for mode in _get_current_function_mode_stack() if not isinstance(mode, _PASSIVE)]


def acting_classes(args: tuple, kwargs: Mapping[str, Any]) -> list[type]:
    """The classes of the call's tensors that have a __torch_function__ of their own."""
    classes = {type(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)}
    inert = (Tensor.__torch_function__.__func__, torch._C._disabled_torch_function_impl)
    return [one for one in classes if getattr(one.__torch_function__, "__func__", one.__torch_function__) not in inert]


def named(who: Any) -> str:
    """A function, a class, or the class of a mode, with its module."""
    while isinstance(who, functools.partial):
        who = who.func
    who = who if hasattr(who, "__qualname__") else type(who)
    return f"{who.__module__}.{who.__qualname__}"


class Beneath(TorchFunctionMode):
    """The mode beneath all active ones: it computes attention once each of them has changed the call as it likes.

    Args:
        attend: computes the call from its arguments.

    Attributes:
        outputs: of each call.
    """

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self._attend = attend
        self.outputs: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not TORCHS_OWN:
            return func(*args, **(kwargs or {}))
        output = self._attend(*args, **(kwargs or {}))
        self.outputs.append(output)
        return output

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Put the mode at the bottom of this thread's modes."""
        modes = _get_current_function_mode_stack()
        _change_stack(len(modes), [self, *modes])
        try:
            yield
        finally:
            _change_stack(len(modes) + 1, modes)


def _change_stack(active: int, modes: list[TorchFunctionMode]) -> None:
    for _ in range(active):
        _pop_mode()
    for mode in modes:
        _push_mode(mode)
