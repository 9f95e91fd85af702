"""`ggpass compile | export | lower-onnx`: lower a model, report what happened to every weight, and write the result."""

import time
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from ggpass import api
from ggpass.cli.console import say, stderr, stdout
from ggpass.cli.models import example, load_model, place_for
from ggpass.cli.options import Dtype, Force, Granularity, ModelDir, Only, Rounding, Scale, Skip, TargetName
from ggpass.errors import GgpassError
from ggpass.formats import Scheme
from ggpass.graph.tables import size
from ggpass.packed.staging import refuse_existing
from ggpass.targets import resolve

ArchOption = Annotated[
    list[str] | None,
    typer.Option(metavar="SM_XY", help="For -cuda: build for this GPU architecture, no GPU needed; may be repeated."),
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write codes and GPU kernels to this .safetensors file."),
]
OutputFile = Annotated[Path, typer.Argument(metavar="OUT.onnx", help="The file to write.")]
Fallback = Annotated[
    Literal["fast", "lowmem", "none"],
    typer.Option(
        help="What runs where the custom-op library is not: `fast` decodes to float at load, `lowmem` keeps the codes "
        "and is slower, `none` makes the file need the library."
    ),
]
ExternalData = Annotated[
    bool | None,
    typer.Option("--external-data/--single-file", help="Tensors in a file beside it; left out: above 64 MB."),
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
    resolve(target, arch or ())  # an unknown target is answered before the model is loaded
    if output is not None and output.suffix != ".safetensors":
        raise GgpassError(f"{output} is not named .safetensors; any safetensors tool opens what is written")
    if output is not None:
        refuse_existing(output, force)
    scheme = Scheme(granularity, scale, rounding)
    model, notes = load_model(model_dir, dtype)
    model.to(place_for(target, arch or ()))
    start = time.perf_counter()
    with stderr().status(f"compiling for {target}"):
        lowered = api.compile(
            model, target=target, scheme=scheme, only=only or (), skip=skip or (), arch=arch or (), inplace=True
        )
    seconds = time.perf_counter() - start
    stdout().print(api.report(lowered))
    found = api.sizes(lowered)
    say(
        *notes,
        f"{type(lowered).__name__}: {size(found.before)} → {size(found.after)} ({found.ratio:.1%}), "
        f"compiled for {target} in {seconds:.1f} s",
    )
    if output is not None:
        with stderr().status(escape(f"writing {output}")):
            api.save(lowered, output)
        say(f"{output}: {size(output.stat().st_size)}")


def export_command(
    model_dir: ModelDir,
    out: OutputFile,
    target: TargetName = "rf8-onnx",
    opset: Annotated[int, typer.Option(help="Of the standard operators.", metavar="N")] = 21,
    fallback: Fallback = "fast",
    external_data: ExternalData = None,
    only: Only = None,
    skip: Skip = None,
    granularity: Granularity = "channel",
    scale: Scale = None,
    rounding: Rounding = "nearest",
    dtype: Dtype = "float32",
    force: Force = False,
) -> None:
    """Write a Hugging Face model as an ONNX file with 8-bit weights, and check the file in ONNX Runtime.

    The file takes token ids with any batch and sequence, and runs in an unmodified ONNX Runtime;
    `ggpass.onnxruntime.session(path)` runs it from the codes.
    """
    api.check_onnx_target(target)  # an unknown target, or a bad path, is answered before the model is loaded
    from ggpass.onnx.save import check_path  # needs the packages that the target has asked for

    check_path(out)
    refuse_existing(out, force)
    model, notes = load_model(model_dir, dtype)
    kwargs, shapes = example(model)
    start = time.perf_counter()
    with stderr().status(escape(f"exporting {out}")):
        artifact = api.export_onnx(
            model,
            None,
            out,
            kwargs=kwargs,
            target=target,
            scheme=Scheme(granularity, scale, rounding),
            opset=opset,
            dynamic_shapes=shapes,
            only=only or (),
            skip=skip or (),
            fallback=None if fallback == "none" else fallback,
            external_data=external_data,
        )
    seconds = time.perf_counter() - start
    stdout().print(artifact.report)
    say(*notes, f"{type(model).__name__} exported for {target} in {seconds:.1f} s: {out}")


def lower_onnx_command(
    file: Annotated[Path, typer.Argument(metavar="IN.onnx", help="A float ONNX model, from any exporter.")],
    out: OutputFile,
    target: TargetName = "rf8-onnx",
    fallback: Fallback = "fast",
    external_data: ExternalData = None,
    only: Only = None,
    skip: Skip = None,
    granularity: Granularity = "channel",
    scale: Scale = None,
    rounding: Rounding = "nearest",
    force: Force = False,
) -> None:
    """Turn the weights of any ONNX model into 8 bits, and report what happened to each.

    Patterns select by the names of initializers or of the nodes that use them.
    """
    refuse_existing(out, force)
    start = time.perf_counter()
    with stderr().status(escape(f"lowering {file}")):
        report = api.lower_onnx(
            file,
            out,
            target=target,
            scheme=Scheme(granularity, scale, rounding),
            only=only or (),
            skip=skip or (),
            fallback=None if fallback == "none" else fallback,
            external_data=external_data,
        )
    seconds = time.perf_counter() - start
    stdout().print(report)
    say(f"lowered for {target} in {seconds:.1f} s: {out}")
