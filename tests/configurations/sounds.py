"""Transformers that make sound or music, and those of other kinds of sequence."""

import torch

from configurations.case import Case, integers, normal, ones, padded, seen, timesteps

CASES = {
    "AceStepTransformer1DModel": Case(
        {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 4,
            "in_channels": 12,
            "audio_acoustic_hidden_dim": 4,
            "sliding_window": 2,
        },
        lambda: {
            "hidden_states": normal(2, 8, 4),
            "timestep": timesteps(value=0.5),
            "timestep_r": timesteps(value=0.5),
            "encoder_hidden_states": normal(2, 5, 16),
            "context_latents": normal(2, 8, 8),
        },
    ),
    "AnimaTextConditioner": Case(
        {
            "source_dim": 12,
            "target_dim": 16,
            "model_dim": 16,
            "num_layers": 1,
            "num_attention_heads": 2,
            "mlp_ratio": 2.0,
            "target_vocab_size": 32,
            "min_sequence_length": 6,
        },
        lambda: {
            "source_hidden_states": normal(2, 5, 12),
            "target_input_ids": integers(32, 2, 4),
            "target_attention_mask": seen(2, 4).long(),
            "source_attention_mask": padded(2, 5).long(),
        },
    ),
    "LongCatAudioDiTTransformer": Case(
        {"dit_dim": 16, "dit_depth": 1, "dit_heads": 2, "dit_text_dim": 12, "latent_dim": 4, "text_conv": False},
        lambda: {
            "hidden_states": normal(2, 8, 4),
            "encoder_hidden_states": normal(2, 5, 12),
            "encoder_attention_mask": padded(2, 5),
            "attention_mask": seen(2, 8),
            "timestep": timesteps(value=0.5),
        },
    ),
    "MiniMaxMusic3Transformer1DModel": Case(
        {
            "in_channels": 4,
            "condition_dim": 12,
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "ff_inner_dim": 16,
            "rotary_dim": 4,
            "fourier_embedding_dim": 8,
        },
        lambda: {
            "hidden_states": normal(2, 4, 8),
            "encoder_hidden_states": normal(2, 8, 12),
            "timestep": timesteps(value=0.5),
        },
    ),
    "MiniMaxMusic3RVQDepthDecoder": Case(
        {
            "hidden_size": 16,
            "num_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "audio_vocab_size": 16,
            "num_codebooks": 4,
        },
        lambda: {"inputs_embeds": normal(2, 4, 16)},
    ),
    "StableAudioDiTModel": Case(
        {
            "sample_size": 8,
            "in_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_attention_heads": 2,
            "out_channels": 4,
            "cross_attention_dim": 16,
            "time_proj_dim": 8,
            "global_states_input_dim": 6,
            "cross_attention_input_dim": 12,
        },
        lambda: {
            "hidden_states": normal(2, 4, 8),
            "timestep": timesteps(value=0.5),
            "encoder_hidden_states": normal(2, 5, 12),
            "global_hidden_states": normal(2, 1, 6),
            "rotary_embedding": (normal(9, 4).cos(), normal(9, 4).sin()),
        },
    ),
    "StableAudio3DiTModel": Case(
        {
            "io_channels": 4,
            "embed_dim": 32,
            "depth": 1,
            "num_heads": 2,
            "cond_token_dim": 12,
            "global_cond_dim": 6,
            "local_add_cond_dim": 5,
            "timestep_features_dim": 8,
            "ff_mult": 2.0,
            "num_memory_tokens": 2,
        },
        lambda: {
            "hidden_states": normal(2, 4, 8),
            "timestep": timesteps(value=0.5),
            "encoder_hidden_states": normal(2, 5, 12),
            "global_hidden_states": normal(2, 6),
        },
    ),
}
_ = ones, torch
