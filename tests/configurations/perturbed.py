"""diffusers' perturbed-attention pipelines: tiny components with random weights, and what each is called with.

A call is the same for a sample whatever other samples it runs with: its noise, prompt and embeddings are its own.
"""

import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import diffusers
import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from torch import Tensor

import tiny
from configurations import CASES
from configurations.examine import build

STEPS = 2
PROMPTS = ("a red fox", "a blue boat", "a cat")
IMAGE_TOKENS = 4

Options = Callable[[Sequence[int], bool, int], dict[str, Any]]


def _no_options(samples: Sequence[int], guided: bool, per_prompt: int) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class PerturbedCase:
    """A pipeline of tiny components, and its call.

    Attributes:
        build: makes the pipeline.
        options: what else it is called with, from the numbers of the samples, whether there is guidance, and how many
            images there are of each.
        prompts: whether it is given prompts; else `options` has their embeddings.
        several: whether this call of it makes several images of a prompt.
        attends: whether the perturbed branch attends at every site.
        image_prompt: whether it takes an IP-Adapter.
        shared_image: an IP-Adapter's image is divided among the samples of a call.
        unguided: what diffusers' own call without guidance fails with; empty where it doesn't.
        says: what the page says of it.
    """

    build: Callable[[], Any]
    options: Options = _no_options
    prompts: bool = True
    several: bool = True
    attends: bool = False
    image_prompt: bool = False
    shared_image: bool = False
    unguided: str = ""
    says: str = ""

    def draw(
        self,
        pipeline: Any,
        guided: bool,
        samples: Sequence[int] = (0,),
        *,
        per_prompt: int = 1,
        adapters: int = 0,
        **changes: Any,
    ) -> Tensor:
        """The latents of images of some of three prompts, so many of each; `changes` of the call's arguments."""
        pipeline.set_progress_bar_config(disable=True)
        images = [(sample, image) for sample in samples for image in range(per_prompt)]
        call = {
            "num_inference_steps": STEPS,
            "guidance_scale": 5.0 if guided else 1.0,
            "pag_scale": 3.0,
            "output_type": "latent",
            "generator": [torch.Generator().manual_seed(100 + 10 * sample + image) for sample, image in images],
        }
        if per_prompt > 1:
            call["num_images_per_prompt"] = per_prompt
        if self.prompts:
            call["prompt"] = [PROMPTS[sample] for sample in samples]
            call["negative_prompt"] = ["a dog"] * len(samples)
        if adapters:
            # without the prompt, and with it
            both = [_normal(40 + adapter, 2, 1, 32) for adapter in range(adapters)]
            call["ip_adapter_image_embeds"] = both if guided else [embeds[1:] for embeds in both]
        return pipeline(**{**call, **self.options(samples, guided, per_prompt), **changes})[0]


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _of_each(samples: Sequence[int], seed: int, *shape: int) -> Tensor:
    """[samples, ...], the same for a sample whatever the others are."""
    return torch.stack([_normal(seed + sample, *shape) for sample in samples])


def with_image_prompts(pipeline: Any, adapters: int = 1) -> Any:
    """IP-Adapters: cross-attention attends to the text, then to 4 tokens of each one's image."""
    torch.manual_seed(0)
    unet, processors = pipeline.unet, {}
    channels = unet.config.cross_attention_dim
    for name in unet.attn_processors:
        module = unet.get_submodule(name.removesuffix(".processor"))
        processors[name] = AttnProcessor2_0()
        if module.is_cross_attention:
            processors[name] = IPAdapterAttnProcessor2_0(
                module.inner_dim, channels, num_tokens=(IMAGE_TOKENS,) * adapters, scale=1.0
            )
    unet.set_attn_processor(processors)
    projections = [ImageProjection(32, channels, num_image_text_embeds=IMAGE_TOKENS) for _ in range(adapters)]
    unet.encoder_hid_proj = MultiIPAdapterImageProjection(projections)
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    return pipeline


def _stable_diffusion(kind: Any, **options: Any) -> Any:
    return kind(**tiny.stable_diffusion().components, requires_safety_checker=False, **options)


def _stable_diffusion_xl(kind: Any, **options: Any) -> Any:
    return kind(**tiny.stable_diffusion_xl().components, add_watermarker=False, **options)


def _control(pipeline: Any) -> Any:
    torch.manual_seed(1)
    control = diffusers.ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(4, 8)).eval()
    # they begin at zero
    for layer in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=0.1)
    return control


def _controlled(kind: Any) -> Any:
    return _stable_diffusion(kind, controlnet=_control(tiny.stable_diffusion()))


def _controlled_xl(kind: Any) -> Any:
    return _stable_diffusion_xl(kind, controlnet=_control(tiny.stable_diffusion_xl()))


def _stable_diffusion_3(kind: Any) -> Any:
    components = tiny.stable_diffusion_3(layers=2).components
    assert components.pop("image_encoder") is components.pop("feature_extractor") is None
    return kind(**components, pag_applied_layers="blocks.1")


def _pixart() -> Any:
    flux = tiny.flux()
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=32,
        use_additional_conditions=False,
        norm_type="ada_norm_single",
    ).eval()
    return diffusers.PixArtSigmaPAGPipeline(
        tokenizer=flux.tokenizer_2,
        text_encoder=flux.text_encoder_2,
        vae=tiny.autoencoder(),
        transformer=transformer,
        scheduler=tiny.latent_scheduler(),
        pag_applied_layers="blocks.0",
    )


def _animated(layers: str = r"mid.*(attentions\.\d+).*attn1") -> Any:
    """Frames are folded into the batch where a picture attends to itself, places of the picture where frames do."""
    pipeline = tiny.stable_diffusion()
    torch.manual_seed(0)
    adapter = diffusers.MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=4
    )
    return diffusers.AnimateDiffPAGPipeline(
        vae=pipeline.vae,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        unet=pipeline.unet,
        motion_adapter=adapter,
        scheduler=pipeline.scheduler,
        pag_applied_layers=layers,
    )


def _kolors_class() -> Any:
    """The class, also where the library of its tokenizer isn't installed: the pipeline is given embeddings."""
    without = importlib.util.find_spec("sentencepiece") is None
    if without:
        sys.modules["sentencepiece"] = cast(ModuleType, SimpleNamespace(SentencePieceProcessor=None))
    try:
        with warnings.catch_warnings():
            # the text encoder is compiled by what torch deprecates
            warnings.simplefilter("ignore", DeprecationWarning)
            return importlib.import_module("diffusers.pipelines.pag.pipeline_pag_kolors").KolorsPAGPipeline
    finally:
        if without:
            del sys.modules["sentencepiece"]


def _kolors() -> Any:
    pipeline = tiny.stable_diffusion_xl()
    return _kolors_class()(
        vae=pipeline.vae, text_encoder=None, tokenizer=None, unet=pipeline.unet, scheduler=pipeline.scheduler
    )


def _kolors_options(samples: Sequence[int], guided: bool, per_prompt: int) -> dict[str, Any]:
    options = {
        "prompt_embeds": _of_each(samples, 50, 7, 64),
        "pooled_prompt_embeds": _of_each(samples, 60, 32),
    }
    if guided:
        options["negative_prompt_embeds"] = _of_each(samples, 70, 7, 64)
        options["negative_pooled_prompt_embeds"] = _of_each(samples, 80, 32)
    return options


def _hunyuan(**changes: Any) -> Any:
    case, flux = CASES["HunyuanDiT2DModel"], tiny.flux()
    texts = {"cross_attention_dim": 32, "cross_attention_dim_t5": 32, "text_len": 77, "text_len_t5": 256}
    options = {**case.options, **texts, "num_layers": 4, **changes}
    return diffusers.HunyuanDiTPAGPipeline(
        vae=tiny.autoencoder(),
        text_encoder=flux.text_encoder,
        tokenizer=flux.tokenizer,
        transformer=build("HunyuanDiT2DModel", type(case)(options, case.inputs)),
        scheduler=tiny.latent_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=flux.text_encoder_2,
        tokenizer_2=flux.tokenizer_2,
    )


def _hunyuan_options(samples: Sequence[int], guided: bool, per_prompt: int) -> dict[str, Any]:
    images = [10 * sample + image for sample in samples for image in range(per_prompt)]
    # the pipeline takes its latents for an eighth of the picture
    return {"height": 64, "width": 64, "latents": _of_each(images, 90, 4, 8, 8), "use_resolution_binning": False}


def _sana() -> Any:
    case = CASES["SanaTransformer2DModel"]
    transformer = build("SanaTransformer2DModel", type(case)({**case.options, "num_layers": 2}, case.inputs))
    return diffusers.SanaPAGPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def _sana_options(samples: Sequence[int], guided: bool, per_prompt: int) -> dict[str, Any]:
    options = {
        "prompt_embeds": _of_each(samples, 50, 5, 12),
        "prompt_attention_mask": torch.ones(len(samples), 5, dtype=torch.long),
        # without an autoencoder, the pipeline takes its latents for a 32nd of the picture
        "height": 256,
        "width": 256,
        "use_resolution_binning": False,
        "negative_prompt": None,
    }
    if guided:
        options["negative_prompt_embeds"] = _of_each(samples, 70, 5, 12)
        options["negative_prompt_attention_mask"] = options["prompt_attention_mask"]
    return options


def _picture(seed: int = 5) -> np.ndarray:
    return _normal(seed, 16, 16, 3).sigmoid().numpy()


def _image(samples: Sequence[int], guided: bool, per_prompt: int) -> dict[str, Any]:
    return {"image": [_picture()] * len(samples), "strength": 0.5, "num_inference_steps": 2 * STEPS}


def _image_each(samples: Sequence[int], guided: bool, per_prompt: int) -> dict[str, Any]:
    return {**_image(samples, guided, per_prompt), "image": [_picture()] * (len(samples) * per_prompt)}


def _mask(samples: Sequence[int], guided: bool, per_prompt: int) -> dict[str, Any]:
    mask = np.zeros((16, 16, 1), np.float32)
    mask[:8] = 1
    return {**_image(samples, guided, per_prompt), "mask_image": [mask] * len(samples), "height": 16, "width": 16}


def _control_image(options: Options, name: str) -> Options:
    def with_control(samples: Sequence[int], guided: bool, per_prompt: int) -> dict[str, Any]:
        return {**options(samples, guided, per_prompt), name: [_picture(6)] * len(samples)}

    return with_control


def _small(samples: Sequence[int], guided: bool, per_prompt: int) -> dict[str, Any]:
    return {"height": 16, "width": 16}


def _inpainting(kind: Any) -> Any:
    """With a UNet that is given the mask and what it leaves beside the latents."""
    components = tiny.stable_diffusion().components
    torch.manual_seed(0)
    components["unet"] = tiny.conditional_unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        in_channels=9,
        out_channels=4,
    )
    return kind(**components, requires_safety_checker=False)


# "Class" or "Class, variant" -> its case
PERTURBED: dict[str, PerturbedCase] = {
    "StableDiffusionPAGPipeline": PerturbedCase(
        lambda: _stable_diffusion(diffusers.StableDiffusionPAGPipeline), image_prompt=True
    ),
    "StableDiffusionPAGImg2ImgPipeline": PerturbedCase(
        lambda: _stable_diffusion(diffusers.StableDiffusionPAGImg2ImgPipeline), _image, image_prompt=True
    ),
    "StableDiffusionPAGInpaintPipeline": PerturbedCase(
        lambda: _stable_diffusion(diffusers.StableDiffusionPAGInpaintPipeline), _mask, image_prompt=True
    ),
    "StableDiffusionPAGInpaintPipeline, nine channels": PerturbedCase(
        lambda: _inpainting(diffusers.StableDiffusionPAGInpaintPipeline), _mask, image_prompt=True
    ),
    "StableDiffusionControlNetPAGPipeline": PerturbedCase(
        lambda: _controlled(diffusers.StableDiffusionControlNetPAGPipeline),
        _control_image(_small, "image"),
        image_prompt=True,
    ),
    "StableDiffusionControlNetPAGInpaintPipeline": PerturbedCase(
        lambda: _controlled(diffusers.StableDiffusionControlNetPAGInpaintPipeline),
        _control_image(_mask, "control_image"),
        image_prompt=True,
    ),
    "StableDiffusionXLPAGPipeline": PerturbedCase(
        lambda: _stable_diffusion_xl(diffusers.StableDiffusionXLPAGPipeline), image_prompt=True
    ),
    "StableDiffusionXLPAGImg2ImgPipeline": PerturbedCase(
        lambda: _stable_diffusion_xl(diffusers.StableDiffusionXLPAGImg2ImgPipeline), _image, image_prompt=True
    ),
    "StableDiffusionXLPAGInpaintPipeline": PerturbedCase(
        lambda: _stable_diffusion_xl(diffusers.StableDiffusionXLPAGInpaintPipeline),
        _mask,
        image_prompt=True,
        says="diffusers leaves the perturbed layers in the UNet after a call for latents",
    ),
    "StableDiffusionXLControlNetPAGPipeline": PerturbedCase(
        lambda: _controlled_xl(diffusers.StableDiffusionXLControlNetPAGPipeline),
        _control_image(_small, "image"),
        image_prompt=True,
    ),
    "StableDiffusionXLControlNetPAGImg2ImgPipeline": PerturbedCase(
        lambda: _controlled_xl(diffusers.StableDiffusionXLControlNetPAGImg2ImgPipeline),
        _control_image(_image, "control_image"),
        image_prompt=True,
        says="diffusers leaves the perturbed layers in the UNet after a call for latents",
    ),
    "StableDiffusion3PAGPipeline": PerturbedCase(
        lambda: _stable_diffusion_3(diffusers.StableDiffusion3PAGPipeline), _small, attends=True
    ),
    "StableDiffusion3PAGImg2ImgPipeline": PerturbedCase(
        lambda: _stable_diffusion_3(diffusers.StableDiffusion3PAGImg2ImgPipeline), _image_each, attends=True
    ),
    "PixArtSigmaPAGPipeline": PerturbedCase(
        _pixart,
        lambda samples, guided, per_prompt: {
            "height": 16,
            "width": 16,
            "max_sequence_length": 8,
            "clean_caption": False,
            "use_resolution_binning": False,
        },
    ),
    "SanaPAGPipeline": PerturbedCase(
        _sana,
        _sana_options,
        prompts=False,
        attends=True,
        says="where it attends to the text (sites=...); what it perturbs is linear attention, which is refused by name",
    ),
    "HunyuanDiTPAGPipeline": PerturbedCase(
        _hunyuan,
        _hunyuan_options,
        unguided="Sizes of tensors must match",
        says="without guidance diffusers' own call fails, where the model is given the picture's size",
    ),
    "HunyuanDiTPAGPipeline, 1.2": PerturbedCase(
        lambda: _hunyuan(use_style_cond_and_image_meta_size=False), _hunyuan_options
    ),
    "KolorsPAGPipeline": PerturbedCase(
        # several images of a prompt fail without a Scope, too, where it is given as embeddings
        _kolors,
        _kolors_options,
        prompts=False,
        several=False,
        image_prompt=True,
        shared_image=True,
        says="one image of each prompt; of an image prompt, diffusers gives each of two samples half of the tokens",
    ),
    "AnimateDiffPAGPipeline": PerturbedCase(
        _animated,
        lambda samples, guided, per_prompt: {"num_frames": 2, "height": 16, "width": 16},
        several=False,
        image_prompt=True,
        says="one video of each prompt",
    ),
}
