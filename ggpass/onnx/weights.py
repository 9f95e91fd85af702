"""Where a model uses its constant weights, seen through Transpose, Cast and Identity, in bodies of If and Loop too."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import onnx_ir as ir

STANDARD = ("", "ai.onnx")
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
#: What an activation may be (`schema`: T).
COMPUTED = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


class Kind(Enum):
    """What a node does with a weight that codes can stand in for."""

    MATMUL = "MatMul"
    GEMM = "Gemm"
    GATHER = "Gather"
    CONV = "Conv"


@dataclass(frozen=True)
class Use:
    """One place where a weight is used.

    Attributes:
        node: the node that consumes it.
        kind: what the node is; None where codes cannot stand in, and then `reason` says why.
        transposed: whether the output channels are the weight's second dimension.
        dtype: of the weight as the node sees it, behind casts.
        reason: why this use cannot be lowered; empty where it can.
    """

    node: ir.Node | None
    kind: Kind | None
    transposed: bool
    dtype: ir.DataType
    reason: str = ""


@dataclass(frozen=True)
class Weight:
    """A constant of two or more dimensions, or one of fewer that only the report is about.

    Attributes:
        name: of the constant; numbered where two graphs of the model use one name.
        value: the initializer, or the output of a Constant node.
        tensor: its data, unread.
        uses: every node that consumes it.
    """

    name: str
    value: ir.Value
    tensor: ir.TensorProtocol
    uses: tuple[Use, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Its own name and those of the nodes that use it, with slashes and with dots: patterns select by any."""
        nodes = [str(use.node.name) for use in self.uses if use.node is not None and use.node.name]
        return tuple(dict.fromkeys([self.name, *nodes, *map(_dotted, nodes)]))

    @property
    def title(self) -> str:
        """What reports call it: the first node's name where its own is a number that an exporter made up."""
        return _dotted(self.names[1]) if self.name.startswith("onnx::") and len(self.names) > 1 else self.name

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(size) for size in self.tensor.shape.numpy())


def _dotted(name: str) -> str:
    """A node's name as torch would write it: /encoder/layer.0/query/MatMul → encoder.layer.0.query.MatMul."""
    return name.strip("/").replace("/", ".")


def find_weights(model: ir.Model) -> list[Weight]:
    """Every floating constant of the model and of its subgraphs that something reads."""
    found: dict[str, Weight] = {}
    for graph in model.graphs():
        for value, tensor in _constants(graph):
            if tensor.dtype not in FLOATS or not (value.uses() or value.is_graph_output()):
                continue
            name, number = str(value.name), 2
            while name in found:
                name, number = f"{value.name}_{number}", number + 1
            found[name] = Weight(name, value, tensor, tuple(_uses(value, len(tensor.shape))))
    return list(found.values())


def _constants(graph: ir.Graph) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    for value in graph.initializers.values():
        if value.const_value is not None:
            yield value, value.const_value
    for node in graph:
        if node.op_type == "Constant" and node.domain in STANDARD and "value" in node.attributes:
            yield node.outputs[0], node.attributes["value"].as_tensor()


def _uses(source: ir.Value, dims: int) -> Iterator[Use]:
    """Every use of a constant, seen through nodes that only pass it on."""
    work = [(source, False, source.dtype or ir.DataType.FLOAT)]
    while work:
        value, transposed, dtype = work.pop()
        if value.is_graph_output():
            yield Use(None, None, transposed, dtype, "the graph returns it")
        for node, position in value.uses():
            passed = _passed_on(node, transposed, dtype, dims)
            if passed is None:
                yield _classify(node, position, transposed, dtype, dims)
            else:
                work.append((node.outputs[0], *passed))


def _passed_on(node: ir.Node, transposed: bool, dtype: ir.DataType, dims: int) -> tuple[bool, ir.DataType] | None:
    """(transposed, dtype) behind a node that only passes a weight on; None for any other node."""
    if node.domain not in STANDARD:
        return None
    if node.op_type == "Identity":
        return transposed, dtype
    if node.op_type == "Cast":
        to = ir.DataType(node.attributes["to"].as_int())
        return (transposed, to) if to in FLOATS else None
    if node.op_type == "Transpose" and dims == 2:
        permutation = node.attributes.get_ints("perm", [1, 0])
        return (transposed ^ (list(permutation or []) == [1, 0]), dtype)
    return None


def _classify(node: ir.Node, position: int, transposed: bool, dtype: ir.DataType, dims: int) -> Use:
    def keep(reason: str) -> Use:
        return Use(node, None, transposed, dtype, reason)

    kind = next((k for k in Kind if k.value == node.op_type and node.domain in STANDARD), None)
    if kind is None:
        domain = "" if node.domain in STANDARD else f"{node.domain}."
        return keep(f"used by {domain}{node.op_type}, which has no lowering")
    if [i for i, value in enumerate(node.inputs) if value is node.inputs[position]] != [position]:
        return keep(f"used twice by one {node.op_type}")
    if position != (0 if kind is Kind.GATHER else 1):
        return keep(f"used by {node.op_type} as something other than its weight")
    if dtype not in COMPUTED:
        return keep(f"{node.op_type} computes in {dtype.name}, and the operators in float or float16")
    if kind is Kind.CONV:
        return Use(node, kind, False, dtype)
    if dims != 2:
        return keep(f"used by {node.op_type} with {dims} dimensions, not 2")
    if kind is Kind.GATHER:
        if transposed or node.attributes.get_int("axis", 0) not in (0, -2):
            return keep("gathered along columns, and a scale belongs to a row")
        return Use(node, kind, False, dtype)
    if kind is Kind.GEMM:
        if node.attributes.get_int("transA", 0):
            return keep("Gemm with transA=1 has no lowering")
        if any(node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta")):
            return keep("Gemm with factors alpha or beta has no lowering")
        return Use(node, kind, transposed ^ (not node.attributes.get_int("transB", 0)), dtype)
    return Use(node, kind, not transposed, dtype)
