"""`ggpass shape`: remap a checkpoint's weights onto a generalized Gaussian of lower shape."""

import time
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Group

from ggpass.cli.console import progress_of, say, stdout
from ggpass.cli.options import Force, Only, Skip
from ggpass.file.shape import shape_file
from ggpass.graph.tables import Column, count, left_lines, table, with_lines
from ggpass.passes.deepshape import DeepShape, ShapeReport

MODE_HELP = "`paper` also shrinks the scale; `compensated` keeps each weight's energy, so that layer outputs keep size."
GRANULARITY_HELP = "What has one fit and one map: all weights, each weight, or each output channel."
RARE_HELP = "Values that occur less often stay; counted in all weights, in proportion where there are more populations."


def shape_command(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A .safetensors file.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The new .safetensors file.")],
    mode: Annotated[Literal["paper", "compensated"], typer.Option(help=MODE_HELP)] = "paper",
    granularity: Annotated[Literal["model", "tensor", "channel"], typer.Option(help=GRANULARITY_HELP)] = "model",
    shape_ratio: Annotated[float, typer.Option(help="ν of the target to ν of the fit.")] = 0.8,
    scale_ratio: Annotated[float, typer.Option(help="α of the target to α of the fit; `paper` only.")] = 0.6,
    step: Annotated[float, typer.Option(help="The grid that weights are counted on, and moved to.")] = 2.0**-13,
    rare: Annotated[float, typer.Option(help=RARE_HELP)] = 1000,
    only: Only = None,
    skip: Skip = None,
    force: Force = False,
) -> None:
    """Remap a model's matrices so that their codes cost fewer bits (DeepShape).

    The values stay floats of the same dtype, and the file one that any safetensors tool reads: `ggpass pack` shrinks
    it. The remap loses quality, which fine-tuning afterwards is meant to win back. Biases and norms stay.

    The target appears only when it is whole; after an interruption, the same command goes on where it stopped.
    """
    settings = DeepShape(mode, granularity, shape_ratio, scale_ratio, step, rare, tuple(only or ()), tuple(skip or ()))
    start = time.perf_counter()
    with progress_of("looking at", "shaping") as advance:
        report = shape_file(source, target, settings, advance, replace=force)
    console = stdout()
    console.print(shape_table(report, settings, console.width))
    say(f"written in {time.perf_counter() - start:.1f} s: {target}")


def shape_table(report: ShapeReport, settings: DeepShape, width: int) -> Group:
    """Return one row for each reshaped weight, all of them as the foot, and below it what stays."""
    done, left = report.reshaped, left_lines((skip.name, skip.reason) for skip in report.skips)
    if done is None or not done.shaped:
        return with_lines(None, ["nothing was reshaped: the new file holds what the old one does", *left])
    bits = done.mean(lambda s: s.bits_before), done.mean(lambda s: s.bits_after)
    columns = [
        Column("\nweight", f"all {len(done.shaped)} matrices, {count(done.size)}"),
        *(Column("\nν"), Column("\nσ'/σ")),
        Column("\nbits each", f"{bits[0]:.2f}→{bits[1]:.2f}"),
        Column("\nchange", f"{done.change:.2%}"),
        Column("beside\nscale", f"{done.change - done.change_of_scale:.2%}"),
    ]
    rows = [
        [
            s.name,
            f"{s.before.shape:.2f}→{s.after.shape:.2f}",
            f"{s.after.std / s.before.std:.3f}",
            f"{s.bits_before:.2f}→{s.bits_after:.2f}",
            f"{s.change:.2%}",
            f"{s.change - s.change_of_scale:.2%}",
        ]
        for s in done.shaped
    ]
    saved = done.mean(lambda s: s.bits_after - s.bits_before)
    pooled = done.pooled_after - done.pooled_before
    text = (
        f"{saved:+.3f} bit a weight on a grid of {settings.step:.3g} where each matrix has its own code, {pooled:+.3f} "
        "where all share one; change is Σ(w' − w)²/Σw²"
    )
    stay = 1 - done.moved_share
    text += f"; {stay:.2%} of the weights have rare values and stay" if stay else ""
    return with_lines(table(columns, rows, width, suffix=".weight"), [text, *left])
