"""The tables of `ggpass inspect`: fits of float weights, and the cost of coded ones in packed and in ONNX files."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ggpass.cli.console import many
from ggpass.graph.tables import Column, count, shape_text, size, table, with_lines

if TYPE_CHECKING:
    from rich.console import Group

    from ggpass.inspection.inspect import Inspection, WeightFit
    from ggpass.inspection.packed import PackedInspection
    from ggpass.onnx.inspect import CodedFile

#: How the table names the families of densities.
SHORT = {"GG": "GG", "Student-t": "t", "Gaussian": "N", "Laplace": "L"}


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


def inspection_table(result: "Inspection", width: int) -> "Group":
    """The table of an inspection and the lines below it, for a terminal of that many columns."""
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


def packed_table(result: "PackedInspection", width: int) -> "Group":
    """One row for each coded tensor, the sums as its foot, and what is not coded below it."""
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


def onnx_table(result: "CodedFile", width: int) -> "Group":
    """One row for each weight, the sums as its foot, and what the file is below it."""
    from ggpass.onnxruntime import library_or_reason

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
