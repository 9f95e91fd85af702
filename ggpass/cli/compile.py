"""`ggpass compile`: lower a Hugging Face model and report what happened to every weight."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ggpass.cli.console import say, stderr, stdout
from ggpass.cli.options import Dtype, Force, Granularity, ModelDir, Only, Rounding, Scale, Skip, TargetName
from ggpass.graph.tables import size

ArchOption = Annotated[
    list[str] | None,
    typer.Option(metavar="SM_XY", help="For -cuda: build for this GPU architecture, no GPU needed; may be repeated."),
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write codes and GPU kernels to this .safetensors file."),
]


def compile_command(
    model_dir: ModelDir,
    target: TargetName = "rf8-cpu",
    only: Only = None,
    skip: Skip = None,
    granularity: Granularity = "channel",
    scale: Scale = None,
    rounding: Rounding = "nearest",
    dtype: Dtype = "auto",
    arch: ArchOption = None,
    output: OutputOption = None,
    force: Force = False,
) -> None:
    """Lower a model's weights to 8 bits and report what happened to each.

    The model is loaded from disk only, in the class that its config names, and is not written back.
    """
    from ggpass.api import compile, report, save, sizes
    from ggpass.cli.models import load_model, place_for
    from ggpass.errors import GgpassError
    from ggpass.formats import Scheme
    from ggpass.packed.staging import refuse_existing
    from ggpass.targets import resolve

    resolve(target, arch or ())  # an unknown target is answered before the model is loaded
    if output is not None and output.suffix != ".safetensors":
        raise GgpassError(f"{output} is not named .safetensors; any safetensors tool opens what is written")
    if output is not None and not force:
        refuse_existing(output)
    scheme = Scheme(granularity, scale, rounding)
    model, notes = load_model(model_dir, dtype)
    model.to(place_for(target, arch or ()))
    start = time.perf_counter()
    with stderr().status(f"compiling for {target}"):
        lowered = compile(
            model, target=target, scheme=scheme, only=only or (), skip=skip or (), arch=arch or (), inplace=True
        )
    seconds = time.perf_counter() - start
    stdout().print(report(lowered))
    found = sizes(lowered)
    say(
        *notes,
        f"{type(lowered).__name__}: {size(found.before)} → {size(found.after)} ({found.ratio:.1%}), "
        f"compiled for {target} in {seconds:.1f} s",
    )
    if output is not None:
        with stderr().status(escape(f"writing {output}")):
            save(lowered, output)
        say(f"{output}: {size(output.stat().st_size)}")
