"""headscope.AttnProcessor: the drop-in for diffusers' AttnProcessor2_0."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as functional
from torch import Tensor

from headscope.models import routing
from headscope.ops import HeadEdit, attention
from headscope.ops.statistics import Statistic, requested_statistics


class AttnProcessor:
    """Does what diffusers' AttnProcessor2_0 does, with headscope's attention inside.

        pipeline.unet.set_attn_processor(headscope.AttnProcessor())

    Works with and without a Scope. With `statistics`, the last call's are kept in `latest`; give each module a
    processor of its own then.

    Args:
        statistics: names of the row statistics to keep from each call.
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

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """[batch, tokens, channels] or [batch, channels, height, width] in and out."""
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch, keys = context.shape[:2]
        mask = attention_mask
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, keys, batch)
            mask = mask.view(batch, attn.heads, -1, mask.shape[-1])
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is None:
            context = hidden_states
        elif attn.norm_cross:
            context = attn.norm_encoder_hidden_states(encoder_hidden_states)

        query, key, value = (
            projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projected in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        output = self._attend(query, key, value, mask)
        hidden_states = output.transpose(1, 2).flatten(2).to(query.dtype)

        for layer in attn.to_out:
            hidden_states = layer(hidden_states)
        if image_shape is not None:
            hidden_states = hidden_states.transpose(-1, -2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if routing.active():
            if self.statistics or self.edit is not None:
                raise RuntimeError(
                    "AttnProcessor: got statistics or an edit of its own inside an active Scope, expected one of them"
                )
            return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        result = attention(
            query, key, value, attn_mask=mask, edit=self.edit, statistics=self.statistics, backend=self.backend
        )
        self.latest = result.statistics
        return result.output
