"""Coded nodes in the place of float ones."""

import dataclasses
from functools import cached_property

import numpy as np
import onnx_ir as ir

from ggpass.errors import FormatError
from ggpass.graph.report import Change
from ggpass.graph.weights import Kind
from ggpass.lowering.decide import Lowering, rows_of
from ggpass.lowering.encode import encode
from ggpass.onnx.names import DOMAIN, Names, operator_name, takes_codebook
from ggpass.onnx.nodes import has_coded_twin, quantized_conv, replace
from ggpass.onnx.tensors import torch_tensor
from ggpass.onnx.weights import Use, Weight


@dataclasses.dataclass
class Rewriter:
    """Gives weights of one model their codes, and their nodes the operators that compute with them."""

    model: ir.Model
    lowering: Lowering
    names: Names

    def lower(self, weight: Weight) -> Change:
        """Give one weight codes, at all its uses."""
        graph = weight.value.graph
        if graph is None:
            raise FormatError(f"constant {weight.name!r} belongs to no graph; export the model again")
        operands = self._codes(weight)
        for value in operands:
            graph.register_initializer(value)
        if takes_codebook(self.lowering.format.name):
            operands.append(self._codebook)
        decoded: dict[tuple[bool, ir.DataType], ir.Value] = {}
        for use in weight.uses:
            assert isinstance(use, Use)
            if use.kind is not Kind.OTHER:
                self._rewrite(use, operands, weight)
                continue
            key = use.swapped, use.dtype
            if key not in decoded:
                decoded[key] = self._decode(graph, operands, weight, *key)
            use.place.replace_input_with(use.position, decoded[key])
        shape = "×".join(map(str, weight.tensor.shape))
        what = f"{shape} {weight.data.dtype.name.lower()} → {self.lowering.format.name}"
        if decoded:
            what += ", by Dequantize"
        return Change(weight.name, what, weight.nbytes, self.lowering.bytes_of_codes(weight))

    def _codes(self, weight: Weight) -> list[ir.Value]:
        """Return the initializers codes and scale, not computed before they are written: one weight at a time."""
        scales: list[ir.TensorProtocol] = []  # of the codes that were written last

        def codes_tensor() -> ir.TensorProtocol:
            read = dataclasses.replace(weight, tensor=torch_tensor(weight.data))
            quantized = encode(read, self.lowering)
            scales[:] = [ir.tensor(quantized.scale.numpy(), name=scale_name)]
            return ir.tensor(quantized.codes.numpy(), name=codes_name)

        def scale_tensor() -> ir.TensorProtocol:
            if not scales:
                codes_tensor()
            return scales[0]

        own = weight.names[0]
        codes_name, scale_name = self.names.new(f"{own}_codes"), self.names.new(f"{own}_scale")
        rows, columns = rows_of(weight.tensor.shape, weight.transposed, weight.leading)
        length = rows if self.lowering.scheme.granularity == "channel" else 1
        codes = ir.LazyTensor(codes_tensor, ir.DataType.UINT8, ir.Shape([rows, columns]), name=codes_name)
        scale = ir.LazyTensor(scale_tensor, ir.DataType.FLOAT, ir.Shape([length]), name=scale_name)
        return [ir.val(codes_name, const_value=codes), ir.val(scale_name, const_value=scale)]

    def _operator(self, operation: str) -> str:
        return operator_name(self.lowering.format.name, operation)

    @cached_property
    def _codebook(self) -> ir.Value:
        name = self.names.new(f"ggpass_{self.lowering.format.name}_codebook")
        codebook = ir.val(name, const_value=ir.tensor(self.lowering.format.codebook.numpy()))
        self.model.graph.register_initializer(codebook)
        return codebook

    def _decode(
        self, graph: ir.Graph, operands: list[ir.Value], weight: Weight, swapped: bool, dtype: ir.DataType
    ) -> ir.Value:
        """Return the weight (its transpose if `swapped`) as floats, by a Dequantize at the start of a graph."""
        own, shape = weight.names[0], tuple(weight.tensor.shape)
        to = ir.AttrInt64("to", int(dtype))
        nodes = [ir.Node(DOMAIN, self._operator("Dequantize"), operands, [to], name=f"{own}_dequantize")]
        if weight.transposed != swapped:
            nodes.append(ir.Node("", "Transpose", [nodes[-1].outputs[0]], [ir.AttrInt64s("perm", [1, 0])]))
        elif weight.matrix != shape:
            target = ir.val(self.names.new(f"{own}_shape"), const_value=ir.tensor(np.array(shape, np.int64)))
            graph.register_initializer(target)
            nodes.append(ir.Node("", "Reshape", [nodes[-1].outputs[0], target], name=f"{own}_reshape"))
        for node in nodes:
            node.outputs[0].name = self.names.new(f"{own}_decoded")
            node.outputs[0].type = ir.TensorType(dtype)
        nodes[-1].outputs[0].shape = ir.Shape(shape[::-1] if swapped else shape)
        graph.insert_before(graph[0], nodes)
        return nodes[-1].outputs[0]

    def _rewrite(self, use: Use, operands: list[ir.Value], weight: Weight) -> None:
        node, graph = use.place, use.place.graph
        assert isinstance(graph, ir.Graph)
        if use.kind is Kind.EMBEDDING:
            to = ir.AttrInt64("to", int(use.dtype))
            new = ir.Node(DOMAIN, self._operator("Gather"), [node.inputs[1], *operands], [to], name=node.name)
            replace(graph, node, new, use.dtype)
        elif use.kind is Kind.CONV:
            kernel = list(weight.tensor.shape[2:])
            if has_coded_twin(node, kernel):
                replace(graph, node, quantized_conv(node, self._operator("Conv"), operands, kernel), use.dtype)
            else:
                node.replace_input_with(1, self._decode(graph, operands, weight, False, use.dtype))
        else:
            self._matmul(graph, node, operands, weight.tensor.shape[1 if use.transposed else 0], use.dtype)

    def _matmul(
        self, graph: ir.Graph, node: ir.Node, operands: list[ir.Value], channels: int, dtype: ir.DataType
    ) -> None:
        """MatMul, MatMul and Add, or Gemm: one node, and an Add if what is added is no bias."""
        added = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
        product, last = node.outputs[0], node
        users = [] if product.is_graph_output() else [user for user, _ in product.uses()]
        if node.op_type == "MatMul" and [user.op_type for user in users] == ["Add"] and users[0].graph is graph:
            other = next((value for value in users[0].inputs if value is not product), None)
            if _is_bias(other, channels):
                added, last = other, users[0]
        bias = added if _is_bias(added, channels) else None
        inputs = [node.inputs[0], *operands, *([bias] if bias is not None else [])]
        new = ir.Node(DOMAIN, self._operator("MatMul"), inputs, name=node.name)
        new.outputs[0].type = ir.TensorType(dtype)
        if added is not None and bias is None:
            new.outputs[0].name = self.names.new(f"{product.name}_product")
            graph.insert_before(node, new)
            new = ir.Node("", "Add", [new.outputs[0], added], name=f"{node.name}_add")
        replace(graph, last, new, dtype)
        if last is not node:
            graph.remove(node, safe=True)


def _is_bias(value: ir.Value | None, channels: int) -> bool:
    """Return True if a value is a constant with one number for each output channel."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return tensor is not None and tuple(tensor.shape.numpy()) == (channels,)
