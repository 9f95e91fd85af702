"""Our nodes, as the bodies want them: Conv(x, Reshape(Dequantize(codes, scale))) → Conv(x, codes, scale, bias).

1. A convolution of one or two spatial dimensions whose weight is decoded for it alone, with numeric padding, becomes
   one node; any other keeps its Dequantize.
2. A missing bias becomes zeros, since the bodies cannot ask for it (`bodies`, 6); zeros of one length are stored once.
3. Attributes that ONNX leaves to their defaults are written out, for the same reason.
4. Where the bodies cannot follow the type of x (`bodies`, CAST_LIKE_OPSET), half precision is cast around the node.
"""

import numpy as np
import onnx_ir as ir

from ggpass.errors import FormatError
from ggpass.onnx.bodies import CAST_LIKE_OPSET
from ggpass.onnx.names import DOMAIN, Names

HALF = ir.DataType.FLOAT16
#: What leads to float weights, and is of no use once nothing reads it.
PASSES_ON = [("", operation) for operation in ("Transpose", "Cast", "Identity", "Constant", "Reshape")]
PASSES_ON += [(DOMAIN, "RF8Dequantize"), (DOMAIN, "CodebookDequantize")]


def complete(model: ir.Model, names: Names) -> int:
    """Apply 1 to 4 to a model and to the bodies of its If and Loop nodes; return the number of fused convolutions."""
    fused = sum(_fuse_convolutions(graph) for graph in model.graphs())
    zeros: dict[tuple[int, ir.DataType], ir.Value] = {}
    for graph in model.graphs():
        for node in list(graph):
            if node.domain == DOMAIN and node.op_type.endswith(("MatMul", "Conv")):
                _give_bias(model.graph, node, names, zeros)
                if model.opset_imports.get("", CAST_LIKE_OPSET) < CAST_LIKE_OPSET and dtype_of(node) is HALF:
                    _widen(graph, node, names)
    for graph in model.graphs():
        _remove_unread(graph)
    return fused


def dtype_of(node: ir.Node) -> ir.DataType:
    """Return the type of a coded node's activations: who made the node knows it, annotations of others may be wrong."""
    return node.outputs[0].dtype or (node.inputs[0].dtype if node.inputs[0] else None) or ir.DataType.FLOAT


def has_coded_twin(conv: ir.Node, kernel: list[int]) -> bool:
    """Return True if a Conv has one or two spatial dimensions, and padding that the input's size has no say in."""
    return len(kernel) in (1, 2) and conv.attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")


def quantized_conv(conv: ir.Node, operator: str, coded: list[ir.Value], kernel: list[int]) -> ir.Node:
    """Return the coded twin of a Conv, with all attributes written out.

    Args:
        coded: codes and scale, and the codebook if the operator takes it.
        kernel: the spatial shape of the weight.
    """
    axes, attributes = len(kernel), conv.attributes
    bias = list(conv.inputs[2:3])
    return ir.Node(
        DOMAIN,
        operator,
        [conv.inputs[0], *coded, *bias],
        [
            ir.AttrInt64s("kernel_shape", kernel),
            ir.AttrInt64s("strides", list(attributes.get_ints("strides", [1] * axes) or [])),
            ir.AttrInt64s("pads", list(attributes.get_ints("pads", [0] * 2 * axes) or [])),
            ir.AttrInt64s("dilations", list(attributes.get_ints("dilations", [1] * axes) or [])),
            ir.AttrInt64("group", attributes.get_int("group", 1) or 1),
        ],
        num_outputs=1,
        name=conv.name,
    )


def replace(graph: ir.Graph, old: ir.Node, new: ir.Node, dtype: ir.DataType | None = None) -> None:
    """Put `new` in the place of `old`: its output takes over the name, type, shape and users.

    A given dtype is trusted more: a model's own annotations are optional, and some converters leave them wrong.
    """
    was, now = old.outputs[0], new.outputs[0]
    now.name, now.shape = was.name, was.shape
    now.type = ir.TensorType(dtype) if dtype else was.type
    graph.insert_before(old, new)
    ir.convenience.replace_all_uses_with(was, now, replace_graph_outputs=True)
    graph.remove(old, safe=True)


def _fuse_convolutions(graph: ir.Graph) -> int:
    fused = 0
    for conv in list(graph):
        if conv.op_type != "Conv" or conv.domain != "":
            continue
        reshape = conv.inputs[1].producer() if conv.inputs[1] is not None else None
        if reshape is None or reshape.op_type != "Reshape" or len(list(reshape.outputs[0].uses())) != 1:
            continue
        decode = reshape.inputs[0].producer() if reshape.inputs[0] is not None else None
        shape = reshape.outputs[0].shape
        if decode is None or decode.domain != DOMAIN or shape is None or not shape.is_static():
            continue
        kernel = [int(size) for size in shape.numpy()[2:]]
        if decode.graph is not graph or not has_coded_twin(conv, kernel):
            continue
        operator = decode.op_type.replace("Dequantize", "Conv")
        replace(graph, conv, quantized_conv(conv, operator, [v for v in decode.inputs if v is not None], kernel))
        fused += 1
    return fused


def _remove_unread(graph: ir.Graph) -> None:
    """Erase what only passed weights on, and the initializers that nothing reads any more."""
    for node in reversed(list(graph)):
        passes_on = (node.domain, node.op_type) in PASSES_ON
        if passes_on and not any(v.uses() or v.is_graph_output() for v in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
            del graph.initializers[name]


def _give_bias(main: ir.Graph, node: ir.Node, names: Names, zeros: dict[tuple[int, ir.DataType], ir.Value]) -> None:
    position = 4 if node.op_type.startswith("Codebook") else 3
    if len(node.inputs) > position and node.inputs[position] is not None:
        return
    codes = node.inputs[1]
    if codes is None or codes.const_value is None:
        raise FormatError(f"the codes of {node.name!r} are no constant; export the model again")
    key = int(codes.const_value.shape.numpy()[0]), dtype_of(node)
    if key not in zeros:
        length, dtype = key
        name = names.new(f"ggpass_zeros_{length}" + ("_half" if dtype is HALF else ""))
        zeros[key] = ir.val(name, const_value=ir.tensor(np.zeros(length, dtype.numpy())))
        main.register_initializer(zeros[key])
    node.resize_inputs(position + 1)
    node.replace_input_with(position, zeros[key])


def _widen(graph: ir.Graph, node: ir.Node, names: Names) -> None:
    """Cast(node(Cast(x), …, Cast(bias))) to half: the node itself computes in float32."""

    def cast(value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
        made = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(to))], name=f"{node.name}_{name}")
        made.outputs[0].name = names.new(f"{node.outputs[0].name}_{name}")
        made.outputs[0].type = ir.TensorType(to)
        return made

    for position in (0, len(node.inputs) - 1):
        value = node.inputs[position]
        assert value is not None
        wide = cast(value, ir.DataType.FLOAT, f"float_{position}")
        graph.insert_before(node, wide)
        node.replace_input_with(position, wide.outputs[0])
    output = node.outputs[0]
    narrow = cast(output, HALF, "half")
    graph.insert_after(node, narrow)
    inner = narrow.outputs[0].name
    narrow.outputs[0].shape = output.shape
    ir.convenience.replace_all_uses_with(output, narrow.outputs[0], replace_graph_outputs=True)
    narrow.replace_input_with(0, output)
    narrow.outputs[0].name, output.name = output.name, inner
    output.type = ir.TensorType(ir.DataType.FLOAT)
