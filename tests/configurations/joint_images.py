"""Transformers that make images by joint attention of image and text: SD3, Flux, Qwen and those built like them."""

import torch

from configurations.case import Case, grid_ids, normal, ones, padded, steps, timesteps


def latents_and_text(channels: int, text: int, size: int = 8, tokens: int = 5):
    return {
        "hidden_states": normal(2, channels, size, size),
        "encoder_hidden_states": normal(2, tokens, text),
        "timestep": steps(),
    }


def packed(channels: int, text: int, *, axes: int = 3, tokens: int = 5):
    """Image tokens of a 4 x 3 grid and text tokens, with their positions."""
    return {
        "hidden_states": normal(2, 12, channels),
        "encoder_hidden_states": normal(2, tokens, text),
        "img_ids": grid_ids(4, 3, axes),
        "txt_ids": torch.zeros(tokens, axes),
        "timestep": timesteps(value=0.5),
    }


FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 6,
    "axes_dims_rope": [2, 2, 4],
}
SD3 = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 6,
    "pos_embed_max_size": 8,
}
QWEN = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "axes_dims_rope": (2, 2, 4),
}


CASES = {
    "SD3Transformer2DModel": Case(SD3, lambda: latents_and_text(4, 12) | {"pooled_projections": normal(2, 6)}),
    "SD3Transformer2DModel, SD3.5-like": Case(
        SD3 | {"qk_norm": "rms_norm", "dual_attention_layers": (0,)},
        lambda: latents_and_text(4, 12) | {"pooled_projections": normal(2, 6)},
    ),
    "FluxTransformer2DModel": Case(FLUX, lambda: packed(4, 12) | {"pooled_projections": normal(2, 6)}),
    "Flux2Transformer2DModel": Case(
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "timestep_guidance_channels": 16,
            "axes_dims_rope": [2, 2, 2, 2],
        },
        lambda: packed(4, 12, axes=4) | {"guidance": ones(2)},
    ),
    "Flux3Transformer2DModel": Case(
        {
            "in_channels": 4,
            "cond_in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "timestep_channels": 16,
            "axes_dims_rope": (2, 2, 2, 2),
        },
        lambda: packed(4, 12, axes=4),
    ),
    "ChromaTransformer2DModel": Case(
        {name: value for name, value in FLUX.items() if name != "pooled_projection_dim"}
        | {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        lambda: packed(4, 12) | {"attention_mask": ones(2, 17)},
    ),
    "BriaTransformer2DModel": Case(FLUX | {"pooled_projection_dim": None}, lambda: packed(4, 12)),
    "BriaFiboTransformer2DModel": Case(
        FLUX | {"pooled_projection_dim": None, "text_encoder_dim": 6, "joint_attention_dim": 12},
        lambda: packed(4, 12) | {"text_encoder_layers": [normal(2, 5, 6), normal(2, 5, 6)]},
    ),
    "BriaFibo2Transformer2DModel": Case(
        {
            "in_channels": 4,
            "patch_size": 2,
            "dim": 16,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 12,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 2,
            "max_num_gist_tokens": 4,
            "gist_step": 1,
            "gist_min_text_len": 2,
            "gist_max_text_len": 16,
            "axes_dims": (4, 2, 2),
            "axes_lens": (64, 16, 16),
        },
        # the Perceiver's text, then the injection block's
        lambda: (
            latents_and_text(4, 12)
            | {
                "encoder_hidden_states": normal(2, 2, 5, 12),
                "timestep": timesteps(value=0.5),
                "encoder_attention_mask": padded(2, 5),
            }
        ),
    ),
    "OvisImageTransformer2DModel": Case(
        {name: value for name, value in FLUX.items() if name != "pooled_projection_dim"} | {"out_channels": 4},
        lambda: packed(4, 12),
    ),
    "LongCatImageTransformer2DModel": Case(FLUX, lambda: packed(4, 12) | {"guidance": ones(2)}),
    "QwenImageTransformer2DModel": Case(
        QWEN,
        lambda: {
            "hidden_states": normal(2, 12, 16),
            "encoder_hidden_states": normal(2, 5, 12),
            "encoder_hidden_states_mask": padded(2, 5),
            "timestep": timesteps(value=0.5),
            "img_shapes": [(1, 4, 3)] * 2,
        },
    ),
    "QwenImage21Transformer2DModel": Case(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "context_in_dim": 12,
            "axes_dims_rope": (2, 2, 4),
        },
        lambda: {
            "hidden_states": normal(2, 12, 4),
            "encoder_hidden_states": normal(2, 5, 12),
            "encoder_hidden_states_mask": padded(2, 5),
            "timestep": timesteps(value=0.5),
            "img_shapes": [[(1, 4, 3)]] * 2,
            # five of text, then a slot for every four of the image's tokens
            "img_mask": torch.arange(8).expand(2, -1) >= 5,
        },
    ),
    "NucleusMoEImageTransformer2DModel": Case(
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "axes_dims_rope": (2, 2, 4),
            "moe_enabled": False,
            "capacity_factors": [8.0],
        },
        lambda: {
            "hidden_states": normal(2, 12, 16),
            "encoder_hidden_states": normal(2, 5, 12),
            "encoder_hidden_states_mask": torch.ones(2, 5, dtype=torch.long),
            "timestep": timesteps(value=0.5),
            "img_shapes": [(1, 4, 3)] * 2,
        },
    ),
}
