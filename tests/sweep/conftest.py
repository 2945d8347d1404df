"""Tiny pipelines on disk, as `--model DIR` takes them."""

import pytest

import tiny


@pytest.fixture(scope="session")
def ddpm_directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("ddpm")
    tiny.ddpm(size=32).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def diffusion_directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("stable_diffusion")
    tiny.stable_diffusion().save_pretrained(path)
    return str(path)
