"""`torch.compile(model, backend="ggpass", options={"target": "rf8-cpu"})`.

Float weights stay alive on this path, beside the codes: Dynamo hands them in at every call. For less memory lower the
module first (`ggpass.compile(model, target=…)`) and compile the result.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ggpass.api import lowering_for
from ggpass.errors import InputError
from ggpass.graph.pipeline import Change, Report, Skip
from ggpass.graph.weights import Weight, group_weights
from ggpass.integrations.dynamo.arguments import fake_of, parameter_name, source_name
from ggpass.integrations.dynamo.code_cache import CACHE, BiasOf, CodedPart, CodesOf, FloatPart, Recipe
from ggpass.integrations.dynamo.training import compile_for_training, settings_of, trains
from ggpass.lowering.lowering import Lowering, bytes_of
from ggpass.passes.lower_weights import reason_to_keep as reason_to_keep_float
from ggpass.passes.lower_weights import replace_use
from ggpass.passes.merge_linears import join, linear_groups, operands_of, reason_to_keep

logger = logging.getLogger("ggpass")

OPTIONS = ("target", "scheme", "only", "skip", "inner", "report", "train")


def ggpass_backend(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend: weights become codes, or get rate nodes to train with; the rest goes to `inner`.

    Args:
        graph_module, example_inputs: Dynamo's; the graph is not edited.
        options: `target` (default `rf8-cpu`), `scheme`, `only`, `skip` as `ggpass.compile` takes them; `inner`, the
            backend that compiles the graph around the lowered weights (default `inductor`); `report`, called with the
            Report of each compiled graph; `train`, a coupled BackSlash or a mapping of its fields: graphs that compute
            gradients get rate nodes, the others are lowered where `target` is given, and go to `inner` as they are
            where it is not.
        mode: not used; torch.compile passes it.

    Raises:
        InputError: an unknown option; or gradients are on and a weight to lower is trainable, without `train`.
    """
    chosen = dict(options or {})
    unknown = sorted(set(chosen) - set(OPTIONS))
    if unknown:
        raise InputError(f"backend ggpass has no option {', '.join(unknown)}; it has {', '.join(OPTIONS)}")
    if "train" in chosen:
        settings = settings_of(chosen["train"])
        if trains(example_inputs):
            return compile_for_training(
                graph_module, example_inputs, settings, chosen.get("inner"), chosen.get("report")
            )
        if "target" not in chosen:
            return torch._dynamo.lookup_backend(chosen.get("inner", "inductor"))(graph_module, list(example_inputs))
    device, lowering, notes = lowering_for(
        chosen.get("target", "rf8-cpu"), chosen.get("scheme"), chosen.get("only", ()), chosen.get("skip", ())
    )
    inner = torch._dynamo.lookup_backend(chosen.get("inner", "inductor"))
    editor = GraphEditor(graph_module, example_inputs, lowering, device.check_tensor)
    editor.report.notes += notes
    editor.lower()
    editor.merge()
    logger.info("torch.compile backend: %s", editor.report)
    if "report" in chosen:
        chosen["report"](editor.report)
    return editor.finish(inner)


@dataclass
class Extra:
    """An argument of the compiled graph beside Dynamo's: the recipe that makes it, and which of its results it is."""

    recipe: Recipe
    output: int


@dataclass
class GraphEditor:
    """Dynamo's graph as ATen, edited: what its weights become is written down as recipes for each call.

    Attributes:
        source: Dynamo's graph.
        example_inputs: its arguments, fake or real.
        lowering: what to lower, and into what.
        check: raises where a weight, by name, lies where the target cannot lower it.
        report: filled by `lower` and `merge`.
    """

    source: fx.GraphModule
    example_inputs: Sequence[Any]
    lowering: Lowering
    check: Callable[[str, Tensor], None] = lambda name, tensor: None
    report: Report = field(default_factory=lambda: Report("torch.compile"))

    def __post_init__(self) -> None:
        placeholders = [n for n in self.source.graph.nodes if n.op == "placeholder"]
        self.fake_mode = detect_fake_mode(self.example_inputs) or FakeTensorMode(shape_env=ShapeEnv())
        self.fakes = [fake_of(value, self.fake_mode) for value in self.example_inputs]
        # A copy is traced: tracing runs the module, and Dynamo keeps the original.
        with self.fake_mode:
            self.module = make_fx(copy.deepcopy(self.source), pre_dispatch=True)(*self.fakes)
        self.graph = self.module.graph
        self.inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
        self.position = {node: i for i, node in enumerate(self.inputs)}
        self.names = [parameter_name(source_name(n)) for n in placeholders]
        self.extras: dict[fx.Node, Extra] = {}
        self.constants: dict[fx.Node, Tensor] = {}

    def lower(self) -> None:
        """Let every use of a weight that can be lowered compute with codes."""
        is_weight = {
            node: isinstance(fake, nn.Parameter) and fake.dim() >= 2 for node, fake in zip(self.inputs, self.fakes)
        }
        sources = [node for node in self.inputs if is_weight[node] and node.users]
        weights = group_weights(sources, lambda node: self.fakes[self.position[node]])
        named = [(w, self._named(w)) for w in weights]
        for weight, names in named:
            fake = weight.tensor
            reason = reason_to_keep_float(Weight(names, fake, weight.uses), self.lowering)
            if reason:
                self.report.skips.append(Skip(names[0], reason, bytes_of(fake)))
                continue
            self._refuse_training(names[0], fake)
            self.check(names[0], fake)
            self._lower(weight, names)

    def _named(self, weight: Weight) -> tuple[str, ...]:
        by_target = {str(node.target): self.names[self.position[node]] for node in self.inputs}
        return tuple(by_target[name] for name in weight.names)

    def _refuse_training(self, name: str, fake: Tensor) -> None:
        if torch.is_grad_enabled() and fake.requires_grad:
            raise InputError(
                f"weight {name!r} is trainable and gradients are on: codes do not pass a gradient to it, and a fused "
                "optimizer would change it without a trace; run under torch.no_grad() or torch.inference_mode(), or "
                "call model.requires_grad_(False)"
            )

    def _lower(self, weight: Weight, names: tuple[str, ...]) -> None:
        fake, transposed = weight.tensor, weight.uses[0].transposed
        node = next(n for n in self.inputs if str(n.target) == weight.name)
        recipe = CodesOf((FloatPart(self.position[node], names[0], transposed),), self.lowering)
        rows = fake.shape[1 if transposed else 0]
        scales = rows if self.lowering.scheme.granularity == "channel" else 1
        codes = self._extra(recipe, 0, (rows, fake.numel() // rows), torch.uint8, fake.device)
        scale = self._extra(recipe, 1, (scales,), torch.float32, fake.device)
        operands = (codes, scale, self._codebook(fake.device))
        for use in weight.uses:
            with self.graph.inserting_before(use.node):
                replace_use(self.graph, use, operands, self.lowering, tuple(fake.shape), fake.dtype)
        dtype = str(fake.dtype).removeprefix("torch.")
        what = f"{'×'.join(map(str, fake.shape))} {dtype} → {self.lowering.format.name}"
        self.report.changes.append(Change(names[0], what, bytes_of(fake), rows * (fake.numel() // rows) + 4 * scales))

    def merge(self) -> None:
        """Merge linears that read one input, whether lowered here or before."""
        linear = self.lowering.operators.linear
        for nodes in linear_groups(self.graph, linear, (linear,)):
            mergeable = [n for n in nodes if not reason_to_keep(n, "placeholder", lambda p: len(p.users))]
            if len(mergeable) < 2:
                continue
            operands = [operands_of(n) for n in mergeable]
            rows = [n.meta["val"].shape[-1] for n in mergeable]
            recipe = CodesOf(tuple(part for o in operands for part in self._parts(o)), self.lowering)
            columns = operands[0]["codes"].meta["val"].shape[1]
            place = operands[0]["codes"].meta["val"].device
            merged: dict[str, Any] = {
                "codes": self._extra(recipe, 0, (sum(rows), columns), torch.uint8, place),
                "scale": self._extra(recipe, 1, (sum(rows),), torch.float32, place),
                "bias": None,
            }
            present = [o["bias"] for o in operands if o["bias"] is not None]
            if present:
                biases = tuple(None if o["bias"] is None else self.position[o["bias"]] for o in operands)
                dtype = present[0].meta["val"].dtype
                merged["bias"] = self._extra(BiasOf(biases, tuple(rows)), 0, (sum(rows),), dtype, place)
            with self.graph.inserting_before(mergeable[0]):
                join(self.graph, mergeable, merged, rows)
            names = " + ".join(self._part_name(p) for p in recipe.parts)
            what = f"{len(mergeable)} linears merged: {sum(rows)} channels"
            self.report.changes.append(Change(names, what))

    def _part_name(self, part: FloatPart | CodedPart) -> str:
        return part.name if isinstance(part, FloatPart) else self.names[part.codes].removesuffix(".lowered.codes")

    def _parts(self, operands: dict[str, Any]) -> tuple[FloatPart | CodedPart, ...]:
        codes, scale = operands["codes"], operands["scale"]
        extra = self.extras.get(codes)
        if extra is not None and isinstance(extra.recipe, CodesOf):
            return extra.recipe.parts
        return (CodedPart(self.position[codes], self.position[scale]),)

    def _codebook(self, device: torch.device) -> fx.Node:
        for node in self.constants:
            if node.meta["val"].device == device:
                return node
        codebook = self.lowering.format.codebook
        node = self._placeholder(tuple(codebook.shape), codebook.dtype, device)
        self.constants[node] = codebook.to(device)
        return node

    def _extra(
        self, recipe: Recipe, output: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> fx.Node:
        node = self._placeholder(shape, dtype, device)
        self.extras[node] = Extra(recipe, output)
        return node

    def _placeholder(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> fx.Node:
        last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(f"ggpass_{len(self.extras) + len(self.constants)}")
        with self.fake_mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype, device=device)
        return node

    def finish(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """Compile the edited graph with `inner`; the callable takes Dynamo's arguments."""
        self.graph.eliminate_dead_code()
        # A weight that the graph reads only as codes does not enter it at all.
        for node in [n for n in self.graph.nodes if n.op == "placeholder" and not n.users]:
            self.graph.erase_node(node)
        self.module.recompile()
        order = [n for n in self.graph.nodes if n.op == "placeholder"]
        compiled = inner(self.module, [n.meta["val"] for n in order])
        recipes = list(dict.fromkeys(self.extras[n].recipe for n in order if n in self.extras))
        feeds: list[int | Tensor | tuple[int, int]] = []
        for node in order:
            if node in self.extras:
                feeds.append((recipes.index(self.extras[node].recipe), self.extras[node].output))
            else:
                feeds.append(self.constants[node] if node in self.constants else self.position[node])
        return Runner(compiled, recipes, feeds)


class Runner:
    """Calls the compiled graph with Dynamo's arguments, codes in the place of the weights they stand for.

    Attributes:
        recipes: how codes are made from Dynamo's arguments.
        feeds: for each argument of the compiled graph: the position of a Dynamo argument, a constant, or
            (recipe, which of its results).
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        recipes: Sequence[Recipe],
        feeds: Sequence[int | Tensor | tuple[int, int]],
    ) -> None:
        self.compiled = compiled
        self.recipes = [(recipe.key, recipe) for recipe in recipes]
        self.feeds = feeds

    def __call__(self, *args: Any) -> Any:
        made = [CACHE.get(key, recipe, args) for key, recipe in self.recipes]
        values = []
        for feed in self.feeds:
            if isinstance(feed, tuple):
                recipe, output = feed
                values.append(made[recipe][output])
            else:
                values.append(args[feed] if isinstance(feed, int) else feed)
        return self.compiled(*values)
