"""LowerWeights: the pass that turns float weights into codes."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ggpass.lowering import Lowering, bytes_of
from ggpass.pipeline import Change, Report, Skip
from ggpass.program import Program
from ggpass.weights import Kind, Weight, WeightUse, group_weights


@dataclass(frozen=True)
class LowerWeights:
    """f(x; w) → f(x; codebook[codes] · scale), codes = rounding(w / scale).

    1. A weight is lowered at all its uses or at none, by tensor identity: tied names share one set of codes.
    2. `linear`, `matmul`, `mm`, `addmm` with a constant matrix, `embedding`, `conv1d/2d`; a transpose may come between.
    3. Biases, norms and other tensors with less than two dimensions stay; so does what `lowering` leaves out.
    4. Every weight that stays is reported with its reason.
    5. The float tensors themselves are not written to; with `lowering.free` their memory is given back.

    Raises:
        WeightError: NaN or infinity in a weight, an integer weight, a pattern that matches nothing.
    """

    lowering: Lowering = field(default_factory=Lowering)

    def __call__(self, program: Program) -> Report:
        report = Report("LowerWeights")
        sources = [n for n in program.graph.nodes if n.op == "get_attr" and n.users]
        weights = group_weights(sources, lambda node: program.weight(str(node.target)))
        matrices = [w for w in weights if w.tensor.dim() >= 2 and isinstance(w.tensor, torch.nn.Parameter)]
        self.lowering.check_patterns(name for w in matrices for name in w.names)
        for weight in weights:
            if weight not in matrices:
                report.skips += _unlisted(weight)
        reasons = [reason_to_keep(weight, self.lowering) for weight in matrices]
        report.skips += [Skip(w.name, reason, bytes_of(w.tensor)) for w, reason in zip(matrices, reasons) if reason]
        chosen = [weight for weight, reason in zip(matrices, reasons) if not reason]
        self.lowering.check_values((weight.name, weight.tensor) for weight in chosen)
        # Small weights first: with `free`, their memory is back before the largest needs room for its codes.
        for weight in sorted(chosen, key=lambda w: w.tensor.numel()):
            report.changes.append(self._lower(program, weight))
        program.graph.eliminate_dead_code()
        program.prune()
        return report

    def _lower(self, program: Program, weight: Weight) -> Change:
        lowering, before, shape = self.lowering, bytes_of(weight.tensor), tuple(weight.tensor.shape)
        dtype = weight.tensor.dtype
        quantized = lowering.lower(weight.name, weight.tensor, weight.uses[0].transposed)
        codebook = f"{lowering.format.name}_codebook"
        tensors = {
            f"{weight.name}_codes": quantized.codes,
            f"{weight.name}_scale": quantized.scale,
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
    return [Skip(weight.name, "a buffer, not a parameter", bytes_of(tensor), matrix=False)]


def reason_to_keep(weight: Weight, lowering: Lowering) -> str:
    """Why a matrix stays a float matrix; empty where every use of it can be lowered."""
    reason = lowering.reason_to_skip(weight.names, weight.tensor)
    if reason:
        return reason
    for use in weight.uses:
        if use.kind is None:
            return use.reason if len(weight.uses) == 1 else f"{use.reason} (node {use.node.name})"
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
