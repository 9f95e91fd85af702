"""One form for every model: one spelling of the standard domain, no functions but ours, constants as initializers.

What comes behind meets a weight in one place only, whichever exporter wrote the file, and of whatever age.
"""

import onnx
import onnx.version_converter
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, LiftSubgraphInitializersToMainGraphPass

from ggpass.errors import FormatError
from ggpass.onnx.boundary import explained
from ggpass.onnx.names import DOMAIN, STANDARD
from ggpass.onnx.tensors import constant, graphs_of, shape_of
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
    for graph in graphs_of(model):
        for node in graph:
            if node.domain == "ai.onnx":
                node.domain = ""
    _drop_initializer_inputs(model)
    if any(function.domain != DOMAIN for function in model.functions.values()):
        with explained("the model's functions cannot be inlined", "inline them with onnx.inliner, and try again"):
            InlinePass(criteria=lambda function: function.domain != DOMAIN)(model)
    model.graph.sort()  # some converters append nodes; ONNX Runtime does not mind, other runtimes do
    for graph in model.graphs():
        _lift_constants(graph)


def drop_traces(model: ir.Model) -> str:
    """Drop the stack traces that torch leaves at each node, a fifth of some files; return a note, or ''."""
    dropped = 0
    for graph in graphs_of(model):
        nodes = list(graph)
        values = [*graph.inputs, *(value for node in nodes for value in node.outputs)]
        for props in [graph.metadata_props, *(n.metadata_props for n in nodes), *(v.metadata_props for v in values)]:
            for key in [key for key in props if key.startswith("pkg.torch.onnx.")]:
                dropped += len(key) + len(props.pop(key))
    return f"dropped {dropped} bytes of stack traces and paths of the exporting machine" if dropped > SMALL else ""


def _drop_initializer_inputs(model: ir.Model) -> None:
    """Before IR version 4 every initializer was listed as an input; later that means that a caller may override it."""
    if model.ir_version < 4:
        kept = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
        model.graph.inputs.clear()
        model.graph.inputs.extend(kept)
        model.ir_version = 4


def _lift_constants(graph: ir.Graph) -> None:
    """Make initializers of large Constant nodes; copies that inlining made of one share it."""
    lifted: dict[int, ir.Value] = {}
    for node in list(graph):
        if node.op_type != "Constant" or node.domain not in STANDARD or "value" not in node.attributes:
            continue
        output, tensor = node.outputs[0], node.attributes["value"].as_tensor()
        if tensor.nbytes <= SMALL or output.is_graph_output():
            continue
        if id(tensor) not in lifted:
            lifted[id(tensor)] = constant(tensor, output.name)
        ir.convenience.replace_all_uses_with(output, lifted[id(tensor)])
        graph.remove(node, safe=True)
        graph.register_initializer(lifted[id(tensor)])


def with_opset(model: ir.Model, least: int, name: str) -> tuple[ir.Model, str]:
    """Return the model in at least that opset, and a note about the conversion, or ''.

    The converter sees large tensors as inputs of the graph, so that their data is not read.

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
    LiftSubgraphInitializersToMainGraphPass()(model)
    graph, large = model.graph, {}
    for key, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > SMALL and not value.is_graph_input():
            large[key] = tensor
            value.shape, value.type = shape_of(tensor), ir.TensorType(tensor.dtype)
            del graph.initializers[key]
            value.const_value = None
            graph.inputs.append(value)
    with explained(
        f"{name} has opset {opset}, the fallback needs {least}, and onnx cannot convert it",
        "export it with a newer opset, or give fallback=None",
    ):
        converted = ir.from_proto(onnx.version_converter.convert_version(ir.to_proto(model), least))
    kept = []
    for value in converted.graph.inputs:
        if value.name in large:
            value.const_value = large[value.name]
        else:
            kept.append(value)
    weights = [value for value in converted.graph.inputs if value.name in large]
    converted.graph.inputs.clear()
    converted.graph.inputs.extend(kept)
    for value in weights:
        converted.graph.register_initializer(value)
    return converted, f"converted from opset {opset} to {least}, which the fallback needs"
