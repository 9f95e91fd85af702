"""`ggpass export` and `ggpass lower-onnx`: ONNX files with 8-bit weights, from a model directory or any ONNX file."""

import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from ggpass.cli.bench import token_inputs
from ggpass.cli.compile import (
    DTYPE_HELP,
    Dtype,
    Granularity,
    GranularityOption,
    ModelDir,
    Only,
    RoundingOption,
    ScaleOption,
    Skip,
    TargetName,
)
from ggpass.cli.console import stderr, stdout

if TYPE_CHECKING:
    from torch import Tensor, nn


class Fallback(StrEnum):
    fast = "fast"
    lowmem = "lowmem"
    none = "none"


OutputFile = Annotated[Path, typer.Argument(metavar="OUT.onnx", help="The file to write.")]
FallbackOption = Annotated[
    Fallback,
    typer.Option(
        help="What runs where the custom-op library is not: `fast` decodes to float at load, `lowmem` keeps the codes "
        "and is slower, `none` makes the file need the library."
    ),
]
ExternalData = Annotated[
    bool | None,
    typer.Option("--external-data/--single-file", help="Tensors in a file beside it; left out: above 64 MB."),
]

#: Batch and sequence of the example; both are left open in the file.
EXAMPLE = (2, 9)


def _fallback(choice: Fallback) -> Literal["fast", "lowmem"] | None:
    chosen: dict[Fallback, Literal["fast", "lowmem"]] = {Fallback.fast: "fast", Fallback.lowmem: "lowmem"}
    return chosen.get(choice)


def export_command(
    model_dir: ModelDir,
    out: OutputFile,
    target: TargetName = "rf8-onnx",
    opset: Annotated[int, typer.Option(help="Of the standard operators.", metavar="N")] = 21,
    fallback: FallbackOption = Fallback.fast,
    external_data: ExternalData = None,
    only: Only = None,
    skip: Skip = None,
    granularity: GranularityOption = Granularity.channel,
    scale: ScaleOption = None,
    rounding: RoundingOption = "nearest",
    dtype: Annotated[Dtype, typer.Option(metavar="DTYPE", help=DTYPE_HELP)] = Dtype.float32,
) -> None:
    """Write a Hugging Face model as an ONNX file with 8-bit weights, and check the file in ONNX Runtime.

    The file takes token ids with any batch and sequence, and runs in an unmodified ONNX Runtime;
    `ggpass.onnxruntime.session(path)` runs it from the codes.
    """
    import ggpass
    from ggpass.api import check_onnx_target
    from ggpass.cli.models import load_model
    from ggpass.formats import Scheme
    from ggpass.onnx.save import check_path

    check_onnx_target(target)  # an unknown target, or a bad path, is answered before the model is loaded
    check_path(out)
    with stderr().status(escape(f"loading {model_dir}")):
        model, notes = load_model(model_dir, dtype.value)
    kwargs, shapes = example(model)
    start = time.perf_counter()
    with stderr().status(escape(f"exporting {out}")):
        artifact = ggpass.export_onnx(
            model,
            None,
            out,
            kwargs=kwargs,
            target=target,
            scheme=Scheme(granularity.value, scale.value if scale else None, rounding),
            opset=opset,
            dynamic_shapes=shapes,
            only=only or (),
            skip=skip or (),
            fallback=_fallback(fallback),
            external_data=external_data,
        )
    seconds = time.perf_counter() - start
    console = stdout()
    console.print(artifact.report)
    for note in notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    console.print(
        f"{type(model).__name__} exported for {target} in {seconds:.1f} s: {out}", highlight=False, markup=False
    )


def lower_onnx_command(
    file: Annotated[Path, typer.Argument(metavar="IN.onnx", help="A float ONNX model, from any exporter.")],
    out: OutputFile,
    target: TargetName = "rf8-onnx",
    fallback: FallbackOption = Fallback.fast,
    external_data: ExternalData = None,
    only: Only = None,
    skip: Skip = None,
    granularity: GranularityOption = Granularity.channel,
    scale: ScaleOption = None,
    rounding: RoundingOption = "nearest",
) -> None:
    """Turn the weights of any ONNX model into 8 bits, and report what happened to each.

    Patterns select by the names of initializers or of the nodes that use them.
    """
    import ggpass
    from ggpass.formats import Scheme

    start = time.perf_counter()
    with stderr().status(escape(f"lowering {file}")):
        report = ggpass.lower_onnx(
            file,
            out,
            target=target,
            scheme=Scheme(granularity.value, scale.value if scale else None, rounding),
            only=only or (),
            skip=skip or (),
            fallback=_fallback(fallback),
            external_data=external_data,
        )
    seconds = time.perf_counter() - start
    console = stdout()
    console.print(report)
    console.print(f"lowered for {target} in {seconds:.1f} s: {out}", highlight=False, markup=False)


def example(model: "nn.Module") -> tuple[dict[str, "Tensor | bool"], dict[str, Any]]:
    """Keyword inputs of a language model, and which of their sizes stay open.

    Raises:
        GgpassError: the model does not take token ids.
    """
    import torch

    from ggpass.errors import GgpassError

    config: Any = model.config
    if getattr(model, "main_input_name", None) != "input_ids":
        raise GgpassError(
            f"export feeds token ids, and {type(model).__name__} takes {getattr(model, 'main_input_name', 'others')}; "
            "call ggpass.export_onnx with example inputs in a script"
        )
    tensors = token_inputs(model, *EXAMPLE)
    # BERT and its kin have the buffer that makes token_type_ids; given as an input it is the caller's to choose.
    if getattr(config, "type_vocab_size", 0) > 1:
        tensors["token_type_ids"] = torch.zeros_like(tensors["input_ids"])
    open_sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    inputs: dict[str, Tensor | bool] = dict(tensors)
    shapes: dict[str, Any] = dict.fromkeys(tensors, open_sizes)
    if hasattr(config, "use_cache"):
        # A cache is state between calls, which a plain file has no place for.
        inputs["use_cache"], shapes["use_cache"] = False, None
    return inputs, shapes
