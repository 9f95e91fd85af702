"""`torch.compile(model, backend="ggpass", options={"target": "rf8-cpu"})`.

Float weights stay alive on this path, beside the codes: Dynamo hands them in at every call. For less memory lower the
module first (`ggpass.compile(model, target=…)`) and compile the result.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ggpass.api import lowering_for
from ggpass.errors import InputError
from ggpass.graph.pipeline import Pipeline
from ggpass.graph.report import Report
from ggpass.integrations.dynamo.call_program import CallProgram
from ggpass.integrations.dynamo.training import compile_for_training, settings_of, trains
from ggpass.lowering.decide import Lowering
from ggpass.passes.lower_weights import LowerWeights
from ggpass.passes.merge_linears import MergeLinears

logger = logging.getLogger("ggpass")

OPTIONS = ("target", "scheme", "only", "skip", "inner", "report", "train")


def ggpass_backend(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a graph of Dynamo: weights become codes, or get rate nodes to train with; the rest goes to `inner`.

    Args:
        graph_module, example_inputs: Dynamo's; the graph is not edited.
        options: `target` (default `rf8-cpu`), `scheme`, `only`, `skip` as `ggpass.compile` takes them; `inner`, the
            backend that compiles the graph around the lowered weights (default `inductor`); `report`, called with the
            Report of each compiled graph; `train`, a coupled BackSlash or a mapping of its fields: graphs that compute
            gradients get rate nodes, the others are lowered if `target` is given, and go to `inner` as they are
            if it is not.
        mode: not used; torch.compile passes it.

    Raises:
        InputError: an unknown option; or gradients are on and a weight to lower is trainable, without `train`.
    """
    chosen = dict(options or {})
    unknown = sorted(set(chosen) - set(OPTIONS))
    if unknown:
        raise InputError(f"backend ggpass has no option {', '.join(unknown)}; it has {', '.join(OPTIONS)}")
    settings = settings_of(chosen["train"]) if "train" in chosen else None
    inner = chosen.get("inner", "inductor")
    training = trains(example_inputs)
    if settings is not None and not training and "target" not in chosen:
        return torch._dynamo.lookup_backend(inner)(graph_module, list(example_inputs))
    try:
        if settings is not None and training:
            compiled, report = compile_for_training(graph_module, example_inputs, settings, chosen.get("inner"))
        else:
            _, lowering, notes = lowering_for(
                chosen.get("target", "rf8-cpu"), chosen.get("scheme"), chosen.get("only", ()), chosen.get("skip", ())
            )
            compiled, report = lower_graph(graph_module, example_inputs, lowering, torch._dynamo.lookup_backend(inner))
            report.notes += notes
    except torch._dynamo.exc.RestartAnalysis:
        raise  # Dynamo traces again, and calls this backend with another graph
    except Exception as error:
        # Dynamo takes some errors for a graph break and runs the plain model: that shall not pass in silence.
        why = " ".join(str(error).split())[:300]
        kept = "lowered" if settings is None or not training else "given a rate"
        logger.warning("torch.compile backend: a graph is not %s (%s: %s)", kept, type(error).__name__, why)
        raise
    logger.info("torch.compile backend: %s", report)
    if "report" in chosen:
        chosen["report"](report)
    return compiled


def lower_graph(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], lowering: Lowering, inner: Callable[..., Any]
) -> tuple[Callable[..., Any], Report]:
    """Return Dynamo's graph, lowered by the passes of `ggpass.compile` and compiled by `inner`, and the report.

    Args:
        graph_module, example_inputs: Dynamo's; the graph is not edited.
        lowering: what to lower, and into what.
        inner: the backend that compiles the lowered graph.

    Raises:
        WeightError: a pattern that matches no weight of the compiled module.
        InputError: gradients are on and a weight to lower is trainable.
    """
    program = CallProgram(graph_module, example_inputs)
    check = lowering.check

    def refuse(name: str, weight: Tensor) -> None:
        if torch.is_grad_enabled() and weight.requires_grad:
            raise InputError(
                f"weight {name!r} is trainable and gradients are on: codes do not pass a gradient to it, and a fused "
                "optimizer would change it without a trace; run under torch.no_grad() or torch.inference_mode(), or "
                "call model.requires_grad_(False)"
            )
        if check is not None:
            check(name, weight)

    # Float weights stay arguments: merging them at each call would double them.
    merge = MergeLinears(lowering.operators, lowering.allocate, floats=False)
    done = Pipeline((LowerWeights(replace(lowering, check=refuse)), merge))(program)
    report = Report("torch.compile")
    for part in done.parts:
        report.changes += part.changes
        report.skips += part.skips
    return program.compile(inner), report
