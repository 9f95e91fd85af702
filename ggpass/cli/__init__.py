"""The command line, `ggpass inspect | compile | shape | pack | export …`; each command is a file here."""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ggpass.cli.bench import bench_command
from ggpass.cli.compile import compile_command, export_command, lower_onnx_command
from ggpass.cli.console import as_options, stderr, stdout
from ggpass.cli.inspect import inspect_command
from ggpass.cli.pack import pack_command, unpack_command
from ggpass.cli.shape import shape_command
from ggpass.errors import GgpassError
from ggpass.formats import FORMATS
from ggpass.targets import TARGETS

app = typer.Typer(
    name="ggpass",
    help="A compiler for neural networks with generalized-Gaussian priors: 8-bit weights, small and fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("inspect")(inspect_command)
app.command("compile")(compile_command)
app.command("shape")(shape_command)
app.command("pack")(pack_command)
app.command("unpack")(unpack_command)
app.command("export")(export_command)
app.command("lower-onnx")(lower_onnx_command)
app.command("bench")(bench_command)


@app.command("targets")
def targets_command() -> None:
    """List the targets, and for each that cannot be used here the reason.

    A target string is FORMAT-DEVICE, as in `rf8-cpu`.
    """
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("device", style="bold")
    table.add_column("target strings")
    table.add_column("here")
    for device in TARGETS.values():
        reason = device.unavailable()
        strings = ", ".join(f"{name}-{device.name}" for name in FORMATS)
        table.add_row(device.name, strings, f"[red]no: {escape(reason)}[/]" if reason else "[green]yes[/]")
    stdout().print(table)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("ggpass")
        except PackageNotFoundError:  # run from a checkout that is not installed
            from ggpass import __version__ as number
        typer.echo(f"ggpass {number}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, 1 with one line on stderr for an error ggpass raises, 2 for wrong usage."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="ggpass")
    except (GgpassError, OSError) as error:
        console = stderr()
        # Wrapped at words in a terminal; one line for whatever reads a pipe.
        wrap = not console.is_terminal
        console.print(f"[bold red]error:[/] [red]{escape(as_options(str(error)))}[/]", soft_wrap=wrap, highlight=False)
        sys.exit(1)
