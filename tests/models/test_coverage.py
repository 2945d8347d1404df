"""Every diffusers class that reaches scaled_dot_product_attention: recorded, edited, and listed in docs/coverage.md."""

import pytest

from configurations import CASES
from configurations.examine import class_of, examine
from configurations.reach import WITHOUT_ENTRY, reaching_classes
from configurations.table import PAGE, head, hooks, row, without_entry

GATING = [
    "UNet2DModel",
    "UNet2DConditionModel",
    "UNet2DConditionModel, SD2-like",
    "UNet2DConditionModel, SDXL-like",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
]


def lines() -> list[str]:
    return PAGE.read_text().splitlines()


@pytest.mark.full
def test_no_class_is_forgotten():
    assert {class_of(name) for name in CASES} | set(WITHOUT_ENTRY) == reaching_classes()


@pytest.mark.full
def test_the_page_lists_every_entry():
    assert PAGE.read_text().startswith(head())
    classes = PAGE.read_text().removesuffix(hooks()).splitlines()
    names = [line.split(" | ")[0].removeprefix("| ") for line in classes if line.startswith("| ")]
    assert names == ["class", *CASES, *sorted(WITHOUT_ENTRY)]
    assert all(without_entry(name) in lines() for name in WITHOUT_ENTRY)


@pytest.mark.parametrize("name", GATING)
def test_gating_families(name):
    found = examine(name, CASES[name])
    assert found.calls > 0
    assert (found.output, found.entropy, found.recorded, found.removal) == ("", "", "", "")
    assert not found.unseen
    assert not found.outside
    assert row(name, found) in lines()


@pytest.mark.full
# diffusers' own: Mochi asks for autocast to float32, others for what torch deprecates
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", [name for name in CASES if name not in GATING])
def test_every_class(name):
    """Whatever fails or can't be seen is on the page, word for word; nothing is recorded silently less."""
    assert row(name, examine(name, CASES[name])) in lines()
