"""Tiny diffusers pipelines with random weights: real code paths, no download, built in well under a second."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from headscope.zoo.pixel_pipeline import PixelDiTPipeline


@dataclass(frozen=True)
class Picture:
    """An item of a task."""

    key: str
    image: np.ndarray | None
    caption: str = ""


def pictures(count: int, size: int = 16) -> list[Picture]:
    rng = np.random.default_rng(0)
    return [Picture(f"test/{i}", rng.integers(0, 256, (size, size, 3), np.uint8), f"picture {i}") for i in range(count)]


def ddpm(size: int = 16) -> DDPMPipeline:
    """An unconditional pixel-space model with two attention resolutions, 4 heads at each of 3 sites."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=size,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    ).eval()
    return DDPMPipeline(unet=unet, scheduler=DDPMScheduler())


def tokenizer() -> CLIPTokenizer:
    """Bytes, bytes that end a word, and two specials; no merges."""
    bytes_alone = sorted(ByteLevel.alphabet())
    tokens = [*bytes_alone, *(f"{token}</w>" for token in bytes_alone), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def autoencoder(size: int = 16) -> AutoencoderKL:
    """Images of twice the latents' size."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=size,
        shift_factor=0.06,
    ).eval()


def text_encoder(words: CLIPTokenizer, kind: type = CLIPTextModel):
    torch.manual_seed(0)
    return kind(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=37,
            num_attention_heads=4,
            num_hidden_layers=2,
            max_position_embeddings=77,
            projection_dim=32,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    ).eval()


def conditional_unet(**options: Any) -> UNet2DConditionModel:
    """Latents of 8 x 8 in two resolutions; text of 32 channels and 4 heads a site, unless told otherwise."""
    shared = {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 8,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
    }
    return UNet2DConditionModel(**{**shared, **options}).eval()


def latent_scheduler() -> DDIMScheduler:
    """As Stable Diffusion has it."""
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )


def stable_diffusion() -> StableDiffusionPipeline:
    """Text to image, latents of 8 x 8, images of 16 x 16; 4 heads at self- and cross-attention sites."""
    words = tokenizer()
    torch.manual_seed(0)
    unet = conditional_unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D")
    )
    pipeline = StableDiffusionPipeline(
        unet=unet,
        vae=autoencoder(),
        tokenizer=words,
        text_encoder=text_encoder(words, CLIPTextModel),
        scheduler=latent_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stable_diffusion_xl() -> StableDiffusionXLPipeline:
    """Two text encoders, and time ids; attention in the down, middle and up blocks, 2 heads a site."""
    words = tokenizer()
    torch.manual_seed(0)
    unet = conditional_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
    return _quiet(
        StableDiffusionXLPipeline(
            unet=unet,
            vae=autoencoder(),
            text_encoder=text_encoder(words),
            tokenizer=words,
            text_encoder_2=text_encoder(words, CLIPTextModelWithProjection),
            tokenizer_2=tokenizer(),
            scheduler=latent_scheduler(),
            add_watermarker=False,
        )
    )


def sd3_transformer() -> SD3Transformer2DModel:
    """Joint attention of image and text tokens."""
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=16,
    ).eval()


def flux_transformer(double: int = 1, single: int = 1, guidance: bool = False) -> FluxTransformer2DModel:
    """Joint attention of text and image tokens, in double-stream and single-stream blocks."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=guidance,
    ).eval()


def flux_inputs(batch: int = 2, height: int = 4, width: int = 3, text: int = 5) -> dict[str, torch.Tensor]:
    """What `flux_transformer` takes: packed latents of height x width tokens."""
    generator = torch.Generator().manual_seed(5)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()
    return {
        "hidden_states": torch.randn(batch, height * width, 16, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, 32, generator=generator),
        "pooled_projections": torch.randn(batch, 32, generator=generator),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
    }


def sd3_inputs(batch: int = 2, text: int = 5) -> dict[str, torch.Tensor]:
    """What `sd3_transformer` takes: latents of 8 x 8, 4 x 4 tokens."""
    generator = torch.Generator().manual_seed(5)
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, 16, generator=generator),
        "pooled_projections": torch.randn(batch, 16, generator=generator),
        "timestep": torch.full((batch,), 500.0),
    }


def stable_diffusion_3(layers: int = 1) -> StableDiffusion3Pipeline:
    """Joint attention under classifier-free guidance; its third text encoder is left out."""
    words = tokenizer()
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=64,
        pooled_projection_dim=64,
    ).eval()
    return _quiet(
        StableDiffusion3Pipeline(
            transformer=transformer,
            vae=autoencoder(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            text_encoder=text_encoder(words, CLIPTextModelWithProjection),
            tokenizer=words,
            text_encoder_2=text_encoder(words, CLIPTextModelWithProjection),
            tokenizer_2=tokenizer(),
            text_encoder_3=None,
            tokenizer_3=None,
        )
    )


def flux(double: int = 1, single: int = 1, guidance: bool = False) -> FluxPipeline:
    """Joint attention, and true guidance in passes of their own."""
    words = tokenizer()
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    letters = T5Tokenizer(vocab=pieces + [(chr(code), -3.0) for code in range(33, 127)], extra_ids=0)
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(letters), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    return _quiet(
        FluxPipeline(
            transformer=flux_transformer(double, single, guidance),
            vae=autoencoder(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            text_encoder=text_encoder(words),
            tokenizer=words,
            text_encoder_2=T5EncoderModel(config).eval(),
            tokenizer_2=letters,
        )
    )


def pixel_dit(size: int = 16) -> PixelDiTPipeline:
    """A transformer in pixel space with random weights that knows three classes."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        out_channels=3,
        num_layers=2,
        sample_size=size,
        patch_size=4,
        num_embeds_ada_norm=3,
    )
    return _quiet(PixelDiTPipeline(transformer.eval(), DDPMScheduler(beta_schedule="squaredcos_cap_v2")))


def dit() -> DiTPipeline:
    """Conditioned on a class; its null class comes after the others in the batch."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    ).eval()
    return _quiet(DiTPipeline(transformer=transformer, vae=autoencoder(), scheduler=DDIMScheduler()))


def controlnet() -> StableDiffusionControlNetPipeline:
    pipeline = stable_diffusion()
    control = ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(4, 8)).eval()
    return _quiet(
        StableDiffusionControlNetPipeline(**pipeline.components, controlnet=control, requires_safety_checker=False)
    )


def _quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
