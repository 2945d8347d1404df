"""`headscope study`, `headscope report` and `headscope compare`."""

from pathlib import Path
from typing import Annotated

import typer

from headscope.cli.common import Batch, Device, DType, Quiet, Seed, clear_errors, console, escaped, need


def study(
    out: Annotated[Path, typer.Option(help="The study's directory; an unfinished study there is gone on with.")] = Path(
        "headscope-study"
    ),
    model: Annotated[str, typer.Option(help="Bundled: pixeldit (a transformer), unet or planted:NAME.")] = "pixeldit",
    items: Annotated[int, typer.Option(help="Items of each group and split whose entropies are observed.")] = 20,
    discover_items: Annotated[int, typer.Option(help="Items on which every head is ablated, to select some.")] = 20,
    confirm_items: Annotated[int, typer.Option(help="Items on which the selected heads are tested.")] = 20,
    draws: Annotated[int | None, typer.Option(help="Draws of noise of each item; 2, with --full 4.")] = None,
    full: Annotated[bool, typer.Option("--full", help="All of it, which takes several times as long.")] = False,
    device: Device = "cpu",
    dtype: DType = "float32",
    batch: Batch = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """The whole study on a bundled model: entropies, ablations, statistics, and a page to read."""
    with clear_errors():
        need("study", "scipy", "skimage", "plotly", "jinja2", "PIL", "polars", "diffusers")
        from headscope.demonstration import StudyConfig, run_study

        config = StudyConfig(
            model=model,
            items=items,
            discover_items=discover_items,
            confirm_items=confirm_items,
            draws=draws,
            full=full,
            seed=seed,
            device=device,
            dtype=dtype,
        )
        page = run_study(config, out, batch=batch, progress=not quiet, console=console)
        console.print(f"report  {escaped(str(page))}\ntables  {escaped(str(out / 'tables'))}", highlight=False)


def report(directory: Annotated[Path, typer.Argument(help="A study's or a sweep's directory.")]) -> None:
    """Write report.html for a study or a sweep, from what is finished."""
    with clear_errors():
        need("study", "scipy", "plotly", "jinja2", "PIL", "polars")
        from headscope.demonstration import is_study, report_study, report_sweep

        page = report_study(directory) if is_study(directory) else report_sweep(directory)
        console.print(f"report  {escaped(str(page))}", highlight=False)


def compare(
    first: Annotated[Path, typer.Argument(help="A finished sweep's or study's directory.")],
    second: Annotated[Path, typer.Argument(help="Another, of another model or checkpoint, on the same images.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("compare.html"),
) -> None:
    """Compare two finished runs, the second minus the first, on what both have, and write a page."""
    with clear_errors():
        need("study", "scipy", "plotly", "jinja2", "PIL", "polars", "diffusers")
        from headscope.demonstration import compare_runs

        page = compare_runs(first, second, out)
        console.print(f"comparison  {escaped(str(page))}", highlight=False)
