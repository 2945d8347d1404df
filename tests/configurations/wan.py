"""Transformers that make video: Wan and those built on it."""

import torch

from configurations.case import Case, normal, ones, steps, timesteps


def clip_and_text(channels: int, text: int, *, frames: int = 2, size: int = 8, tokens: int = 5):
    return {
        "hidden_states": normal(2, channels, frames, size, size),
        "encoder_hidden_states": normal(2, tokens, text),
        "timestep": steps(),
    }


def frames_first(channels: int, text: int, **options):
    inputs = clip_and_text(channels, text, **options)
    return inputs | {"hidden_states": inputs["hidden_states"].transpose(1, 2).contiguous()}


_WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 12,
    "freq_dim": 16,
    "ffn_dim": 16,
    "num_layers": 1,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}
_WITH_IMAGE = {"image_dim": 6, "added_kv_proj_dim": 24}


def _helios():
    return clip_and_text(4, 12) | {
        "indices_hidden_states": ones(2, 2),
        "indices_latents_history_short": ones(2, 1),
        "indices_latents_history_mid": ones(2, 1),
        "indices_latents_history_long": ones(2, 4),
        "latents_history_short": normal(2, 4, 1, 8, 8),
        "latents_history_mid": normal(2, 4, 1, 8, 8),
        "latents_history_long": normal(2, 4, 4, 8, 8),
    }


def _wan_animate_2():
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return {
        "hidden_states": [normal(4, 1, 8, 8)],
        "timestep": timesteps(1),
        "encoder_hidden_states": [normal(5, 12)],
        "condition_latents": [normal(4, 1, 8, 8)],
        "encoder_hidden_states_image": normal(1, 257, 1280),
        "kv_cache": WanAnimate2KVCache(1),
        "kv_cache_mode": "extract",
        "seq_len": 16,
        "offset_grid_sizes": torch.tensor([[1, 4, 4]]),
    }


CASES = {
    "WanTransformer3DModel": Case(_WAN, lambda: clip_and_text(4, 12)),
    "WanTransformer3DModel, with image": Case(
        _WAN | _WITH_IMAGE, lambda: clip_and_text(4, 12) | {"encoder_hidden_states_image": normal(2, 257, 6)}
    ),
    "WanVACETransformer3DModel": Case(
        _WAN | {"num_layers": 2, "vace_layers": [0], "vace_in_channels": 6},
        lambda: clip_and_text(4, 12) | {"control_hidden_states": normal(2, 6, 2, 8, 8)},
    ),
    "WanAnimateTransformer3DModel": Case(
        _WAN
        | {
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 6,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 4,
            "motion_dim": 2,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 8,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 1,
        },
        lambda: {
            "hidden_states": normal(1, 12, 3, 8, 8),
            "timestep": steps(1),
            "encoder_hidden_states": normal(1, 5, 12),
            "encoder_hidden_states_image": normal(1, 7, 6),
            "pose_hidden_states": normal(1, 4, 2, 8, 8),
            "face_pixel_values": normal(1, 3, 5, 16, 16),
        },
        samples=1,
    ),
    "WanAnimate2Transformer3DModel": Case(
        {
            "text_len": 6,
            "in_dim": 8,
            "dim": 24,
            "ffn_dim": 16,
            "freq_dim": 16,
            "text_dim": 12,
            "out_dim": 4,
            "num_heads": 2,
            "num_layers": 1,
        },
        _wan_animate_2,
        samples=1,
    ),
    "SkyReelsV2Transformer3DModel": Case(_WAN, lambda: clip_and_text(4, 12)),
    "ChronoEditTransformer3DModel": Case(
        _WAN | {"rope_temporal_skip_len": 8},
        lambda: clip_and_text(4, 12),
    ),
    "AnyFlowTransformer3DModel": Case(
        _WAN | {"gate_value": 0.25, "deltatime_type": "r"},
        lambda: frames_first(4, 12) | {"timestep": torch.full((2, 2), 500.0), "r_timestep": torch.full((2, 2), 250.0)},
    ),
    "AnyFlowFARTransformer3DModel": Case(
        _WAN | {"gate_value": 0.25, "deltatime_type": "r", "compressed_patch_size": (1, 4, 4), "full_chunk_limit": 3},
        lambda: (
            frames_first(4, 12)
            | {
                "timestep": torch.full((2, 2), 500.0),
                "r_timestep": torch.full((2, 2), 250.0),
                "chunk_partition": [1, 1],
            }
        ),
    ),
    "HeliosTransformer3DModel": Case(
        {name: value for name, value in _WAN.items() if name != "rope_max_seq_len"}
        | {
            "rope_dim": (4, 4, 4),
            "has_multi_term_memory_patch": True,
            "guidance_cross_attn": True,
            "zero_history_timestep": True,
            "is_amplify_history": False,
        },
        _helios,
    ),
}
