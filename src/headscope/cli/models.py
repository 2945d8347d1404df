"""`headscope train` and `headscope bench`."""

from pathlib import Path
from typing import Annotated

import typer

from headscope._files import local_path
from headscope.cli.common import Device, DType, Quiet, clear_errors, console, escaped, need


def train(
    out: Annotated[
        Path, typer.Option(help="The training run's directory; an unfinished run there is gone on with.")
    ] = (Path("headscope-train")),
    model: Annotated[str, typer.Option(help="pixeldit (a transformer) or unet.")] = "pixeldit",
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 8000,
    minutes: Annotated[float | None, typer.Option(help="Stop after so many minutes, at the end of a step.")] = None,
    seed: Annotated[int, typer.Option(help="Of the initial weights, the batches and the noise.")] = 0,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the forward pass: float32, or bfloat16 by autocast.")] = "float32",
    export: Annotated[
        Path | None, typer.Option(help="Write the weights and the model card there when training is done.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train a bundled model on the zoo's image groups; resumable."""
    with clear_errors():
        need("study", "diffusers", "skimage", "PIL")
        if export is not None:
            local_path("export", export)
        from headscope.zoo.train import TrainConfig
        from headscope.zoo.train import train as run_training

        result = run_training(
            TrainConfig(
                out=out,
                model=model,
                steps=steps,
                minutes=minutes,
                seed=seed,
                device=device,
                dtype=dtype,
                progress=not quiet,
            )
        )
        console.print(f"trained {result.step} of {steps} steps  {escaped(str(out))}", highlight=False)
        if export is not None:
            from headscope.zoo.card import export as export_model

            export_model(out, export)
            from headscope.demonstration import describe_heads

            describe_heads(export, out / "heads", progress=not quiet, console=console)
            console.print(f"model   {escaped(str(export))}", highlight=False)


def bench(
    model: Annotated[
        list[str] | None, typer.Option(help="bundled, sd15, sdxl or flux; may be repeated. Default: all.")
    ] = None,
    full: Annotated[
        bool | None, typer.Option("--full/--small", help="Real configurations, or stand-ins. Default: full on a GPU.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Every way of running runs once in each.")] = 11,
    out: Annotated[Path, typer.Option(help="Where the numbers and the plot go.")] = Path("headscope-bench"),
    device: Device = "cpu",
    dtype: DType = "float32",
) -> None:
    """Speed, memory and operations of denoisers: stock, recorded, edited, and with a hook that stores attention."""
    with clear_errors():
        need("study", "diffusers", "pyarrow", "plotly")
        from headscope.bench import DENOISERS, Settings, run_bench

        settings = Settings(tuple(model or DENOISERS), device, dtype, full, rounds)
        path = run_bench(settings, out, console)
        console.print(
            f"numbers {escaped(str(path))}\nplot    {escaped(str(path.with_suffix('.html')))}", highlight=False
        )
