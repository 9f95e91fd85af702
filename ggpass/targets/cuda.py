"""The target `cuda`: kernels for NVIDIA GPUs, registered for CUDA tensors of every ggpass operator.

With `arch=` it builds for GPUs that are elsewhere: kernels travel with the Artifact and with the file it is saved to.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ggpass.errors import InputError, KernelsUnavailable, TargetError
from ggpass.formats.base import Format
from ggpass.graph.program import Program
from ggpass.graph.report import Report
from ggpass.kernels.cuda import compiler
from ggpass.kernels.cuda.archs import parse
from ggpass.kernels.cuda.driver import reason_against
from ggpass.kernels.cuda.uses import DTYPES, Use, inexact, table_of, variants_for
from ggpass.lowering import operators as ops
from ggpass.lowering.modules import Lowered, LoweredConv, LoweredEmbedding, LoweredLinear
from ggpass.targets.artifact import Artifact, Sizes
from ggpass.targets.base import Target
from ggpass.targets.cuda_operators import float_note, generate, kernels_on

if TYPE_CHECKING:
    from ggpass.kernels.cuda.cubin import Cubin

logger = logging.getLogger("ggpass")


class CudaArtifact(Artifact):
    """An Artifact whose kernels travel with it.

    Attributes:
        kernels: the cubins that its graph can call, for each architecture it was compiled for.
    """

    def __init__(
        self, program: Program, target: str, report: Report, sizes: Sizes, kernels: "tuple[Cubin, ...]" = ()
    ) -> None:
        super().__init__(program, target, report, sizes)
        self.kernels = kernels

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program on the GPU that its tensors are on.

        Raises:
            InputError: an input, or the artifact itself, is not on a GPU; or as `Artifact`.
        """
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu" and leaf.dim():
                raise InputError(self._why_not_here(leaf))
        return super().__call__(*args, **kwargs)

    def _why_not_here(self, leaf: Tensor) -> str:
        what = f"this artifact was compiled for {self.target} and was called with a tensor on {leaf.device}"
        if any(t.device.type != "cpu" for t in self.program.graph_module.state_dict().values()):
            return f"{what}; move the inputs with .to('cuda')"
        archs = ", ".join(sorted({cubin.arch for cubin in self.kernels}))
        return (
            f"{what}; its own tensors are there too, since it was built ahead of time ({archs}): save it, and load it "
            "on a machine with such a GPU, into the model compiled there on 'cuda'. To see its values here, compile "
            "for the target reference or cpu"
        )


@dataclass(frozen=True)
class CudaTarget(Target):
    """Kernels for this machine's GPU, or ahead of time for others.

    Attributes:
        archs: what to build for, as ("sm_90",); empty for this machine's GPUs.
    """

    archs: tuple[str, ...] = ()

    def for_archs(self, archs: Sequence[str]) -> "CudaTarget":
        """Return the same target, building ahead of time.

        Raises:
            TargetError: no architecture of that name.
        """
        try:
            for arch in archs:
                parse(arch)
        except KernelsUnavailable as error:
            raise TargetError(f"arch={archs!r}: {error}") from error
        return replace(self, archs=tuple(dict.fromkeys(archs)))

    def unavailable(self) -> str | None:
        """Ahead of time: no compiler or no TVM. Else: no driver, no GPU, one too old, or a torch without CUDA."""
        if self.archs:
            from ggpass.kernels import cache

            try:
                compiler.find()
            except KernelsUnavailable as error:
                return str(error)
            there = cache.version_of("apache-tvm") is not None
            return None if there else "apache-tvm is not installed to generate kernels; pip install 'ggpass[tvm]'"
        reason = reason_against()
        if not reason and torch.version.cuda is None:
            reason = f"torch {torch.__version__} is built without CUDA; install a CUDA build of the same version"
        return f'{reason}; or build for a GPU elsewhere with arch="sm_90", or use rf8-cpu' if reason else None

    def check_tensor(self, name: str, tensor: Tensor) -> None:
        """A weight lies on a GPU that the kernels run on, unless this builds ahead of time.

        Raises:
            TargetError: it is not on a GPU that the kernels run on.
        """
        # Norms and biases may lie anywhere: only matrices are lowered.
        if self.archs or tensor.dim() < 2 or tensor.device.type == "meta":
            return
        if tensor.device.type != "cuda":
            raise TargetError(
                f"target cuda lowers a model where it lies, and {name!r} is on {tensor.device}; call model.to('cuda') "
                'first, or build for a GPU elsewhere with arch="sm_90"'
            )
        found = kernels_on(tensor.device.index or 0)
        if isinstance(found, str):
            raise TargetError(f"{name!r} is on {tensor.device}: {found}; move the model to a newer GPU, or use rf8-cpu")

    def prepare(self, fmt: Format) -> tuple[str, ...]:
        """Nothing is built before it is known what for; notes on what is rounded."""
        counts = {dtype: inexact(fmt.codebook, dtype) for dtype in DTYPES}
        return tuple(
            f"{count} of {fmt.name}'s 256 values are rounded in {str(dtype).removeprefix('torch.')} models"
            for dtype, count in counts.items()
            if count
        )

    def build(self, lowered: Program | nn.Module, report: Report, sizes: Sizes, target: str) -> Artifact | nn.Module:
        """As `Target.build`, every kernel that it can call built and, on this machine's GPUs, loaded.

        Raises:
            TargetError: ahead of time, a kernel cannot be built.
        """
        kernels = self._kernels(list(_uses(lowered)), report, target)
        if isinstance(lowered, Program):
            return CudaArtifact(lowered, target, report, sizes, kernels)
        lowered.__dict__["ggpass_kernels"] = kernels
        return super().build(lowered, report, sizes, target)

    def _kernels(self, uses: Sequence[tuple[Use, Tensor, Tensor]], report: Report, target: str) -> "tuple[Cubin, ...]":
        """Build what `uses` call: each a use, its codes and its codebook."""
        if not uses:
            return ()
        for dtype in dict.fromkeys(use.dtype for use, _, _ in uses if use.family == "linear"):
            if dtype not in DTYPES:
                report.notes.append(float_note(dtype))
        wanted = variants_for((use for use, _, _ in uses), table_of(uses[0][2]).decoder)
        made: dict[tuple[str, str], Cubin] = {}
        try:
            if self.archs:
                from ggpass.kernels.cuda.build import Builder

                for arch in self.archs:
                    made |= {(c.name, c.arch): c for c in Builder(generate).obtain_all(wanted, arch)}
            else:
                for index in sorted({codes.device.index or 0 for _, codes, _ in uses}):
                    kernels = kernels_on(index)
                    if not isinstance(kernels, str):
                        made |= {(c.name, c.arch): c for c in kernels.load(wanted)}
        except KernelsUnavailable as error:
            if self.archs:
                raise TargetError(f"target {target!r} with arch={self.archs}: {error}") from error
            note = f"computes with the torch reference, several times slower, until it has kernels: {error}"
            logger.warning("target cuda %s", note)
            report.notes.append(note)
        if made:
            report.notes.append(describe(made.values()))
        return tuple(made.values())


def tune(
    compiled: nn.Module | Artifact, rows: Sequence[int] = (1, 8, 16, 64, 512, 2048)
) -> dict[str, dict[str, float]]:
    """Time every kernel that can compute a compiled model's linears, and take the fastest from now on.

    Takes some seconds, and is never done unasked. What is found is kept on disk for this GPU model; run the model anew
    before capturing a CUDA graph, since other kernels may be loaded then.

    Args:
        compiled: what `ggpass.compile` returned, on a GPU.
        rows: of activations: batch × sequence.

    Returns:
        For each shape "m × n × k" milliseconds by the kernel's name.

    Raises:
        InputError: it is not on a GPU that the kernels run on.
    """
    found: dict[str, dict[str, float]] = {}
    for use, codes, codebook in _uses(compiled.program if isinstance(compiled, Artifact) else compiled):
        kernels = kernels_on(codes.device.index or 0) if codes.device.type == "cuda" else f"it is on {codes.device}"
        if isinstance(kernels, str):
            raise InputError(f"there is nothing to tune: {kernels}; compile the model on a GPU that the kernels run on")
        for m in rows if use.family == "linear" and use.dtype in DTYPES else ():
            shape = f"{m} × {codes.shape[0]} × {codes.shape[1]}"
            if shape not in found:
                scale = torch.ones(codes.shape[0], device=codes.device)
                found[shape] = kernels.tune(m, codes, scale, codebook, use.dtype)
    return found


def describe(kernels: "Iterable[Cubin]") -> str:
    """Return one line for the report: how many kernels, for what, by which compiler, and what they take."""
    kernels = list(kernels)
    archs, compilers = (sorted({getattr(c, what) for c in kernels}) for what in ("arch", "compiler"))
    registers = max((c.registers or 0 for c in kernels), default=0)
    spilling = sorted(f"{c.name} ({c.spills} bytes)" for c in kernels if c.spills)
    return (
        f"{len(kernels)} CUDA kernels for {', '.join(archs)} by {', '.join(compilers)}, "
        f"{sum(len(c.image) for c in kernels) / 1e3:.0f} kB; at most {registers} registers a thread, "
        + (f"registers spilled in {', '.join(spilling)}" if spilling else "none spilled")
    )


def _uses(lowered: Program | nn.Module) -> Iterator[tuple[Use, Tensor, Tensor]]:
    """Yield how a Program or a module computes with each of its quantized weights: the use, the codes, the codebook."""
    if isinstance(lowered, Program):
        operators = ops.DISPATCHED
        places = {operators.linear: ("linear", 1), operators.embedding: ("embedding", 1)}
        for node in lowered.calls(*places, operators.dequantize):
            family, at = places.get(node.target, ("dequantize", 0))  # type: ignore[arg-type]
            codes, _, codebook = (lowered.weight(str(a.target)) for a in node.args[at : at + 3])  # type: ignore[union-attr]
            dtype = node.args[0].meta["val"].dtype if family == "linear" else node.args[at + 3]  # type: ignore[union-attr]
            yield Use(family, dtype, codes.shape[1]), codes, codebook  # type: ignore[arg-type]
        return
    for module in lowered.modules():
        if isinstance(module, Lowered):
            known = {LoweredEmbedding: ("embedding",), LoweredConv: ("dequantize",), LoweredLinear: ("linear",)}
            families = next(
                (found for kind, found in known.items() if isinstance(module, kind)), ("linear", "dequantize")
            )
            for held in module.lowered_weights().values():
                for family in families:
                    yield Use(family, held.dtype, held.codes.shape[1]), held.codes, held.codebook
