"""The bundled models: small unconditional diffusion models of 32 x 32 pixels, with 8 heads at each attention site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headscope._extras import require

__all__ = ["DEFAULT_MODEL", "MODELS", "SCHEDULER_CONFIG", "BundledModel", "build_scheduler"]

_FACES = ("faces", "faces_grey", "lfw", "photographs")
_TIES = ("twins", "distinct", "mirrored", "unmirrored", "tiled", "untiled", "eyes", "odd_eyes")

# the cosine schedule: a linear one destroys images as small as these in its first half
SCHEDULER_CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "epsilon",
    "clip_sample": True,
}


@dataclass(frozen=True)
class BundledModel:
    """A bundled model: what it is, and how it is trained.

    Attributes:
        name: what it is asked for by.
        title: what it is, in a line.
        part: the pipeline's part that denoises, "unet" or "transformer".
        class_name: its class in diffusers.
        config: the settings of that class.
        sites: its attention sites, in words.
        groups: the image groups it is trained on.
        batch, learning_rate, ema: see `headscope.zoo.train.TrainConfig`.
    """

    name: str
    title: str
    part: str
    class_name: str
    config: dict[str, Any]
    sites: str
    groups: tuple[str, ...]
    batch: int
    learning_rate: float
    ema: float

    def build(self) -> Any:
        """The untrained denoiser in float32: images [batch, 3, 32, 32] in, noise of the same shape out."""
        model = getattr(require("diffusers", "study"), self.class_name)(**self.config)
        if self.part == "transformer":
            _begin_as_identity(model)
        return model

    def denoise(self, model: Any, noisy: Any, timesteps: Any) -> Any:
        """The denoiser's answer to noisy images, [batch, 3, 32, 32]; timesteps are whole numbers, [batch]."""
        if self.part == "unet":
            return model(noisy, timesteps).sample
        # the label that stands for no class
        labels = timesteps.new_full((len(noisy),), self.config["num_embeds_ada_norm"])
        return model(noisy, timesteps, class_labels=labels).sample


def _begin_as_identity(model: Any) -> None:
    """Let every block begin as the identity (DiT's "adaLN-Zero", arXiv 2212.09748), and the answer as the input.

    A patch's pixels are embedded along orthonormal directions that the position embedding leaves alone, and read off
    along the same: what noise there is passes from the start, where an answer that begins as zero learns only slowly to
    let faint noise pass.
    """
    import torch

    for layer in (*(block.norm1.linear for block in model.transformer_blocks), model.proj_out_1, model.proj_out_2):
        layer.weight.data.zero_()
        layer.bias.data.zero_()
    patches = model.pos_embed.proj
    width, pixels = patches.weight.shape[0], patches.weight[0].numel()
    # the last layer norm takes the mean off
    taken = torch.cat([model.pos_embed.pos_embed[0], torch.ones(1, width)]).double()
    _, sizes, directions = torch.linalg.svd(taken, full_matrices=True)
    free = directions[int((sizes > 1e-3 * sizes[0]).sum()) :]
    drawn = torch.linalg.qr(torch.randn(len(free), pixels, dtype=torch.float64)).Q
    # [width, channels, patch, patch]
    embedding = (free.T @ drawn).reshape(patches.weight.shape)
    patches.weight.data.copy_(embedding)
    patches.bias.data.zero_()
    # answers are laid out with the channels last
    model.proj_out_2.weight.data.copy_(embedding.permute(2, 3, 1, 0).reshape(pixels, width))


_MODELS = (
    BundledModel(
        name="pixeldit",
        title="the bundled transformer (DiT in pixel space)",
        part="transformer",
        class_name="DiTTransformer2DModel",
        config={
            "num_attention_heads": 8,
            "attention_head_dim": 16,
            "in_channels": 3,
            "out_channels": 3,
            "num_layers": 6,
            "sample_size": 32,
            "patch_size": 4,
            # a label for images of one kind, and beside it the one for no class, which is used
            "num_embeds_ada_norm": 1,
            "norm_type": "ada_norm_zero",
        },
        sites="6 self-attention sites over 8 x 8 patches of 4 x 4 pixels, with 8 heads of 16 channels each",
        groups=(*_FACES, *_TIES),
        batch=24,
        learning_rate=1.5e-3,
        ema=0.9995,
    ),
    BundledModel(
        name="unet",
        title="the bundled UNet",
        part="unet",
        class_name="UNet2DModel",
        # 96 channels in heads of 12: 8 heads, at 16 x 16 and at 8 x 8
        config={
            "sample_size": 32,
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": [48, 96, 96],
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
            "attention_head_dim": 12,
            "dropout": 0.1,
        },
        sites="7 self-attention sites (3 at 16 x 16, 4 at 8 x 8) with 8 heads of 12 channels each",
        groups=_FACES,
        batch=16,
        learning_rate=3e-4,
        ema=0.999,
    ),
)
MODELS: dict[str, BundledModel] = {model.name: model for model in _MODELS}
DEFAULT_MODEL = "pixeldit"


def build_scheduler() -> Any:
    """The diffusers DDPMScheduler that the models are trained under."""
    return require("diffusers", "study").DDPMScheduler(**SCHEDULER_CONFIG)
