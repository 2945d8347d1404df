"""Operations that sharing the clean forward leaves to a sweep of every head, against whole forwards; counted.

    python bench/sharing.py [--out bench/results]

For each denoiser, at its real size and resolution: the operations of one whole forward of a row, and of a row in which
one head of a site is edited and the clean outputs before that site are used again, averaged over all heads; and the
memory of one item's clean outputs, which are stored for edits of every site, in a type of 16 bits. No
weight is allocated (torch's meta device), so nothing is timed: a speed-up is at most the ratio. Which calls can be left
out is learned on a stand-in of the same depth and a fraction of the width, whose forwards are really run and checked.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from headscope.bench import records
from headscope.bench.configurations import CONFIGURATIONS, DEEP, FULL, Configuration
from headscope.models import Scope
from headscope.sweep.compute.sharing import Prefix

Build = Callable[[str], Configuration]

TITLES = {
    "sd15": "SD 1.5, 512 px",
    "sdxl": "SDXL, 1024 px",
    "sd3": "SD3 medium, 1024 px",
    "flux": "Flux.1-dev, 1024 px",
}


def learned(build: Build) -> tuple[Prefix, dict[str, int]]:
    """The calls that edits of each site don't change, and each site's heads."""
    torch.manual_seed(0)
    built = build(DEEP)
    model = built.model
    model.eval().requires_grad_(False)
    heads = {site.name: site.heads for site in Scope(model).sites}
    given = built.inputs(2)

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


def counted(build: Build) -> dict[str, float]:
    """Operations of a forward of one row: whole, and edited, on average over heads."""
    prefix, heads = learned(build)
    with torch.device("meta"):
        built = build(FULL)
        given = built.inputs(1)
        rows = torch.zeros(1, dtype=torch.long)
    model = built.model.eval().requires_grad_(False)
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
    stored = {leaf.untyped_storage()._cdata: leaf.untyped_storage() for leaf in tree_leaves(full._values)}
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
        "kept_gib_16_bit": sum(storage.nbytes() for storage in stored.values()) / 2 / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Count what sharing the clean forward's work leaves to do.")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    out = parser.parse_args().out
    found = {TITLES[name]: counted(build) for name, build in CONFIGURATIONS.items()}
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
    records.write(out / "sharing-counted.json", {**records.software(), "denoisers": found})


if __name__ == "__main__":
    main()
