"""PreparedModel: a model that trains through graphs edited by passes, on its own Parameters."""

import copy
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from ggpass.errors import InputError
from ggpass.graph.pipeline import Pass, Pipeline
from ggpass.graph.program import Program
from ggpass.graph.report import Report
from ggpass.lowering.modules import first_lowered
from ggpass.training.graphs import TrainingGraph, bind, signature_of, trace, training_flags

_warn_once = functools.cache(logging.getLogger("ggpass").warning)

Passes = tuple[Pass | Callable[[Program], Report], ...]

#: Traces kept: two for train and eval, and one for each further signature of the inputs. More would be a model whose
#: plain-valued inputs change from call to call.
MOST_TRACES = 16


class PreparedModel(nn.Module):
    """f(x; θ) with the passes' nodes in its training graph; its Parameters and buffers are the model's own.

    1. `parameters()`, `named_*`, `state_dict()`, `load_state_dict()` are the model's: the same names and objects, so
       an optimizer built on either trains both.
    2. `train()` and `eval()` switch between graphs, one for each pattern of the modules' training flags. The passes
       run on those of training mode; eval mode is the model itself, traced.
    3. Inputs that no graph takes (other keywords, another dtype, a size that the trace holds fixed) are traced at
       their first call, and the report says so; no call computes with a graph that does not fit.
    4. `.to(…)` drops the graphs; the next call traces anew. Hooks of submodules do not run in a graph.
    5. A pass that writes weights (GGInit, DeepShape) writes them at the first trace of training mode, into the model's
       own Parameters, and never again. One that puts other tensors in their place is refused.
    6. Other attributes (`config`, methods) are the model's, and compute without the nodes.
    7. `copy.deepcopy` gives a PreparedModel of a copy, without an attached Regularizer; pickling is refused.

    Attributes:
        model: the caller's.
        report: of the passes, and of the inputs that were traced.
        regularizers: those that `attach` made.
        written: whether the passes have run on a training graph.
    """

    def __init__(self, model: nn.Module, passes: Passes, dynamic_shapes: Any = None, traced: bool = True) -> None:
        super().__init__()
        held = {name: getattr(model, name) for name in ("_parameters", "_buffers", "_modules")}
        options = {"passes": passes, "dynamic_shapes": dynamic_shapes, "traced": traced, "written": False}
        state = self.__dict__
        state.update(held, model=model, graphs={}, regularizers=[], report=Report("prepare"), **options)
        # Trainers read the names of a forward's arguments.
        state["forward"] = functools.wraps(model.forward)(functools.partial(PreparedModel._run, self))

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if not self.traced:
            return self.model(*args, **kwargs)
        kwargs = dict(sorted(kwargs.items()))
        return self._graph(args, kwargs).program(*args, **kwargs)

    def _graph(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TrainingGraph:
        key = (training_flags(self.model), signature_of(args, kwargs))
        known = self.graphs.setdefault(key, [])
        leaves = pytree.tree_leaves((args, dict(kwargs)))
        found = next((graph for graph in known if graph.accepts(leaves)), None)
        if found is None:
            found = self._trace(args, kwargs)
            known.append(found)
        return found

    def _trace(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TrainingGraph:
        count = sum(map(len, self.graphs.values()))
        if count >= MOST_TRACES:
            raise InputError(
                f"{count} different inputs were traced, and this one fits none of the graphs; mark the sizes that "
                "change with dynamic_shapes=, and give what is no tensor the same value at each call"
            )
        graph = trace(self.model, args, kwargs, self.dynamic_shapes, self.written)
        if self.model.training:
            report = Pipeline(self.passes, title="training graph")(graph.program)
            if self.written:
                report.notes.append("traced again: passes that write weights have written them, and left them here")
            self.__dict__["written"] = True
        else:
            report = Report("eval graph", notes=["the model itself, traced"])
        if graph.fixed:
            report.notes.append(
                f"the first dimension is fixed for {', '.join(graph.fixed)}; another size is traced when it comes"
            )
        bind(graph, self.model)
        self.report.parts.append(report)
        return graph

    def attach(self, *optimizers: Optimizer, scaler: Any = None, micro_batches: int | None = None) -> Any:
        """Start what the passes do beside an optimizer, such as the proximal step; once, ahead of training.

        Args:
            optimizers: those that train this model, usually one.
            scaler, micro_batches: needed no longer. A step adds the slope of the coupled modes once, whatever the loss
                was multiplied by.

        Returns:
            The Regularizer of the first pass that has one.

        Raises:
            InputError: no pass acts beside an optimizer, or it is attached already.
        """
        if self.regularizers:
            raise InputError("an optimizer is attached already; call detach() on the Regularizers first")
        attaches = [getattr(step, "attach", None) for step in self.passes]
        found = [attach(self.model, *optimizers) for attach in attaches if attach is not None]
        if not found:
            raise InputError(
                "none of the passes acts beside an optimizer; leave attach() out, or prepare with BackSlash"
            )
        if scaler is not None or micro_batches is not None:
            _warn_once("attach() needs scaler= and micro_batches= no longer: the optimizer's step adds the slope once")
        self.regularizers.extend(found)
        return found[0]

    def _attached(self) -> Any:
        if not self.regularizers:
            raise InputError("no optimizer is attached; call attach(optimizer) first")
        return self.regularizers[0]

    def bits(self) -> float:
        """Zero-order entropy of the regularized weights now, in bits a weight."""
        return float(self._attached().bits())

    def status(self) -> str:
        """Return one line for a progress bar."""
        return str(self._attached().status())

    # A module like the one it holds.

    @property
    def ggpass_report(self) -> Report:
        """Return the report, where `ggpass.report` looks for it."""
        return self.report

    @property
    def training(self) -> bool:
        """Return the model's own flag, whoever set it."""
        return bool(self.__dict__["model"].training)

    @training.setter
    def training(self, mode: bool) -> None:
        if "model" in self.__dict__:  # not yet while nn.Module sets up its attributes
            self.model.training = mode

    def train(self, mode: bool = True) -> "PreparedModel":
        """Switch to the training graphs (True) or the eval graphs (False), and the model's own switch."""
        self.model.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's."""
        return self.model.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.model._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "PreparedModel":
        self.model._apply(fn, recurse)
        self.graphs.clear()
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["model"], name)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PreparedModel":
        twin = PreparedModel(copy.deepcopy(self.model, memo), self.passes, self.dynamic_shapes, self.traced)
        twin.__dict__["written"] = self.written
        memo[id(self)] = twin
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InputError("a PreparedModel cannot be pickled: its graphs are of this process; save its state_dict()")


def prepare_model(
    model: nn.Module,
    args: tuple[Any, ...] | None,
    kwargs: Mapping[str, Any] | None,
    passes: Passes,
    dynamic_shapes: Any,
) -> PreparedModel:
    """`ggpass.prepare`, its inputs checked: both graphs are traced ahead, so that errors come here."""
    if not isinstance(model, nn.Module):
        raise InputError(f"prepare takes a torch.nn.Module, not {type(model).__name__}; pass the model itself")
    if isinstance(args, Mapping):
        raise InputError("args is a tuple of positional inputs; give keyword inputs as kwargs=")
    lowered = first_lowered(model)
    if lowered is not None:
        raise InputError(f"module {lowered!r} is lowered, and codes do not train; prepare the float model")
    if isinstance(model, PreparedModel):
        raise InputError("the model is prepared already; prepare prepared.model with all passes at once")
    traced = args is not None or kwargs is not None
    if dynamic_shapes is not None and not traced:
        raise InputError("dynamic_shapes= needs a graph; give example inputs (args=, kwargs=) with it")
    prepared = PreparedModel(model, passes, dynamic_shapes, traced)
    if not traced:
        prepared.report.notes.append(
            "without example inputs: no graph, and no node in it; attach(optimizer) acts beside the model as it is"
        )
        return prepared
    kwargs = dict(sorted((kwargs or {}).items()))
    flags = {module: module.training for module in model.modules()}
    try:
        # The mode that the model is in comes first, with what its caller froze: a batch norm, for instance.
        prepared._graph(args or (), kwargs)
        model.train(not model.training)
        prepared._graph(args or (), kwargs)
    finally:
        for module, flag in flags.items():
            module.training = flag
    return prepared
