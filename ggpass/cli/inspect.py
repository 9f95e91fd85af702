"""`ggpass inspect`: the fit of each weight and its bits in each 8-bit format; of files that are coded, the cost."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.markup import escape

from ggpass.cli.console import echo_json, many, progress, say, stdout
from ggpass.cli.options import Json
from ggpass.errors import FormatError, GgpassError
from ggpass.graph.tables import Column, count, shape_text, size, table, with_lines
from ggpass.inspection.inspect import Inspection, WeightFit, inspect_checkpoint
from ggpass.inspection.packed import PackedInspection
from ggpass.inspection.packed import measure as measure_packed
from ggpass.inspection.plot import draw, largest_histograms
from ggpass.onnxruntime import library_or_reason
from ggpass.packed.checkpoint import Checkpoint
from ggpass.packed.layout import TensorFile
from ggpass.packed.manifest import is_packed
from ggpass.targets import TARGETS

if TYPE_CHECKING:
    from ggpass.onnx.inspect import QuantizedFile

#: How the table names the families of densities.
SHORT = {"GG": "GG", "Student-t": "t", "Gaussian": "N", "Laplace": "L"}


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
        panels = largest_histograms(result, checkpoint, largest)
        whole = file.parent.name if file.stem == "model" else file.stem or file.name
        draw(panels, plot, f"{whole}: {many(len(panels), 'largest weight')}", log_y=not linear)
        if not json:
            say(f"histograms of {many(len(panels), 'weight')}: {plot}")


def _show(result: Any, table_of: Callable[[Any, int], Group], as_json: bool) -> None:
    """Print the figures of a file, as JSON or as a table."""
    if as_json:
        echo_json(result.as_dict())
        return
    console = stdout()
    console.print(table_of(result, console.width))


def _counted(verb: str, measure: Callable[[Callable[[str], None]], Any]) -> Any:
    """Call `measure` with a progress bar that names each tensor, and return its result."""
    with progress() as bar:
        task = bar.add_task(verb, total=None)
        return measure(lambda name: bar.update(task, advance=1, description=escape(f"{verb} {name}")))


def _inspect_floats(file: Path, is_onnx: bool) -> tuple[Inspection, Checkpoint]:
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
    missing = TARGETS["onnx"].unavailable()
    if missing:
        raise GgpassError(f"reading {path} {missing}")
    from ggpass.onnx.inspect import is_coded
    from ggpass.onnx.reader import load

    return is_coded(load(path))


def _figures(sqnr: float, entropy: float) -> str:
    if math.isnan(entropy):
        return "–"
    return f"{'exact' if math.isinf(sqnr) else format(sqnr, '.1f')} {entropy:.2f}"


def _best_fit(fit: WeightFit) -> str:
    """Which density fits best and by how many thousandths of a bit a weight: t 10, GG 1.0."""
    verdict = fit.verdict
    if verdict is None:
        return "–"
    margin = 1000 * verdict.margin
    return f"{SHORT[verdict.best.name]} {margin:.0f}" if margin >= 9.95 else f"{SHORT[verdict.best.name]} {margin:.1f}"


def _best_fit_lines(result: Inspection) -> list[str]:
    """Count the matrices that each density fits best, GG first, and explain the column."""
    counts = result.best_counts()
    matrices = sum(number for number, _ in counts.values())
    if not matrices:
        return []
    ranking = sorted(counts.items(), key=lambda item: (item[0] != "GG", -item[1][1]))
    shares = [
        (name, number, f"{elements / result.weight_count:.1%}")
        for name, (number, elements) in ranking
        if number or name == "GG"
    ]
    (_, number, share), *others = shares
    line = f"GG fits best in {number} of {matrices} matrices ({share} of the weights)"
    line += "".join(f", {name} in {number} ({share})" for name, number, share in others)
    families = ", ".join(name if name == short else f"{short} ({name})" for name, short in SHORT.items())
    return [line, f"best fit: the least AIC of {families}; its lead over the next in 1/1000 bit a weight"]


def inspection_table(result: Inspection, width: int) -> Group:
    """Return the table of an inspection and the lines below it, for a terminal of that many columns."""
    dtypes = {fit.info.dtype for fit in result.weights}
    columns = [
        Column("\nweight", f"all {len(result.weights)} matrices"),
        Column("\nshape", count(result.weight_count)),
        *([Column("\ndtype")] if len(dtypes) > 1 else []),
        *(Column("\nν"), Column("\nσ"), Column("best\nfit")),
        *(
            Column(f"{name.upper():^8}\n   dB  bit", _figures(result.sqnr(name), result.entropy(name)))
            for name in result.formats
        ),
    ]
    rows = []
    for fit in result.weights:
        row = [fit.info.name, shape_text(fit.info.shape)]
        row += [fit.info.dtype] if len(dtypes) > 1 else []
        row += [f"{fit.ggd.shape:.2f}", f"{fit.ggd.std:.3g}"] if fit.ggd else ["zero", "0"]
        row += [_best_fit(fit)]
        row += [_figures(fit.sqnr(form), fit.formats[form].entropy) for form in result.formats]
        rows.append(row)
    lines = [
        f"matrices are {result.weight_share:.2%} of {size(result.total_bytes)}"
        + (f", all {next(iter(dtypes))}" if len(dtypes) == 1 else "")
        + "; dB is the signal-to-quantization-noise ratio, bit the entropy of the codes a weight"
    ]
    lines += _best_fit_lines(result)
    if result.vectors:
        total = sum(info.nbytes for info in result.vectors)
        lines.append(f"{many(len(result.vectors), 'vector')} (biases, norms; {size(total)}) left as they are")
    lines += [f"skipped {skip.info.name}: {skip.reason}" for skip in result.skipped]
    if not result.weights:
        return with_lines(None, ["no matrices", *lines])
    return with_lines(table(columns, rows, width, gap=1, suffix=".weight"), lines)


def packed_table(result: PackedInspection, width: int) -> Group:
    """Return one row for each coded tensor, the sums as its foot, and the other tensors below it."""
    figures = [
        [count(t.elements), size(t.bytes), f"{t.bits:.3f}", f"{t.entropy:.3f}", f"{t.efficiency:.2%}"]
        for t in (result.total, *result.coded)
    ]
    titles = ("elements", "bytes", "bits each", "entropy", "efficiency")
    columns = [Column("weight", f"all {len(result.coded)} coded tensors"), Column("as", words=True)]
    columns += map(Column, titles, figures[0])
    lines = [
        f"{size(result.file_bytes)} in all, {8 * result.file_bytes / max(1, result.elements):.3f} bits for each of "
        f"{count(result.elements)} elements; entropy is that of the stored symbols, of zero order, tensor by tensor"
    ]
    if result.plain:
        lines.append(f"{len(result.plain)} tensors ({size(sum(t.bytes for t in result.plain))}) stay as they are")
    lines += [f"{alias} equals {name} and is stored once" for alias, name in result.aliases.items()]
    rows = [[t.name, t.kind, *row] for t, row in zip(result.coded, figures[1:])]
    return with_lines(table(columns, rows, width) if rows else None, lines)


def onnx_table(result: "QuantizedFile", width: int) -> Group:
    """Return one row for each weight, the sums as its foot, and the facts of the file below it."""
    codes = result.total
    columns = [
        Column("codes", f"all {len(result.tensors)} weights"),
        Column("shape", count(codes.elements)),
        Column("computed by", words=True),
        Column("entropy", f"{codes.entropy:.2f}"),
    ]
    rows = []
    for t in result.tensors:
        by = ", ".join(t.operators) + (f" ({t.uses} nodes)" if t.uses > 1 else "")
        rows.append([t.name.removesuffix("_codes"), shape_text(t.shape), by, f"{t.entropy:.2f}"])
    library = library_or_reason()
    lines = [
        f"{size(result.file_bytes)}: {size(codes.bytes)} of codes, {size(result.other_bytes)} of scales, biases and "
        f"norms, opset {result.opset}; entropy is in bits a code",
        "runs in any ONNX runtime: the operators carry their own fallback"
        if result.fallback
        else "carries no fallback: it runs with the ggpass custom-op library only",
        f"the library is {library}" if isinstance(library, Path) else f"no custom-op library here: {library}",
    ]
    return with_lines(table(columns, rows, width), lines)
