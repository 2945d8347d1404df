"""Tiny pipelines on disk, as `--model DIR` takes them, one of each family that sweeps know."""

import pytest

import tiny

FAMILIES = {
    "stable_diffusion": tiny.stable_diffusion,
    "stable_diffusion_xl": tiny.stable_diffusion_xl,
    "stable_diffusion_3": lambda: tiny.stable_diffusion_3(layers=3),
    "flux": lambda: tiny.flux(double=2, single=2, guidance=True),
}


@pytest.fixture(scope="session")
def family_directory(tmp_path_factory):
    """The directory of a family's pipeline, saved when it is first asked for."""
    saved = {}

    def directory(family: str) -> str:
        if family not in saved:
            path = tmp_path_factory.mktemp(family)
            FAMILIES[family]().save_pretrained(path)
            saved[family] = str(path)
        return saved[family]

    return directory
