"""`ggpass compile`: lower a Hugging Face model and report what happened to every weight."""

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ggpass.cli.console import stderr, stdout


class Granularity(StrEnum):
    channel = "channel"
    tensor = "tensor"


class Scale(StrEnum):
    pow2 = "pow2"
    real = "real"


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


DTYPE_HELP = "Load the weights as float32, bfloat16, float16, or auto: as the checkpoint stores them."

ModelDir = Annotated[
    Path, typer.Argument(metavar="MODEL_DIR", help="A Hugging Face model directory with safetensors weights.")
]
TargetName = Annotated[
    str, typer.Option("--target", "-t", metavar="FORMAT-DEVICE", help="`ggpass targets` lists them.")
]
Only = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="Lower only weights whose name matches; may be repeated.")
]
Skip = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="Leave weights whose name matches; may be repeated.")
]
GranularityOption = Annotated[Granularity, typer.Option(help="One scale for each output channel, or for the tensor.")]
ScaleOption = Annotated[Scale | None, typer.Option(help="Powers of two, or real scales; the format's own if left out.")]
ArchOption = Annotated[
    list[str] | None,
    typer.Option(metavar="SM_XY", help="For -cuda: build for this GPU architecture, no GPU needed; may be repeated."),
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write codes and GPU kernels to this .safetensors file."),
]
RoundingOption = Annotated[str, typer.Option(help="`nearest`, or `paper`: RF8's published greedy rounding.")]


def compile_command(
    model_dir: ModelDir,
    target: TargetName = "rf8-cpu",
    only: Only = None,
    skip: Skip = None,
    granularity: GranularityOption = Granularity.channel,
    scale: ScaleOption = None,
    rounding: RoundingOption = "nearest",
    dtype: Annotated[Dtype, typer.Option(metavar="DTYPE", help=DTYPE_HELP)] = Dtype.auto,
    arch: ArchOption = None,
    output: OutputOption = None,
) -> None:
    """Lower a model's weights to 8 bits and report what happened to each.

    The model is loaded from disk only, in the class that its config names, and is not written back.
    """
    import ggpass
    from ggpass.cli.inspect import size
    from ggpass.cli.models import load_model, place_for
    from ggpass.errors import GgpassError
    from ggpass.formats import Scheme
    from ggpass.targets import resolve

    resolve(target, arch or ())  # an unknown target is answered before the model is loaded
    if output is not None and output.suffix != ".safetensors":
        raise GgpassError(f"{output} is not named .safetensors; any safetensors tool opens what is written")
    scheme = Scheme(granularity.value, scale.value if scale else None, rounding)
    with stderr().status(escape(f"loading {model_dir}")):
        model, notes = load_model(model_dir, dtype.value)
        model.to(place_for(target, arch or ()))
    start = time.perf_counter()
    with stderr().status(f"compiling for {target}"):
        lowered = ggpass.compile(
            model, target=target, scheme=scheme, only=only or (), skip=skip or (), arch=arch or (), inplace=True
        )
    seconds = time.perf_counter() - start
    console = stdout()
    console.print(ggpass.report(lowered))
    sizes = ggpass.sizes(lowered)
    for note in notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    console.print(
        f"{type(lowered).__name__}: {size(sizes.before)} → {size(sizes.after)} ({sizes.ratio:.1%}), "
        f"compiled for {target} in {seconds:.1f} s",
        highlight=False,
    )
    if output is not None:
        with stderr().status(escape(f"writing {output}")):
            ggpass.save(lowered, output)
        console.print(f"{escape(str(output))}: {size(output.stat().st_size)}", highlight=False)
