"""Further transformers that make video, some with sound."""

import torch

from configurations.case import Case, normal, ones, padded, seen, steps, timesteps
from configurations.wan import clip_and_text, frames_first

_COGVIDEO = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 4,
    "text_embed_dim": 12,
    "num_layers": 1,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 5,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 5,
}
_HUNYUAN_VIDEO = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "patch_size": 2,
    "patch_size_t": 1,
    "text_embed_dim": 12,
    "pooled_projection_dim": 6,
    "rope_axes_dim": (2, 4, 4),
}
_LTX2 = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
    "num_layers": 1,
    "caption_channels": 12,
    "rope_double_precision": False,
}
_COSMOS = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 1,
    "mlp_ratio": 2,
    "text_embed_dim": 12,
    "adaln_lora_dim": 4,
    "max_size": (4, 16, 16),
    "patch_size": (1, 2, 2),
    "extra_pos_embed_type": "learnable",
    # concatenating one takes torchvision
    "concat_padding_mask": False,
}
_KANDINSKY = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 12,
    "in_text_dim2": 6,
    "time_dim": 16,
    "patch_size": (1, 2, 2),
    "model_dim": 16,
    "ff_dim": 16,
    "num_text_blocks": 1,
    "num_visual_blocks": 1,
    "axes_dims": (4, 2, 2),
}


def _hunyuan_video():
    return clip_and_text(4, 12) | {
        "pooled_projections": normal(2, 6),
        "encoder_attention_mask": padded(2, 5).long(),
        "guidance": timesteps(value=6.0),
    }


def _framepack():
    return _hunyuan_video() | {
        "hidden_states": normal(2, 4, 3, 4, 4),
        "image_embeds": normal(2, 3, 6),
        "indices_latents": ones(3),
        "latents_clean": normal(2, 4, 2, 4, 4),
        "indices_latents_clean": ones(2),
        "latents_history_2x": normal(2, 4, 2, 4, 4),
        "indices_latents_history_2x": ones(2),
        "latents_history_4x": normal(2, 4, 8, 4, 4),
        "indices_latents_history_4x": ones(8),
    }


def _cosmos3():
    image = 6
    indices = torch.arange(2, 2 + image)
    return {
        "input_ids": torch.tensor([1, 2]),
        "text_indexes": torch.tensor([0, 1]),
        "position_ids": torch.zeros(3, 2 + image, dtype=torch.long),
        "und_len": 2,
        "sequence_length": 2 + image,
        "vision_tokens": [normal(1, 2, 1, 2, 3)],
        "vision_token_shapes": [(1, 2, 3)],
        "vision_sequence_indexes": indices,
        "vision_mse_loss_indexes": indices,
        "vision_timesteps": ones(image),
        "vision_noisy_frame_indexes": [torch.tensor([0])],
    }


def _ltx2():
    return {
        "hidden_states": normal(2, 24, 4),
        "audio_hidden_states": normal(2, 6, 4),
        "encoder_hidden_states": normal(2, 5, 12),
        "audio_encoder_hidden_states": normal(2, 5, 12),
        "timestep": timesteps(),
        "encoder_attention_mask": seen(2, 5),
        "num_frames": 2,
        "height": 4,
        "width": 3,
        "audio_num_frames": 6,
        "fps": 25.0,
    }


def _minimax_h3():
    """Video, audio and text tokens of one packed sequence."""
    video, audio, text = 8, 3, 4
    total = text + audio + video
    return {
        "hidden_states": normal(2, video, 16),
        "audio_hidden_states": normal(2, audio, 6),
        "encoder_hidden_states": normal(2, text, 12),
        "timestep": timesteps(1, value=0.5),
        "timestep_indices": torch.zeros(total, dtype=torch.long),
        "token_tags": torch.tensor([1] * text + [2] * audio + [0] * video),
        "position_ids": torch.arange(total)[:, None].expand(-1, 3),
        "text_indices": torch.arange(text),
        "audio_indices": torch.arange(text, text + audio),
        "video_indices": torch.arange(text + audio, total),
    }


CASES = {
    "CogVideoXTransformer3DModel": Case(_COGVIDEO, lambda: frames_first(4, 12)),
    "CogVideoXTransformer3DModel, 1.5-like": Case(
        _COGVIDEO | {"patch_size_t": 2, "use_rotary_positional_embeddings": True},
        lambda: frames_first(4, 12) | {"image_rotary_emb": (normal(16, 8).cos(), normal(16, 8).sin())},
    ),
    "ConsisIDTransformer3DModel": Case(
        _COGVIDEO
        | {
            "cross_attn_interval": 1,
            "is_train_face": True,
            "cross_attn_dim_head": 4,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 2,
            "LFE_vit_dim": 2,
            "LFE_depth": 5,
            "LFE_dim_head": 4,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 1,
            "LFE_num_querie": 1,
            "LFE_output_dim": 10,
            "LFE_ff_mult": 1,
            "LFE_num_scale": 1,
        },
        lambda: frames_first(4, 12) | {"id_vit_hidden": [ones(2, 2, 2)], "id_cond": ones(2, 2)},
    ),
    "AllegroTransformer3DModel": Case(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "cross_attention_dim": 24,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 2,
            "caption_channels": 12,
        },
        lambda: (
            clip_and_text(4, 12) | {"attention_mask": ones(2, 2, 8, 8), "encoder_attention_mask": padded(2, 5).long()}
        ),
    ),
    "LatteTransformer3DModel": Case(
        {
            "sample_size": 8,
            "num_layers": 1,
            "patch_size": 2,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "caption_channels": 12,
            "in_channels": 4,
            "cross_attention_dim": 8,
            "out_channels": 4,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "video_length": 2,
        },
        lambda: clip_and_text(4, 12) | {"enable_temporal_attentions": True},
    ),
    "MochiTransformer3DModel": Case(
        {
            "patch_size": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "pooled_projection_dim": 12,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 4,
            "max_sequence_length": 5,
        },
        lambda: clip_and_text(4, 16) | {"encoder_attention_mask": padded(2, 5)},
    ),
    "EasyAnimateTransformer3DModel": Case(
        {
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "in_channels": 4,
            "out_channels": 4,
            "mmdit_layers": 1,
            "num_layers": 2,
            "patch_size": 2,
            "sample_height": 8,
            "sample_width": 8,
            "text_embed_dim": 12,
            "time_embed_dim": 8,
        },
        lambda: clip_and_text(4, 12),
    ),
    "HunyuanVideoTransformer3DModel": Case(_HUNYUAN_VIDEO | {"guidance_embeds": True}, _hunyuan_video),
    "HunyuanVideoFramepackTransformer3DModel": Case(
        _HUNYUAN_VIDEO
        | {"guidance_embeds": True, "has_image_proj": True, "image_proj_dim": 6, "has_clean_x_embedder": True},
        _framepack,
        shared=frozenset({"indices_latents_clean", "indices_latents_history_2x"}),
    ),
    "HunyuanVideo15Transformer3DModel": Case(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "patch_size": 1,
            "patch_size_t": 1,
            "text_embed_dim": 12,
            "text_embed_2_dim": 6,
            "image_embed_dim": 4,
            "rope_axes_dim": (2, 2, 4),
            "target_size": 16,
            "task_type": "t2v",
        },
        lambda: (
            clip_and_text(4, 12, size=4)
            | {
                "timestep": timesteps(),
                "encoder_attention_mask": padded(2, 5).long(),
                "encoder_hidden_states_2": normal(2, 3, 6),
                "encoder_attention_mask_2": torch.ones(2, 3, dtype=torch.long),
                "image_embeds": torch.zeros(2, 3, 4),
            }
        ),
    ),
    "LTXVideoTransformer3DModel": Case(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "num_layers": 1,
            "caption_channels": 12,
        },
        lambda: {
            "hidden_states": normal(2, 24, 4),
            "encoder_hidden_states": normal(2, 5, 12),
            "timestep": steps(),
            "encoder_attention_mask": padded(2, 5),
            "num_frames": 2,
            "height": 4,
            "width": 3,
        },
    ),
    "LTX2VideoTransformer3DModel": Case(_LTX2, _ltx2),
    "SanaWMLTX2RefinerTransformer3DModel": Case(
        _LTX2,
        lambda: {
            "hidden_states": normal(2, 24, 4),
            "encoder_hidden_states": normal(2, 5, 12),
            "timestep": timesteps(),
            "video_rotary_emb": (normal(2, 24, 16).cos(), normal(2, 24, 16).sin()),
            "encoder_attention_mask": seen(2, 5),
        },
    ),
    "SanaWMTransformer3DModel": Case(
        {
            "in_channels": 4,
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "softmax_every_n": 2,
            "linear_head_dim": 16,
            "chunk_plucker_channels": 6,
            "chunk_plucker_post_attn_blocks": 2,
            "caption_channels": 12,
            "mlp_ratio": 2.0,
        },
        lambda: clip_and_text(4, 12, size=4) | {"timestep": torch.full((2, 1, 2), 500.0), "mask": padded(2, 5)},
    ),
    "SanaVideoTransformer3DModel": Case(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 12,
            "sample_size": 8,
            "rope_max_seq_len": 32,
        },
        lambda: clip_and_text(4, 12),
    ),
    "MotifVideoTransformer3DModel": Case(
        {
            "in_channels": 9,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_decoder_layers": 0,
            "mlp_ratio": 2.0,
            "patch_size": 1,
            "patch_size_t": 1,
            "text_embed_dim": 12,
            "image_embed_dim": 4,
            "rope_axes_dim": (4, 4, 4),
        },
        lambda: clip_and_text(9, 12, size=4),
    ),
    "MiniMaxH3Transformer3DModel": Case(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "hidden_size": 24,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "ffn_dim": 16,
            "in_channels": 4,
            "audio_in_channels": 6,
            "text_dim": 12,
            "freq_dim": 8,
            "time_embed_hidden_dim": 24,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        _minimax_h3,
    ),
    "CosmosTransformer3DModel": Case(
        _COSMOS,
        lambda: clip_and_text(4, 12) | {"attention_mask": ones(2, 5), "fps": 30},
    ),
    "Cosmos3OmniTransformer": Case(
        {
            "head_dim": 6,
            "hidden_size": 12,
            "intermediate_size": 24,
            "latent_channel": 2,
            "latent_patch_size": 1,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "num_key_value_heads": 1,
            "patch_latent_dim": 2,
            "rope_axes_dim": [1, 1, 1],
            "vocab_size": 32,
        },
        _cosmos3,
        samples=1,
    ),
    "Kandinsky5Transformer3DModel": Case(
        _KANDINSKY,
        lambda: {
            "hidden_states": normal(2, 2, 8, 8, 4),
            "encoder_hidden_states": normal(2, 5, 12),
            "timestep": timesteps(),
            "pooled_projections": normal(2, 6),
            "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
            "text_rope_pos": torch.arange(5),
        },
        shared=frozenset({"visual_rope_pos"}),
    ),
    "Kandinsky6Transformer3DModel": Case(
        _KANDINSKY | {"visual_cond": False, "in_audio_dim": 4, "out_audio_dim": 4},
        lambda: {
            "hidden_states": normal(2, 2, 8, 8, 4),
            "encoder_hidden_states": normal(2, 5, 12),
            "pooled_projections": normal(2, 6),
            "timestep": timesteps(),
            "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
        },
        shared=frozenset({"visual_rope_pos"}),
    ),
    "Kandinsky6SRTransformer3DModel": Case(
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "time_dim": 16,
            "model_dim": 16,
            "ff_dim": 16,
            "num_visual_blocks": 1,
            "axes_dims": (4, 2, 2),
        },
        lambda: {"hidden_states": normal(2, 2, 8, 8, 9), "timestep": timesteps()},
    ),
}
