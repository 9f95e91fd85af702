"""`ggpass targets`: what a model can be compiled for, and what is missing where it cannot."""

from ggpass.cli.console import stdout


def targets_command() -> None:
    """List the targets, and for each that cannot be used here the reason.

    A target string is FORMAT-DEVICE, as in `rf8-cpu`.
    """
    from rich.markup import escape
    from rich.table import Table

    from ggpass.formats import FORMATS
    from ggpass.targets import TARGETS

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("device", style="bold")
    table.add_column("target strings")
    table.add_column("here")
    for device in TARGETS.values():
        reason = device.unavailable()
        strings = ", ".join(f"{name}-{device.name}" for name in FORMATS)
        table.add_row(device.name, strings, f"[red]no: {escape(reason)}[/]" if reason else "[green]yes[/]")
    stdout().print(table)
