"""`torch.compile(model, backend="ggpass", options={"train": BackSlash(…)})`: rate nodes in Dynamo's training graph.

The edited graph goes to the inner backend whole, so that AOTAutograd and inductor fuse the rate's slope into the
backward. What a node reads (λ, ν, α, ε) are arguments of the compiled graph, looked up by the Parameters of each call:
nothing compiles again when they change, and a second module of the same class has its own.
"""

import copy
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch.utils.weak import WeakIdKeyDictionary

from ggpass.errors import InputError
from ggpass.graph.edges import insert_behind
from ggpass.graph.program import owner_of
from ggpass.graph.report import Change, Report, Skip
from ggpass.integrations.dynamo.arguments import parameter_name, source_name
from ggpass.passes import BackSlash
from ggpass.passes.backslash.node import Row, node_values, rate_node, ready_nodes
from ggpass.passes.backslash.parametrizations import factors_of
from ggpass.passes.backslash.selection import reason_to_skip
from ggpass.training import Regularizer

logger = logging.getLogger("ggpass")


def settings_of(train: Any) -> BackSlash:
    """The BackSlash that `options["train"]` asks for; a mapping holds its fields, coupled where it names no mode.

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
    """Whether a graph with these arguments computes gradients of Parameters."""
    return torch.is_grad_enabled() and any(isinstance(v, nn.Parameter) and v.requires_grad for v in example_inputs)


def compile_for_training(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    settings: BackSlash,
    inner: Any = None,
    report: Callable[[Report], Any] | None = None,
) -> Callable[..., Any]:
    """f(x; w) → f(x; node(w)) in a copy of Dynamo's graph, compiled by `inner`.

    Args:
        graph_module, example_inputs: Dynamo's; the graph is not edited.
        settings: which weights, and the rate where no Regularizer feeds their nodes.
        inner: a backend for training graphs; None: inductor, or aot_eager where inductor has no C++ compiler.
        report: called with the Report.

    Returns:
        What Dynamo calls with its arguments.
    """
    told = Report("BackSlash")
    twin = _copy(graph_module)
    inputs = [node for node in twin.graph.nodes if node.op == "placeholder"]
    names = [parameter_name(source_name(node)) for node in graph_module.graph.nodes if node.op == "placeholder"]
    factors = factors_of({n: v for n, v in zip(names, example_inputs) if isinstance(v, nn.Parameter)})
    chosen = {}
    for position, (name, value) in enumerate(zip(names, example_inputs)):
        if isinstance(value, nn.Parameter) and inputs[position].users:
            reason = reason_to_skip([name], value, settings, factors)
            if reason:
                told.skips.append(Skip(name, reason, matrix=value.dim() >= 2))
            else:
                told.changes.append(Change(name, "the rate's gradient joins its own"))
                chosen[position] = name
    _insert(twin, inputs, list(chosen))
    values = [node_values().to(example_inputs[position].device) for position in chosen]
    fake_mode = detect_fake_mode(example_inputs)
    fakes = [fake_mode.from_tensor(v, static_shapes=True) if fake_mode else v for v in values]
    if inner is None:
        inner, note = _default_inner()
        told.notes += note
    logger.info("torch.compile backend: %s", told)
    if report is not None:
        report(told)
    compiled = torch._dynamo.lookup_backend(inner)(twin, [*example_inputs, *fakes])
    return TrainingRunner(compiled, chosen, settings) if chosen else compiled


def _copy(source: fx.GraphModule) -> fx.GraphModule:
    """A copy whose graph can be edited; it carries what AOTAutograd asks of Dynamo's graphs."""
    twin = fx.GraphModule(source, copy.deepcopy(source.graph))
    twin.meta.update(source.meta)
    if hasattr(source, "_param_name_to_source"):
        twin._param_name_to_source = source._param_name_to_source
    for node, original in zip(twin.graph.nodes, source.graph.nodes):
        if hasattr(original, "_dynamo_source"):
            node._dynamo_source = original._dynamo_source
    return twin


def _insert(module: fx.GraphModule, inputs: list[fx.Node], positions: list[int]) -> None:
    """A new argument, behind all others, and a node that reads it for each weight."""
    last = inputs[-1]
    for position in positions:
        with module.graph.inserting_after(last):
            last = module.graph.placeholder(f"ggpass_rate_{position}")
        last._dynamo_source = None
        read = (inputs[position], last)
        body = next(n for n in module.graph.nodes if n.op != "placeholder")
        insert_behind(
            inputs[position : position + 1], body, functools.partial(module.graph.call_function, rate_node, read)
        )
    module.recompile()


@functools.cache
def _default_inner() -> tuple[str, tuple[str, ...]]:
    """Inductor, or where no C++ compiler is found AOTAutograd without it, said once."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        note = "no C++ compiler for inductor: the graph runs by aot_eager, correct and not fused; install one, as g++"
        logger.warning("torch.compile backend: %s", note)
        return "aot_eager", (note,)
    return "inductor", ()


#: A graph's first weight -> Regularizers by settings and names, of weights that no attached one feeds: a graph that is
#: compiled again, for another batch size, goes on where the first one was.
_ALONE: WeakIdKeyDictionary = WeakIdKeyDictionary()


class TrainingRunner:
    """Calls the compiled graph with Dynamo's arguments and the values that the nodes of these weights read.

    An attached Regularizer (`BackSlash.attach(model, optimizer)`) feeds the nodes. Where there is none, the fits follow
    the weights by themselves, every training forward counts as a step, and λ is the constant asked for.
    """

    def __init__(self, compiled: Callable[..., Any], names: Mapping[int, str], settings: BackSlash) -> None:
        self.compiled = compiled
        self.positions = tuple(names)
        self.names = tuple(names.values())
        self.settings = settings

    def __call__(self, *args: Any) -> Any:
        weights = tuple(args[position] for position in self.positions)
        values = ready_nodes(weights, functools.partial(self._alone, weights))
        # Copies: the compiled backward saves them, and the next forward writes to the originals.
        return self.compiled(*args, *[value.clone() for value in values])

    @torch.no_grad()
    def _alone(self, weights: tuple[nn.Parameter, ...]) -> Sequence[Row]:
        """The rows of weights that no Regularizer feeds; the one kept here holds no weight between calls."""
        known = _ALONE.setdefault(weights[0], {})
        regularizer = known.get((self.settings, self.names))
        if regularizer is None:
            holder = nn.Module()
            for name, weight in zip(self.names, weights):
                module, leaf = owner_of(holder, name)
                module.register_parameter(leaf, weight)
            regularizer = Regularizer(holder, replace(self.settings, only=self.names, skip=()))
            known[self.settings, self.names] = regularizer
        regularizer.weights = weights
        rows = regularizer.before_forward()
        regularizer.steps += 1
        regularizer.weights = ()
        return rows
