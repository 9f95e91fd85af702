"""Training graphs: a model traced with the training flags it has, reading the model's own tensors at every call."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ggpass.errors import InputError, TraceError
from ggpass.graph.program import Program

#: The name under which a training graph holds the model whose tensors it reads.
MODEL = "ggpass_model"

#: How torch's own batch norm begins its refusal, which torch.export leaves out of a graph.
REFUSAL = "Expected more than 1 value per channel when training"

REMEDY = (
    "give a batch of two or more (drop_last=True in the DataLoader for the last one), or put the batch norms into "
    "eval()"
)


def training_flags(model: nn.Module) -> tuple[bool, ...]:
    """Which of a model's modules are in training mode: what torch.export bakes into a graph."""
    return tuple(module.training for module in model.modules())


def signature_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    """Return all but sizes that sets one traced call apart: the structure, dtypes, devices and plain values."""
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    return spec, tuple(_kind(leaf) for leaf in leaves)


def _kind(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return leaf.dtype, leaf.device, leaf.dim()
    return type(leaf), leaf if isinstance(leaf, Hashable) else repr(leaf)


@dataclass
class TrainingGraph:
    """One trace of a model: for one pattern of training flags and one signature of its inputs.

    Attributes:
        program: the graph; it reads the model's Parameters and buffers where the model holds them.
        guards: raises if sizes do not fit the trace.
        fixed: inputs whose first dimension the trace holds to the size of the example, as "x: 8".
    """

    program: Program
    guards: Callable[..., Any]
    fixed: tuple[str, ...]

    def accepts(self, leaves: list[Any]) -> bool:
        """Return True if the trace holds for inputs of these sizes."""
        try:
            self.guards(*leaves)
        except (AssertionError, RuntimeError, IndexError):
            return False
        return True


def trace(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any = None, frozen: bool = False
) -> TrainingGraph:
    """Return the graph of a model as it stands, in training mode or not, by torch.export.

    Args:
        model: any module.
        args, kwargs: example inputs.
        dynamic_shapes: as torch.export takes it. None: the first dimension of every tensor may change, wherever the
            model's own code allows it.
        frozen: whether passes leave the weights as they are, since they ran on an earlier trace of this model.

    Raises:
        TraceError: torch.export cannot trace it; says what broke and which form of the rate needs no trace.
    """
    shapes = _batch_dimensions(model, args, kwargs) if dynamic_shapes is None else dynamic_shapes
    try:
        with torch.enable_grad():
            exported = torch.export.export(model, args, dict(kwargs), dynamic_shapes=shapes)
        module = exported.module(check_guards=True)
    except Exception as error:  # torch.export raises whatever the model's own code and its tracer raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = "\n".join(lines[:4]) or "no message"
        if REFUSAL in reason:
            raise TraceError(
                f"{type(model).__name__} cannot be traced with these inputs: {REFUSAL}; {REMEDY}"
            ) from error
        raise TraceError(
            f"torch.export could not trace {type(model).__name__}: {type(error).__name__}: {reason}\n"
            "The proximal mode needs no graph: leave out args and kwargs, or call BackSlash.attach(model, optimizer)."
        ) from error
    # Not at the top: it loads sympy, which takes half of the time of `import ggpass`.
    from torch.fx.experimental.symbolic_shapes import is_concrete_int

    guards = _take_guards(module)
    program = Program(module, model, training=True, frozen=frozen)
    inputs = [(node.name, node.meta.get("val")) for node in program.inputs()]
    sizes = [(name, value.shape[0]) for name, value in inputs if isinstance(value, Tensor) and value.dim()]
    return TrainingGraph(program, guards, tuple(f"{name}: {size}" for name, size in sizes if is_concrete_int(size)))


def _batch_dimensions(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    shapes = torch.export.ShapesCollection()
    for leaf in pytree.tree_leaves((args, dict(kwargs))):
        # torch.export takes sizes of 0 and 1 for constants.
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] > 1:
            shapes[leaf] = {0: torch.export.Dim.AUTO}
    return shapes.dynamic_shapes(model, args, dict(kwargs))


def _take_guards(module: fx.GraphModule) -> Callable[..., Any]:
    """Take the check of the inputs' sizes out of the graph: it is asked before a call, to choose between graphs."""
    found = module.graph.find_nodes(op="call_module", target="_guards_fn")
    if not found:
        return lambda *leaves: None
    for node in found:
        module.graph.erase_node(node)
    module.recompile()
    return module.get_submodule("_guards_fn")


def bind(graph: TrainingGraph, model: nn.Module) -> None:
    """Let the graph read each of the model's tensors from the model itself; the last thing done to it.

    So `load_state_dict` and whatever else replaces a tensor of the model is seen, and buffers that one graph updates
    are read by the others. Constants that tracing made stay in the graph.
    """
    program = graph.program
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    reads = [n for n in program.reads() if tensors.get(str(n.target)) is program.weight(str(n.target))]
    for name in dict.fromkeys(str(node.target) for node in reads):
        program.delete_weight(name)
    guard_batch_norms(program)
    program.graph_module.add_module(MODEL, model)
    for node in reads:
        node.target = f"{MODEL}.{node.target}"
    program.graph_module.recompile()


def guard_batch_norms(program: Program) -> None:
    """batch_norm(x) → batch_norm(more_than_one(x)) wherever the mean and variance are the batch's.

    Var[x] needs two values. Without this a graph that was traced with a larger batch takes one of 1: the output is the
    bias alone, and the running variance becomes NaN.

    Args:
        program: a graph as torch.export traces it; edited in place.
    """
    for node in program.calls(torch.ops.aten.batch_norm.default):
        source, uses_batch = node.args[0], node.args[5]
        if not (isinstance(source, fx.Node) and uses_batch):
            continue
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        name = stack[-1][0] if stack else node.name
        with program.graph.inserting_before(node):
            guard = program.graph.call_function(more_than_one, (source, name))
        guard.meta["val"] = source.meta.get("val")
        node.update_arg(0, guard)


def more_than_one(x: Tensor, name: str) -> Tensor:
    """x itself, of shape (B, C, …).

    Args:
        x: what a batch norm in training mode reads.
        name: of the batch norm, for the error.

    Raises:
        InputError: one value for each channel.
    """
    if x.numel() == x.shape[1]:
        raise InputError(
            f"{name!r} normalizes by the batch's own variance, and an input of shape {tuple(x.shape)} has one value "
            f"for each channel; {REMEDY}"
        )
    return x
