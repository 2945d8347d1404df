"""The one place where a running model meets headscope.attention.

While a Scope is active, `torch.nn.functional.scaled_dot_product_attention` is routed: calls made inside an
observed attention module go to that module's frame, every other call goes straight to torch. Which module is
running is known from its forward hooks, per thread, so two models in two threads don't meet.
"""

import threading
from collections.abc import Callable
from typing import Protocol

import torch.nn.functional as functional
from torch import Tensor


class Frame(Protocol):
    """A running attention module, as the router sees it."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        stock: Callable[..., Tensor],
        attn_mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Tensor: ...


class _Frames(threading.local):
    def __init__(self) -> None:
        self.stack: list[Frame] = []


_frames = _Frames()
_lock = threading.Lock()
_users = 0
_stock: Callable[..., Tensor] = functional.scaled_dot_product_attention


def push(frame: Frame) -> None:
    _frames.stack.append(frame)


def pop(frame: Frame) -> None:
    """Leave the frame, and any above it that an exception left behind."""
    while _frames.stack:
        if _frames.stack.pop() is frame:
            return


def forget(scope: object) -> None:
    """Drop this thread's frames of a scope that is being left."""
    _frames.stack = [frame for frame in _frames.stack if getattr(frame, "scope", None) is not scope]


def active() -> bool:
    """Whether this thread is inside an observed attention module."""
    return bool(_frames.stack)


def install() -> None:
    """Start routing, or count one more user of it."""
    global _users, _stock
    with _lock:
        if _users == 0:
            _stock = functional.scaled_dot_product_attention
            functional.scaled_dot_product_attention = _routed
        _users += 1


def uninstall() -> None:
    """Count one user less; the last one restores torch's function."""
    global _users
    with _lock:
        _users -= 1
        if _users == 0 and functional.scaled_dot_product_attention is _routed:
            functional.scaled_dot_product_attention = _stock


def _routed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    options = {
        "attn_mask": attn_mask,
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
    }
    if not _frames.stack:
        return _stock(query, key, value, **options)
    return _frames.stack[-1].attend(query, key, value, stock=_stock, **options)
