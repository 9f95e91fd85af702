"""SQNR = 10·log10(Σw² / Σ(w − ŵ)²) and H = −Σ p_c log2 p_c of each weight in each format, with its GG fit."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ggpass.errors import FormatError, WeightError
from ggpass.formats import FORMATS, Format, Scheme, quantize
from ggpass.formats.scheme import row_blocks
from ggpass.ggd.density import GGD
from ggpass.ggd.fit import fit_moments
from ggpass.ggd.grid import entropy
from ggpass.ggd.rivals import Rival, Verdict, best_by_aic, fit_rivals
from ggpass.packed.checkpoint import Checkpoint, TensorInfo
from ggpass.packed.dtypes import WEIGHT_DTYPES

#: What JSON tells of each fitted density.
RIVAL_KEYS = ("shape", "scale", "parameters", "log_likelihood", "aic")


@dataclass(frozen=True)
class FormatFit:
    """How one format represents one weight, with the format's own default scheme: a scale for each channel.

    Attributes:
        noise: Σ(w − ŵ)².
        counts: (256,) int64, how often each code occurs.
    """

    noise: float
    counts: Tensor

    @property
    def entropy(self) -> float:
        """H = −Σ p_c log2 p_c, the zero-order entropy of the codes in bits a weight."""
        return entropy(self.counts).item()


@dataclass(frozen=True)
class WeightFit:
    """One matrix: its GG fit and what each format makes of it.

    Attributes:
        energy: Σw².
        ggd: the density fitted by moments; None for zeros only.
        rivals: the likeliest density of each family, as `ggpass.ggd.fit_rivals` gives them; none for zeros only.
        formats: by the format's name.
    """

    info: TensorInfo
    energy: float
    ggd: GGD | None
    rivals: tuple[Rival, ...]
    formats: Mapping[str, FormatFit]

    @property
    def verdict(self) -> Verdict | None:
        """Return the family that fits best by AIC, and the next; None for zeros only."""
        return best_by_aic(self.rivals) if self.rivals else None

    def sqnr(self, name: str) -> float:
        """10·log10(Σw² / Σ(w − ŵ)²) in dB; infinite where the format is exact."""
        return sqnr_db(self.energy, self.formats[name].noise)


@dataclass(frozen=True)
class Skipped:
    """A tensor that no format takes, and why."""

    info: TensorInfo
    reason: str


@dataclass(frozen=True)
class Inspection:
    """What `ggpass inspect` shows.

    Attributes:
        weights: the floating tensors of two or more dimensions.
        vectors: the floating tensors of one dimension or none (biases, norms): no format takes them.
        skipped: everything else, with the reasons.
    """

    path: Path
    formats: tuple[str, ...]
    weights: tuple[WeightFit, ...]
    vectors: tuple[TensorInfo, ...]
    skipped: tuple[Skipped, ...]

    @property
    def weight_count(self) -> int:
        """Elements of all inspected matrices."""
        return sum(fit.info.size for fit in self.weights)

    @property
    def weight_bytes(self) -> int:
        """Return bytes of all inspected matrices as stored."""
        return sum(fit.info.nbytes for fit in self.weights)

    @property
    def total_bytes(self) -> int:
        """Return bytes of all tensors as stored."""
        others = (*self.vectors, *(skip.info for skip in self.skipped))
        return self.weight_bytes + sum(info.nbytes for info in others)

    @property
    def weight_share(self) -> float:
        """Return the share of the bytes that are inspected matrices; 0 for an empty checkpoint."""
        return self.weight_bytes / self.total_bytes if self.total_bytes else 0.0

    def entropy(self, name: str) -> float:
        """Σ size·H / Σ size: mean bits a weight when every matrix has its own code; NaN without matrices."""
        if not self.weight_count:
            return math.nan
        return sum(fit.info.size * fit.formats[name].entropy for fit in self.weights) / self.weight_count

    def sqnr(self, name: str) -> float:
        """10·log10(ΣΣw² / ΣΣ(w − ŵ)²) over all matrices, in dB; NaN without matrices."""
        if not self.weights:
            return math.nan
        return sqnr_db(sum(f.energy for f in self.weights), sum(f.formats[name].noise for f in self.weights))

    def best_counts(self) -> dict[str, tuple[int, int]]:
        """For each family of densities, in how many matrices it fits best by AIC, and how many weights they hold."""
        counts: dict[str, tuple[int, int]] = {}
        for fit in self.weights:
            for rival in fit.rivals:
                matrices, elements = counts.get(rival.name, (0, 0))
                best = fit.verdict is not None and fit.verdict.best.name == rival.name
                counts[rival.name] = (matrices + best, elements + best * fit.info.size)
        return counts

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; a number that JSON cannot hold (an infinite SQNR) is None."""
        return {
            "path": str(self.path),
            "weights": [
                {
                    **_info_dict(fit.info),
                    "shape_nu": fit.ggd and fit.ggd.shape,
                    "scale_alpha": fit.ggd and fit.ggd.scale,
                    "std": fit.ggd.std if fit.ggd else 0.0,
                    "best_fit": fit.verdict and fit.verdict.best.name,
                    "best_fit_margin_bits": fit.verdict and fit.verdict.margin,
                    "rivals": {rival.name: {key: getattr(rival, key) for key in RIVAL_KEYS} for rival in fit.rivals},
                    "formats": {
                        name: {"sqnr_db": _finite(fit.sqnr(name)), "entropy_bits": fit.formats[name].entropy}
                        for name in self.formats
                    },
                }
                for fit in self.weights
            ],
            "vectors": [_info_dict(info) for info in self.vectors],
            "skipped": [{**_info_dict(skip.info), "reason": skip.reason} for skip in self.skipped],
            "totals": {
                "weights": self.weight_count,
                "weight_bytes": self.weight_bytes,
                "total_bytes": self.total_bytes,
                "weight_share": self.weight_share,
                "best_fits": {
                    name: {"matrices": matrices, "weights": elements}
                    for name, (matrices, elements) in self.best_counts().items()
                },
                "formats": {
                    name: {"sqnr_db": _finite(self.sqnr(name)), "entropy_bits": _finite(self.entropy(name))}
                    for name in self.formats
                },
            },
        }


def sqnr_db(energy: float, noise: float) -> float:
    """10·log10(energy / noise) in dB; infinite without noise (zeros, which every format holds exactly)."""
    return 10 * math.log10(energy / noise) if noise else math.inf


def fit_format(matrix: Tensor, fmt: Format, scheme: Scheme | None = None) -> FormatFit:
    """noise = Σ(w − codebook[c]·scale)², counts[c] = #{codes equal to c}; in blocks of rows, sums in float64.

    Args:
        matrix: (N, K) floating, row n an output channel.
        fmt: the format.
        scheme: how scales are chosen; the format's default if left out.

    Raises:
        FormatError: NaN or infinity in the matrix.
    """
    quantized = quantize(matrix, fmt, scheme)
    noise, counts = 0.0, torch.zeros(256, dtype=torch.int64)
    blocks = row_blocks(*matrix.shape)
    for start in blocks:
        rows = slice(start, start + blocks.step)
        scale = quantized.scale[rows] if len(quantized.scale) == len(matrix) else quantized.scale
        # The codes' values times their scale are exact in float64, so noise holds nothing but the rounding.
        rounded = fmt.decode(quantized.codes[rows]).double() * scale[:, None].double()
        noise += (matrix[rows].double() - rounded).square_().sum().item()
        counts += torch.bincount(quantized.codes[rows].flatten().int(), minlength=256)
    return FormatFit(noise, counts)


def fit_weight(info: TensorInfo, weight: Tensor, formats: Mapping[str, Format] = FORMATS) -> WeightFit:
    """Return the GG fit of a weight and its rivals, and for each format its noise and its codes' histogram.

    Args:
        weight: two or more dimensions, floating; dimension 0 is taken as the output channels.

    Raises:
        FormatError: NaN or infinity in the weight.
    """
    matrix = weight.flatten(1)
    fits = {name: fit_format(matrix, fmt) for name, fmt in formats.items()}
    try:
        fitted, rivals = fit_moments(weight), fit_rivals(weight)
        energy = fitted.std**2 * weight.numel()
    except WeightError:  # zeros only: the formats have refused everything else
        fitted, rivals, energy = None, (), 0.0
    return WeightFit(info, energy, fitted, rivals, fits)


def inspect_checkpoint(
    path: str | Path,
    formats: Mapping[str, Format] = FORMATS,
    progress: Callable[[TensorInfo], None] = lambda info: None,
    checkpoint: Checkpoint | None = None,
) -> Inspection:
    """Return every tensor of a checkpoint, one at a time: fitted, listed as a vector, or skipped with the reason.

    Args:
        path: as Checkpoint takes it.
        formats: the formats to compare, by name.
        progress: called after each tensor.
        checkpoint: the one at `path` if it is already open.

    Raises:
        FormatError: the checkpoint cannot be read.
    """
    checkpoint = checkpoint or Checkpoint(path)
    weights, vectors, skipped = [], [], []
    for info in checkpoint.tensors:
        reason = _why_not(info)
        if reason is None and len(info.shape) < 2:
            vectors.append(info)
        elif reason is None:
            try:
                weights.append(fit_weight(info, checkpoint.read(info.name), formats))
            except FormatError as error:
                reason = str(error)
        if reason is not None:
            skipped.append(Skipped(info, reason))
        progress(info)
    return Inspection(checkpoint.path, tuple(formats), tuple(weights), tuple(vectors), tuple(skipped))


def _why_not(info: TensorInfo) -> str | None:
    """Return the reason why a tensor is no weight for any format, or None."""
    if info.size == 0:
        return "empty"
    if info.dtype in WEIGHT_DTYPES:
        return None
    if info.dtype.startswith(("I", "U", "BOOL")):
        return f"integer ({info.dtype}): an index, a mask or codes, not a weight"
    if info.dtype.startswith("F"):
        return f"already {info.dtype}, 8 bits or fewer; inspect the checkpoint that it was made from"
    return f"{info.dtype} is not a real floating type"


def _info_dict(info: TensorInfo) -> dict[str, Any]:
    return {"name": info.name, "shape": list(info.shape), "dtype": info.dtype}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
