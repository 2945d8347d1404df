"""What the fused backends share: outputs are allocated here, and a launcher fills them."""

from collections.abc import Callable, Sequence

from torch import Tensor

from headscope.ops.schema import allocate


def forward_of(launch: Callable[..., None]) -> Callable[..., tuple[Tensor, list[Tensor]]]:
    """The operator's forward around a kernel's launcher, which writes every element of the outputs it is given."""

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float,
        gate: Tensor | None,
        fill: Tensor | None,
        statistics: Sequence[str],
    ) -> tuple[Tensor, list[Tensor]]:
        output, values = allocate(query, value, statistics)
        launch(
            query,
            key,
            value,
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=scale,
            gate=gate,
            fill=fill,
            statistics=tuple(statistics),
            output=output,
            statistic_outputs=values,
        )
        return output, values

    return forward
