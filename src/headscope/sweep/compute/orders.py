"""Orders of heads from what needs no removal of any: gradients, sizes of outputs, chance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from headscope.counter import counter_permutation
from headscope.models import Recording
from headscope.models.editing.edits import Fill
from headscope.models.recording.recording import HEAD_OUTPUT
from headscope.sweep.compute.context import Context
from headscope.sweep.plan.items import PromptItem, SweptItem, source_weights
from headscope.sweep.plan.units import Advance

ATTRIBUTION, INTEGRATED, MAGNITUDE, RANDOM = "attribution", "integrated", "magnitude", "random"
RANDOM_ORDERS = 4
# of the path on which all gates go from 1 to 0 together
PATH_POINTS = 5

Items = Sequence[SweptItem | PromptItem]
Heads = Sequence[tuple[str, int]]


def forwards_of_orders(cotangents: int) -> int:
    """How many rows pass through the denoiser for an item and timestep: backwards count twice."""
    return 1 + (3 + 2 * cotangents) + 3 * PATH_POINTS


def orders_of(context: Context, items: Items, fill: Fill, heads: Heads, advance: Advance) -> dict[str, list[int]]:
    """Orders of heads, the most important first, by name; each lists the places of all heads.

    - attribution: g + c of `Scope.attribute`, relative to the clean loss at every timestep, averaged over timesteps.
    - integrated: the same of the gradient integrated along the path on which all gates go from 1 to 0 together.
    - magnitude: the norm over the head's dimensions of what the fill takes away (output - fill where the fill is a mean
      or zeros, else the output), averaged over queries, items and timesteps.
    - random 1, 2, ...: drawn by the counter from the sweep's seed.

    Items count by their sources. Equal heads stay in the order of execution.
    """
    weights = source_weights(items)
    scores = {**_attributed(context, items, fill, heads, weights, advance)}
    scores[MAGNITUDE] = _magnitudes(context, items, fill, heads, weights, advance)
    # what overflowed comes last
    orders = {
        name: np.argsort(-np.nan_to_num(score, nan=-np.inf), kind="stable").tolist() for name, score in scores.items()
    }
    for number in range(1, RANDOM_ORDERS + 1):
        drawn = counter_permutation("circuit", number, context.config.seed, count=len(heads))
        orders[f"{RANDOM} {number}"] = [int(place) for place in drawn]
    return orders


def _attributed(
    context: Context, items: Items, fill: Fill, heads: Heads, weights: np.ndarray, advance: Advance
) -> dict[str, np.ndarray]:
    """By order, every head's score."""
    config, timesteps = context.config, context.plan.timesteps
    sites = list(dict.fromkeys(site for site, _ in heads))
    pieces: dict[int, dict[str, np.ndarray]] = {}
    each = len(timesteps) * (forwards_of_orders(config.cotangents) - 1)
    columns: list[int] = []

    def attribute(piece: range) -> None:
        found = context.loss_scope.attribute(
            context.task,
            [items[index] for index in piece],
            timesteps,
            sites=sites,
            cotangents=config.cotangents,
            fill=fill,
            replicate=config.seed,
            integrate=PATH_POINTS,
            batch=len(piece),
        )
        assert found.integrated is not None
        columns[:] = [found.heads.index(head) for head in heads]
        pieces[piece.start] = {"loss": found.loss, ATTRIBUTION: found.g + found.c, INTEGRATED: found.integrated}
        advance(each * len(piece))

    context.rows.run(len(items), attribute)
    joined = {name: np.concatenate([pieces[start][name] for start in sorted(pieces)]) for name in pieces[0]}
    loss = np.tensordot(weights, joined.pop("loss"), 1)
    return {
        name: (np.tensordot(weights, values[:, :, columns], 1) / loss[:, None]).mean(0)
        for name, values in joined.items()
    }


def _magnitudes(
    context: Context, items: Items, fill: Fill, heads: Heads, weights: np.ndarray, advance: Advance
) -> np.ndarray:
    """Every head's magnitude: see `orders_of`."""
    scope = context.loss_scope
    sites = list(dict.fromkeys(site for site, _ in heads))
    total = np.zeros(len(heads))

    for timestep in context.plan.timesteps:
        parts: dict[int, np.ndarray] = {}

        def measure(piece: range, timestep=timestep, parts=parts) -> None:
            some = [items[index] for index in piece]
            with torch.inference_mode(), scope.record(HEAD_OUTPUT, reduce=None, sites=sites) as recording:
                context.task.predict(context.noisy_inputs(context.prepared(some), timestep))
            norms = _norms(recording, fill)
            parts[piece.start] = np.stack([norms[site][:, head] for site, head in heads], 1)
            advance(len(piece))

        context.rows.run(len(items), measure)
        total += weights @ np.concatenate([parts[start] for start in sorted(parts)])
    return total


def _norms(recording: Recording, fill: Fill) -> dict[str, np.ndarray]:
    """By site, the mean over queries of the norms of its heads' outputs less their fill: [items, heads]."""
    found: dict[str, np.ndarray] = {}
    for key in recording.tensors.kept():
        output = recording.samples(*key[:5]).double()
        if isinstance(fill, Recording):
            output = output - fill.mean(HEAD_OUTPUT, *key[1:5]).to(output.device)
        # of several rows to an item, the mean over rows as well
        norm = output.norm(dim=-1).mean(-1)
        norm = norm.mean(1) if norm.ndim == 3 else norm
        found[key.site] = found.get(key.site, 0.0) + norm.cpu().numpy()
    return found
