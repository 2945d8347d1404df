"""`headscope sweep` and its commands: status, verify, sheet, retry."""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from headscope._files import local_path
from headscope.cli.common import Batch, Device, DType, Quiet, Seed, clear_errors, console, escaped, need

commands = typer.Typer(help="Observe every head and ablate each in turn, over images and timesteps, into Parquet.")

Workers = Annotated[int, typer.Option(help="Processes that work on it; with GPUs, one each.")]
Executor = Annotated[
    str | None, typer.Option(help="local, processes, ray or slurm. Default: local, or processes for several workers.")
]
Address = Annotated[str | None, typer.Option(help="Of a running Ray cluster; default: Ray on this machine.")]
Job = Annotated[
    list[str] | None,
    typer.Option(help="Of Slurm jobs, as submitit names it: timeout_min=600, slurm_partition=gpu; may be repeated."),
]
# a plan's file replaces these options
PLANNED = (
    "model",
    "prompts",
    "group",
    "timesteps",
    "fill",
    "score",
    "no_ablation",
    "attribute",
    "kind",
    "feature",
    "items",
    "generate_steps",
    "device",
    "dtype",
    "seed",
    "draws",
)


@commands.callback(invoke_without_command=True)
def sweep(
    context: typer.Context,
    plan: Annotated[Path | None, typer.Option(help="A TOML file that says it all, in place of the options.")] = None,
    model: Annotated[
        str,
        typer.Option(help="pixeldit, unet, untrained:NAME, planted:NAME, or a directory with a diffusers pipeline."),
    ] = "pixeldit",
    prompts: Annotated[str | None, typer.Option(help="A text file with a prompt per line.")] = None,
    group: Annotated[
        list[str] | None, typer.Option(help="A zoo group, or NAME=DIR for a folder of images; may be repeated.")
    ] = None,
    timesteps: Annotated[
        str | None, typer.Option(help="Comma-separated; default: three, evenly spaced in log-SNR.")
    ] = None,
    fill: Annotated[
        list[str] | None,
        typer.Option(help="mean, zero, uniform, identity or resample; may be repeated. Default: mean and zero."),
    ] = None,
    score: Annotated[
        list[str] | None,
        typer.Option(
            help="loss, distance, x0, generate, 'on FEATURE' (the loss of its pixels, as in 'on edge') or"
            " module:function; may be repeated. Default: loss."
        ),
    ] = None,
    no_ablation: Annotated[bool, typer.Option("--no-ablation", help="Observe entropies only.")] = False,
    attribute: Annotated[
        bool, typer.Option("--attribute", help="Every head's importance from a few backwards, beside the ablations.")
    ] = False,
    kind: Annotated[
        list[str] | None, typer.Option(help="A further table, of a kind of unit that must be named; may be repeated.")
    ] = None,
    feature: Annotated[
        list[str] | None,
        typer.Option(help="A feature of your own, module:function, for the kind features and scores; may be repeated."),
    ] = None,
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
    draws: Annotated[int, typer.Option(help="Noise replicates of every item, from the seed on.")] = 1,
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
    with clear_errors():
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
            kinds=tuple(kind or ()),
            features=tuple(feature or ()),
            seed=seed,
            draws=draws,
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
    need("diffusers", "diffusers", "polars", "pyarrow")
    import polars as pl

    from headscope.sweep import Execution, run_sweep

    local_path("out", out)
    if dry_run:
        from headscope.sweep.compute.estimate import estimate_sweep

        _print_estimate(estimate_sweep(config, Execution(rows=batch)), workforce.count)
        return
    run = run_sweep(config, out, batch=batch, workers=workforce, progress=not quiet, console=console)
    for kind in run.tables:
        rows = run.table(kind).select(pl.len()).collect().item()
        console.print(f"{kind:<15} {rows:>9,} rows  {escaped(str(out / kind))}", highlight=False)
    console.print(f"to read it: headscope report {escaped(str(out))}", highlight=False)


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


@commands.command()
def status(directory: RunDirectory) -> None:
    """How far a sweep is, what works on it, and what failed."""
    with clear_errors():
        from headscope.sweep import Run

        found = Run.open(directory).status()
        output = Console()
        table = Table("kind", "finished", "units")
        for kind, (done, units) in found.units.items():
            table.add_row(kind, f"{done:,}", f"{units:,}")
        output.print(table)
        output.print(f"forwards: {found.forwards[0]:,} of {found.forwards[1]:,}", highlight=False)
        for unit, owner in found.running.items():
            output.print(f"running: {unit[:12]} by {escaped(owner)}", highlight=False, soft_wrap=True)
        for unit, error in found.failed.items():
            line = error.strip().splitlines()[-1]
            output.print(f"failed: {unit[:12]}: {escaped(line)}", highlight=False, soft_wrap=True)
        if found.failed:
            output.print(f"to try them again: headscope sweep retry {escaped(str(directory))}", highlight=False)
        elif not found.complete and not found.running:
            output.print("nobody works on it: the command that began it goes on where it stopped", highlight=False)


@commands.command()
def verify(directory: RunDirectory) -> None:
    """Read every file of a sweep to its end; exit 1 where something is missing, torn or not its own."""
    with clear_errors():
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
                output.print(f"{problem}: {escaped(name)}", highlight=False, soft_wrap=True)
    if not found.sound:
        raise typer.Exit(1)


@commands.command()
def sheet(directory: RunDirectory) -> None:
    """Contact sheets of a sweep's generated images: clean, and with the heads removed that change them most."""
    with clear_errors():
        from headscope.sweep import Run
        from headscope.sweep.store.sheet import write_contact_sheets

        for path in write_contact_sheets(Run.open(directory)):
            console.print(f"sheet  {escaped(str(path))}", highlight=False)


@commands.command()
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
    with clear_errors():
        from headscope.sweep import Execution, Run, SweepConfig

        run = Run.open(directory)
        config = SweepConfig.from_json(run.manifest.get("config"))
        # what can't be is refused before anything is forgotten
        Execution(rows=batch)
        workforce = _workforce(workers, executor, address, job)
        run.mend()
        _run(config, directory, batch, workforce, quiet)


def _integers(name: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name}: got {text!r}, expected integers separated by commas") from None
