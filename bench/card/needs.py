"""The packages that stages need beyond torch, Triton, NumPy, pytest and pytest-xdist, and which are missing here."""

import importlib.util
import sys

from card.stage import ROOT

# package -> (module, stages)
NEEDS = {
    "diffusers": ("diffusers", "model sweep"),
    "pyarrow": ("pyarrow", "model sweep"),
    "rich": ("rich", "model sweep"),
    "polars": ("polars", "sweep"),
    "transformers": ("transformers", "sweep"),
}


def constraints() -> dict[str, str]:
    """Versions as constraints.txt has them."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def show() -> None:
    versions = constraints()
    for package, (module, stages) in NEEDS.items():
        wanted = f"{package}=={versions[package]}" if package in versions else package
        here = "here" if importlib.util.find_spec(module) else "MISSING"
        print(f"{wanted:24} {here:8} {stages}")
    sys.stdout.flush()
