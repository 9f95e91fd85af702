"""The entry points: thin sequences, each readable as a recipe."""

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ggpass.errors import InputError, TargetError, TraceError
from ggpass.formats import Scheme
from ggpass.graph.pipeline import Pass, Pipeline
from ggpass.graph.program import Program
from ggpass.graph.report import Report
from ggpass.graph.weights import as_patterns
from ggpass.lowering.decide import Lowering
from ggpass.lowering.lower_module import lower_module
from ggpass.passes.backslash import BackSlash
from ggpass.passes.clean_up import CleanUp
from ggpass.passes.deepshape import DeepShape, ShapeReport
from ggpass.passes.fold_batch_norm import FoldBatchNorm
from ggpass.passes.gg_init import GGInit
from ggpass.passes.lower_weights import LowerWeights
from ggpass.passes.merge_linears import MergeLinears
from ggpass.targets import Target, place, resolve
from ggpass.targets.artifact import Artifact, Sizes, bytes_of_module, describe
from ggpass.training.prepared import PreparedModel, prepare_model

logger = logging.getLogger("ggpass")

Attached = TypeVar("Attached")
Filled = TypeVar("Filled", nn.Module, Artifact)


def lowering_for(
    target: str,
    scheme: Scheme | None,
    only: str | Iterable[str],
    skip: str | Iterable[str],
    arch: str | Iterable[str] = (),
) -> tuple[Target, Lowering, tuple[str, ...]]:
    """Return the device, the lowering and notes for the report that `compile`'s options ask for."""
    fmt, device = resolve(target, as_patterns(arch))
    notes = device.prepare(fmt)
    lowering = Lowering(
        format=fmt,
        scheme=scheme or Scheme(),
        only=as_patterns(only),
        skip=as_patterns(skip),
        operators=device.operators,
        allocate=device.allocate,
        check=device.check_tensor,
    )
    return device, lowering, notes


def deployment_passes(lowering: Lowering) -> tuple[Pass, ...]:
    """Return the passes that take a traced Program to one that a target can run."""
    # Merging comes after lowering, so that it moves bytes and not floats.
    return (FoldBatchNorm(), CleanUp(), LowerWeights(lowering), MergeLinears(lowering.operators, lowering.allocate))


def compile(
    model: nn.Module,
    args: tuple[Any, ...] | Tensor | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: str,
    scheme: Scheme | None = None,
    dynamic_shapes: Any = None,
    passes: Pass | Iterable[Pass | Callable[[Program], Report]] = (),
    only: str | Iterable[str] = (),
    skip: str | Iterable[str] = (),
    arch: str | Iterable[str] = (),
    inplace: bool = False,
) -> Any:
    """Lower a model's weights to 8 bits for a target.

    With example inputs the model is traced, all passes run on the graph, and an Artifact comes back. Without them a
    module of the same class comes back, its weights lowered: `generate()`, hooks and `state_dict` still work. Its
    `parameters()` are those that stay float (biases, norms), which may be none: take its device from `buffers()`.

    Args:
        model: any module, float32, bfloat16 or float16. It stays as it is, bit for bit, unless `inplace`. Of what
            `prepare` returned, the model itself is compiled: training nodes are not for deployment.
        args: example inputs: a tuple, or one tensor.
        kwargs: example keyword inputs.
        target: `format-device`, such as `rf8-cpu`.
        scheme: how scales are chosen; the default is one for each output channel, by the format's own rule.
        dynamic_shapes: as `torch.export.export` takes it; None keeps the shapes of the examples.
        passes: more passes, run on the graph before the target's own; they need example inputs.
        only: patterns; weights that match none stay float. A shell pattern on the full name, or a module's name.
        skip: patterns of weights that stay float; stronger than `only`.
        arch: for `-cuda`: GPU architectures to build for ahead of time, as "sm_90"; no GPU is needed then, and what
            comes back carries its kernels into the file it is saved to.
        inplace: free each float weight as its codes exist. The model is consumed: without inputs it becomes the
            result, with inputs it must not be used any more.

    Returns:
        An Artifact (with inputs), or a module of the same class (without). `ggpass.report` works on both.

    Raises:
        TargetError: unknown or unusable target, with the list; a weight that is not on the target's device.
        TraceError: the model cannot be traced; says what broke.
        WeightError: NaN or infinity in a weight, an integer weight, a pattern that matches nothing.
        InputError: `model` is no module; `passes` or `dynamic_shapes` without inputs.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"compile takes a torch.nn.Module, not {type(model).__name__}; pass the model itself")
    if isinstance(model, PreparedModel):
        model = model.model
    if isinstance(args, Mapping):
        raise InputError("args is a tuple of positional inputs; give keyword inputs as kwargs=")
    passes = (passes,) if callable(passes) else tuple(passes)
    device, lowering, notes = lowering_for(target, scheme, only, skip, arch)
    lowering = replace(lowering, free=inplace)
    before = bytes_of_module(model)
    if args is None and kwargs is None:
        if passes or dynamic_shapes is not None:
            raise InputError("passes= and dynamic_shapes= need a graph; give example inputs (args=, kwargs=) with them")
        result, report = lower_module(model, lowering, inplace=inplace)
        report.notes += [*notes, "without example inputs: linears that share an input stay apart, no graph passes run"]
        return device.build(result, report, Sizes(before, bytes_of_module(result)), target)
    args = (args,) if isinstance(args, Tensor) else tuple(args or ())
    program = Program.trace(model, args, kwargs, dynamic_shapes)
    report = Pipeline((*passes, *deployment_passes(lowering)), title=f"compile for {target}")(program)  # type: ignore[arg-type]
    report.notes += notes
    if dynamic_shapes is not None:
        # torch.export makes a size static that the model's code compares, and says nothing.
        report.notes.append("takes " + ", ".join(describe(node.meta.get("val")) for node in program.inputs()))
    if not inplace:
        program.own_tensors(model)
    return device.build(program, report, Sizes(before, bytes_of_module(program.graph_module)), target)


def check_onnx_target(target: str) -> None:
    """Raise TargetError where a target string is unknown, cannot be used here, or is no onnx target."""
    if resolve(target)[1].name != "onnx":
        raise TargetError(f"an ONNX file is written for a target that ends in -onnx, as rf8-onnx, not {target!r}")


def export_onnx(
    model: nn.Module,
    args: tuple[Any, ...] | Tensor | None,
    path: str | Path,
    *,
    kwargs: Mapping[str, Any] | None = None,
    target: str = "rf8-onnx",
    scheme: Scheme | None = None,
    opset: int = 21,
    dynamic_shapes: Any = None,
    passes: Iterable[Pass | Callable[[Program], Report]] = (),
    only: str | Iterable[str] = (),
    skip: str | Iterable[str] = (),
    fallback: Literal["fast", "lowmem"] | None = "fast",
    external_data: bool | None = None,
    check: bool = True,
) -> Artifact:
    """Lower a model's weights to 8 bits and write it as an ONNX file, checked in ONNX Runtime.

    The file holds codes and scales, and operators of the domain `ai.ggpass`. ONNX Runtime runs it from the codes with
    the custom-op library (`ggpass.onnxruntime.session(path)`), and any runtime runs it by the fallback in the file.

    Args:
        model: any module in float32 or float16; it stays as it is.
        args: example inputs: a tuple, one tensor, or None where `kwargs` holds all.
        path: the file; one named `path.data` comes beside it where the tensors are many. If that name is taken, by an
            earlier save for instance, it has eight digits before `.data`; the earlier one goes once the model is there.
        kwargs: example keyword inputs.
        target: `format-onnx`, such as `rf8-onnx`.
        scheme, dynamic_shapes, passes, only, skip: as in `compile`.
        opset: of the standard operators.
        fallback: `fast` decodes to float weights at load, and runs like a float model; `lowmem` keeps the codes and
            decodes them at each call, more slowly; None attaches nothing, and the file needs the library.
        external_data: whether tensors go to a file of their own; None: above 64 MB.
        check: compare the file with the Artifact on the example inputs.

    Returns:
        The Artifact that the file was made from; its report says what happened to every weight, and how the check went.

    Raises:
        TargetError: no onnx target, missing packages, bfloat16, or a file that computes something else (the message
            names the first node that does).
        TraceError: the model cannot be traced or exported.
        InputError: no example inputs, or a path that cannot be written.
    """
    if args is None and kwargs is None:
        raise InputError("export_onnx traces the model; give it example inputs (args=, kwargs=)")
    check_onnx_target(target)
    from ggpass.onnx.export import export_artifact
    from ggpass.onnx.save import check_path

    path = check_path(path)
    args = (args,) if isinstance(args, Tensor) else tuple(args or ())
    artifact = compile(
        model,
        args,
        kwargs,
        target=target,
        scheme=scheme,
        dynamic_shapes=dynamic_shapes,
        passes=passes,
        only=only,
        skip=skip,
    )
    leaves = pytree.tree_leaves((args, dict(kwargs or {})))
    written = export_artifact(
        artifact, leaves, path, opset=opset, fallback=fallback, external_data=external_data, check=check
    )
    artifact.report.parts.append(written)
    return artifact


def lower_onnx(
    path_in: str | Path,
    path_out: str | Path,
    *,
    target: str = "rf8-onnx",
    scheme: Scheme | None = None,
    only: str | Iterable[str] = (),
    skip: str | Iterable[str] = (),
    fallback: Literal["fast", "lowmem"] | None = "fast",
    external_data: bool | None = None,
) -> Report:
    """Any ONNX file in, the same model with 8-bit weights out.

    MatMul, Gemm, Gather and Conv compute with the codes; other float operators get a large constant decoded
    (LSTM, ConvTranspose, Attention, a table under Add). Functions of the model are inlined. Tensors are read and
    written one at a time, so that a model may be larger than memory. The file is opened before it gets its name.

    Args:
        path_in: a float model, from any exporter; it stays as it is.
        path_out: the file to write, a different one.
        target, scheme, only, skip, fallback, external_data: as in `export_onnx`; names are those of the initializers.

    Returns:
        What happened to every weight: lowered, or left with the reason.

    Raises:
        TargetError: no onnx target, missing packages, or ONNX Runtime does not open what was written.
        FormatError: not an ONNX model, or one that refers to data outside its directory.
        WeightError: NaN in a weight, or a pattern that matches nothing.
        InputError: paths that cannot be read or written, or a full disk.
    """
    check_onnx_target(target)
    _, lowering, _ = lowering_for(target, scheme, only, skip)
    from ggpass.onnx.lower import lower_file

    return lower_file(path_in, path_out, lowering, fallback=fallback, external_data=external_data)


def init_(
    model: nn.Module,
    args: tuple[Any, ...] | Tensor | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    shape: float | str | Mapping[str, float] = "auto",
    seed: int = 0,
    only: str | Iterable[str] = (),
    skip: str | Iterable[str] = (),
    dynamic_shapes: Any = None,
) -> Report:
    """w ~ GGD(ν, α), Var(w) = ξ/n: new first values for a model's weights, in place (see `passes.GGInit`).

    Call it on a model as its constructor leaves it: the σ of embeddings and smaller residual branches are read off
    the weights. Parameters stay the same objects, with their ties, dtype, device and `requires_grad`.

    Args:
        model: any module.
        args, kwargs: example inputs, from which ξ is read off the graph; without them, or where tracing fails, ξ = 1
            for all, and the report says so.
        shape: ν: a number from 0.2 to 8, `{pattern: ν}`, `"like:FILE"` for the shapes of a trained checkpoint
            (safetensors), or `"auto"`.
        seed: the same seed gives the same weights; each depends on it and on its own name alone.
        only, skip, dynamic_shapes: as in `compile`.

    Returns:
        For each weight its operator, ξ and why, n, ν, σ before and after; for each other the reason.

    Raises:
        WeightError: a weight on the meta device or sharded, NaN in one, ν out of range, a pattern without a match.
        FormatError: no readable checkpoint behind `like:`.
        InputError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"init_ takes a torch.nn.Module, not {type(model).__name__}; pass the model itself")
    step = GGInit(shape, seed, as_patterns(only), as_patterns(skip), inplace=True)
    if args is None and kwargs is None:
        return step.on_module(model)
    args = (args,) if isinstance(args, Tensor) else tuple(args or ())
    try:
        program = Program.trace(model, args, kwargs, dynamic_shapes)
    except TraceError as error:
        why = str(error).splitlines()[0]
        logger.warning("init_ takes ξ = 1 for every weight: %s", why)
        return step.on_module(model, why=why)
    return step.on_module(model, program)


def shape_(
    model: nn.Module,
    *,
    mode: Literal["paper", "compensated"] = "paper",
    granularity: Literal["model", "tensor", "channel"] = "model",
    shape_ratio: float = 0.8,
    scale_ratio: float = 0.6,
    step: float = 2.0**-13,
    rare: float = 1000,
    only: str | Iterable[str] = (),
    skip: str | Iterable[str] = (),
) -> ShapeReport:
    """w' = Δ·round(Q(p(w); 0.8ν, 0.6α)/Δ): remap trained weights to fewer bits, in place (see `passes.DeepShape`).

    Parameters stay the same objects, with their ties, dtype, device and `requires_grad`, so that fine-tuning goes on.

    Args:
        model: any trained module.
        mode: `compensated` keeps each weight's energy, and with it the size of layer outputs.
        granularity: what has one fit and one map.
        shape_ratio, scale_ratio, step, rare, only, skip: as in `passes.DeepShape`.

    Returns:
        For each weight ν, σ, bits and squared change; for each other the reason. `.reshaped` holds the numbers.

    Raises:
        FormatError: a setting that is none of those.
        WeightError: NaN or infinity in a weight, or a pattern without a match; the model is as it was then.
        InputError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"shape_ takes a torch.nn.Module, not {type(model).__name__}; pass the model itself")
    settings = (mode, granularity, shape_ratio, scale_ratio, step, rare)
    return DeepShape(*settings, as_patterns(only), as_patterns(skip)).on_module(model)


def prepare(
    model: nn.Module,
    args: tuple[Any, ...] | Tensor | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    passes: Pass | Iterable[Pass | Callable[[Program], Report]] | None = None,
    dynamic_shapes: Any = None,
) -> PreparedModel:
    """Put what passes do in training into a model's training graph, around the caller's own Parameters.

    The model is traced twice, for `train()` and for `eval()`; the passes edit the training graph alone. What comes
    back trains in any loop: its parameters, buffers and `state_dict` are the model's.

    Args:
        model: any module; its Parameters and buffers are shared, and its training flags are as before afterwards.
        args: example inputs: a tuple, or one tensor. Without any, there is no graph: passes act only by `attach`.
        kwargs: example keyword inputs.
        passes: run on the training graph; BackSlash(target_bits=2.0) if left out.
        dynamic_shapes: as `torch.export.export` takes it; None lets the first dimension of every tensor change,
            wherever the model's code allows it. A size that a graph does not take is traced when it comes.

    Returns:
        A PreparedModel: `attach(optimizer)`, `bits()`, `status()`, `report`.

    Raises:
        TraceError: the model cannot be traced; says what broke.
        WeightError: nothing to regularize, or a pattern that matches nothing.
        InputError: no module, a prepared or a lowered one, or `dynamic_shapes` without inputs.
    """
    if passes is None:
        passes = BackSlash(target_bits=2.0)
    args = (args,) if isinstance(args, Tensor) else args
    return prepare_model(model, args, kwargs, (passes,) if callable(passes) else tuple(passes), dynamic_shapes)


def save(compiled: Any, path: str | os.PathLike[str]) -> None:
    """Write what `compile` returned (or any module) to one `.safetensors` file, its codes at their entropy.

    Args:
        compiled: an Artifact or a module.
        path: of the file; written beside it first, and renamed.

    Raises:
        FormatError: it holds nothing that can be stored.
    """
    from ggpass.file.save import save as save_file

    save_file(compiled, Path(path))


Artifact.writer = save


def load(
    path: str | os.PathLike[str],
    into: Filled | None = None,
    *,
    target: str | None = None,
    device: str | torch.device | None = None,
    kernels: bool = True,
) -> Filled:
    """Fill a model from a file that `save` or `ggpass pack` wrote, or leave it as it was; codes stay codes.

    Args:
        path: of the file; or a directory of packed shards, or its index.
        into: a float model of the same architecture, whose values do not matter; it may be on the meta device. Or what
            `compile` made of one.
        target: `format-device`, as for `compile`, or a target's name alone, which takes the format that most weights of
            the file have. If left out: that of the device, or `reference` if it has none that can be used here.
        device: where the model goes, as "cuda:0". If left out: where the target computes, or else where it is; the CPU
            for a model on the meta device.
        kernels: whether GPU kernels that the file carries serve this process. They are machine code for the GPU: take
            them only from where you would take a program.

    Raises:
        FormatError: a damaged file, or one that does not fit `into`; the message names the tensor.
        TargetError: an unknown or unusable target, or an unknown device.
    """
    from ggpass.file.load import load as load_file

    return load_file(Path(path), into, *place(target, device, into), kernels=kernels)


def _attached(compiled: Any, what: str, kind: type[Attached]) -> Attached:
    """Return the `report` or `sizes` of an Artifact, or of a lowered module, which names it `ggpass_…`."""
    found = getattr(compiled, what if isinstance(compiled, Artifact) else f"ggpass_{what}", None)
    if not isinstance(found, kind):
        raise InputError(f"{type(compiled).__name__} carries no {what}; pass what ggpass.compile returned")
    return found


def report(compiled: Any) -> Report:
    """What happened to every weight of something that `compile` returned.

    Raises:
        InputError: it did not come from ggpass.
    """
    return _attached(compiled, "report", Report)


def sizes(compiled: Any) -> Sizes:
    """Return bytes of the tensors before and after, of something that `compile` returned.

    Raises:
        InputError: it did not come from ggpass.
    """
    return _attached(compiled, "sizes", Sizes)
