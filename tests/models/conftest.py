"""Tests of whole models run on one thread."""

import pytest
import torch

import tiny


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny tensors are not worth threads, which a busy machine would let wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def unet():
    """A model in pixel space, with 4 heads at each of 2 sites."""
    return tiny.ddpm().unet


@pytest.fixture(scope="module")
def sample():
    """Noisy images for it."""
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def diffusion():
    """A text-to-image pipeline."""
    return tiny.stable_diffusion()
