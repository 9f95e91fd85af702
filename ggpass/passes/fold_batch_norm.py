"""FoldBatchNorm: an inference batch norm behind a convolution or linear becomes part of its weight and bias."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ggpass.graph.program import Program
from ggpass.graph.report import Change, Report, Skip

aten = torch.ops.aten

#: The producers whose output channel is dimension 1 of the result, or the last one for a 2-D linear.
PRODUCERS = (
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.linear.default,
)


@dataclass(frozen=True)
class FoldBatchNorm:
    """γ·(W∗x + b − μ)/√(σ² + ε) + β = W'∗x + b', with g = γ/√(σ² + ε), W' = g·W, b' = g·(b − μ) + β.

    1. The batch norm reads running statistics (inference), and is the only reader of its producer.
    2. The producer is conv1d, conv2d, or a linear with a 2-D result, and its weight and bias have no other reader.
    3. g, W' and b' are formed in float64 and rounded once to the weight's dtype.
    4. A batch norm that stays is reported with its reason.
    """

    def __call__(self, program: Program) -> Report:
        report = Report("FoldBatchNorm")
        for norm in program.calls(aten.batch_norm.default):
            reason = _reason_to_keep(norm)
            if reason:
                report.skips.append(Skip(norm.name, reason, matrix=False))
            else:
                report.changes.append(_fold(program, norm))
        if report.changes:
            program.prune()
        return report


def _reason_to_keep(norm: fx.Node) -> str:
    producer = norm.args[0]
    if norm.args[5] is not False:
        return "computes batch statistics (training mode)"
    if not isinstance(producer, fx.Node) or producer.target not in PRODUCERS:
        return "does not follow a convolution or linear"
    if list(producer.users) != [norm]:
        return f"{producer.name} has other readers"
    weight, bias = producer.args[1], producer.args[2] if len(producer.args) > 2 else None
    for tensor in (weight, bias):
        if tensor is None:
            continue
        if not isinstance(tensor, fx.Node) or tensor.op != "get_attr":
            return f"the weight or bias of {producer.name} is computed"
        if list(tensor.users) != [producer]:
            return f"{tensor.target} has other readers"
    if any(isinstance(n, fx.Node) and n.op != "get_attr" for n in norm.args[1:5]):
        return "its weight or statistics are computed"
    # One batch dimension in front of the channels: in any other shape dimension 1 is not the producer's channels.
    if norm.meta["val"].dim() != producer.args[1].meta["val"].dim():  # type: ignore[union-attr]
        return f"the result of {producer.name} has no batch dimension, or more than one"
    return ""


def _fold(program: Program, norm: fx.Node) -> Change:
    producer: fx.Node = norm.args[0]  # type: ignore[assignment]

    def value(node: object, default: float) -> Tensor:
        if isinstance(node, fx.Node):
            return program.weight(str(node.target)).detach().double()
        return torch.full((), default, dtype=torch.float64)

    gamma, beta, mean, variance = (value(n, d) for n, d in zip(norm.args[1:5], (1.0, 0.0, 0.0, 1.0)))
    epsilon: float = norm.args[7]  # type: ignore[assignment]
    gain = gamma / torch.sqrt(variance + epsilon)
    weight_node: fx.Node = producer.args[1]  # type: ignore[assignment]
    bias_node = producer.args[2] if len(producer.args) > 2 else None
    name = str(weight_node.target)
    weight = program.weight(name).detach()
    folded = (weight.double() * gain.view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
    bias = (gain * (value(bias_node, 0.0) - mean) + beta).to(weight.dtype)

    # Another name of the same tensor keeps the old values: the tensor is replaced, not written to.
    program.set_weight(name, folded)
    bias_name = str(bias_node.target) if isinstance(bias_node, fx.Node) else program.free_name(f"{name}_folded_bias")
    program.set_weight(bias_name, bias)
    with program.graph.inserting_before(producer):
        bias_node = program.get_attr(bias_name)
    producer.args = (*producer.args[:2], bias_node, *producer.args[3:])
    norm.replace_all_uses_with(producer)
    program.graph.erase_node(norm)
    return Change(norm.name, f"folded into {name}")
