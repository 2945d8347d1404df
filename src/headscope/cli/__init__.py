"""The command line: study, sweep, report, compare, train, bench, doctor.

Reading order: common (options and errors), then a file for each group of commands: studies, sweeps, models,
and examination (doctor). Packages that take long to import are imported by the command that needs them.
"""

from typing import Annotated

import typer
from rich.console import Console

from headscope._version import __version__
from headscope.cli import models, studies, sweeps
from headscope.cli.common import clear_errors

app = typer.Typer(
    help="See and edit what every attention head of a diffusion model does.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(sweeps.commands, name="sweep", invoke_without_command=True)
for _command in (studies.study, studies.report, studies.compare, models.train, models.bench):
    app.command()(_command)


@app.command()
def doctor() -> None:
    """Versions, devices, and which backends are available here or why they are not."""
    with clear_errors():
        from headscope.cli.examination import examination

        output = Console()
        for part in examination():
            output.print(part, highlight=False)


def _show_version(show: bool) -> None:
    if show:
        print(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """See and edit what every attention head of a diffusion model does."""


def main() -> None:
    app()
