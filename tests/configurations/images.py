"""Further transformers that make images."""

import torch

from configurations.case import Case, grid_ids, integers, normal, ones, padded, seen, steps, timesteps
from configurations.joint_images import latents_and_text

Z_IMAGE = {
    "all_patch_size": (2,),
    "all_f_patch_size": (1,),
    "in_channels": 4,
    "dim": 32,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 12,
    "axes_dims": [8, 4, 4],
    "axes_lens": [64, 16, 16],
}


def _sizes():
    return {
        "original_size": torch.tensor([[64, 64], [64, 64]]),
        "target_size": torch.tensor([[64, 64], [64, 64]]),
        "crop_coords": torch.tensor([[0, 0], [0, 0]]),
    }


def hunyuan_dit():
    return {
        "hidden_states": normal(2, 4, 8, 8),
        "timestep": timesteps(),
        "encoder_hidden_states": normal(2, 4, 8),
        "text_embedding_mask": ones(2, 4),
        "encoder_hidden_states_t5": normal(2, 3, 8),
        "text_embedding_mask_t5": ones(2, 3),
        "image_meta_size": ones(2, 6),
        "style": steps(value=0),
        "image_rotary_emb": [ones(16, 8), torch.zeros(16, 8)],
    }


def _omnigen():
    tokens = 6 + 1 + 16
    return {
        "hidden_states": normal(2, 4, 8, 8),
        "timestep": timesteps(value=0.5),
        "input_ids": integers(10, 2, 6),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": ones(2, tokens, tokens),
        "position_ids": torch.arange(tokens).expand(2, -1),
    }


def _ideogram4():
    from diffusers.models.transformers.transformer_ideogram4 import LLM_TOKEN_INDICATOR, OUTPUT_IMAGE_INDICATOR

    text, image = 3, 6
    positions = torch.cat([torch.arange(text)[:, None].expand(-1, 3), grid_ids(2, 3).long() + 65536])
    indicator = torch.tensor([LLM_TOKEN_INDICATOR] * text + [OUTPUT_IMAGE_INDICATOR] * image)
    hidden, context = normal(2, text + image, 4), normal(2, text + image, 6)
    hidden[:, :text] = 0
    context[:, text:] = 0
    return {
        "hidden_states": hidden,
        "encoder_hidden_states": context,
        "timestep": timesteps(value=0.5),
        "position_ids": positions.expand(2, -1, -1),
        "segment_ids": torch.ones(2, text + image, dtype=torch.long),
        "indicator": indicator.expand(2, -1),
    }


CASES = {
    "DiTTransformer2DModel": Case(
        {
            "sample_size": 8,
            "num_layers": 1,
            "patch_size": 2,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_embeds_ada_norm": 1000,
        },
        lambda: {"hidden_states": normal(2, 4, 8, 8), "timestep": steps(), "class_labels": torch.tensor([1, 2])},
    ),
    "PixArtTransformer2DModel": Case(
        {
            "sample_size": 8,
            "num_layers": 1,
            "patch_size": 2,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 8,
            "caption_channels": 12,
            "use_additional_conditions": False,
        },
        lambda: (
            latents_and_text(4, 12)
            | {
                "encoder_attention_mask": padded(2, 5),
                "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            }
        ),
    ),
    "PriorTransformer": Case(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "num_layers": 1,
            "embedding_dim": 8,
            "num_embeddings": 5,
            "additional_embeddings": 4,
        },
        lambda: {
            "hidden_states": normal(2, 8),
            "timestep": 7,
            "proj_embedding": normal(2, 8),
            "encoder_hidden_states": normal(2, 5, 8),
        },
    ),
    "AuraFlowTransformer2DModel": Case(
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_projection_dim": 16,
            "joint_attention_dim": 12,
            "pos_embed_max_size": 16,
        },
        lambda: latents_and_text(4, 12) | {"timestep": timesteps(value=0.5)},
    ),
    "CogView3PlusTransformer2DModel": Case(
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "text_embed_dim": 12,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "pos_embed_max_size": 8,
            "sample_size": 8,
        },
        lambda: latents_and_text(4, 12) | _sizes(),
    ),
    "CogView4Transformer2DModel": Case(
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "text_embed_dim": 12,
            "time_embed_dim": 8,
            "condition_dim": 4,
        },
        lambda: latents_and_text(4, 12) | _sizes(),
    ),
    "GlmImageTransformer2DModel": Case(
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "text_embed_dim": 12,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "prior_vq_quantizer_codebook_size": 16,
        },
        lambda: (
            latents_and_text(4, 12)
            | {
                "prior_token_id": integers(16, 2, 16),
                "prior_token_drop": torch.zeros(2, dtype=torch.bool),
                "target_size": torch.full((2, 2), 64.0),
                "crop_coords": torch.zeros(2, 2),
            }
        ),
    ),
    "ErnieImageTransformer2DModel": Case(
        {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_layers": 1,
            "ffn_hidden_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 1,
            "text_in_dim": 12,
            "rope_axes_dim": (4, 2, 2),
            "qk_layernorm": True,
        },
        lambda: {
            "hidden_states": normal(2, 4, 4, 4),
            "timestep": timesteps(),
            "text_bth": normal(2, 5, 12),
            "text_lens": torch.tensor([5, 4]),
        },
    ),
    "HiDreamImageTransformer2DModel": Case(
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_channels": [12, 6],
            "text_emb_dim": 8,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (8, 8),
            "llama_layers": (0, 1),
            "force_inference_output": True,
        },
        lambda: {
            "hidden_states": normal(2, 4, 8, 8),
            "encoder_hidden_states_t5": normal(2, 5, 12),
            "encoder_hidden_states_llama3": normal(2, 2, 5, 6),
            "pooled_embeds": normal(2, 8),
            "timesteps": steps(),
        },
        layers_first=frozenset({"encoder_hidden_states_llama3"}),
    ),
    "HunyuanDiT2DModel": Case(
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4,
            "hidden_size": 16,
            "text_len": 4,
            "text_len_t5": 3,
        },
        hunyuan_dit,
        shared=frozenset({"image_rotary_emb"}),
    ),
    "HunyuanImageTransformer2DModel": Case(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "patch_size": (1, 1),
            "text_embed_dim": 12,
            "rope_axes_dim": (4, 4),
        },
        lambda: latents_and_text(4, 12, size=4) | {"timestep": timesteps(), "encoder_attention_mask": padded(2, 5)},
    ),
    "Ideogram4Transformer2DModel": Case(
        {
            "in_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "adaln_dim": 8,
            "llm_features_dim": 6,
            "mrope_section": (2, 1, 1),
        },
        _ideogram4,
    ),
    "JoyImageEditTransformer3DModel": Case(
        {
            "patch_size": [1, 2, 2],
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 12,
            "num_layers": 1,
            "rope_dim_list": [4, 6, 6],
            "theta": 256,
        },
        lambda: {
            "hidden_states": normal(2, 4, 1, 4, 4),
            "encoder_hidden_states": normal(2, 5, 12),
            "timestep": timesteps(),
        },
    ),
    "JoyImageEditPlusTransformer3DModel": Case(
        {
            "patch_size": [1, 2, 2],
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 12,
            "num_layers": 1,
            "rope_dim_list": [4, 6, 6],
            "theta": 256,
        },
        lambda: {
            "hidden_states": normal(1, 2, 4, 1, 2, 2),
            "encoder_hidden_states": normal(1, 5, 12),
            "timestep": timesteps(1),
            "shape_list": [[(1, 1, 1), (1, 1, 1)]],
        },
        samples=1,
    ),
    "Krea2Transformer2DModel": Case(
        {
            "in_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 16,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 8,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2),
        },
        lambda: {
            "hidden_states": normal(2, 6, 4),
            "encoder_hidden_states": normal(2, 5, 2, 8),
            "timestep": timesteps(value=0.5),
            "position_ids": torch.cat([torch.zeros(5, 3), grid_ids(2, 3)]),
            "encoder_attention_mask": padded(2, 5),
        },
    ),
    "Lumina2Transformer2DModel": Case(
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (32, 32, 32),
            "cap_feat_dim": 12,
        },
        lambda: latents_and_text(4, 12) | {"timestep": timesteps(value=0.5), "encoder_attention_mask": seen(2, 5)},
    ),
    "LuminaNextDiT2DModel": Case(
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "learn_sigma": False,
            "cross_attention_dim": 12,
        },
        lambda: (
            latents_and_text(4, 12)
            | {
                "timestep": timesteps(value=0.5),
                "encoder_mask": ones(2, 5),
                "image_rotary_emb": normal(384, 384, 4),
                "cross_attention_kwargs": {},
            }
        ),
    ),
    "OmniGenTransformer2DModel": Case(
        {
            "hidden_size": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 16,
            "num_layers": 1,
            "pad_token_id": 0,
            "vocab_size": 32,
            "in_channels": 4,
            "time_step_dim": 4,
            "rope_scaling": {"long_factor": [1, 2], "short_factor": [1, 2]},
        },
        _omnigen,
    ),
    "PRXTransformer2DModel": Case(
        {
            "in_channels": 4,
            "patch_size": 2,
            "context_in_dim": 12,
            "hidden_size": 16,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 1,
            "axes_dim": [4, 4],
        },
        lambda: latents_and_text(4, 12) | {"timestep": timesteps(value=0.5), "attention_mask": padded(2, 5)},
    ),
    "SanaTransformer2DModel": Case(
        {
            "patch_size": 1,
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
        lambda: latents_and_text(4, 12),
    ),
    "ZImageTransformer2DModel": Case(
        Z_IMAGE,
        lambda: {
            "x": [normal(4, 1, 8, 8) for _ in range(2)],
            "cap_feats": [normal(5, 12) for _ in range(2)],
            "t": timesteps(value=0.5),
        },
    ),
}
