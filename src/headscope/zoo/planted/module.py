"""The planted models as modules of diffusers: a stem of fixed features, attention written by hand, a readout."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn
from torch.nn.functional import pad, pixel_shuffle

from headscope.zoo.planted.designs import (
    ABOVE,
    BELOW,
    DESIGNS,
    HEAD_DIM,
    MODELS,
    OFFSET,
    PATCH,
    SIZE,
    SLOTS,
    STEEP,
    THRESHOLDS,
    check_name,
)
from headscope.zoo.planted.noise import log_snr, shrinkage
from headscope.zoo.planted.truth import PlantedTruth, planted_truth
from headscope.zoo.planted.weights import WIDTH, places, projections

__all__ = ["PlantedModel"]


def _constant(values: np.ndarray | list[float]) -> Tensor:
    return torch.tensor(np.asarray(values, np.float32))


class Stem(nn.Module):
    """A token's features: [items, 3, 32, 32] in, [items, tokens, WIDTH + heads] out, zeros where the heads write."""

    places: Tensor
    thresholds: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.register_buffer("places", _constant(places()))
        self.register_buffer("thresholds", _constant(list(THRESHOLDS)))

    def forward(self, sample: Tensor, above: Tensor, below: Tensor) -> Tensor:
        """
        Args:
            above, below: [items], 1 where the log-SNR is above or below its threshold, else 0.
        """
        pixels = sample[:, :, ::PATCH, ::PATCH]
        red, green, blue = pixels.unbind(1)
        luminance = (red + 2 * green + blue) / 4
        # the last row and column have no neighbour and a difference of 0
        down, across = luminance.diff(dim=1).abs(), luminance.diff(dim=2).abs()
        edge = pad(down, (0, 0, 0, 1)) + pad(across, (0, 1))
        tokens = pixels.flatten(2).mT
        bits = tokens[..., None] > self.thresholds
        code = torch.where(bits, 1.0, -1.0).to(sample.dtype).flatten(2)
        items, count = tokens.shape[:2]
        parts = [
            self.places.expand(items, -1, -1),
            tokens,
            luminance.flatten(1)[..., None],
            edge.flatten(1)[..., None],
            code,
            code * above[:, None, None],
            below[:, None, None].expand(-1, count, -1),
            sample.new_zeros(items, count, self.heads),
        ]
        return torch.cat(parts, -1)


class Block(nn.Module):
    """One attention site, whose heads each write one number a token into a place of their own in the stream."""

    def __init__(self, names: tuple[str, ...], first: int, heads: int) -> None:
        super().__init__()
        width = WIDTH + heads
        self.attn = Attention(width, heads=len(names), dim_head=HEAD_DIM, bias=False, out_bias=False)
        written = np.zeros((width, len(names) * HEAD_DIM))
        weights = {name: np.zeros((len(names) * HEAD_DIM, width)) for name in ("query", "key", "value")}
        for number, name in enumerate(names):
            rows = slice(number * HEAD_DIM, (number + 1) * HEAD_DIM)
            for part, projection in projections(name)._asdict().items():
                weights[part][rows, :WIDTH] = projection
            written[WIDTH + first + number, number * HEAD_DIM] = 1.0
        layers = {"to_q": weights["query"], "to_k": weights["key"], "to_v": weights["value"], "to_out.0": written}
        with torch.no_grad():
            for layer, weight in layers.items():
                self.attn.get_submodule(layer).weight.copy_(_constant(weight))

    def forward(self, stream: Tensor) -> Tensor:
        return stream + self.attn(stream)


class Readout(nn.Module):
    """The prediction [items, 3, 32, 32] from what the heads wrote."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.inputs = {
            slot: [number for number, name in enumerate(names) if DESIGNS[name].slot == slot]
            for slot in SLOTS
            if any(DESIGNS[name].slot == slot for name in names)
        }
        self.gated = {names.index(name): name for name in ("above", "below") if name in names}

    def forward(self, written: Tensor, gates: dict[str, Tensor], shrinkage: Tensor) -> Tensor:
        """
        Args:
            written: [items, tokens, heads].
            gates: above and below, [items].
            shrinkage: [items], that of the timestep.
        """
        elements = [torch.zeros_like(written[..., 0])] * (3 * PATCH * PATCH)
        for name, numbers in self.inputs.items():
            slot = SLOTS[name]
            outputs = [written[..., number] for number in numbers]
            if slot.rule == "gated":
                outputs = [
                    output * gates[self.gated[number]][:, None] for number, output in zip(numbers, outputs, strict=True)
                ]
            total = torch.stack(outputs).sum(0)
            if slot.rule == "either":
                total = (STEEP * total - OFFSET).clamp(0, 1)
            elif slot.rule == "both":
                total = torch.stack(outputs).prod(0)
            elements[slot.channel * PATCH * PATCH + slot.pixel] = shrinkage[:, None] * slot.gain * total
        grid = SIZE // PATCH
        return pixel_shuffle(torch.stack(elements, 1).unflatten(2, (grid, grid)), PATCH)


class PlantedModel(ModelMixin, ConfigMixin):
    """A denoiser of 32 x 32 images whose heads are written by hand; it predicts the clean image.

    Called like a UNet2DModel: `model(sample, timestep).sample`.

    Args:
        name: one of PLANTED.
        sample_size, in_channels, out_channels, patch_size: what diffusers and a Scope look for; they can't be others.

    Attributes:
        truth: what each head does, in float64.

    Raises:
        ValueError: no such model, or another size.
    """

    @register_to_config
    def __init__(
        self,
        name: str = "all",
        sample_size: int = SIZE,
        in_channels: int = 3,
        out_channels: int = 3,
        patch_size: int = PATCH,
    ) -> None:
        check_name(name)
        sizes, expected = (sample_size, in_channels, out_channels, patch_size), (SIZE, 3, 3, PATCH)
        if sizes != expected:
            raise ValueError(f"sample_size, in_channels, out_channels, patch_size: got {sizes}, expected {expected}")
        super().__init__()
        sites = MODELS[name]
        names = tuple(head for site in sites for head in site)
        ratios = log_snr()
        self.register_buffer("shrinkage", _constant(shrinkage()))
        self.register_buffer("above", _constant(ratios > ABOVE))
        self.register_buffer("below", _constant(ratios < BELOW))
        self.stem = Stem(len(names))
        starts = [sum(map(len, sites[:number])) for number in range(len(sites))]
        self.blocks = nn.ModuleList(Block(heads, start, len(names)) for heads, start in zip(sites, starts, strict=True))
        self.readout = Readout(names)

    @property
    def truth(self) -> PlantedTruth:
        return planted_truth(self.config["name"])

    def forward(self, sample: Tensor, timestep: Tensor | float, return_dict: bool = True) -> Any:
        """
        Args:
            sample: x_t, [items, 3, 32, 32].
            timestep: one of the scheduler's, or one for each item.

        Returns:
            UNet2DOutput, or without return_dict a tuple, with the prediction of x_0.

        Raises:
            ValueError: a sample of another size.
        """
        if tuple(sample.shape[1:]) != (3, SIZE, SIZE):
            raise ValueError(f"sample: got {list(sample.shape)}, expected [items, 3, {SIZE}, {SIZE}]")
        steps = torch.as_tensor(timestep, device=sample.device).long().reshape(-1).expand(len(sample))
        gates = {"above": self.above[steps], "below": self.below[steps]}
        stream = self.stem(sample, gates["above"], gates["below"])
        for block in self.blocks:
            stream = block(stream)
        prediction = self.readout(stream[..., WIDTH:], gates, self.shrinkage[steps])
        return UNet2DOutput(sample=prediction) if return_dict else (prediction,)
