"""A spy on attention inside a pipeline's call, beside headscope: what each row of each call was of, and its entropy."""

from collections import defaultdict
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as functional


class Call(NamedTuple):
    """An attention call: of some of its module's rows, `start` of which came before in the module's run."""

    forward: int
    site: str
    rows: int
    start: int
    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None


class Watched:
    """The record of a run: every attention call, the sites that were perturbed, the timestep of every step."""

    def __init__(self):
        self.calls, self.perturbed, self.timesteps = [], set(), []
        self.forward = -1


@contextmanager
def watched(pipeline, sites, change=None):
    """Every attention call of the sites; `change(call, output)` may change its output."""
    seen, running = Watched(), []
    denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    stock, step = functional.scaled_dot_product_attention, pipeline.scheduler.step

    def spy(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        output = stock(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if not running:
            return output
        name, rows, start = running[-1]
        running[-1][2] += len(query)
        call = Call(seen.forward, name, rows, start, query, key, attn_mask)
        seen.calls.append(call)
        return output if change is None else change(call, output.clone())

    def enter(name, module, args, kwargs):
        own = args[0] if args else kwargs["hidden_states"]
        running.append([name, len(own), 0])
        if type(getattr(module, "processor", None)).__name__.startswith("PAG"):
            seen.perturbed.add(name)

    def count(module, args):
        seen.forward += 1

    def stepped(noise, timestep, *args, **kwargs):
        seen.timesteps.append(float(timestep))
        return step(noise, timestep, *args, **kwargs)

    handles = [denoiser.register_forward_pre_hook(count)]
    for name in sites:
        module = denoiser.get_submodule(name)
        handles.append(
            module.register_forward_pre_hook(lambda *given, name=name: enter(name, *given), with_kwargs=True)
        )
        handles.append(module.register_forward_hook(lambda module, args, output: running.pop() and None))
    functional.scaled_dot_product_attention, pipeline.scheduler.step = spy, stepped
    try:
        yield seen
    finally:
        functional.scaled_dot_product_attention = stock
        del pipeline.scheduler.step
        for handle in handles:
            handle.remove()


def entropies(query, key, mask):
    """The mean over queries, [rows, heads], float64."""
    logits = query.double() @ key.double().mT / query.shape[-1] ** 0.5
    logits = logits if mask is None else logits + mask
    return torch.special.entr(logits.softmax(-1)).sum(-1).mean(-1)


def places(call, branches, samples):
    """Of each of the call's rows: the number of the call in its module's run, the branch and the sample.

    Frames are folded into the rows of a sample, or places of the picture where motion modules attend.
    """
    whole = len(branches) * samples
    fold = call.rows // whole
    for row in range(call.start, call.start + len(call.query)):
        number, place = divmod(row // fold, whole)
        branch, sample = divmod(place, samples)
        yield number, branches[branch], sample


def by_hand(seen, branches, samples, forward=None):
    """{(forward, site, call, branch, sample, head): entropy}, the mean over a sample's rows; of one forward, or all."""
    found = defaultdict(list)
    for call in seen.calls:
        if forward not in (None, call.forward):
            continue
        rows = entropies(call.query, call.key, call.mask).tolist()
        for (number, branch, sample), heads in zip(places(call, branches, samples), rows, strict=True):
            for head, entropy in enumerate(heads):
                found[call.forward, call.site, number, branch, sample, head].append(entropy)
    return {key: sum(values) / len(values) for key, values in found.items()}
