"""Where a model uses its constant weights, seen through Transpose, Cast and Identity, in bodies of If and Loop too."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from math import prod

import onnx_ir as ir

from ggpass.onnx.names import DOMAIN, STANDARD

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
#: What an activation may be (`schema`: T).
COMPUTED = (ir.DataType.FLOAT, ir.DataType.FLOAT16)

#: Up to this many bytes a constant gets no Dequantize: two nodes and a table of their own take as much.
DECODE_BYTES = 4096
#: Operators that want the very numbers they are given: sizes, positions, angles, comparisons, sequences.
EXACT = {"Resize", "Upsample", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Where", "Range", "Loop"}
EXACT |= {"Scan", "If", "SequenceInsert", "SequenceConstruct", "Mod", "Sign", "IsNaN", "IsInf", "Optional"}
EXACT |= {"RotaryEmbedding", "GroupQueryAttention", "GridSample", "AffineGrid", "RoiAlign", "STFT", "DFT"}
#: Parts of names of operators of quantized models.
QUANTIZED = ("Quant", "QLinear", "QGemm", "QAttention", "QEmbed", "QMoE", "Integer", "NBits", "Bnb4", "BFP")
#: Operators that multiply or look up learned numbers. A constant elsewhere (Add, Mul, …) may be a grid or a mask.
LEARNED = {
    "MatMul",
    "Gemm",
    "Conv",
    "ConvTranspose",
    "LSTM",
    "GRU",
    "RNN",
    "Einsum",
    "Gather",
    "FusedConv",
    "FusedGemm",
}
LEARNED |= {"FusedMatMul", "Attention", "MultiHeadAttention", "EmbedLayerNormalization", "DeformConv"}


class Kind(Enum):
    """What a node does with a weight that codes can stand in for."""

    MATMUL = "MatMul"
    GEMM = "Gemm"
    GATHER = "Gather"
    CONV = "Conv"
    DECODE = ""  # any other float operator: a Dequantize goes before it


@dataclass(frozen=True)
class Use:
    """One place where a weight is used.

    Attributes:
        node: the node that consumes it; None if the graph returns it.
        position: which of the node's inputs it is.
        kind: what the node is; None if codes cannot stand in, and then `reason` says why.
        transposed: whether the output channels are the weight's second dimension.
        dtype: of the weight as the node sees it, behind casts.
        swapped: whether the node sees the weight transposed.
        reason: why the node does not compute with codes itself; '' if it does.
    """

    node: ir.Node | None
    position: int
    kind: Kind | None
    transposed: bool
    dtype: ir.DataType
    swapped: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Weight:
    """A constant of two or more dimensions, or one of fewer that only the report is about.

    Attributes:
        name: of the constant; numbered if two graphs of the model use one name.
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
        """What reports call it: the first node's name if its own is a number that an exporter made up."""
        return _dotted(self.names[1]) if self.name.startswith("onnx::") and len(self.names) > 1 else self.name

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(size) for size in self.tensor.shape.numpy())

    @property
    def transposed(self) -> bool:
        """Whether the output channels are the second dimension, at the first use that computes with codes."""
        direct = [use.transposed for use in self.uses if use.kind not in (None, Kind.DECODE)]
        return direct[0] if direct else False

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of the constant as it lies in memory, seen as a matrix that codes and scales are made of.

        A row is what an index of the first dimension selects, unless no use asks for that: then as many dimensions are
        rows as leave a row long enough for its scale.
        """
        shape, split = self.shape, 1
        if all(use.kind is Kind.DECODE for use in self.uses):
            while split < len(shape) - 1 and prod(shape[split + 1 :]) >= MIN_ROW:
                split += 1
        return prod(shape[:split]), prod(shape[split:])

    @property
    def learned(self) -> bool:
        """Whether some use says that these are learned numbers."""
        return any(use.node is not None and use.node.op_type in LEARNED for use in self.uses)


#: A scale of four bytes for fewer weights than this would cost more than an eighth of their codes.
MIN_ROW = 32


def _dotted(name: str) -> str:
    """A node's name as torch would write it: /encoder/layer.0/query/MatMul → encoder.layer.0.query.MatMul."""
    return name.strip("/").replace("/", ".")


def find_weights(model: ir.Model) -> list[Weight]:
    """Every floating constant of the model and of its subgraphs that something reads."""
    found: dict[str, Weight] = {}
    for graph in model.graphs():
        for value, tensor in constants(graph):
            if tensor.dtype not in FLOATS or not (value.uses() or value.is_graph_output()):
                continue
            name, number = str(value.name), 2
            while name in found:
                name, number = f"{value.name}_{number}", number + 1
            found[name] = Weight(name, value, tensor, tuple(_uses(value, tensor)))
    return list(found.values())


def constants(graph: ir.Graph) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """Yield the initializers of a graph and the outputs of its Constant nodes, with their tensors."""
    for value in graph.initializers.values():
        if value.const_value is not None:
            yield value, value.const_value
    for node in graph:
        if node.op_type == "Constant" and node.domain in STANDARD and "value" in node.attributes:
            yield node.outputs[0], node.attributes["value"].as_tensor()


def _uses(source: ir.Value, tensor: ir.TensorProtocol) -> Iterator[Use]:
    """Every use of a constant, seen through nodes that only pass it on."""
    dims = len(tensor.shape)
    work = [(source, False, tensor.dtype)]
    while work:
        value, swapped, dtype = work.pop()
        if value.is_graph_output():
            yield Use(None, 0, None, swapped, dtype, reason="the graph returns it")
        for node, position in value.uses():
            passed = _passed_on(node, swapped, dtype, dims)
            if passed is None:
                yield _classify(node, position, swapped, dtype, dims, tensor.nbytes)
            else:
                work.append((node.outputs[0], *passed))


def _passed_on(node: ir.Node, swapped: bool, dtype: ir.DataType, dims: int) -> tuple[bool, ir.DataType] | None:
    """(swapped, dtype) behind a node that only passes a weight on; None for any other node."""
    if node.domain not in STANDARD:
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


def _classify(node: ir.Node, position: int, swapped: bool, dtype: ir.DataType, dims: int, nbytes: int) -> Use:
    kind = next((k for k in Kind if k.value == node.op_type and node.domain in STANDARD), None)
    reason = _reason_not_direct(node, position, kind, swapped, dtype, dims)
    if not reason:
        assert kind is not None
        by_column = kind is Kind.MATMUL or (kind is Kind.GEMM and not node.attributes.get_int("transB", 0))
        return Use(node, position, kind, swapped ^ by_column, dtype, swapped)
    decodes = dims >= 2 and nbytes > DECODE_BYTES and dtype in COMPUTED and _takes_any_numbers(node)
    return Use(node, position, Kind.DECODE if decodes else None, swapped, dtype, swapped, reason)


def _takes_any_numbers(node: ir.Node) -> bool:
    """Whether an operator goes on computing with numbers that are a little off."""
    known = node.domain in (*STANDARD, "com.microsoft")
    return known and node.op_type not in EXACT and not any(part in node.op_type for part in QUANTIZED)


def _reason_not_direct(
    node: ir.Node, position: int, kind: Kind | None, swapped: bool, dtype: ir.DataType, dims: int
) -> str:
    """Why a node does not compute with codes itself; '' if it does."""
    if kind is None:
        domain = "" if node.domain in STANDARD else f"{node.domain}."
        return f"used by {domain}{node.op_type}, which has no lowering"
    if [i for i, value in enumerate(node.inputs) if value is node.inputs[position]] != [position]:
        return f"used twice by one {node.op_type}"
    if position != (0 if kind is Kind.GATHER else 1):
        return f"used by {node.op_type} as something other than its weight"
    if dtype not in COMPUTED:
        return f"{node.op_type} computes in {dtype.name}, and the operators in float or float16"
    if kind is Kind.CONV:
        return ""
    if dims != 2:
        return f"used by {node.op_type} with {dims} dimensions, not 2"
    if kind is Kind.GATHER:
        along_rows = not swapped and node.attributes.get_int("axis", 0) in (0, -2)
        return "" if along_rows else "gathered along columns, and a scale belongs to a row"
    if kind is Kind.GEMM:
        if node.attributes.get_int("transA", 0):
            return "Gemm with transA=1 has no lowering"
        if any(node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta")):
            return "Gemm with factors alpha or beta has no lowering"
    return ""


def reason_of_other(value: ir.Value, tensor: ir.TensorProtocol) -> tuple[str, bool]:
    """Why a constant that is no float stays, and whether it counts as a matrix of the model."""
    if any(node.domain == DOMAIN for node, _ in value.uses()):
        return "holds codes already", False
    if tensor.dtype.bitwidth <= 8 and tensor.dtype is not ir.DataType.BOOL:
        return f"is {tensor.dtype.name.lower()}: quantized already", True
    return f"is {tensor.dtype.name.lower()}, not a float weight", False
