"""Runs a denoiser, and looks at what a Scope left in it."""

import torch


def run(unet, sample, timestep=7):
    with torch.inference_mode():
        return unet(sample, timestep, return_dict=False)[0]


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
