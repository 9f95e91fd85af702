"""Which density fits each weight best: in an inspection, its JSON, the table of the command line and the plot."""

import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from ggpass.cli.inspect import inspection_table
from ggpass.formats import FORMATS
from ggpass.ggd import GGD, best_by_aic, fit_moments, fit_rivals
from ggpass.inspection import plot
from ggpass.inspection.inspect import inspect_checkpoint


def gg_sample() -> Tensor:
    return GGD(1.3, 0.05).sample((100, 200), generator=torch.Generator().manual_seed(0))


def heavy_sample() -> Tensor:
    """A Student-t of two degrees of freedom: a Gaussian over the root of an exponential variate."""
    generator = torch.Generator().manual_seed(1)
    normal, uniform = torch.randn(100, 200, generator=generator), torch.rand(100, 200, generator=generator)
    return 0.05 * normal / (-(1 - uniform).log()).sqrt()


def test_the_best_density_of_each_weight_is_counted(tmp_path: Path) -> None:
    save_file({"gg": gg_sample(), "heavy": heavy_sample(), "zeros": torch.zeros(4, 4)}, tmp_path / "m.safetensors")
    result = inspect_checkpoint(tmp_path / "m.safetensors")
    first, heavy, zeros = result.weights
    assert first.rivals == fit_rivals(gg_sample())
    assert first.verdict == best_by_aic(fit_rivals(gg_sample()))
    assert [fit.verdict and fit.verdict.best.name for fit in result.weights] == ["GG", "Student-t", None]
    assert result.best_counts() == {
        "Gaussian": (0, 0),
        "Laplace": (0, 0),
        "GG": (1, 20_000),
        "Student-t": (1, 20_000),
    }
    data = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert data["totals"]["best_fits"]["GG"] == {"matrices": 1, "weights": 20_000}
    assert data["weights"][1]["best_fit"] == "Student-t"
    assert data["weights"][1]["best_fit_margin_bits"] == heavy.verdict.margin  # type: ignore[union-attr]
    assert data["weights"][0]["rivals"]["GG"]["aic"] == first.rivals[2].aic
    assert (data["weights"][2]["best_fit"], data["weights"][2]["rivals"], zeros.rivals) == (None, {}, ())


#: Columns of a terminal that hold the names of a transformer in one line.
WIDE = 67 + 11 * len(FORMATS)


@pytest.mark.parametrize("columns", [80, WIDE, 140])
def test_the_table_names_the_best_density_and_its_lead(tmp_path: Path, columns: int) -> None:
    names = [f"encoder.layer.{i}.attention.output.dense.weight" for i in range(2)]
    tensors = {names[0]: gg_sample(), names[1]: heavy_sample(), "zeros": torch.zeros(4, 4)}
    save_file(tensors, tmp_path / "m.safetensors")
    result = inspect_checkpoint(tmp_path / "m.safetensors")
    console = Console(width=columns, file=StringIO(), record=True)
    console.print(inspection_table(result, columns))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= columns
    rows = [line for line in text.splitlines() if "100×200" in line]
    for row, fit, letter in zip(rows, result.weights, ("GG", "t")):
        assert fit.verdict is not None
        lead = 1000 * fit.verdict.margin
        assert f" {letter} {lead:.1f} " in row or f" {letter} {lead:.0f} " in row
    if columns >= WIDE:
        assert all(row.startswith("encoder.layer.") and "output.dense" in row for row in rows)
    words = " ".join(text.split())
    assert "GG fits best in 1 of 2 matrices (50.0% of the weights), Student-t in 1 (50.0%)" in words
    assert "the least AIC of GG, t (Student-t), N (Gaussian), L (Laplace); its lead over the next" in words


def test_a_student_that_fits_best_has_its_curve_and_the_legend_says_so() -> None:
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib; pip install 'ggpass[plot]'")
    weights = (("gg", gg_sample()), ("t", heavy_sample()))
    panels = [plot.histogram(n, w, fit_moments(w), best_by_aic(fit_rivals(w))) for n, w in weights]
    figure = plot.figure_of(panels, "title")
    assert [len(axis.lines) for axis in figure.axes] == [2, 3]
    notes = [" ".join(text.get_text() for text in axis.texts) for axis in figure.axes]
    assert "best fit:\nGG" in notes[0]
    assert "best fit:\nStudent-t" in notes[1]
    assert [text.get_text() for text in figure.legends[0].get_texts()][-1] == plot.STUDENT_LABEL
    # Its density in units of σ has its mass: 1 within the range but for the tails.
    x, density = figure.axes[1].lines[2].get_data()
    assert 0.9 < (density * (x[1] - x[0])).sum() <= 1.0
