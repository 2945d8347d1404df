"""A smoke check of attribution on SDXL, SD3 and Flux, with random weights.

It shows that g and c are what they are defined to be on these families, and that g + c ranks heads about as exact zero
ablation does. It says nothing of how well g + c does on trained models (test_gradients does, on the bundled one): a
model that was never trained isn't at an optimum, so g alone ranks heads well here, and the part of the second order
that c leaves out, the error times the prediction's curvature, isn't small.
"""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import tiny
from headscope import HeadEdit, Scope, Task
from tiny import pictures

TIMESTEPS = (200, 600)
STEP = 0.05
FAMILIES = {
    "xl": tiny.stable_diffusion_xl,
    "sd3": lambda: tiny.stable_diffusion_3(layers=3),
    "flux": lambda: tiny.flux(double=2, single=1),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_attribution_against_exact_ablation(family):
    task = Task.of(FAMILIES[family]())
    scope = Scope(task.denoiser)
    items = pictures(2)
    found = scope.attribute(task, items, TIMESTEPS, cotangents=16)
    exact, slope, squares = (np.zeros(found.g.shape) for _ in range(3))
    for column, timestep in enumerate(TIMESTEPS):
        inputs = task.noisy_inputs(task.prepare(items), timestep)

        def prediction(site, head, gate, inputs=inputs):
            gates = torch.ones(1, scope.site(site).heads)
            gates[:, head] = gate
            with torch.inference_mode(), scope.edit({site: HeadEdit(gates)}):
                return task.predict(inputs).double()

        def loss(answer, inputs=inputs):
            return (answer - inputs.target).square().flatten(1).mean(1)

        for index, (site, head) in enumerate(found.heads):
            exact[:, column, index] = loss(prediction(site, head, 0.0)).numpy() - found.loss[:, column]
            behind, ahead = (prediction(site, head, 1 + sign * STEP) for sign in (-1, 1))
            slope[:, column, index] = (loss(behind) - loss(ahead)).numpy() / (2 * STEP)
            squares[:, column, index] = ((ahead - behind) / (2 * STEP)).square().flatten(1).mean(1).numpy()
    # float32's rounding of a loss of about 1, over the step; and the third order
    np.testing.assert_allclose(found.g, slope, rtol=0.02, atol=2e-6 / STEP)
    # a head's c has a relative standard deviation of sqrt(2 / 16) = 0.35, and its sum over heads and items of less
    assert found.c.sum() == pytest.approx(squares.sum(), rel=0.35)
    correlation = float(spearmanr((found.g + found.c).ravel(), exact.ravel()).statistic)
    print(f"{family}: c {found.c.sum() / squares.sum():.2f} of its expectation, Spearman {correlation:.3f}")
    assert correlation > 0.9
