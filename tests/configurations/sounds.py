"""Transformers that make sound or music, and those of other kinds of sequence."""

from configurations.case import Case, integers, normal, padded, seen, timesteps

_PROTEIN = {
    "nlayers": 1,
    "token_dim": 8,
    "nheads": 2,
    "dim_cond": 8,
    "pair_repr_dim": 4,
    "latent_dim": 4,
    "token_type_emb_dim": 4,
}

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
    "RFD4ProteinaTransformer": Case(
        _PROTEIN
        | {
            "t_emb_dim": 8,
            "xt_pair_dist_dim": 4,
            "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists",),
            "feats_pair_cond": ("time_emb_bb_ca",),
            "update_pair_repr_every_n": 1,
            "tri_mult_c": 4,
            "num_sequence_classes": 5,
        },
        lambda: {
            "bb_ca": normal(2, 6, 3),
            "local_latents": normal(2, 6, 4),
            "bb_ca_time": timesteps(value=0.5),
            "local_latents_time": timesteps(value=0.5),
            "padding_mask": padded(2, 6),
            "token_type": integers(7, 2, 6),
            "conditioning": {
                "is_in_context_conditioning": ~seen(2, 6),
                "supports_local_latent": seen(2, 6),
            },
        },
    ),
    "RFD4ProteinaAutoencoder": Case(
        _PROTEIN
        | {
            "atom37_mask": [[True] * 37] * 5,
            "allowed_residue_types": [[True] * 5] * 7,
            "n_residue_types": 5,
            "encoder_feats_seq": ("token_type",),
            "decoder_feats_seq": ("ca_coors_nm", "z_latent_seq", "token_type"),
        },
        lambda: {
            "z_latent": normal(2, 6, 4),
            "ca_coors_nm": normal(2, 6, 3),
            "padding_mask": padded(2, 6),
            "token_type": integers(7, 2, 6),
            "conditioning": {
                "is_in_context_conditioning": ~seen(2, 6),
                "supports_local_latent": seen(2, 6),
            },
        },
    ),
}
