"""`ggpass inspect`: the fit of each weight and its bits in each 8-bit format; of files that are coded, the cost."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from ggpass.cli.console import echo_json, many, progress, say, stdout
from ggpass.cli.options import Json

if TYPE_CHECKING:
    from rich.console import Group

    from ggpass.inspection.inspect import Inspection
    from ggpass.packed.checkpoint import Checkpoint


def inspect_command(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A .safetensors or .onnx file, a .safetensors.index.json, or a directory that holds one.",
        ),
    ],
    plot: Annotated[
        Path | None, typer.Option(help="Write histograms of the largest weights with their fits.", metavar="PNG")
    ] = None,
    largest: Annotated[int, typer.Option(help="How many weights to plot.", min=1, max=60, metavar="N")] = 12,
    linear: Annotated[
        bool, typer.Option("--linear", help="Plot a linear density axis, not a logarithmic one.")
    ] = False,
    json: Json = False,
) -> None:
    """Show each weight's fit and what each 8-bit format makes of it.

    For every floating tensor of two or more dimensions: the moment fit of a generalized Gaussian (shape ν, where 2 is
    a Gaussian and 1 a Laplacian; deviation σ); which of Gaussian, Laplace, generalized Gaussian and Student-t fits best
    by AIC, and by how many thousandths of a bit a weight over the next; and for each format the
    signal-to-quantization-noise ratio in dB and the entropy of the codes in bits a weight, each format with its own
    default scale for every output channel.

    Rows (dimension 0) are taken as the output channels. A file does not say which weights are transposed, as those of
    Hugging Face's Conv1D (GPT-2) are: there the scales of `ggpass compile` differ from those shown here.

    Of an ONNX file that ggpass wrote: which operators compute with each weight, and the entropy of its codes.

    Of a file that `ggpass pack` wrote: the bits that each weight takes, and the entropy of its symbols.

    Nothing is unpickled: .bin and .pt files are refused.
    """
    from ggpass.cli.tables import inspection_table, onnx_table, packed_table
    from ggpass.errors import GgpassError
    from ggpass.inspection.packed import measure as measure_packed

    if plot is not None and (plot.suffix.lower() != ".png" or not plot.parent.is_dir()):
        raise GgpassError(f"--plot takes a .png in a directory that exists, not {plot}")
    is_onnx = file.suffix.lower() == ".onnx"
    packed = _packed_files(file)
    if packed or (is_onnx and _is_coded_onnx(file)):
        if plot is not None:
            raise GgpassError(f"--plot draws float weights, and those of {file} are codes; leave --plot out")
        if packed:
            _show(_counted("decoding", lambda step: measure_packed(packed, step)), packed_table, json)
        else:
            from ggpass.onnx.inspect import measure as measure_onnx

            _show(_counted("reading", lambda step: measure_onnx(file, step)), onnx_table, json)
        return
    result, checkpoint = _inspect_floats(file, is_onnx)
    _show(result, inspection_table, json)
    if plot is not None:
        from ggpass.inspection.plot import draw, largest_histograms

        panels = largest_histograms(result, checkpoint, largest)
        whole = file.parent.name if file.stem == "model" else file.stem or file.name
        draw(panels, plot, f"{whole}: {many(len(panels), 'largest weight')}", log_y=not linear)
        if not json:
            say(f"histograms of {many(len(panels), 'weight')}: {plot}")


def _show(result: Any, table_of: "Callable[[Any, int], Group]", as_json: bool) -> None:
    """Print the figures of a file, as JSON or as a table."""
    if as_json:
        echo_json(result.as_dict())
        return
    console = stdout()
    console.print(table_of(result, console.width))


def _counted(verb: str, measure: Callable[[Callable[[str], None]], Any]) -> Any:
    """Return what `measure` returns, with a progress bar that names each tensor."""
    with progress() as bar:
        task = bar.add_task(verb, total=None)
        return measure(lambda name: bar.update(task, advance=1, description=escape(f"{verb} {name}")))


def _inspect_floats(file: Path, is_onnx: bool) -> "tuple[Inspection, Checkpoint]":
    from ggpass.inspection.inspect import inspect_checkpoint
    from ggpass.packed.checkpoint import Checkpoint

    if is_onnx:
        from ggpass.onnx.inspect import OnnxCheckpoint

        checkpoint: Checkpoint = OnnxCheckpoint(file)
    else:
        checkpoint = Checkpoint(file)
    with progress() as bar:
        task = bar.add_task("inspecting", total=sum(info.nbytes for info in checkpoint.tensors))
        step = lambda info: bar.advance(task, info.nbytes)  # noqa: E731
        return inspect_checkpoint(file, progress=step, checkpoint=checkpoint), checkpoint


def _packed_files(path: Path) -> list[Path]:
    """Return the packed safetensors files at `path`, a file or a directory of them; [] if it is not packed."""
    from ggpass.errors import FormatError
    from ggpass.packed.layout import TensorFile
    from ggpass.packed.manifest import is_packed

    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    try:
        with TensorFile(files[0]) as opened:
            return files if is_packed(opened.layout) else []
    except (FormatError, IndexError):
        return []


def _is_coded_onnx(path: Path) -> bool:
    """Return True if an ONNX file computes with our operators.

    Raises:
        GgpassError: not an ONNX model, or the packages that read one are missing.
    """
    from ggpass.errors import GgpassError
    from ggpass.targets import TARGETS

    missing = TARGETS["onnx"].unavailable()
    if missing:
        raise GgpassError(f"reading {path} {missing}")
    from ggpass.onnx.inspect import is_coded
    from ggpass.onnx.reader import load

    return is_coded(load(path))
