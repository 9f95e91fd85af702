"""LowerWeights: the pass that turns float weights into codes."""

from dataclasses import dataclass, field

import torch
from torch import fx

from ggpass.graph.program import Program
from ggpass.graph.report import Change, Report
from ggpass.graph.weights import Kind, Use, Weight
from ggpass.lowering.decide import Lowering, decide
from ggpass.lowering.encode import Encode, check_values, release


@dataclass(frozen=True)
class LowerWeights:
    """f(x; w) → f(x; codebook[codes] · scale), codes = rounding(w / scale).

    1. A weight is lowered at all its uses or at none, by tensor identity: tied names share one set of codes.
    2. `linear`, `matmul`, `mm`, `addmm` with a constant matrix, `embedding`, `conv1d/2d`; a transpose may come between.
    3. Biases, norms and other tensors with less than two dimensions stay; so does all that `lowering` leaves out.
    4. Every weight that stays is reported with its reason.
    5. The float tensors themselves are not written to; with `lowering.free` their memory is given back.

    Raises:
        WeightError: NaN or infinity in a weight, an integer weight.
    """

    lowering: Lowering = field(default_factory=Lowering)

    def __call__(self, program: Program) -> Report:
        report = Report("LowerWeights")
        self.lowering.selection.check(program.matrix_names())
        chosen = decide(program.tensors(), self.lowering, report)
        check_values(chosen, self.lowering)
        codebooks: dict[torch.device, str] = {}
        for weight in chosen:
            report.changes.append(self._lower(program, weight, codebooks))
        program.graph.eliminate_dead_code()
        program.prune()
        return report

    def _lower(self, program: Program, weight: Weight, codebooks: dict[torch.device, str]) -> Change:
        lowering, tensor = self.lowering, weight.tensor
        change, shape, dtype = lowering.change(weight), tuple(tensor.shape), tensor.dtype
        if tensor.device not in codebooks:
            codebooks[tensor.device] = program.free_name(f"{lowering.format.name}_codebook")
            program.set_weight(codebooks[tensor.device], lowering.format.codebook.to(tensor.device), buffer=True)
        names = [program.free_name(f"{weight.name}_{part}") for part in ("codes", "scale")]
        program.derive(names, Encode(lowering, weight.name, weight.transposed), (tensor,))
        for use in weight.uses:
            with program.graph.inserting_before(use.place):
                operands = tuple(program.get_attr(name) for name in (*names, codebooks[tensor.device]))
                replace_use(program.graph, use, operands, lowering, shape, dtype)  # type: ignore[arg-type]
        release(weight, lowering)
        return change


def replace_use(
    graph: fx.Graph,
    use: Use,
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
    node, operators = use.place, lowering.operators
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
