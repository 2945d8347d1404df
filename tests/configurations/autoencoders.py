"""Autoencoders: their attention is reached like a denoiser's, though no pipeline asks a Scope to watch it."""

import torch

from configurations.case import Case, normal, ones

_PLAIN = {
    "block_out_channels": (4, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "latent_channels": 4,
}
_HUNYUAN_15 = {
    "latent_channels": 4,
    "block_out_channels": (8, 8, 8),
    "layers_per_block": 1,
    "spatial_compression_ratio": 4,
    "temporal_compression_ratio": 2,
}


def _image():
    return {"sample": normal(2, 3, 16, 16)}


def _video(frames: int = 5):
    return {"sample": normal(2, 3, frames, 16, 16)}


def _tiled(kind, options):
    """The class runs tiled only."""
    model = kind(**options)
    model.enable_tiling()
    return model


CASES = {
    "AutoencoderKL": Case(_PLAIN, _image),
    "AutoencoderKLFlux2": Case(_PLAIN, _image),
    "AutoencoderKLTemporalDecoder": Case(
        {"block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2, "layers_per_block": 1},
        lambda: {"sample": normal(4, 3, 16, 16), "num_frames": 2},
        samples=2,
        folded={"sample": 2},
    ),
    "AsymmetricAutoencoderKL": Case(
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "down_block_out_channels": (4, 8),
            "layers_per_down_block": 1,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "up_block_out_channels": (4, 8),
            "layers_per_up_block": 1,
            "norm_num_groups": 2,
            "sample_size": 16,
        },
        lambda: _image() | {"mask": ones(2, 1, 16, 16)},
    ),
    "VQModel": Case(_PLAIN | {"latent_channels": 3, "num_vq_embeddings": 16}, _image),
    "ConsistencyDecoderVAE": Case(
        {
            "encoder_block_out_channels": (4, 8),
            "encoder_down_block_types": ("DownEncoderBlock2D",) * 2,
            "encoder_norm_num_groups": 2,
            "decoder_add_attention": True,
            "decoder_block_out_channels": (8, 16),
            "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2,
            "decoder_layers_per_block": 1,
            "decoder_norm_num_groups": 2,
            "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2,
        },
        lambda: _image() | {"generator": torch.Generator().manual_seed(0)},
    ),
    "AutoencoderKLHunyuanImage": Case(
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 4,
            "block_out_channels": (32, 32),
            "layers_per_block": 1,
            "spatial_compression_ratio": 2,
            "sample_size": 16,
        },
        _image,
    ),
    "AutoencoderKLHunyuanImageRefiner": Case(_HUNYUAN_15 | {"block_out_channels": (32, 32, 32)}, _video),
    # its causal mask lacks a dimension for heads, so that only batches of one run
    "AutoencoderKLHunyuanVideo15": Case(
        _HUNYUAN_15 | {"block_out_channels": (32, 32, 32)},
        lambda: {"sample": normal(1, 3, 5, 16, 16)},
        samples=1,
    ),
    "AutoencoderKLHunyuanVideo": Case(
        {
            "latent_channels": 4,
            "down_block_types": ("HunyuanVideoDownBlock3D",) * 4,
            "up_block_types": ("HunyuanVideoUpBlock3D",) * 4,
            "block_out_channels": (8, 8, 8, 8),
            "layers_per_block": 1,
            "norm_num_groups": 4,
        },
        _video,
    ),
    "AutoencoderKLAllegro": Case(
        {
            "block_out_channels": (8, 8, 8, 8),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "sample_size": 16,
        },
        lambda: {"sample": normal(1, 3, 24, 16, 16)},
        build=_tiled,
        samples=1,
    ),
    "AutoencoderKLCosmos": Case(
        {
            "latent_channels": 4,
            "encoder_block_out_channels": (8, 8, 8, 8),
            "decode_block_out_channels": (8, 8, 8, 8),
            "attention_resolutions": (8,),
            "resolution": 32,
            "num_layers": 1,
            "spatial_compression_ratio": 4,
            "temporal_compression_ratio": 4,
        },
        lambda: {"sample": normal(2, 3, 5, 32, 32)},
    ),
    "AutoencoderKLMochi": Case(
        {
            "latent_channels": 4,
            "encoder_block_out_channels": (32, 32, 32, 32),
            "decoder_block_out_channels": (32, 32, 32, 32),
            "layers_per_block": (1, 1, 1, 1, 1),
        },
        lambda: _video(7),
    ),
    "AutoencoderKLWan": Case(
        {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
        _video,
    ),
    "AutoencoderKLQwenImage": Case(
        {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
        _video,
    ),
    "AutoencoderKLQwenImage21": Case(
        {
            "base_dim": 4,
            "decoder_base_dim": 4,
            "z_dim": 4,
            "dim_mult": [1, 1, 1, 1, 1],
            "num_res_blocks": 1,
        },
        lambda: {"sample": normal(2, 4, 1, 32, 32)},
    ),
    "AutoencoderKLMiniMaxH3": Case(
        {
            "latent_channels": 4,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "spatial_downsample_factors": (2, 2),
            "temporal_downsample_factors": (2, 2),
            "norm_num_groups": 4,
            "decoder_num_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_attention_head_dim": 8,
            "decoder_num_register_tokens": 2,
            "decoder_ffn_mult": 2,
            "token_drop": 0,
            "latents_mean": (0.0,) * 4,
            "latents_std": (1.0,) * 4,
        },
        lambda: _video(17),
    ),
    "AutoencoderKLMiniMaxH3Audio": Case(
        {
            "encoder_dim": 4,
            "encoder_rates": (2, 2),
            "latent_dim": 16,
            "latent_channels": 4,
            "num_attention_heads": 2,
            "decoder_dim": 16,
            "decoder_rates": (2, 2),
            "decoder_kernel_sizes": (4, 4),
            "resblock_kernel_sizes": (3,),
            "resblock_dilation_sizes": ((1, 3),),
            "latents_mean": [0.0] * 4,
            "latents_std": [1.0] * 4,
        },
        lambda: {"sample": normal(2, 1, 32)},
    ),
    "AutoencoderKLKVAEAudio": Case(
        {
            "encoder_dim": 4,
            "encoder_rates": [2, 2],
            "latent_dim": 16,
            "codebook_dim": 4,
            "decoder_dim": 16,
            "decoder_rates": [2, 2],
            "attn_num_heads": 2,
        },
        lambda: {"sample": normal(2, 1, 32)},
    ),
    "AutoencoderRAE": Case(
        {
            "encoder_hidden_size": 64,
            "encoder_patch_size": 8,
            "encoder_num_hidden_layers": 1,
            "encoder_input_size": 32,
            "patch_size": 4,
            "image_size": 16,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 16,
        },
        lambda: {"sample": normal(2, 3, 32, 32)},
    ),
    "AutoencoderSAME": Case(
        {
            "patch_size": 4,
            "encoder_channels": 8,
            "encoder_c_mults": (2,),
            "encoder_strides": (2,),
            "encoder_transformer_depths": (1,),
            "latent_dim": 4,
            "dim_heads": 8,
            "ff_mult": 2,
        },
        lambda: {"sample": normal(2, 2, 64)},
    ),
    "AutoencoderVidTok": Case(
        {
            "ch": 32,
            "ch_mult": [1, 1],
            "num_res_blocks": 1,
            "spatial_ds": [0],
            "spatial_us": [1],
            "tempo_ds": [],
            "tempo_us": [],
        },
        lambda: _video(5) | {"sample_posterior": False},
        frames_for_heads=True,
    ),
    "MMAudioVAE": Case(
        {
            "mel_bins": 8,
            "latent_channels": 4,
            "hidden_channels": 16,
            "channel_multipliers": (1, 2),
            "layers_per_block": 1,
        },
        lambda: {"sample": normal(2, 512 * 16)},
    ),
    "LTX2VideoDiffusionDecoderModel": Case(
        {
            "latent_channels": 4,
            "patch_size": 2,
            "decoder_head_dim": 8,
            "decoder_stage_channels": (32, 16, 16, 16, 16),
            "decoder_stage_depths": (1, 1, 1, 1, 1),
            "decoder_stage_kernels": ((3, 3, 3),) * 4,
            "decoder_upsample_channel_reductions": (2, 1, 1, 1),
            "decoder_stage5_kernel": (3, 3, 3),
            "decoder_t_emb_dim": 16,
            "spatial_compression_ratio": 16,
        },
        lambda: {"z": normal(2, 4, 2, 3, 3), "generator": torch.Generator().manual_seed(0)},
    ),
}
