"""LowerWeights: the pass that turns float weights into codes."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from ggpass.lowering.lowering import Lowering, bytes_of
from ggpass.graph.pipeline import Change, Report, Skip
from ggpass.graph.program import Program
from ggpass.graph.weights import Kind, Weight, WeightUse, group_weights


@dataclass(frozen=True)
class LowerWeights:
    """f(x; w) → f(x; codebook[codes] · scale), codes = rounding(w / scale).

    1. A weight is lowered at all its uses or at none, by tensor identity: tied names share one set of codes.
    2. `linear`, `matmul`, `mm`, `addmm` with a constant matrix, `embedding`, `conv1d/2d`; a transpose may come between.
    3. Biases, norms and other tensors with less than two dimensions stay; so does what `lowering` leaves out.
    4. Every weight that stays is reported with its reason.
    5. The float tensors themselves are not written to; with `lowering.free` their memory is given back.

    Raises:
        WeightError: NaN or infinity in a weight, an integer weight.
    """

    lowering: Lowering = field(default_factory=Lowering)

    def __call__(self, program: Program) -> Report:
        report = Report("LowerWeights")
        sources = [node for node in program.reads() if node.users]
        weights = group_weights(sources, lambda node: program.weight(str(node.target)))
        weights = [replace(w, names=self.lowering.aliases_of(w.tensor) or w.names) for w in weights]
        matrices = [w for w in weights if w.tensor.dim() >= 2 and isinstance(w.tensor, torch.nn.Parameter)]
        for weight in weights:
            if weight not in matrices:
                report.skips += _unlisted(weight)
        reasons = [reason_to_keep(weight, self.lowering) for weight in matrices]
        report.skips += [Skip(w.name, reason, bytes_of(w.tensor)) for w, reason in zip(matrices, reasons) if reason]
        chosen = [weight for weight, reason in zip(matrices, reasons) if not reason]
        self.lowering.check_values((w.name, w.tensor, w.uses[0].transposed) for w in chosen)
        # Small weights first: with `free`, their memory is back before the largest needs room for its codes.
        codebook = program.free_name(f"{self.lowering.format.name}_codebook")
        for weight in sorted(chosen, key=lambda w: w.tensor.numel()):
            report.changes.append(self._lower(program, weight, codebook))
        program.graph.eliminate_dead_code()
        program.prune()
        return report

    def _lower(self, program: Program, weight: Weight, codebook: str) -> Change:
        lowering, before, shape = self.lowering, bytes_of(weight.tensor), tuple(weight.tensor.shape)
        dtype = weight.tensor.dtype
        quantized = lowering.lower(weight.name, weight.tensor, weight.uses[0].transposed)
        tensors = {
            program.free_name(f"{weight.name}_codes"): quantized.codes,
            program.free_name(f"{weight.name}_scale"): quantized.scale,
            codebook: lowering.format.codebook.to(quantized.codes.device),
        }
        for name, tensor in tensors.items():
            program.set_weight(name, tensor, buffer=True)
        for use in weight.uses:
            with program.graph.inserting_before(use.node):
                codes, scale, values = (program.get_attr(name) for name in tensors)
                replace_use(program.graph, use, (codes, scale, values), lowering, shape, dtype)
        return Change(
            weight.name if len(weight.names) == 1 else " = ".join(weight.names),
            f"{'×'.join(map(str, shape))} {str(dtype).removeprefix('torch.')} → {lowering.format.name}",
            before,
            bytes_of(quantized.codes) + bytes_of(quantized.scale),
        )


def _unlisted(weight: Weight) -> list[Skip]:
    """Skips of what lowering is not about: nothing for index tensors, one line each for float vectors and buffers."""
    tensor: Tensor = weight.tensor
    if not tensor.is_floating_point():
        return []
    if tensor.dim() < 2:
        return [Skip(weight.name, f"{tensor.dim()}-D (bias, norm): stays as it is", bytes_of(tensor), matrix=False)]
    # A buffer that is used as weights are counts as a matrix: leaving it out would make the share look better.
    matrix = any(use.kind is not None for use in weight.uses)
    return [Skip(weight.name, "a buffer, not a parameter", bytes_of(tensor), matrix=matrix)]


def reason_to_keep(weight: Weight, lowering: Lowering) -> str:
    """Why a matrix stays a float matrix; empty where every use of it can be lowered."""
    for use in weight.uses:
        if use.kind is None:
            return use.reason if len(weight.uses) == 1 else f"{use.reason} (node {use.node.name})"
    reason = lowering.reason_to_skip(weight.names, weight.tensor)
    if reason:
        return reason
    if len({use.transposed for use in weight.uses}) > 1:
        return "used in both orientations, and a scale belongs to one"
    if not lowering.worth_it(weight.tensor, weight.uses[0].transposed):
        return "codes and scales would be no smaller"
    return ""


def replace_use(
    graph: fx.Graph,
    use: WeightUse,
    operands: tuple[fx.Node, fx.Node, fx.Node],
    lowering: Lowering,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    """Let one use compute with (codes, scale, codebook) instead of the float weight.

    Args:
        use: the place; its node must be behind the insertion point.
        operands: nodes that yield codes, scale and codebook.
        shape, dtype: of the float weight.
    """
    node, operators = use.node, lowering.operators
    if use.kind is Kind.CONV:
        flat = graph.call_function(operators.dequantize, (*operands, dtype))
        restored = graph.call_function(torch.ops.aten.view.default, (flat, list(shape)))
        node.update_arg(1, restored)
        return
    if use.kind is Kind.EMBEDDING:
        new = graph.call_function(operators.embedding, (node.args[1], *operands, dtype))
    elif node.target is torch.ops.aten.addmm.default:
        new = graph.call_function(operators.linear, (node.args[1], *operands, node.args[0]))
    else:
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        new = graph.call_function(operators.linear, (node.args[0], *operands, bias))
    new.meta["val"] = node.meta.get("val")
    node.replace_all_uses_with(new)
    graph.erase_node(node)
