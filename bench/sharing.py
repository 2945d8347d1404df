"""What sharing the clean forward's work leaves to do, counted: floating-point operations of a sweep of every head.

    python bench/sharing.py [--out bench/results]

For each denoiser, at its real size and resolution: the operations of one whole forward of a row, and of a row in which
one head of a site is edited and everything that finished before that site is taken over, averaged over all heads; and
the memory that the clean outputs of one item take, which are kept for edits of every site, in a type of 16 bits. No
weight is allocated (torch's meta device), so nothing is timed: a speed-up is at most the ratio. Which calls can be left
out is learned on a stand-in of the same depth and a fraction of the width, whose forwards are really run and checked.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from headscope._machine import versions
from headscope.models import Scope
from headscope.sweep.sharing import Prefix

Inputs = Callable[[int], dict[str, Any]]


def sd15(full: bool) -> tuple[nn.Module, Inputs]:
    """Stable Diffusion 1.5 at 512 px."""
    width = 768 if full else 16
    size = 64 if full else 8
    unet = diffusers.UNet2DConditionModel(
        sample_size=size,
        cross_attention_dim=width,
        **({} if full else {"block_out_channels": (16, 32, 64, 64), "norm_num_groups": 4}),
    )
    return unet, lambda rows: {
        "sample": torch.randn(rows, 4, size, size),
        "timestep": torch.full((rows,), 500),
        "encoder_hidden_states": torch.randn(rows, 77, width),
    }


def sdxl(full: bool) -> tuple[nn.Module, Inputs]:
    """SDXL at 1024 px."""
    width, pooled, ids, size = (2048, 1280, 256, 128) if full else (16, 16, 4, 16)
    unet = diffusers.UNet2DConditionModel(
        sample_size=size,
        block_out_channels=(320, 640, 1280) if full else (20, 40, 80),
        norm_num_groups=32 if full else 4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=width,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=ids,
        projection_class_embeddings_input_dim=pooled + 6 * ids,
    )
    return unet, lambda rows: {
        "sample": torch.randn(rows, 4, size, size),
        "timestep": torch.full((rows,), 500),
        "encoder_hidden_states": torch.randn(rows, 77, width),
        "added_cond_kwargs": {"text_embeds": torch.randn(rows, pooled), "time_ids": torch.ones(rows, 6)},
    }


def sd3(full: bool) -> tuple[nn.Module, Inputs]:
    """Stable Diffusion 3 medium at 1024 px."""
    size, text = (128, 333) if full else (8, 5)
    small = {
        "sample_size": 8,
        "pos_embed_max_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "attention_head_dim": 2,
        "joint_attention_dim": 16,
        "caption_projection_dim": 48,
        "pooled_projection_dim": 16,
    }
    real = {
        "sample_size": 128,
        "pos_embed_max_size": 192,
        "in_channels": 16,
        "out_channels": 16,
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
    }
    chosen = real if full else small
    transformer = diffusers.SD3Transformer2DModel(num_layers=24, num_attention_heads=24, patch_size=2, **chosen)
    return transformer, lambda rows: {
        "hidden_states": torch.randn(rows, chosen["in_channels"], size, size),
        "encoder_hidden_states": torch.randn(rows, text, chosen["joint_attention_dim"]),
        "pooled_projections": torch.randn(rows, chosen["pooled_projection_dim"]),
        "timestep": torch.full((rows,), 500.0),
    }


def flux(full: bool) -> tuple[nn.Module, Inputs]:
    """Flux.1-dev at 1024 px."""
    small = {
        "in_channels": 4,
        "attention_head_dim": 8,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (2, 2, 4),
    }
    transformer = diffusers.FluxTransformer2DModel(guidance_embeds=True, **({} if full else small))
    config = transformer.config
    tokens, text = (4096, 512) if full else (16, 5)
    return transformer, lambda rows: {
        "hidden_states": torch.randn(rows, tokens, config.in_channels),
        "encoder_hidden_states": torch.randn(rows, text, config.joint_attention_dim),
        "pooled_projections": torch.randn(rows, config.pooled_projection_dim),
        "timestep": torch.full((rows,), 0.5),
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.ones(rows),
    }


DENOISERS = {"SD 1.5, 512 px": sd15, "SDXL, 1024 px": sdxl, "SD3 medium, 1024 px": sd3, "Flux.1-dev, 1024 px": flux}


def learned(build: Callable[[bool], tuple[nn.Module, Inputs]]) -> tuple[Prefix, dict[str, int]]:
    """What edits of each site leave as it was, and each site's heads."""
    torch.manual_seed(0)
    model, inputs = build(False)
    model.eval().requires_grad_(False)
    heads = {site.name: site.heads for site in Scope(model).sites}
    given = inputs(2)

    def forward(rows: list[int]) -> Tensor:
        chosen = torch.tensor(rows)

        def of_rows(name: str, value: Any) -> Any:
            if isinstance(value, dict):
                return {key: of_rows(key, entry) for key, entry in value.items()}
            return value if name.endswith("_ids") and value.shape[-1] == 3 else value[chosen]

        return model(**{name: of_rows(name, value) for name, value in given.items()}, return_dict=False)[0]

    prefix = Prefix.learn(model, heads, forward)
    if not prefix.shares:
        raise SystemExit(f"nothing is shared: {prefix.reason}")
    return prefix, heads


def counted(build: Callable[[bool], tuple[nn.Module, Inputs]]) -> dict[str, float]:
    """Operations of a forward of one row: whole, and edited, on average over heads."""
    prefix, heads = learned(build)
    with torch.device("meta"):
        model, inputs = build(True)
        given = inputs(1)
        rows = torch.zeros(1, dtype=torch.long)
    model.eval().requires_grad_(False)
    # the same modules in the same order: what was learned of the stand-in holds
    full = Prefix(model, heads)
    full._root, full._attention_at = prefix._root, prefix._attention_at

    def operations() -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**given, return_dict=False)
        return counter.get_total_flops()

    whole = operations()
    edited = {}
    with full.clean(frozenset([site]) for site in heads):
        operations()
    kept = {leaf.untyped_storage()._cdata: leaf.untyped_storage() for leaf in tree_leaves(full._values)}
    for site in heads:
        with full.replay(frozenset([site]), rows):
            edited[site] = operations()
    mean = sum(edited[site] * count for site, count in heads.items()) / sum(heads.values())
    return {
        "sites": len(heads),
        "heads": sum(heads.values()),
        "whole_tflops": whole / 1e12,
        "edited_tflops": mean / 1e12,
        "ratio": whole / mean,
        "least_left": min(edited.values()) / whole,
        "most_left": max(edited.values()) / whole,
        # counted in float32; half of it in a type of 16 bits
        "kept_gib_16_bit": sum(storage.nbytes() for storage in kept.values()) / 2 / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Count what sharing the clean forward's work leaves to do.")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    out = parser.parse_args().out
    found = {name: counted(build) for name, build in DENOISERS.items()}
    table = Table("denoiser", "heads", "TFLOP whole", "edited, mean", "whole / edited", "left, by site", "kept, GiB")
    for name, row in found.items():
        numbers = (f"{row[key]:.2f}" for key in ("whole_tflops", "edited_tflops", "ratio"))
        table.add_row(
            name,
            f"{row['heads']:.0f}",
            *numbers,
            f"{row['least_left']:.0%} to {row['most_left']:.0%}",
            f"{row['kept_gib_16_bit']:.1f}",
        )
    Console(width=120).print(table)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "sharing-counted.json"
    path.write_text(json.dumps({"versions": versions(), "denoisers": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
