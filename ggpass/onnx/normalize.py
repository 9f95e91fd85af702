"""One form for every model: one spelling of the standard domain, no functions but ours, constants as initializers.

What comes behind meets a weight in one place only, whichever exporter wrote the file, and of whatever age.
"""

import onnx
import onnx.version_converter
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveInitializersFromInputsPass

from ggpass.errors import FormatError
from ggpass.onnx.names import DOMAIN
from ggpass.onnx.reader import explained
from ggpass.onnx.tensors import graphs_of, refer
from ggpass.onnx.wire import SMALL

#: The opset that a model gets that imports none, and has no node that would need one.
DEFAULT_OPSET = 17


def normalize(model: ir.Model) -> None:
    """Bring a model into the form that this package works on, in place.

    Raises:
        FormatError: functions that cannot be inlined.
    """
    for domains in (model.opset_imports, *(function.opset_imports for function in model.functions.values())):
        if "ai.onnx" in domains:
            domains.setdefault("", domains.pop("ai.onnx"))
    if model.ir_version < 4:  # then every initializer was listed as an input; later a caller may override such a one
        RemoveInitializersFromInputsPass()(model)
        model.ir_version = 4
    if any(function.domain != DOMAIN for function in model.functions.values()):
        with explained("the model's functions cannot be inlined", "inline them with onnx.inliner, and try again"):
            InlinePass(criteria=lambda function: function.domain != DOMAIN)(model)
    model.graph.sort()  # some converters append nodes; ONNX Runtime does not mind, other runtimes do
    for graph in model.graphs():
        _lift_constants(graph)


def drop_metadata(model: ir.Model, prefix: str = "") -> int:
    """Drop the metadata of graphs, nodes and values whose key has this prefix; return their bytes."""
    dropped = 0
    for graph in graphs_of(model):
        nodes = list(graph)
        values = [*graph.inputs, *graph.initializers.values(), *(value for node in nodes for value in node.outputs)]
        holders: list[ir.Graph | ir.Node | ir.Value] = [graph, *nodes, *values]
        for props in [holder.metadata_props for holder in holders]:
            for key in [key for key in props if key.startswith(prefix)]:
                dropped += len(key) + len(props.pop(key))
    return dropped


def drop_traces(model: ir.Model) -> str:
    """Drop the stack traces that torch leaves at each node, a fifth of some files; return a note, or ''."""
    dropped = drop_metadata(model, "pkg.torch.onnx.")
    return f"dropped {dropped} bytes of stack traces and paths of the exporting machine" if dropped > SMALL else ""


def _lift_constants(graph: ir.Graph) -> None:
    """Make initializers of large Constant nodes; copies that inlining made of one share it."""
    lifted: dict[int, ir.Value] = {}
    for node in list(graph):
        if node.op_type != "Constant" or node.domain != "" or "value" not in node.attributes:
            continue
        output, tensor = node.outputs[0], node.attributes["value"].as_tensor()
        if tensor.nbytes <= SMALL or output.is_graph_output():
            continue
        if id(tensor) not in lifted:
            lifted[id(tensor)] = ir.val(str(output.name), const_value=tensor)
        ir.convenience.replace_all_uses_with(output, lifted[id(tensor)])
        graph.remove(node, safe=True)
        graph.register_initializer(lifted[id(tensor)])


def with_opset(model: ir.Model, least: int, name: str) -> tuple[ir.Model, str]:
    """Return the model in at least that opset, and a note about the conversion, or ''.

    The converter sees large initializers as external data, so that they are not read.

    Args:
        model: normalized; it is used up.
        name: of the file, for errors.

    Raises:
        FormatError: onnx's converter cannot do it.
    """
    opset = model.opset_imports.get("")
    if opset is None:
        if any(node.domain == "" for graph in model.graphs() for node in graph):
            raise FormatError(f"{name} does not say which opset its operators are of; export it again")
        model.opset_imports[""] = max(least, DEFAULT_OPSET)
        return model, ""
    if opset >= least:
        return model, ""
    large: dict[str, ir.TensorProtocol] = {}
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.nbytes > SMALL and tensor.dtype is not ir.DataType.STRING:
                key = str(len(large))
                large[key] = tensor
                refer(value, key, 0)
    with explained(
        f"{name} has opset {opset}, the fallback needs {least}, and onnx cannot convert it",
        "export it with a newer opset, or give fallback=None",
    ):
        converted = ir.from_proto(onnx.version_converter.convert_version(ir.to_proto(model), least))
    for graph in converted.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = large[str(value.const_value.location)]
    return converted, f"converted from opset {opset} to {least}, which the fallback needs"
