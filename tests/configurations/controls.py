"""ControlNets, and the adapters that add attention to another model."""

from types import SimpleNamespace

import torch
from diffusers import ControlNetModel, ZImageTransformer2DModel

from configurations.case import Case, normal, ones, padded, steps, timesteps
from configurations.images import Z_IMAGE, hunyuan_dit
from configurations.joint_images import FLUX, QWEN, SD3, packed
from configurations.unets import CONDITIONED, conditioned

_CONTROL = {
    name: CONDITIONED[name]
    for name in ("block_out_channels", "layers_per_block", "norm_num_groups", "down_block_types", "cross_attention_dim")
} | {"attention_head_dim": 4, "conditioning_embedding_out_channels": (4, 8)}

_COSMOS_NEEDS = SimpleNamespace(
    functional=SimpleNamespace(
        resize=lambda image, size, interpolation: torch.nn.functional.interpolate(image, size, mode=interpolation)
    ),
    InterpolationMode=SimpleNamespace(NEAREST="nearest"),
)


def _resizing(kind, options):
    """The class takes torchvision to resize a mask with; where it isn't installed, torch does it."""
    from diffusers.models.controlnets import controlnet_cosmos

    if not hasattr(controlnet_cosmos, "transforms"):
        controlnet_cosmos.transforms = _COSMOS_NEEDS
    return kind(**options)


def _with_transformer(kind, options):
    """The class borrows its embedders from the transformer that it controls."""
    transformer = ZImageTransformer2DModel(**Z_IMAGE)
    return kind.from_transformer(kind(**options), transformer)


CASES = {
    "ControlNetModel": Case(_CONTROL, lambda: conditioned() | {"controlnet_cond": normal(2, 3, 16, 16)}),
    "ControlNetUnionModel": Case(
        _CONTROL
        | {
            "addition_time_embed_dim": 4,
            "num_control_type": 2,
            "num_trans_channel": 8,
            "num_trans_head": 2,
            "num_proj_channel": 8,
        },
        lambda: (
            conditioned()
            | {
                "controlnet_cond": [normal(2, 3, 16, 16)],
                "control_type": torch.tensor([[1.0, 0.0], [1.0, 0.0]]),
                "control_type_idx": [0],
            }
        ),
    ),
    "MultiControlNetModel": Case(
        _CONTROL,
        lambda: (
            conditioned()
            | {"controlnet_cond": [normal(2, 3, 16, 16)] * 2, "conditioning_scale": [1.0, 0.5], "return_dict": False}
        ),
        build=lambda kind, options: kind([ControlNetModel(**options), ControlNetModel(**options)]),
    ),
    "SparseControlNetModel": Case(
        _CONTROL
        | {
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "num_attention_heads": 2,
            "motion_num_attention_heads": 2,
        },
        lambda: (
            conditioned()
            | {
                "sample": normal(2, 4, 3, 8, 8),
                "encoder_hidden_states": normal(6, 5, 12),
                "controlnet_cond": normal(2, 4, 3, 8, 8),
                "conditioning_mask": ones(2, 1, 3, 8, 8),
            }
        ),
        folded={"encoder_hidden_states": 3},
    ),
    "FluxControlNetModel": Case(
        FLUX, lambda: packed(4, 12) | {"pooled_projections": normal(2, 6), "controlnet_cond": normal(2, 12, 4)}
    ),
    "SD3ControlNetModel": Case(
        SD3 | {"caption_projection_dim": 16},
        lambda: {
            "hidden_states": normal(2, 4, 8, 8),
            "controlnet_cond": normal(2, 4, 8, 8),
            "encoder_hidden_states": normal(2, 5, 12),
            "pooled_projections": normal(2, 6),
            "timestep": steps(),
        },
    ),
    "HunyuanDiT2DControlNetModel": Case(
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "transformer_num_layers": 4,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4,
            "hidden_size": 16,
            "text_len": 4,
            "text_len_t5": 3,
        },
        lambda: hunyuan_dit() | {"controlnet_cond": normal(2, 4, 8, 8)},
        shared=frozenset({"image_rotary_emb"}),
    ),
    "QwenImageControlNetModel": Case(
        QWEN,
        lambda: {
            "hidden_states": normal(2, 12, 16),
            "controlnet_cond": normal(2, 12, 16),
            "encoder_hidden_states": normal(2, 5, 12),
            "encoder_hidden_states_mask": padded(2, 5),
            "timestep": timesteps(value=0.5),
            "img_shapes": [(1, 4, 3)] * 2,
        },
    ),
    "SanaControlNetModel": Case(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 4,
            "cross_attention_dim": 8,
            "caption_channels": 12,
            "sample_size": 8,
        },
        lambda: {
            "hidden_states": normal(2, 4, 8, 8),
            "controlnet_cond": normal(2, 4, 8, 8),
            "encoder_hidden_states": normal(2, 5, 12),
            "timestep": steps(),
        },
    ),
    "CosmosControlNetModel": Case(
        {
            "n_controlnet_blocks": 1,
            "in_channels": 6,
            "latent_channels": 6,
            "model_channels": 24,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "mlp_ratio": 2,
            "text_embed_dim": 12,
            "adaln_lora_dim": 4,
            "max_size": (4, 16, 16),
            "img_context_dim_in": 6,
            "img_context_dim_out": 24,
        },
        lambda: {
            "controls_latents": normal(2, 4, 1, 8, 8),
            "latents": normal(2, 4, 1, 8, 8),
            "timestep": timesteps(value=0.5),
            "encoder_hidden_states": (normal(2, 5, 12), normal(2, 4, 6)),
            "condition_mask": ones(2, 1, 1, 8, 8),
            "padding_mask": torch.zeros(1, 1, 8, 8),
        },
        build=_resizing,
    ),
    "ZImageControlNetModel": Case(
        {
            "control_layers_places": [0],
            "control_refiner_layers_places": [0],
            "control_in_dim": 4,
            "dim": 32,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
        },
        lambda: {
            "x": [normal(4, 1, 8, 8)] * 2,
            "t": timesteps(value=0.5),
            "cap_feats": [normal(5, 12)] * 2,
            "control_context": [normal(4, 1, 8, 8)] * 2,
        },
        build=_with_transformer,
    ),
}
