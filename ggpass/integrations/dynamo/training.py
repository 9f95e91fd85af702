"""`torch.compile(model, backend="ggpass", options={"train": BackSlash(…)})`: rate nodes in Dynamo's training graph.

A node marks the weights that the rate acts on. The optimizer that steps them is found at its first step, and its steps
add the slope, once each: whatever number of graphs, forwards and backwards led to a step. Nothing compiles again when
λ, ν or α change, and each module of a class has its own. If forwards run inside `step(closure)`, the first step has no
slope yet: call `BackSlash.attach(model, optimizer)` for it.
"""

import copy
import functools
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from ggpass.errors import InputError
from ggpass.graph.edges import insert_behind
from ggpass.graph.program import owner_of
from ggpass.graph.report import Change, Report, Skip
from ggpass.graph.weights import Weight, weights_of_module
from ggpass.integrations.dynamo.arguments import compiled_module, parameter_name, source_name
from ggpass.passes.backslash import BackSlash, rate_node
from ggpass.passes.backslash.attached import owners_of
from ggpass.passes.backslash.regularizer import Regularizer
from ggpass.passes.backslash.selection import reasons_to_skip

logger = logging.getLogger("ggpass")


def settings_of(train: Any) -> BackSlash:
    """Return the BackSlash that `options["train"]` asks for; a mapping holds its fields, coupled by default.

    Raises:
        InputError: something else, a field that BackSlash does not have, or a mode without nodes.
    """
    if isinstance(train, Mapping):
        try:
            train = BackSlash(**{"mode": "coupled", **train})
        except TypeError as error:
            raise InputError(f"options['train'] holds fields of BackSlash: {error}") from error
    if not isinstance(train, BackSlash):
        raise InputError(
            f"options['train'] is a BackSlash or a mapping of its fields, not {type(train).__name__}; "
            "{'train': {'strength': 1e-6}} is the least"
        )
    if "coupled" not in train.mode:
        raise InputError(
            f"mode={train.mode!r} acts after the optimizer's step and puts nothing into a graph: compile without "
            "'train' and call BackSlash.attach(model, optimizer), or choose mode='coupled'"
        )
    return train


def trains(example_inputs: Sequence[Any]) -> bool:
    """Return True if a graph with these arguments computes gradients of Parameters."""
    return torch.is_grad_enabled() and any(isinstance(v, nn.Parameter) and v.requires_grad for v in example_inputs)


def compile_for_training(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], settings: BackSlash, inner: Any = None
) -> tuple[Callable[..., Any], Report]:
    """f(x; w) → f(x; node(w)) in a copy of Dynamo's graph, compiled by `inner`.

    Args:
        graph_module, example_inputs: Dynamo's; the graph is not edited.
        settings: which weights, and the rate if no Regularizer is attached to them.
        inner: a backend for training graphs; None: inductor, or aot_eager if inductor has no C++ compiler.

    Returns:
        A callable of Dynamo's arguments, and the report.

    Raises:
        WeightError: a pattern matches no weight of the compiled module.
    """
    done = Report("BackSlash")
    twin = _copy(graph_module)
    inputs = twin.graph.find_nodes(op="placeholder")
    labels = [parameter_name(source_name(node)) for node in graph_module.graph.find_nodes(op="placeholder")]
    model = compiled_module()
    own = {id(v): Weight((n,), v) for n, v in zip(labels, example_inputs) if isinstance(v, nn.Parameter)}
    found = list(own.values()) if model is None else weights_of_module(model)
    reasons = {id(weight.tensor): (weight, reason) for weight, reason in reasons_to_skip(found, settings)}
    chosen = {}
    for position, value in enumerate(example_inputs):
        if id(value) in own and inputs[position].users:
            weight, reason = reasons.get(id(value), (own[id(value)], "is no Parameter of the compiled module"))
            if reason:
                done.skips.append(Skip(weight.name, reason, matrix=weight.is_matrix))
            else:
                done.changes.append(Change(weight.title, "the rate's gradient joins its own"))
                chosen[position] = weight.name
    body = next(n for n in twin.graph.nodes if n.op != "placeholder")
    for weight in (inputs[position] for position in chosen):
        insert_behind([weight], body, functools.partial(twin.graph.call_function, rate_node, (weight,)))
    twin.recompile()
    if inner is None:
        inner, note = _default_inner()
        done.notes += note
    compiled = torch._dynamo.lookup_backend(inner)(twin, list(example_inputs))
    return _with_waiting(compiled, chosen, settings) if chosen else compiled, done


def _copy(source: fx.GraphModule) -> fx.GraphModule:
    """Return a copy whose graph can be edited; it carries what AOTAutograd asks of Dynamo's graphs."""
    twin = fx.GraphModule(source, copy.deepcopy(source.graph))
    twin.meta.update(source.meta)
    if hasattr(source, "_param_name_to_source"):
        twin._param_name_to_source = source._param_name_to_source
    for node, original in zip(twin.graph.nodes, source.graph.nodes):
        if hasattr(original, "_dynamo_source"):
            node._dynamo_source = original._dynamo_source
    return twin


@functools.cache
def _default_inner() -> tuple[str, tuple[str, ...]]:
    """Return inductor, or AOTAutograd without it if no C++ compiler is found, logged once."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        note = "no C++ compiler for inductor: the graph runs by aot_eager, correct and not fused; install one, as g++"
        logger.warning("torch.compile backend: %s", note)
        return "aot_eager", (note,)
    return "inductor", ()


#: Weights that a compiled graph has run since their last step, without a Regularizer of the caller -> name, settings.
_WAITING: WeakIdKeyDictionary = WeakIdKeyDictionary()

#: The hook on every optimizer's step, while weights wait.
_WATCH: list[RemovableHandle] = []


def _with_waiting(compiled: Callable[..., Any], names: Mapping[int, str], settings: BackSlash) -> Callable[..., Any]:
    """Call the compiled graph, and let its weights wait for their optimizer if no Regularizer is attached to them."""

    def run(*args: Any) -> Any:
        for position, name in names.items():
            if all(owner.automatic for owner in coupled_owners(args[position])):
                _WAITING[args[position]] = (name, settings)
        if _WAITING and not _WATCH:
            _WATCH.append(register_optimizer_step_pre_hook(_attach_waiting))
        return compiled(*args)

    return run


def coupled_owners(weight: nn.Parameter) -> list[Regularizer]:
    """Return the attached Regularizers that add their slope to a weight's gradient."""
    return [owner for owner in owners_of(weight) if owner.coupled]


def _attach_waiting(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Attach a Regularizer to the waiting weights that an optimizer is about to step, if it has none of them yet."""
    found: dict[BackSlash, dict[str, nn.Parameter]] = {}
    for weight in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        name, settings = _WAITING.pop(weight, ("", None))
        owners = coupled_owners(weight)
        mine = any(optimizer in owner.optimizers or not owner.automatic for owner in owners)
        if settings is not None and weight.requires_grad and not mine:
            weights = found.setdefault(settings, {})
            numbered = (f"{name}_{i}" for i in itertools.count(2))  # two modules of a class have the same names
            weights[name if name not in weights else next(n for n in numbered if n not in weights)] = weight
    for settings, weights in found.items():
        holder = nn.Module()
        for name, weight in weights.items():
            module, leaf = owner_of(holder, name)
            module.register_parameter(leaf, weight)
        regularizer = Regularizer(holder, replace(settings, only=tuple(weights), skip=()))
        regularizer.automatic = True
        regularizer.attach(optimizer)
        logger.info("torch.compile backend: %s steps %d of the weights", type(optimizer).__name__, len(weights))
    if not _WAITING:
        while _WATCH:
            _WATCH.pop().remove()
