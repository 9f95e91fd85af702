"""Histograms of weights with their fitted densities, as small multiples in units of each weight's own σ."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ggpass.errors import GgpassError
from ggpass.ggd.blocks import blocks
from ggpass.ggd.density import GGD
from ggpass.ggd.rivals import Verdict
from ggpass.inspection.inspect import Inspection
from ggpass.packed.checkpoint import Checkpoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The plotted range is ± this many σ; what lies beyond is counted in the panel.
RANGE = 6.0
BINS = 120

STUDENT_LABEL = "Student-t, where it fits best"

BAR, FIT, GAUSSIAN, STUDENT = "#9db8d2", "#b5371f", "#5a5a5a", "#1f6b3a"


@dataclass(frozen=True)
class Panel:
    """σ·(share of weights in a bin)/(width of the bin), over u = w/σ in [−RANGE, RANGE].

    Attributes:
        density: (BINS,) float64; its sum times the width of a bin is 1 − beyond.
        beyond: the share of weights outside.
        verdict: which family fits best by AIC, if that is known.
    """

    name: str
    ggd: GGD
    density: Tensor
    beyond: float
    verdict: Verdict | None = None


def histogram(name: str, weight: Tensor, ggd: GGD, verdict: Verdict | None = None) -> Panel:
    """density[b] = #{w : w/σ in bin b} / (#w · width), a block at a time.

    Args:
        name: what the panel is called.
        weight: (N, K), finite.
        ggd: its fit, for σ and for the curve.
        verdict: which family fits best; a Student-t that does has its own curve.
    """
    counts = torch.zeros(BINS, dtype=torch.float64)
    for block in blocks(weight):
        counts += torch.histc(block.double() / ggd.std, BINS, -RANGE, RANGE)
    width = 2 * RANGE / BINS
    beyond = 1 - counts.sum().item() / weight.numel()
    return Panel(name, ggd, counts / (weight.numel() * width), beyond, verdict)


def largest_histograms(inspection: Inspection, checkpoint: Checkpoint, count: int = 12) -> list[Panel]:
    """The histograms of the `count` largest weights, in the order of the checkpoint; one tensor in memory at a time.

    Raises:
        GgpassError: no weight has a fit, so that there is nothing to draw.
    """
    fitted = [fit for fit in inspection.weights if fit.ggd]
    if not fitted:
        raise GgpassError(f"{inspection.path} has no weight with a fitted density; leave --plot out")
    chosen = {fit.info.name for fit in sorted(fitted, key=lambda fit: -fit.info.size)[:count]}
    return [
        histogram(fit.info.name, checkpoint.read(fit.info.name).flatten(1), fit.ggd, fit.verdict)
        for fit in fitted
        if fit.info.name in chosen and fit.ggd
    ]


def short_name(name: str, width: int = 34) -> str:
    """Return the end of a dotted name, which is what tells weights apart, after an ellipsis where it is cut."""
    name = name.removesuffix(".weight")
    return name if len(name) <= width else "…" + name[-(width - 1) :]


def figure_of(histograms: list[Panel], title: str, log_y: bool = True) -> "Figure":
    """Small multiples of σ·f over w/σ: bars, the fitted GGD, the Gaussian of the same σ, and a better Student-t.

    Args:
        histograms: one panel each.
        title: of the whole figure.
        log_y: a logarithmic density axis, which shows the tails.

    Raises:
        GgpassError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise GgpassError("drawing needs matplotlib; pip install 'ggpass[plot]'") from error
    columns = min(len(histograms), 4 if len(histograms) > 6 else 3)
    rows = math.ceil(len(histograms) / columns)
    figure = Figure(figsize=(max(5.8, 3.1 * columns + 0.5), 2.35 * rows + 1.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    width = 2 * RANGE / BINS
    centres = (torch.arange(BINS, dtype=torch.float64) * width - RANGE + width / 2).numpy()
    curve = torch.linspace(-RANGE, RANGE, 601, dtype=torch.float64)
    gaussian = GGD(2.0, math.sqrt(2)).density(curve).numpy()
    for axis, item in zip(axes.flat, histograms):
        axis.bar(centres, item.density.numpy(), width, color=BAR, label="weights")
        axis.plot(curve.numpy(), gaussian, color=GAUSSIAN, linestyle=":", linewidth=1.0, label="Gaussian, same σ")
        fitted = GGD(item.ggd.shape, item.ggd.scale / item.ggd.std).density(curve).numpy()
        axis.plot(curve.numpy(), fitted, color=FIT, linewidth=1.3, label="fitted generalized Gaussian")
        best = item.verdict.best if item.verdict else None
        if best is not None and best.name == "Student-t":
            student = (best.log_density(curve * item.ggd.std) + math.log(item.ggd.std)).exp().numpy()
            axis.plot(curve.numpy(), student, color=STUDENT, linestyle="--", linewidth=1.0, label=STUDENT_LABEL)
        axis.set_title(short_name(item.name), fontsize=8)
        note = f"ν = {item.ggd.shape:.2f}\nσ = {item.ggd.std:.3g}"
        if item.beyond > 0:
            note += f"\n{100 * item.beyond:.1g} % outside"
        axis.text(0.03, 0.95, note, transform=axis.transAxes, fontsize=7.5, va="top")
        if best is not None:
            label = f"best fit:\n{best.name}"
            axis.text(0.97, 0.95, label, transform=axis.transAxes, fontsize=7.5, va="top", ha="right")
        axis.set_xlim(-RANGE, RANGE)
        axis.tick_params(labelsize=8)
    for axis in axes.flat[len(histograms) :]:
        axis.remove()
    peak = max(float(item.density.max()) for item in histograms)
    if log_y:
        axes[0, 0].set_yscale("log")
        axes[0, 0].set_ylim(1e-6, 4 * max(peak, 1.0))
    else:
        axes[0, 0].set_ylim(0, 1.15 * peak)
    for column in range(columns):
        last = axes[(len(histograms) - 1 - column) // columns, column]
        last.tick_params(labelbottom=True)
    figure.supxlabel("weight in units of its deviation, $w/\\sigma$", fontsize=9)
    figure.supylabel("density, $\\sigma f(w)$" + (", logarithmic" if log_y else ""), fontsize=9)
    by_label: dict[str, Any] = {}
    for axis in figure.axes:
        by_label |= dict(zip(*reversed(axis.get_legend_handles_labels())))
    order = ["weights", "fitted generalized Gaussian", "Gaussian, same σ", STUDENT_LABEL]
    order = [label for label in order if label in by_label]
    figure.legend(
        [by_label[label] for label in order],
        order,
        loc="outside upper center",
        title=title,  # not a suptitle: the layout would put the two on top of each other
        title_fontsize=11,
        ncols=len(order) if len(order) == 3 or columns > 3 else 2,
        fontsize=8.5,
        frameon=False,
    )
    return figure


def draw(histograms: list[Panel], path: Path, title: str, log_y: bool = True) -> None:
    """The PNG of `figure_of(histograms, title, log_y)` at `path`.

    Raises:
        GgpassError: matplotlib is not installed, or the file cannot be written.
    """
    figure = figure_of(histograms, title, log_y)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise GgpassError(f"{path} cannot be written ({error}); name a .png in a directory that exists") from error
