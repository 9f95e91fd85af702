"""Every tensor of a model: in initializers and attributes, in graphs, bodies and functions; read when asked for."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

#: Puts another tensor in the place of one.
Put = Callable[[ir.TensorProtocol], None]


class MappedTensor(ir.LazyTensor):
    """A tensor that is mapped from its file for as long as someone reads it, so that a model need not fit in memory.

    Attributes:
        file: the file, links followed.
    """

    def __init__(self, tensor: ir.ExternalTensor, file: Path) -> None:
        dtype, shape, size = tensor.dtype, tensor.shape, tensor.nbytes
        offset, packed = tensor.offset or 0, dtype.bitwidth < 8

        def read() -> ir.TensorProtocol:
            if not size:
                return ir.Tensor(np.empty(shape.numpy(), dtype.numpy()), dtype, name=tensor.name)
            raw = np.memmap(file, np.uint8, "r", offset, (size,))
            if packed:
                return ir.PackedTensor(raw, dtype, shape=shape, name=tensor.name)
            return ir.Tensor(raw.view(dtype.numpy()).reshape(shape.numpy()), dtype, name=tensor.name)

        super().__init__(read, dtype, shape, name=tensor.name)
        self.file = file


def torch_tensor(tensor: ir.TensorProtocol) -> torch.Tensor:
    """Return the elements of a tensor, without a copy if it is mapped from a file; read only."""
    array = tensor.numpy()
    if tensor.dtype is ir.DataType.BFLOAT16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    with warnings.catch_warnings():
        # torch warns that a mapped array cannot be written to; nothing here writes to a weight.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(np.ascontiguousarray(array))


def refer(value: ir.Value, location: str, offset: int) -> None:
    """Let an initializer refer to its data in a file instead of holding it."""
    tensor = value.const_value
    assert tensor is not None
    shape = ir.Shape(tensor.shape.numpy())
    value.const_value = ir.ExternalTensor(
        location, offset, tensor.nbytes, tensor.dtype, shape=shape, name=str(value.name)
    )


def graphs_of(model: ir.Model) -> Iterator[ir.Graph]:
    """Yield the model's graph, the bodies of its control flow, and those of its functions."""
    yield from model.graphs()
    for function in model.functions.values():
        yield function.graph
        yield from function.graph.subgraphs()


def tensors_of(model: ir.Model) -> Iterator[tuple[ir.TensorProtocol, Put]]:
    """Yield every tensor of a model, and how to put another in its place."""
    for graph in graphs_of(model):
        for value in list(graph.initializers.values()):
            if value.const_value is not None:
                yield value.const_value, lambda new, value=value: setattr(value, "const_value", new)  # type: ignore[misc]
        for node in graph:
            for attribute in list(node.attributes.values()):
                yield from _tensors_of_attribute(node, attribute)


def _tensors_of_attribute(node: ir.Node, attribute: ir.Attr) -> Iterator[tuple[ir.TensorProtocol, Put]]:
    if attribute.is_ref():
        return
    if attribute.type is ir.AttributeType.TENSOR:
        yield attribute.value, lambda new: node.attributes.add(ir.AttrTensor(attribute.name, new))
    elif attribute.type is ir.AttributeType.TENSORS:
        tensors = list(attribute.value)
        for i, tensor in enumerate(tensors):

            def put(new: ir.TensorProtocol, i: int = i) -> None:
                tensors[i] = new
                node.attributes.add(ir.AttrTensors(attribute.name, tensors))

            yield tensor, put


def files_of(path: Path, model: ir.Model) -> list[Path]:
    """Return the model's file, and those that it keeps tensors in, links followed."""
    beside = {tensor.file for tensor, _ in tensors_of(model) if isinstance(tensor, MappedTensor)}
    return [path, *sorted(beside - {path.resolve()})]


def tensor_bytes(model: ir.Model) -> int:
    """Return the bytes of all tensors, without reading them."""
    return sum(tensor.nbytes for tensor, _ in tensors_of(model))
