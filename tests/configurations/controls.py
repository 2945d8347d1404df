"""ControlNets, and the adapters that add attention to another model."""

import torch

from configurations.case import Case, normal, ones, padded, seen, steps, timesteps
from configurations.images import _FLUX, _QWEN, _SD3, _hunyuan_dit, _packed
from configurations.unets import _CONDITIONED, _conditioned

_CONTROL = {
    name: _CONDITIONED[name]
    for name in ("block_out_channels", "layers_per_block", "norm_num_groups", "down_block_types", "cross_attention_dim")
} | {"attention_head_dim": 4, "conditioning_embedding_out_channels": (4, 8)}

CASES = {
    "ControlNetModel": Case(_CONTROL, lambda: _conditioned() | {"controlnet_cond": normal(2, 3, 16, 16)}),
    "ControlNetUnionModel": Case(
        _CONTROL | {"num_control_type": 2, "num_trans_channel": 8, "num_trans_head": 2, "num_proj_channel": 8},
        lambda: _conditioned()
        | {
            "controlnet_cond": [normal(2, 3, 16, 16)],
            "control_type": torch.tensor([[1.0, 0.0], [1.0, 0.0]]),
            "control_type_idx": [0],
        },
    ),
    "SparseControlNetModel": Case(
        {name: value for name, value in _CONTROL.items()}
        | {
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "num_attention_heads": 2,
            "motion_num_attention_heads": 2,
        },
        lambda: _conditioned()
        | {
            "sample": normal(2, 4, 3, 8, 8),
            "encoder_hidden_states": normal(6, 5, 12),
            "controlnet_cond": normal(2, 4, 3, 8, 8),
            "conditioning_mask": ones(2, 1, 3, 8, 8),
        },
    ),
    "FluxControlNetModel": Case(
        _FLUX, lambda: _packed(4, 12) | {"pooled_projections": normal(2, 6), "controlnet_cond": normal(2, 12, 4)}
    ),
    "SD3ControlNetModel": Case(
        _SD3 | {"caption_projection_dim": 16},
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
            "transformer_num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 6,
            "pooled_projection_dim": 4,
            "hidden_size": 16,
            "text_len": 4,
            "text_len_t5": 3,
        },
        lambda: _hunyuan_dit() | {"controlnet_cond": normal(2, 4, 8, 8)},
    ),
    "QwenImageControlNetModel": Case(
        _QWEN,
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
            "img_context_dim_out": 6,
        },
        lambda: {
            "controls_latents": normal(2, 4, 1, 8, 8),
            "latents": normal(2, 4, 1, 8, 8),
            "timestep": timesteps(value=0.5),
            "encoder_hidden_states": (normal(2, 5, 12), normal(2, 4, 6)),
            "condition_mask": ones(2, 1, 1, 8, 8),
            "padding_mask": torch.zeros(1, 1, 8, 8),
        },
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
    ),
}
_ = seen
