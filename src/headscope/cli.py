"""The command line: study, sweep, report, train, bench, doctor."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from headscope._files import local_path
from headscope._signals import INTERRUPTED, TERMINATED, Terminated, sigterm_interrupts
from headscope._version import __version__

app = typer.Typer(
    help="See and edit what every attention head of a diffusion model does.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
sweeps = typer.Typer(help="Observe every head and ablate each in turn, over images and timesteps, into Parquet.")
app.add_typer(sweeps, name="sweep", invoke_without_command=True)
console = Console(stderr=True)

Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, ...")]
DType = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Batch = Annotated[
    int | None, typer.Option(help="Rows that pass through the denoiser at once, at most; default: what fits.")
]
Seed = Annotated[int, typer.Option(help="The noise replicate: the same seed gives the same noise everywhere.")]
Workers = Annotated[int, typer.Option(help="Processes that work on it; with GPUs, one each.")]
Executor = Annotated[
    str | None, typer.Option(help="local, processes, ray or slurm. Default: local, or processes for several workers.")
]
Address = Annotated[str | None, typer.Option(help="Of a running Ray cluster; default: Ray on this machine.")]
Job = Annotated[
    list[str] | None,
    typer.Option(help="Of Slurm jobs, as submitit names it: timeout_min=600, slurm_partition=gpu; may be repeated."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]


@contextmanager
def _clear_errors() -> Iterator[None]:
    """One line instead of a traceback for what a user can mend; HEADSCOPE_TRACEBACK=1 shows all of it. SIGTERM is as
    Ctrl-C."""
    try:
        with sigterm_interrupts():
            yield
    except (ValueError, TypeError, KeyError, ImportError, RuntimeError, OSError) as error:
        if os.environ.get("HEADSCOPE_TRACEBACK") == "1":
            raise
        console.print(f"[bold red]error[/] {_escaped(_sentence(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt as error:
        console.print("stopped; what is finished is kept, and the same command goes on from there")
        raise typer.Exit(TERMINATED if isinstance(error, Terminated) else INTERRUPTED) from None


def _sentence(error: Exception) -> str:
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _escaped(text: str) -> str:
    """Text that a terminal shows as it is: neither markup nor characters that would steer it."""
    from rich.markup import escape

    # names of files may be anything
    readable = text.encode("utf-8", "backslashreplace").decode()
    return escape("".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in readable))


@app.command()
def study(
    out: Annotated[Path, typer.Option(help="The study's directory; an unfinished study there is gone on with.")] = Path(
        "headscope-study"
    ),
    items: Annotated[int, typer.Option(help="Items of each group and split whose entropies are observed.")] = 20,
    discover_items: Annotated[int, typer.Option(help="Items on which every head is ablated, to select some.")] = 16,
    confirm_items: Annotated[int, typer.Option(help="Items on which the selected heads are tested.")] = 20,
    device: Device = "cpu",
    dtype: DType = "float32",
    batch: Batch = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """The whole study on the bundled model: entropies, ablations, statistics, and a page to read."""
    with _clear_errors():
        from headscope._extras import require

        for module in ("scipy", "skimage", "plotly", "jinja2", "PIL", "polars", "diffusers"):
            require(module, "study")
        from headscope.demonstration import StudyConfig, run_study

        config = StudyConfig(
            items=items,
            discover_items=discover_items,
            confirm_items=confirm_items,
            seed=seed,
            device=device,
            dtype=dtype,
        )
        page = run_study(config, out, batch=batch, progress=not quiet, console=console)
        console.print(f"report  {_escaped(str(page))}\ntables  {_escaped(str(out / 'tables'))}", highlight=False)


@sweeps.callback(invoke_without_command=True)
def sweep(
    context: typer.Context,
    plan: Annotated[Path | None, typer.Option(help="A TOML file that says it all, in place of the options.")] = None,
    model: Annotated[str, typer.Option(help='"builtin", or a directory with a diffusers pipeline.')] = "builtin",
    prompts: Annotated[str | None, typer.Option(help="A text file with a prompt per line.")] = None,
    group: Annotated[
        list[str] | None, typer.Option(help="A zoo group, or NAME=DIR for a folder of images; may be repeated.")
    ] = None,
    timesteps: Annotated[
        str | None, typer.Option(help="Comma-separated; default: three, evenly spaced in log-SNR.")
    ] = None,
    fill: Annotated[
        list[str] | None, typer.Option(help="mean, zero, uniform or identity; may be repeated. Default: mean and zero.")
    ] = None,
    score: Annotated[
        list[str] | None,
        typer.Option(help="loss, distance, x0, generate or module:function; may be repeated. Default: loss."),
    ] = None,
    no_ablation: Annotated[bool, typer.Option("--no-ablation", help="Observe entropies only.")] = False,
    attribute: Annotated[
        bool, typer.Option("--attribute", help="Every head's importance from a few backwards, beside the ablations.")
    ] = False,
    items: Annotated[
        int | None,
        typer.Option(help="Items of each group and split, all of which must be there; default: 20, or what there is."),
    ] = None,
    generate_steps: Annotated[int, typer.Option(help="Sampling steps of the generate score.")] = 10,
    out: Annotated[Path, typer.Option(help="The run directory; an unfinished run there is gone on with.")] = Path(
        "headscope-run"
    ),
    device: Device = "cpu",
    dtype: DType = "float32",
    batch: Batch = None,
    seed: Seed = 0,
    workers: Workers = 1,
    executor: Executor = None,
    address: Address = None,
    job: Job = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would take, from a short calibration.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Observe every head and ablate each in turn, over images and timesteps, into Parquet.

    Without a command, runs a sweep, or what is left of it.
    """
    with _clear_errors():
        command = context.invoked_subcommand
        if command is not None:
            asked = [name for name in context.params if _given(context, name)]
            if asked:
                raise ValueError(
                    f"{asked[0]}: got it before the command {command}, expected options of {command} after it"
                )
            return
        from headscope.sweep import SweepConfig

        workforce = _workforce(workers, executor, address, job)
        if plan is not None:
            asked = [name for name in PLANNED if _given(context, name)]
            if asked:
                raise ValueError(f"plan: got {asked[0]} beside it, expected it in the file")
            _run(SweepConfig.from_toml(plan), out, batch, workforce, quiet, dry_run)
            return
        unused = [name for name, given in (("score", score), ("fill", fill and not attribute)) if no_ablation and given]
        if unused:
            raise ValueError(f"{unused[0]}: got some beside --no-ablation, expected one or the other")
        groups = tuple(group) if group else (() if prompts else ("faces", "faces_grey", "lfw", "photographs"))
        config = SweepConfig(
            model=model,
            groups=groups,
            prompts=prompts,
            items=items,
            timesteps=_integers("timesteps", timesteps),
            fills=() if no_ablation and not attribute else tuple(fill or ("mean", "zero")),
            scores=() if no_ablation else tuple(score or ("loss",)),
            generate_steps=generate_steps,
            attribute=attribute,
            seed=seed,
            device=device,
            dtype=dtype,
        )
        _run(config, out, batch, workforce, quiet, dry_run)


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _workforce(workers: int, executor: str | None, address: str | None, job: list[str] | None):
    from headscope.sweep import Workers

    chosen = executor or ("local" if workers == 1 else "processes")
    return Workers(chosen, workers, address=address, parameters=_job_parameters(job or []))


def _run(config, out: Path, batch: int | None, workforce, quiet: bool, dry_run: bool = False) -> None:
    """Run a sweep, or say what it would take, and print the result."""
    from headscope._extras import require

    for module in ("diffusers", "polars", "pyarrow"):
        require(module, "diffusers")
    from headscope.sweep import Execution, run_sweep

    local_path("out", out)
    if dry_run:
        from headscope.sweep.compute.estimate import estimate_sweep

        _print_estimate(estimate_sweep(config, Execution(rows=batch)), workforce.count)
        return
    run = run_sweep(
        config,
        out,
        batch=batch,
        workers=workforce,
        progress=not quiet,
        console=console,
    )
    for kind in run.tables:
        rows = run.table(kind).select("item").collect().height
        console.print(f"{kind:<15} {rows:>9,} rows  {_escaped(str(out / kind))}", highlight=False)
    console.print(f"to read it: headscope report {_escaped(str(out))}", highlight=False)


def _job_parameters(texts: list[str]) -> dict[str, int | str]:
    parameters: dict[str, int | str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ValueError(f"job: got {text!r}, expected NAME=VALUE")
        if name in parameters:
            raise ValueError(f"job: got {name} twice, expected each once")
        parameters[name] = int(value) if value.isdecimal() else value
    return parameters


def _print_estimate(estimate, workers: int) -> None:
    output = Console()
    found = Table("kind", "units", "forwards of one image")
    for kind, (units, forwards) in estimate.units.items():
        found.add_row(kind, f"{units:,}", f"{forwards:,}")
    for note in estimate.notes:
        output.print(note, markup=False, highlight=False, soft_wrap=True)
    output.print(found)
    output.print(estimate.summary(workers), highlight=False, soft_wrap=True)


RunDirectory = Annotated[Path, typer.Argument(help="A sweep's directory.")]


@sweeps.command()
def status(directory: RunDirectory) -> None:
    """How far a sweep is, what works on it, and what failed."""
    with _clear_errors():
        from headscope.sweep import Run

        found = Run.open(directory).status()
        output = Console()
        table = Table("kind", "finished", "units")
        for kind, (done, units) in found.units.items():
            table.add_row(kind, f"{done:,}", f"{units:,}")
        output.print(table)
        output.print(f"forwards: {found.forwards[0]:,} of {found.forwards[1]:,}", highlight=False)
        for unit, owner in found.running.items():
            output.print(f"running: {unit[:12]} by {_escaped(owner)}", highlight=False, soft_wrap=True)
        for unit, error in found.failed.items():
            line = error.strip().splitlines()[-1]
            output.print(f"failed: {unit[:12]}: {_escaped(line)}", highlight=False, soft_wrap=True)
        if found.failed:
            output.print(f"to try them again: headscope sweep retry {_escaped(str(directory))}", highlight=False)
        elif not found.complete and not found.running:
            output.print("nobody works on it: the command that began it goes on where it stopped", highlight=False)


@sweeps.command()
def verify(directory: RunDirectory) -> None:
    """Read every file of a sweep to its end; exit 1 where something is missing, torn or not its own."""
    with _clear_errors():
        from headscope.sweep import Run

        found = Run.open(directory).verify()
        output = Console()
        for kind, rows in found.rows.items():
            output.print(f"{kind:<15} {rows:>11,} rows", highlight=False)
        # of a run that is under way there may be thousands
        missing = Counter(name.partition("/")[0] for name in found.missing)
        for kind, count in missing.items():
            output.print(f"missing: {kind}, {count:,} unit(s) that aren't finished", highlight=False)
        for problem in ("torn", "foreign", "leftovers"):
            for name in getattr(found, problem):
                output.print(f"{problem}: {_escaped(name)}", highlight=False, soft_wrap=True)
    if not found.sound:
        raise typer.Exit(1)


@sweeps.command()
def sheet(directory: RunDirectory) -> None:
    """Contact sheets of a sweep's generated images: clean, and with the heads removed that change them most."""
    with _clear_errors():
        from headscope.sweep import Run
        from headscope.sweep.store.sheet import write_contact_sheets

        for path in write_contact_sheets(Run.open(directory)):
            console.print(f"sheet  {_escaped(str(path))}", highlight=False)


@sweeps.command()
def retry(
    directory: RunDirectory,
    batch: Batch = None,
    workers: Workers = 1,
    executor: Executor = None,
    address: Address = None,
    job: Job = None,
    quiet: Quiet = False,
) -> None:
    """Forget a sweep's failures and torn files, and run what is left of it."""
    with _clear_errors():
        from headscope.sweep import Execution, Run, SweepConfig

        run = Run.open(directory)
        config = SweepConfig.from_json(run.manifest.get("config"))
        # what can't be is refused before anything is forgotten
        Execution(rows=batch)
        workforce = _workforce(workers, executor, address, job)
        run.mend()
        _run(config, directory, batch, workforce, quiet)


# what a plan's file says in place of these options
PLANNED = (
    "model",
    "prompts",
    "group",
    "timesteps",
    "fill",
    "score",
    "no_ablation",
    "attribute",
    "items",
    "generate_steps",
    "device",
    "dtype",
    "seed",
)


def _integers(name: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name}: got {text!r}, expected integers separated by commas") from None


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="A study's or a sweep's directory.")],
) -> None:
    """Write report.html for a study or a sweep, from what is finished."""
    with _clear_errors():
        from headscope._extras import require

        for module in ("scipy", "plotly", "jinja2", "PIL", "polars"):
            require(module, "study")
        from headscope.demonstration import is_study, report_study, report_sweep

        page = report_study(directory) if is_study(directory) else report_sweep(directory)
        console.print(f"report  {_escaped(str(page))}", highlight=False)


@app.command()
def train(
    out: Annotated[
        Path, typer.Option(help="The training run's directory; an unfinished run there is gone on with.")
    ] = (Path("headscope-train")),
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 8000,
    minutes: Annotated[float | None, typer.Option(help="Stop after so many minutes, at the end of a step.")] = None,
    seed: Annotated[int, typer.Option(help="Of the initial weights, the batches and the noise.")] = 0,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the forward pass: bfloat16 (autocast) or float32.")] = "bfloat16",
    export: Annotated[
        Path | None, typer.Option(help="Write the weights and the model card there when training is done.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train the bundled model on the zoo's image groups; resumable."""
    with _clear_errors():
        from headscope._extras import require

        for module in ("diffusers", "skimage", "PIL"):
            require(module, "study")
        if export is not None:
            local_path("export", export)
        from headscope.zoo.train import TrainConfig
        from headscope.zoo.train import train as run_training

        result = run_training(
            TrainConfig(
                out=out, steps=steps, minutes=minutes, seed=seed, device=device, dtype=dtype, progress=not quiet
            )
        )
        console.print(f"trained {result.step} of {steps} steps  {_escaped(str(out))}", highlight=False)
        if export is not None:
            from headscope.zoo.card import export as export_model

            export_model(out, export)
            console.print(f"model   {_escaped(str(export))}", highlight=False)


@app.command()
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
    with _clear_errors():
        from headscope._extras import require

        for module in ("diffusers", "pyarrow", "plotly"):
            require(module, "study")
        from headscope.bench import DENOISERS, Settings, run_bench

        settings = Settings(tuple(model or DENOISERS), device, dtype, full, rounds)
        path = run_bench(settings, out, console)
        console.print(
            f"numbers {_escaped(str(path))}\nplot    {_escaped(str(path.with_suffix('.html')))}", highlight=False
        )


@app.command()
def doctor() -> None:
    """Versions, devices, and which backends are available here or why they are not."""
    with _clear_errors():
        from headscope._doctor import examination

        output = Console()
        for part in examination():
            output.print(part, highlight=False)


def _version(show: bool) -> None:
    if show:
        print(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """See and edit what every attention head of a diffusion model does."""


def main() -> None:
    app()


if __name__ == "__main__":
    sys.exit(main())
