"""`ggpass inspect`: the generalized-Gaussian fit of each weight, and what each 8-bit format makes of it."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ggpass.cli.coded_file import inspect_coded_onnx, is_coded_onnx, is_onnx_file
from ggpass.cli.console import many, progress, stdout
from ggpass.cli.packed import inspect_packed, is_packed_file
from ggpass.graph.report import wrap_name

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ggpass.inspection.inspect import Inspection, WeightFit

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
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
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
    from ggpass.errors import GgpassError
    from ggpass.inspection.inspect import inspect_checkpoint
    from ggpass.inspection.plot import draw, largest_histograms
    from ggpass.packed.checkpoint import Checkpoint

    if plot is not None and (plot.suffix.lower() != ".png" or not plot.parent.is_dir()):
        raise GgpassError(f"--plot takes a .png in a directory that exists, not {plot}")
    if is_packed_file(file):
        inspect_packed(file, json)
        return
    if is_onnx_file(file):
        if is_coded_onnx(file):
            inspect_coded_onnx(file, json)
            return
        from ggpass.onnx.checkpoint import OnnxCheckpoint

        checkpoint: Checkpoint = OnnxCheckpoint(file)
    else:
        checkpoint = Checkpoint(file)
    with progress() as bar:
        task = bar.add_task("inspecting", total=sum(info.nbytes for info in checkpoint.tensors))
        result = inspect_checkpoint(file, progress=lambda info: bar.advance(task, info.nbytes), checkpoint=checkpoint)
    console = stdout()
    if json:
        from json import dumps

        typer.echo(dumps(result.as_dict(), indent=2, ensure_ascii=False))
    else:
        console.print(inspection_table(result, console.width))
    if plot is not None:
        histograms = largest_histograms(result, checkpoint, largest)
        whole = file.parent.name if file.stem == "model" else file.stem or file.name
        draw(histograms, plot, f"{whole}: {many(len(histograms), 'largest weight')}", log_y=not linear)
        if not json:
            console.print(f"histograms of {many(len(histograms), 'weight')}: {plot}", highlight=False, markup=False)


def count(number: int) -> str:
    """A count for people: 384, 22.69 M, 1.24 G."""
    for unit, size in (("G", 10**9), ("M", 10**6)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def size(number: int) -> str:
    """Bytes for people, in kB, MB and GB (powers of 1000)."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return f"{number} B"


def _figures(sqnr: float, entropy: float) -> str:
    if math.isnan(entropy):
        return "–"
    return f"{'exact' if math.isinf(sqnr) else format(sqnr, '.1f')} {entropy:.2f}"


def _best_fit(fit: "WeightFit") -> str:
    """Which density fits best and by how many thousandths of a bit a weight: t 10, GG 1.0."""
    verdict = fit.verdict
    if verdict is None:
        return "–"
    margin = 1000 * verdict.margin
    return f"{SHORT[verdict.best.name]} {margin:.0f}" if margin >= 9.95 else f"{SHORT[verdict.best.name]} {margin:.1f}"


def _best_fit_lines(result: "Inspection") -> list[str]:
    """In how many matrices each density fits best, GG first, and what the column says."""
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


def inspection_table(result: "Inspection", width: int) -> "RenderableType":
    """The table of an inspection and the lines below it, for a terminal of that many columns."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    dtypes = {fit.info.dtype for fit in result.weights}
    shapes = ["×".join(str(length) for length in fit.info.shape) for fit in result.weights]
    deviations = [f"{fit.ggd.std:.3g}" if fit.ggd else "0" for fit in result.weights]
    fits = [_best_fit(fit) for fit in result.weights]
    # The other columns take this much; the names get the rest, in as many lines as they need.
    fixed = sum(max(map(len, texts), default=5) + 1 for texts in (shapes, deviations, fits))
    fixed += 5 + 11 * len(result.formats) + (5 if len(dtypes) > 1 else 0)
    room = max(16, width - fixed)
    table = Table(box=None, padding=(0, 1, 0, 0), show_footer=True, pad_edge=False)
    table.add_column("\nweight", overflow="fold", footer=f"all {len(result.weights)} matrices")
    table.add_column("\nshape", justify="right", no_wrap=True, footer=count(result.weight_count))
    if len(dtypes) > 1:
        table.add_column("\ndtype", no_wrap=True)
    table.add_column("\nν", justify="right", no_wrap=True)
    table.add_column("\nσ", justify="right", no_wrap=True)
    table.add_column("best\nfit", justify="right", no_wrap=True)
    for name in result.formats:
        footer = _figures(result.sqnr(name), result.entropy(name))
        table.add_column(f"{name.upper():^8}\n   dB  bit", justify="right", no_wrap=True, footer=footer)
    names = [fit.info.name for fit in result.weights]
    if any(len(name) > room for name in names):
        names = [name.removesuffix(".weight") for name in names]
    for fit, name, shape, deviation, best in zip(result.weights, names, shapes, deviations, fits):
        row = [escape(wrap_name(name, room)), shape]
        row += [fit.info.dtype] if len(dtypes) > 1 else []
        row += [f"{fit.ggd.shape:.2f}" if fit.ggd else "zero", deviation, best]
        row += [_figures(fit.sqnr(form), fit.formats[form].entropy) for form in result.formats]
        table.add_row(*row)
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
    body = [table, Text()] if result.weights else [Text("no matrices")]
    return Group(*body, Text("\n".join(lines)))
