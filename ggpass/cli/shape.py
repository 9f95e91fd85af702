"""`ggpass shape`: remap a checkpoint's weights onto a generalized Gaussian of lower shape."""

import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from ggpass.cli.console import progress, stdout

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ggpass.passes.deepshape import DeepShape, ShapeReport


class Mode(StrEnum):
    paper = "paper"
    compensated = "compensated"


class Population(StrEnum):
    model = "model"
    tensor = "tensor"
    channel = "channel"


MODE_HELP = "`paper` also shrinks the scale; `compensated` keeps each weight's energy, so that layer outputs keep size."
GRANULARITY_HELP = "What has one fit and one map: all weights, each weight, or each output channel."
RARE_HELP = "Values that occur less often stay; counted in all weights, in proportion where there are more populations."


def shape_command(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A .safetensors file.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The new .safetensors file; it must not exist yet.")],
    mode: Annotated[Mode, typer.Option(help=MODE_HELP)] = Mode.paper,
    granularity: Annotated[Population, typer.Option(help=GRANULARITY_HELP)] = Population.model,
    shape_ratio: Annotated[float, typer.Option(help="ν of the target to ν of the fit.")] = 0.8,
    scale_ratio: Annotated[float, typer.Option(help="α of the target to α of the fit; `paper` only.")] = 0.6,
    step: Annotated[float, typer.Option(help="The grid that weights are counted on, and moved to.")] = 2.0**-13,
    rare: Annotated[float, typer.Option(help=RARE_HELP)] = 1000,
    only: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Only weights whose name matches; may be repeated.")
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Leave weights whose name matches; may be repeated.")
    ] = None,
) -> None:
    """Remap a model's matrices so that their codes cost fewer bits (DeepShape).

    The values stay floats of the same dtype, and the file one that any safetensors tool reads: `ggpass pack` shrinks
    it. The remap loses quality, which fine-tuning afterwards is meant to win back. Biases and norms stay.

    The target appears only when it is whole; after an interruption, the same command goes on where it stopped.
    """
    from ggpass.file.shape import shape_file
    from ggpass.passes.deepshape import DeepShape

    settings = DeepShape(
        mode.value, granularity.value, shape_ratio, scale_ratio, step, rare, tuple(only or ()), tuple(skip or ())
    )
    start = time.perf_counter()
    with progress() as bar:
        task = bar.add_task("shaping", total=None)

        def advance(name: str, done: int, total: int) -> None:
            verb = "looking at" if done <= total // 2 else "shaping"
            bar.update(task, completed=done // 1000, total=total // 1000, description=escape(f"{verb} {name}"))

        report = shape_file(source, target, settings, advance)
    console = stdout()
    console.print(shape_table(report, settings, console.width))
    console.print(f"written in {time.perf_counter() - start:.1f} s: {target}", highlight=False, markup=False)


def shape_table(report: "ShapeReport", settings: "DeepShape", width: int) -> "RenderableType":
    """One row for each reshaped weight, all of them as the foot, and below it what stays."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from ggpass.cli.inspect import count
    from ggpass.graph.report import wrap_name

    done = report.reshaped
    lines = [_sentence(report, settings)]
    lines += [f"left: {name}: {reason}" for name, reason in _by_reason(report).items()]
    text = Text("\n".join(lines))
    if done is None or not done.shaped:
        return text
    # The other columns take this much; the names get the rest, in as many lines as they need.
    room = max(16, width - 52)
    names = [s.name for s in done.shaped]
    if any(len(name) > room for name in names):
        names = [name.removesuffix(".weight") for name in names]
    bits = done.mean(lambda s: s.bits_before), done.mean(lambda s: s.bits_after)
    table = Table(box=None, padding=(0, 2, 0, 0), show_footer=True, pad_edge=False)
    table.add_column("\nweight", overflow="fold", footer=f"all {len(names)} matrices, {count(done.size)}")
    for title, foot in (
        ("\nν", ""),
        ("\nσ'/σ", ""),
        ("\nbits each", f"{bits[0]:.2f}→{bits[1]:.2f}"),
        ("\nchange", f"{done.change:.2%}"),
        ("beside\nscale", f"{done.change - done.change_of_scale:.2%}"),
    ):
        table.add_column(title, justify="right", no_wrap=True, footer=foot)
    for s, name in zip(done.shaped, names):
        table.add_row(
            escape(wrap_name(name, room)),
            f"{s.before.shape:.2f}→{s.after.shape:.2f}",
            f"{s.after.std / s.before.std:.3f}",
            f"{s.bits_before:.2f}→{s.bits_after:.2f}",
            f"{s.change:.2%}",
            f"{s.change - s.change_of_scale:.2%}",
        )
    return Group(table, Text(), text)


def _sentence(report: "ShapeReport", settings: "DeepShape") -> str:
    done = report.reshaped
    if done is None or not done.shaped:
        return "nothing was reshaped: the new file holds what the old one does"
    saved = done.mean(lambda s: s.bits_after - s.bits_before)
    pooled = done.pooled_after - done.pooled_before
    text = (
        f"{saved:+.3f} bit a weight on a grid of {settings.step:.3g} where each matrix has its own code, {pooled:+.3f} "
        "where all share one; change is Σ(w' − w)²/Σw²"
    )
    stay = 1 - done.moved_share
    return text + (f"; {stay:.2%} of the weights have rare values and stay" if stay else "")


def _by_reason(report: "ShapeReport") -> dict[str, str]:
    """first name "and n more" -> reason."""
    groups: dict[str, list[str]] = {}
    for skip in report.skips:
        groups.setdefault(skip.reason, []).append(skip.name)
    return {
        names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else ""): reason for reason, names in groups.items()
    }
