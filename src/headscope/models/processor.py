"""headscope.AttnProcessor: the drop-in for diffusers' AttnProcessor2_0, and headscope inside its other processors."""

import copy
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType, ModuleType
from typing import Any

import torch.nn.functional as functional
from torch import Tensor

from headscope.models.hooks import routing
from headscope.ops import HeadEdit, attention
from headscope.ops.statistics import Statistic, requested_statistics

# the names under which diffusers' processors call attention
_SDPA, _DISPATCH = "scaled_dot_product_attention", "dispatch_attention_fn"


class AttnProcessor:
    """Does what diffusers' AttnProcessor2_0 does, with headscope's attention inside.

        pipeline.unet.set_attn_processor(headscope.AttnProcessor())

    After `fuse_qkv_projections()` it uses the fused projections, as FusedAttnProcessor2_0 does. Attention with a
    processor of its own (joint attention, rotary embeddings, IP-Adapter, ...) keeps it, with headscope inside:

        ours = {name: headscope.AttnProcessor.over(stock) for name, stock in model.attn_processors.items()}
        model.set_attn_processor(ours)

    Works with and without a Scope. With `statistics`, those of the last attention call are in `latest`; give each
    module a processor of its own then.

    Args:
        statistics: names of the row statistics to take from each call, or Statistic objects.
        edit: the edit of every call's heads.
        backend: as in `headscope.attention`.
    """

    # tells Scope that the attention inside can be routed
    sees_attention = True

    def __init__(
        self,
        *,
        statistics: Sequence[str | Statistic] = (),
        edit: HeadEdit | None = None,
        backend: str | None = None,
    ) -> None:
        self.statistics = requested_statistics(statistics)
        self.edit = edit
        self.backend = backend
        self.latest: dict[str, Tensor] = {}

    @classmethod
    def over(
        cls,
        stock: Any,
        *,
        statistics: Sequence[str | Statistic] = (),
        edit: HeadEdit | None = None,
        backend: str | None = None,
    ) -> Any:
        """A copy of a processor of diffusers that does all its work, with headscope's attention inside.

        The copy is an instance of the stock processor's class too, takes the same arguments, and shares its
        parameters: IP-Adapter scales, `state_dict` and moves between devices work as before. `stock` itself is left as
        it is.

        Raises:
            TypeError: the processor calls neither torch's scaled_dot_product_attention nor diffusers' dispatcher.
        """
        processor = copy.copy(stock)
        if not isinstance(stock, AttnProcessor):
            processor.__class__ = _kind_over(type(stock))
        AttnProcessor.__init__(processor, statistics=statistics, edit=edit, backend=backend)
        return processor

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        image_rotary_emb: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """[batch, tokens, channels] or [batch, channels, height, width] in and out.

        Raises:
            TypeError: the module isn't one that AttnProcessor2_0 serves.
        """
        # named in the signature, else diffusers would drop them before they get here
        _check_served(attn, encoder_hidden_states, image_rotary_emb)
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        batch, keys = (hidden_states if encoder_hidden_states is None else encoder_hidden_states).shape[:2]
        mask = attention_mask
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, keys, batch)
            # [batch, heads, 1 or queries, keys]
            mask = mask.view(batch, attn.heads, -1, mask.shape[-1])
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        query, key, value = _project(attn, hidden_states, encoder_hidden_states)
        head_dim = key.shape[-1] // attn.heads
        query, key, value = (x.view(batch, -1, attn.heads, head_dim).transpose(1, 2) for x in (query, key, value))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        output = self.attend(query, key, value, mask)
        hidden_states = output.transpose(1, 2).reshape(batch, -1, attn.heads * head_dim).to(query.dtype)

        for layer in attn.to_out:
            hidden_states = layer(hidden_states)
        if image_shape is not None:
            hidden_states = hidden_states.transpose(-1, -2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """torch's scaled_dot_product_attention [batch, heads, tokens, dim], by headscope, or by the Scope at work here.

        Raises:
            RuntimeError: inside a Scope, where this processor has statistics or an edit of its own.
            ValueError: dropout_p is not 0.
        """
        options: dict[str, Any] = {
            "attn_mask": attn_mask,
            "is_causal": is_causal,
            "scale": scale,
            "enable_gqa": enable_gqa,
        }
        if routing.active():
            if self.statistics or self.edit is not None:
                raise RuntimeError(
                    "AttnProcessor: got statistics or an edit of its own inside an active Scope, expected one of them"
                )
            return functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, **options)
        if dropout_p:
            raise ValueError(f"dropout_p: got {dropout_p}, expected 0; put the model in eval mode")
        result = attention(
            query, key, value, edit=self.edit, statistics=self.statistics, backend=self.backend, **options
        )
        self.latest = result.statistics
        return result.output


def _check_served(attn: Any, encoder_hidden_states: Any, image_rotary_emb: Any) -> None:
    """Raises TypeError for modules of whose work AttnProcessor2_0 would leave out a part without a word."""
    missing = [name for name in ("spatial_norm", "group_norm", "norm_cross", "to_out") if not hasattr(attn, name)]
    added = getattr(attn, "add_k_proj", None) is not None or getattr(attn, "add_q_proj", None) is not None
    more = image_rotary_emb is not None or isinstance(encoder_hidden_states, tuple)
    if missing or added or more or attn.to_out is None:
        raise TypeError(
            f"AttnProcessor: got {type(attn).__name__} with a processor of its own, expected one that AttnProcessor2_0"
            " serves; use headscope.AttnProcessor.over(stock processor) there"
        )


def _project(attn: Any, hidden_states: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Query [batch, queries, channels], key and value [batch, keys, channels]; fused where the module is."""
    if context is None and attn.fused_projections:
        query, key, value = attn.to_qkv(hidden_states).chunk(3, -1)
        return query, key, value
    if context is None:
        return attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    if attn.norm_cross:
        context = attn.norm_encoder_hidden_states(context)
    if attn.fused_projections:
        key, value = attn.to_kv(context).chunk(2, -1)
        return attn.to_q(hidden_states), key, value
    return attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)


class _Calling(threading.local):
    """The processor made by `over` that is at work in this thread."""

    processor: AttnProcessor | None = None


_calling = _Calling()


@functools.cache
def _kind_over(stock: type) -> type:
    """A subclass of the stock processor whose code finds headscope's attention under attention's names."""
    stock_call = stock.__call__
    code = getattr(stock_call, "__code__", None)
    if not isinstance(stock_call, FunctionType) or code is None or not {_SDPA, _DISPATCH} & set(code.co_names):
        raise TypeError(
            f"stock: got {stock.__name__}, which doesn't call torch's scaled_dot_product_attention or diffusers'"
            " dispatch_attention_fn, expected a processor that does"
        )
    call = _with_our_attention(stock_call)

    # has the stock signature: diffusers drops the keyword arguments that a processor's signature lacks
    @functools.wraps(stock_call)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outer, _calling.processor = _calling.processor, self
        try:
            return call(self, *args, **kwargs)
        finally:
            _calling.processor = outer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # diffusers makes anew the processors of modules that an IP-Adapter leaves alone
        stock.__init__(self, *args, **kwargs)
        AttnProcessor.__init__(self)

    # the stock name stays in it: diffusers looks for words such as "Added" there
    return type(f"Headscope{stock.__name__}", (stock, AttnProcessor), {"__call__": __call__, "__init__": __init__})


def _with_our_attention(function: FunctionType) -> Callable[..., Any]:
    """The same code, in a copy of its module's names in which attention is headscope's."""
    names = dict(function.__globals__)
    # a module's name would lead torch.compile back to the module's own names
    names.pop("__name__", None)
    for name, value in function.__globals__.items():
        if value is functional:
            names[name] = _functional()
    names[_SDPA], names[_DISPATCH] = _attend, _dispatch
    twin = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


@functools.cache
def _functional() -> ModuleType:
    """torch.nn.functional with headscope's attention."""
    module = ModuleType("headscope_functional")
    module.__dict__.update({name: value for name, value in vars(functional).items() if not name.startswith("__")})
    module.__dict__[_SDPA] = _attend
    return module


def _attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
    processor = _calling.processor
    assert processor is not None, "called by a processor that `over` made"
    return processor.attend(query, key, value, *args, **options)


def _dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: Mapping[str, Any] | None = None,
    *,
    backend: Any = None,
    parallel_config: Any = None,
) -> Tensor:
    """diffusers' dispatcher on [batch, tokens, heads, dim], as its native backend does it."""
    chosen = getattr(backend, "value", backend)
    if chosen not in (None, "native", "_native_math") or parallel_config is not None or attention_kwargs:
        raise RuntimeError(
            f"backend: got the attention backend {chosen} or options of one, expected diffusers' native one without"
            " context parallelism"
        )
    # a mask over keys is the native backend's own shorthand
    if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]) and attn_mask.ndim == 2:
        attn_mask = attn_mask[:, None, None, :]
    query, key, value = (x.permute(0, 2, 1, 3) for x in (query, key, value))
    options = (attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return _attend(query, key, value, *options).permute(0, 2, 1, 3)
