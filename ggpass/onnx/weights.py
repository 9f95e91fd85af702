"""Where a model uses its constant weights, seen through Transpose, Cast and Identity, in bodies of If and Loop too."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import onnx_ir as ir
import torch

from ggpass.formats.scheme import row_blocks
from ggpass.graph import weights as graph_weights
from ggpass.graph.report import Skip
from ggpass.graph.weights import Kind
from ggpass.lowering.decide import rows_of
from ggpass.onnx.names import DOMAIN
from ggpass.onnx.tensors import torch_tensor

FLOATS = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.DOUBLE: torch.float64,
}
#: What an activation may be (`schema`: T).
COMPUTED = (ir.DataType.FLOAT, ir.DataType.FLOAT16)

#: Operators that compute with codes; any other may get a Dequantize before it (Kind.OTHER).
KINDS = {"MatMul": Kind.LINEAR, "Gemm": Kind.LINEAR, "Gather": Kind.EMBEDDING, "Conv": Kind.CONV}
#: Up to this many bytes a constant gets no Dequantize: two nodes and a table of their own take as much.
DECODE_BYTES = 4096
#: Operators that want the very numbers they are given: sizes, positions, angles, comparisons, sequences.
EXACT = {"Resize", "Upsample", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Where", "Range", "Loop"}
EXACT |= {"Scan", "If", "SequenceInsert", "SequenceConstruct", "Mod", "Sign", "IsNaN", "IsInf", "Optional"}
EXACT |= {"RotaryEmbedding", "GroupQueryAttention", "GridSample", "AffineGrid", "RoiAlign", "STFT", "DFT"}
#: Parts of names of operators of quantized models.
QUANTIZED = ("Quant", "QLinear", "QGemm", "QAttention", "QEmbed", "QMoE", "Integer", "NBits", "Bnb4", "BFP")
#: Operators that multiply or look up learned numbers. A constant elsewhere (Add, Mul, …) may be a grid or a mask.
LEARNED = {"MatMul", "Gemm", "Conv", "ConvTranspose", "LSTM", "GRU", "RNN", "Einsum", "Gather", "FusedConv"}
LEARNED |= {"FusedGemm", "FusedMatMul", "Attention", "MultiHeadAttention", "EmbedLayerNormalization", "DeformConv"}


@dataclass(frozen=True, kw_only=True)
class Use(graph_weights.Use):
    """One place where a weight is used.

    Attributes:
        place: the node that consumes it, or the value that the graph returns.
        position: which of the node's inputs it is.
        dtype: of the weight as the node sees it, behind casts.
        swapped: whether the node sees the weight transposed.
    """

    position: int = 0
    dtype: ir.DataType
    swapped: bool = False


@dataclass(frozen=True, kw_only=True)
class Weight(graph_weights.Weight):
    """A floating constant.

    Attributes:
        names: its own, numbered if two graphs of the model use one name; then those of the nodes that use it, with
            slashes and with dots: patterns select by any.
        tensor: its shape and dtype, on the meta device.
        value: the initializer, or the output of a Constant node.
        data: its elements, unread.
    """

    value: ir.Value
    data: ir.TensorProtocol
    lazy: bool = True

    #: A scale of four bytes for fewer elements than this would cost more than an eighth of their codes.
    least_row: ClassVar[int] = 32

    @property
    def name(self) -> str:
        """Return the name in reports: the first node's, if its own is a number that an exporter made up."""
        own, *nodes = self.names
        return _dotted(nodes[0]) if own.startswith("onnx::") and nodes else own

    @property
    def title(self) -> str:
        """Return the name in reports; the others are of nodes, not of the weight."""
        return self.name

    @property
    def matrix(self) -> tuple[int, int]:
        """Return (rows, columns) of the constant as it lies in memory, seen as a matrix that is encoded."""
        return rows_of(self.tensor.shape, False, self.leading)

    def reason_of_values(self) -> str:
        """Return the reason why its values should have no codes, or ''. NaN is left for the encoder to refuse.

        Infinity stands for a mask or padding. A constant under Add or Mul with few values is a grid or a mask too, such
        as positions of anchors: a relative error in them moves the result, and they are small beside weights.
        """
        if self.value.is_graph_input():
            return "an input with a default, which a caller may override"
        matrix = torch_tensor(self.data).reshape(self.matrix)
        blocks = row_blocks(*matrix.shape)
        for start in blocks:
            infinite = matrix[start : start + blocks.step].isinf()
            if infinite.any():
                row, column = (int(i) for i in infinite.nonzero()[0])
                number = matrix[start + row, column].item()
                return f"holds {number} (row {start + row}), which has no code: a mask or padding"
        some = matrix.flatten()[: blocks.step * matrix.shape[1]]
        learned = any(isinstance(use.place, ir.Node) and use.place.op_type in LEARNED for use in self.uses)
        if not learned and 4 * len(some.unique()) < some.numel():
            return "holds few values for its size: a grid or a mask, not weights"
        return ""


def _dotted(name: str) -> str:
    """Return a node's name as torch would write it: /encoder/layer.0/query/MatMul → encoder.layer.0.query.MatMul."""
    return name.strip("/").replace("/", ".")


def find_weights(model: ir.Model) -> list[Weight]:
    """Return every floating constant of the model and of its subgraphs that something reads."""
    found: dict[str, Weight] = {}
    for graph in model.graphs():
        for value, data in constants(graph):
            if data.dtype not in FLOATS or not (value.uses() or value.is_graph_output()):
                continue
            name, number = str(value.name), 2
            while name in found:
                name, number = f"{value.name}_{number}", number + 1
            uses = _in_one_orientation(list(_uses(value, data)), data.nbytes)
            nodes = [str(use.place.name) for use in uses if isinstance(use.place, ir.Node) and use.place.name]
            names = tuple(dict.fromkeys([name, *nodes, *map(_dotted, nodes)]))
            tensor = torch.empty(tuple(data.shape.numpy()), dtype=FLOATS[data.dtype], device="meta")
            found[name] = Weight(names=names, tensor=tensor, uses=uses, value=value, data=data)
    return list(found.values())


def _in_one_orientation(uses: list[Use], nbytes: int) -> tuple[Use, ...]:
    """Return the uses, with a Dequantize at those in another orientation than the first, if that is worth it."""
    direct = [use.transposed for use in uses if use.kind in KINDS.values()]
    if nbytes > DECODE_BYTES:
        other = [use.kind in KINDS.values() and use.transposed != direct[0] for use in uses]
        uses = [replace(use, kind=Kind.OTHER, transposed=False) if o else use for use, o in zip(uses, other)]
    return tuple(uses)


def constants(graph: ir.Graph) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """Yield the initializers of a graph and the outputs of its Constant nodes, with their tensors."""
    for value in graph.initializers.values():
        if value.const_value is not None:
            yield value, value.const_value
    for node in graph:
        if node.op_type == "Constant" and node.domain == "" and "value" in node.attributes:
            yield node.outputs[0], node.attributes["value"].as_tensor()


def other_constants(model: ir.Model) -> list[Skip]:
    """Return a Skip for each constant of two or more dimensions that is no float and that something reads."""
    skips = []
    for graph in model.graphs():
        for value, data in constants(graph):
            users = [node for node, _ in value.uses()]
            if len(data.shape) < 2 or data.dtype in FLOATS or not users:
                continue
            reason, matrix = f"is {data.dtype.name.lower()}, not a float weight", False
            if any(node.domain == DOMAIN for node in users):
                reason = "holds codes already"
            elif data.dtype.bitwidth <= 8 and data.dtype is not ir.DataType.BOOL:
                reason, matrix = f"is {data.dtype.name.lower()}: quantized already", True
            skips.append(Skip(str(value.name), reason, data.nbytes, matrix=matrix))
    return skips


def _uses(source: ir.Value, data: ir.TensorProtocol) -> Iterator[Use]:
    """Yield every use of a constant, seen through nodes that only pass it on."""
    work = [(source, False, data.dtype)]
    while work:
        value, swapped, dtype = work.pop()
        if value.is_graph_output():
            yield Use(place=value, kind=None, reason="the graph returns it", dtype=dtype)
        for node, position in value.uses():
            passed = _passed_on(node, swapped, dtype, len(data.shape))
            if passed is None:
                yield _classify(node, position, swapped, dtype, data)
            else:
                work.append((node.outputs[0], *passed))


def _passed_on(node: ir.Node, swapped: bool, dtype: ir.DataType, dims: int) -> tuple[bool, ir.DataType] | None:
    """Return whether a node's result is the constant transposed, and its dtype; None if the node computes."""
    if node.domain != "":
        return None
    if node.op_type == "Identity":
        return swapped, dtype
    if node.op_type == "Cast":
        to = ir.DataType(node.attributes["to"].as_int())
        return (swapped, to) if to in FLOATS else None
    if node.op_type == "Transpose" and dims == 2:
        permutation = node.attributes.get_ints("perm", [1, 0])
        return (swapped ^ (list(permutation or []) == [1, 0]), dtype)
    return None


def _classify(node: ir.Node, position: int, swapped: bool, dtype: ir.DataType, data: ir.TensorProtocol) -> Use:
    kind = KINDS.get(node.op_type) if node.domain == "" else None
    reason = _reason_not_direct(node, position, kind, swapped, dtype, len(data.shape))
    if reason:
        # Any operator that goes on computing with numbers that are a little off.
        known = node.domain in ("", "com.microsoft") and node.op_type not in EXACT
        decodes = known and not any(part in node.op_type for part in QUANTIZED)
        decodes = decodes and len(data.shape) >= 2 and data.nbytes > DECODE_BYTES and dtype in COMPUTED
        kind, transposed = Kind.OTHER if decodes else None, False
    else:
        # MatMul and Gemm multiply by W, our operators by Wᵀ.
        by_column = kind is Kind.LINEAR and not node.attributes.get_int("transB", 0)
        transposed = swapped ^ by_column
    return Use(
        place=node, kind=kind, transposed=transposed, reason=reason, position=position, dtype=dtype, swapped=swapped
    )


def _reason_not_direct(
    node: ir.Node, position: int, kind: Kind | None, swapped: bool, dtype: ir.DataType, dims: int
) -> str:
    """Return the reason why a node does not compute with codes itself, or ''."""
    if kind is None:
        domain = f"{node.domain}." if node.domain else ""
        return f"used by {domain}{node.op_type}, which has no lowering"
    if [i for i, value in enumerate(node.inputs) if value is node.inputs[position]] != [position]:
        return f"used twice by one {node.op_type}"
    if position != (0 if kind is Kind.EMBEDDING else 1):
        return f"used by {node.op_type} as something other than its weight"
    if dtype not in COMPUTED:
        return f"{node.op_type} computes in {dtype.name}, and the operators in float or float16"
    if kind is Kind.CONV:
        return ""
    if dims != 2:
        return f"used by {node.op_type} with {dims} dimensions, not 2"
    if kind is Kind.EMBEDDING:
        along_rows = not swapped and node.attributes.get_int("axis", 0) in (0, -2)
        return "" if along_rows else "gathered along columns, and a scale belongs to a row"
    if node.op_type == "Gemm":
        if node.attributes.get_int("transA", 0):
            return "Gemm with transA=1 has no lowering"
        if any(node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta")):
            return "Gemm with factors alpha or beta has no lowering"
    return ""
