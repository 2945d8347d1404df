"""UNets: convolutions with attention between them."""

import torch

from configurations.case import Case, normal, ones, steps, timesteps

CONDITIONED = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}


def conditioned():
    return {"sample": normal(2, 4, 8, 8), "timestep": 7, "encoder_hidden_states": normal(2, 5, 12)}


def _extended():
    return {"text_embeds": normal(2, 6), "time_ids": ones(2, 6)}


CASES = {
    "UNet2DModel": Case(
        {
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 4,
        },
        lambda: {"sample": normal(2, 3, 8, 8), "timestep": 7},
    ),
    # as Stable Diffusion 1.5: attention_head_dim is the number of heads there
    "UNet2DConditionModel": Case(CONDITIONED, conditioned),
    "UNet2DConditionModel, SD2-like": Case(
        CONDITIONED | {"attention_head_dim": (2, 4), "use_linear_projection": True}, conditioned
    ),
    "UNet2DConditionModel, SDXL-like": Case(
        CONDITIONED
        | {
            "attention_head_dim": (2, 4),
            "use_linear_projection": True,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 + 6 * 4,
        },
        lambda: conditioned() | {"added_cond_kwargs": _extended()},
    ),
    # as Kandinsky 2: text keys are added to the image's own
    "UNet2DConditionModel, added keys": Case(
        CONDITIONED
        | {
            "down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ("UpBlock2D", "SimpleCrossAttnUpBlock2D"),
        },
        conditioned,
    ),
    "UNet3DConditionModel": Case(
        CONDITIONED
        | {
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        lambda: conditioned() | {"sample": normal(2, 4, 3, 8, 8)},
    ),
    "UNetMotionModel": Case(
        {
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "sample_size": 8,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
            "cross_attention_dim": 12,
            "num_attention_heads": 2,
            "motion_num_attention_heads": 2,
        },
        lambda: {"sample": normal(2, 4, 3, 8, 8), "timestep": 7, "encoder_hidden_states": normal(6, 5, 12)},
        folded={"encoder_hidden_states": 3},
    ),
    "UNetSpatioTemporalConditionModel": Case(
        {
            "sample_size": 8,
            "in_channels": 4,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "cross_attention_dim": 12,
            "num_attention_heads": 4,
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 12,
        },
        lambda: {
            "sample": normal(2, 3, 4, 8, 8),
            "timestep": 7,
            "encoder_hidden_states": normal(2, 1, 12),
            "added_time_ids": ones(2, 3),
        },
    ),
    "I2VGenXLUNet": Case(
        {
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "cross_attention_dim": 12,
            "attention_head_dim": 4,
        },
        lambda: {
            "sample": normal(2, 4, 3, 8, 8),
            "timestep": 7,
            "fps": torch.tensor([8, 8]),
            "image_latents": normal(2, 4, 3, 8, 8),
            "image_embeddings": normal(2, 12),
            "encoder_hidden_states": normal(2, 5, 12),
        },
    ),
    "Kandinsky3UNet": Case(
        {
            "time_embedding_dim": 16,
            "groups": 2,
            "attention_head_dim": 4,
            "layers_per_block": 2,
            "block_out_channels": (8, 16, 32, 64),
            "cross_attention_dim": 12,
            "encoder_hid_dim": 6,
        },
        lambda: {
            "sample": normal(2, 4, 16, 16),
            "timestep": 7,
            "encoder_hidden_states": normal(2, 5, 6),
            "encoder_attention_mask": ones(2, 5),
        },
    ),
    "StableCascadeUNet": Case(
        {
            "in_channels": 4,
            "out_channels": 4,
            "timestep_ratio_embedding_dim": 8,
            "conditioning_dim": 16,
            "block_out_channels": (8, 16),
            "num_attention_heads": (2, 4),
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "clip_text_pooled_in_channels": 6,
            "clip_seq": 2,
        },
        lambda: {
            "sample": normal(2, 4, 8, 8),
            "timestep_ratio": timesteps(value=0.5),
            "clip_text_pooled": normal(2, 1, 6),
        },
    ),
    "UVit2DModel": Case(
        {
            "hidden_size": 16,
            "cond_embed_dim": 8,
            "micro_cond_encode_dim": 2,
            "micro_cond_embed_dim": 10,
            "encoder_hidden_size": 8,
            "vocab_size": 33,
            "codebook_size": 32,
            "in_channels": 16,
            "block_out_channels": 16,
            "num_res_blocks": 1,
            "block_num_heads": 2,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 32,
            "sample_size": 4,
        },
        lambda: {
            "input_ids": torch.randint(0, 33, (2, 4, 4)),
            "encoder_hidden_states": normal(2, 5, 8),
            "pooled_text_emb": normal(2, 8),
            "micro_conds": ones(2, 5),
        },
    ),
    "DreamLiteUNetModel": Case(
        {
            "sample_size": 8,
            "block_out_channels": (8, 16, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 12,
            "attention_head_dim": 4,
            "ff_mult": 2,
        },
        conditioned,
    ),
    "UNetControlNetXSModel": Case(
        {
            "sample_size": 8,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "cross_attention_dim": 12,
            "num_attention_heads": 2,
            "ctrl_conditioning_embedding_out_channels": (2, 2),
            "ctrl_block_out_channels": (4, 8),
            "ctrl_num_attention_heads": 2,
            "ctrl_max_norm_num_groups": 2,
        },
        lambda: conditioned() | {"controlnet_cond": normal(2, 3, 16, 16)},
    ),
    "T5FilmDecoder": Case(
        {"input_dims": 8, "targets_length": 6, "d_model": 16, "num_layers": 1, "num_heads": 4, "d_kv": 4, "d_ff": 16},
        lambda: {
            "encodings_and_masks": [(normal(2, 5, 16), ones(2, 5))],
            "decoder_input_tokens": normal(2, 6, 8),
            "decoder_noise_time": timesteps(value=0.5),
        },
    ),
    "Transformer2DModel": Case(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "in_channels": 8,
            "norm_num_groups": 4,
            "cross_attention_dim": 12,
        },
        lambda: {"hidden_states": normal(2, 8, 4, 4), "encoder_hidden_states": normal(2, 5, 12)},
    ),
    "DreamLiteTransformer2DModel": Case(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "in_channels": 8,
            "norm_num_groups": 4,
            "cross_attention_dim": 12,
        },
        lambda: {"hidden_states": normal(2, 8, 4, 4), "encoder_hidden_states": normal(2, 5, 12)},
    ),
    "TransformerTemporalModel": Case(
        {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 8, "norm_num_groups": 4},
        lambda: {"hidden_states": normal(6, 8, 4, 4), "timestep": steps(), "num_frames": 3},
        folded={"hidden_states": 3},
    ),
}
