"""Every diffusers class that reaches scaled_dot_product_attention: recorded, edited, and listed in docs/coverage.md."""

import re

import polars as pl
import pytest
import torch

from configurations import CASES
from configurations.examine import class_of, examine, same_entropies
from configurations.reach import WITHOUT_ENTRY, reaching_classes
from configurations.table import PAGE, head, outcome, row, sections, without_entry

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
    classes = PAGE.read_text().removesuffix(sections()).splitlines()
    names = [line.split(" | ")[0].removeprefix("| ") for line in classes if line.startswith("| ")]
    assert names == ["class", *CASES, *sorted(WITHOUT_ENTRY)]
    assert all(without_entry(name) in lines() for name in WITHOUT_ENTRY)


def batches(names: list[str]) -> list:
    """(name, samples): batches of two, and in the full tests of one and three, where the class takes them."""
    quick = [pytest.param(name, 2, id=name) for name in names]
    others = [(name, samples) for samples in (1, 3) for name in names if CASES[name].samples > 1]
    return quick + [pytest.param(*one, id=f"{one[0]}, {one[1]}", marks=pytest.mark.full) for one in others]


@pytest.mark.parametrize(("name", "samples"), batches(GATING))
def test_gating_families(name, samples):
    found = examine(name, CASES[name], samples)
    assert found.calls > 0
    assert (found.output, found.entropy, found.recorded, found.removal) == ("", "", "", "")
    assert not found.unseen
    assert not found.outside
    assert row(name, found) in lines()


@pytest.mark.full
# diffusers' own: Mochi asks for autocast to float32, others for what torch deprecates
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("name", "samples"), batches([name for name in CASES if name not in GATING]))
def test_every_class(name, samples):
    """Whatever fails or can't be seen is on the page, word for word; nothing is recorded silently less."""
    said = row(name, examine(name, CASES[name], samples))
    if samples == 2:
        assert said in lines()
    else:
        assert outcome(said) in [outcome(line) for line in lines() if line.startswith("| ")]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: table, ""),
        # what a table lacks, has twice or has wrong
        (lambda table: table.filter(table["sample"] != 1), "2 of 4 rows .* missing and 0 too many"),
        (lambda table: table.with_columns(sample=1 - pl.col("sample")), r"entropies are off by 1\.0e\+00 nats"),
        (lambda table: table.with_columns(sample=pl.col("sample") + 1), "2 of 4 rows .* missing and 2 too many"),
        (lambda table: table.with_columns(queries=4), "4 queries recorded, expected 3"),
        (lambda table: table.with_columns(entropy_mean=pl.lit(float("nan"))), "entropies are off by nan nats"),
    ],
)
def test_the_comparison_misses_nothing(change, said):
    """Of a call on two samples, two heads and three queries."""
    entropy = torch.tensor([[[0.0] * 3, [0.5] * 3], [[1.0] * 3, [1.5] * 3]], dtype=torch.float64)
    rows = [("a", 0, sample, head, 3, sample + 0.5 * head) for sample in range(2) for head in range(2)]
    schema = ["site", "call", "sample", "head", "queries", "entropy_mean"]
    found = same_entropies({("a", 0): entropy}, change(pl.DataFrame(rows, schema=schema, orient="row")), 2)
    assert re.search(said, found) if said else not found
