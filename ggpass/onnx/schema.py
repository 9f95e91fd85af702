"""The operators of the domain `ai.ggpass`, version 1: what an exported file says and what the custom-op library runs.

    RF8MatMul(x, codes, scale, bias?)   y = x · (codebook[codes] · scale)ᵀ + bias
    RF8Gather(ids, codes, scale)        y = (codebook[codes] · scale)[ids]
    RF8Dequantize(codes, scale)         w = codebook[codes] · scale
    RF8Conv(x, codes, scale, bias?)     y = x ∗ (codebook[codes] · scale) + bias

`CodebookMatMul`, `CodebookGather`, `CodebookDequantize`, `CodebookConv` are the same with one more input, `codebook`,
directly behind `scale`; the RF8 operators mean the codebook of `ggpass.formats.RF8`, any alias of a code included.

An output channel is a row of `codes`, and its scale multiplies the row. A scale of one element is every row's.
The model-local functions of `ggpass.onnx.bodies` compute the same by standard operators, where no library does.
"""

from collections.abc import Callable

import onnx.defs
from onnx import TensorProto
from onnx.shape_inference import InferenceContext, InferenceError

from ggpass.onnx.names import DOMAIN, VERSION

_OpSchema = onnx.defs.OpSchema
_Parameter = _OpSchema.FormalParameter
_Optional = _OpSchema.FormalParameterOption.Optional

#: A dimension: a length, a symbol, or None where nothing is known.
Dim = int | str | None

_TYPES = {"T": ["tensor(float)", "tensor(float16)"], "I": ["tensor(int64)", "tensor(int32)"]}
_TYPE_DOCS = {"T": "Activations; sums are formed in float32.", "I": "Row numbers."}

_X = _Parameter("x", "T", "(…, K); for Conv (B, C, …) with one or two spatial dimensions.")
_IDS = _Parameter("ids", "I", "(…), row numbers in [0, N).")
_CODES = _Parameter("codes", "tensor(uint8)", "(N, K); for Conv (O, C/group · ∏kernel_shape).")
_SCALE = _Parameter("scale", "tensor(float)", "(N) or (1), finite.")
_CODEBOOK = _Parameter("codebook", "tensor(float)", "(256), the value of each code.")
_BIAS = _Parameter("bias", "T", "(N).", param_option=_Optional)

_INTS = _OpSchema.AttrType.INTS
_TO = _OpSchema.Attribute(
    "to", onnx.helper.make_attribute("to", TensorProto.FLOAT), "ONNX type of the result: 1 float, 10 float16."
)
_OP_VERSION = _OpSchema.Attribute(
    "op_version", onnx.helper.make_attribute("op_version", 1), "The operator's version, for a library to see."
)
#: As in ONNX's own Conv, but for `kernel_shape`, which flattened codes no longer tell and which is therefore required.
_CONV = [
    _OpSchema.Attribute("kernel_shape", _INTS, "The spatial shape of the kernel.", required=True),
    _OpSchema.Attribute("strides", _INTS, "1 along each axis if left out.", required=False),
    _OpSchema.Attribute("pads", _INTS, "Begins, then ends; 0 if left out.", required=False),
    _OpSchema.Attribute("dilations", _INTS, "1 along each axis if left out.", required=False),
    _OpSchema.Attribute("group", onnx.helper.make_attribute("group", 1), "Groups of input and output channels."),
]


def _shape(ctx: InferenceContext, index: int) -> list[Dim] | None:
    """Return the dimensions of an input; None for an unknown rank."""
    kind = ctx.get_input_type(index) if ctx.has_input(index) else None
    if kind is None or not kind.tensor_type.HasField("shape"):
        return None
    known = kind.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in known]


def _set_output(ctx: InferenceContext, elem_type: int, shape: list[Dim] | None) -> None:
    ctx.set_output_type(0, onnx.helper.make_tensor_type_proto(elem_type, shape))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InferenceError(f"[ggpass] {message}")


def _differ(a: Dim, b: Dim) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a != b


def _codes(ctx: InferenceContext, first: int) -> list[Dim]:
    """(N, K) of the codes at input `first`; raises where scale or codebook cannot belong to them."""
    codes, scale = _shape(ctx, first), _shape(ctx, first + 1)
    _require(codes is None or len(codes) == 2, f"codes are (N, K), not {codes}")
    known: list[Dim] = codes or [None, None]
    if scale is not None:
        fits = len(scale) == 1 and (scale[0] == 1 or not _differ(scale[0], known[0]))
        _require(fits, f"scale is (N) or (1) for codes of {known}, not {scale}")
    return known


def _attributes(ctx: InferenceContext, name: str, default: list[int]) -> list[int]:
    found = ctx.get_attribute(name)
    return list(found.ints) if found is not None and found.ints else default


def _infer_matmul(ctx: InferenceContext, bias: int) -> None:
    """(…, K) × (N, K) → (…, N)."""
    x, (rows, columns) = _shape(ctx, 0), _codes(ctx, 1)
    kind = ctx.get_input_type(0)
    if kind is None:
        return
    if x is not None:
        _require(len(x) >= 1 and not _differ(x[-1], columns), f"x is (…, {columns}), not {x}")
    _check_bias(ctx, bias, rows)
    _set_output(ctx, kind.tensor_type.elem_type, None if x is None else [*x[:-1], rows])


def _infer_gather(ctx: InferenceContext, bias: int) -> None:
    """(…) × (N, K) → (…, K)."""
    ids, (_, columns) = _shape(ctx, 0), _codes(ctx, 1)
    _set_output(ctx, _to(ctx), None if ids is None else [*ids, columns])


def _infer_dequantize(ctx: InferenceContext, bias: int) -> None:
    """(N, K) → (N, K)."""
    _set_output(ctx, _to(ctx), _codes(ctx, 0))


def _infer_conv(ctx: InferenceContext, bias: int) -> None:
    """out = ⌊(in + pads − dilation · (kernel − 1) − 1) / stride⌋ + 1 along each spatial axis."""
    x, (rows, _) = _shape(ctx, 0), _codes(ctx, 1)
    kind = ctx.get_input_type(0)
    kernel = _attributes(ctx, "kernel_shape", [])
    axes = len(kernel)
    _require(axes in (1, 2), f"kernel_shape has one or two entries, not {kernel}")
    strides, dilations = (_attributes(ctx, name, [1] * axes) for name in ("strides", "dilations"))
    pads = _attributes(ctx, "pads", [0] * 2 * axes)
    _require(len(strides) == len(dilations) == axes, f"strides {strides} and dilations {dilations} need {axes} entries")
    _require(len(pads) == 2 * axes, f"pads {pads} need {2 * axes} entries")
    _check_bias(ctx, bias, rows)
    if kind is None:
        return
    shape: list[Dim] | None = None
    if x is not None:
        _require(len(x) == axes + 2, f"x has {axes + 2} dimensions for kernel_shape {kernel}, not {x}")
        sizes: list[Dim] = []
        for i, length in enumerate(x[2:]):
            room = None if not isinstance(length, int) else length + pads[i] + pads[i + axes]
            reach = dilations[i] * (kernel[i] - 1) + 1
            _require(room is None or room >= reach, f"x is {x}, shorter than the kernel {kernel} at spatial axis {i}")
            sizes.append(None if room is None else (room - reach) // strides[i] + 1)
        shape = [x[0], rows, *sizes]
    _set_output(ctx, kind.tensor_type.elem_type, shape)


def _check_bias(ctx: InferenceContext, index: int, rows: Dim) -> None:
    bias = _shape(ctx, index) if ctx.get_num_inputs() > index else None
    _require(bias is None or (len(bias) == 1 and not _differ(bias[0], rows)), f"bias is ({rows}), not {bias}")


def _to(ctx: InferenceContext) -> int:
    attribute = ctx.get_attribute("to")
    kind = attribute.i if attribute is not None else TensorProto.FLOAT
    _require(kind in (TensorProto.FLOAT, TensorProto.FLOAT16), f"to is 1 (float) or 10 (float16), not {kind}")
    return int(kind)


_Infer = Callable[[InferenceContext, int], None]

#: Operation -> first input, whether a bias follows, attributes, inference.
_OPERATIONS: dict[str, tuple[list[_Parameter], bool, list[_OpSchema.Attribute], _Infer]] = {
    "MatMul": ([_X], True, [], _infer_matmul),
    "Gather": ([_IDS], False, [_TO], _infer_gather),
    "Dequantize": ([], False, [_TO], _infer_dequantize),
    "Conv": ([_X], True, _CONV, _infer_conv),
}


def _schema(prefix: str, operation: str) -> _OpSchema:
    first, has_bias, attributes, infer = _OPERATIONS[operation]
    inputs = [*first, _CODES, _SCALE, *([_CODEBOOK] if prefix == "Codebook" else [])]
    bias = len(inputs)
    inputs += [_BIAS] if has_bias else []
    used = ["T", *(["I"] if operation == "Gather" else [])]
    schema = _OpSchema(
        f"{prefix}{operation}",
        DOMAIN,
        VERSION,
        (infer.__doc__ or "").strip(),
        inputs=inputs,
        outputs=[_Parameter("y", "T", "The result.")],
        type_constraints=[(name, _TYPES[name], _TYPE_DOCS[name]) for name in used],
        attributes=[*attributes, _OP_VERSION],
    )
    schema.set_type_and_shape_inference_function(lambda ctx: infer(ctx, bias))
    return schema


SCHEMAS: dict[str, _OpSchema] = {
    schema.name: schema for schema in (_schema(p, o) for p in ("RF8", "Codebook") for o in _OPERATIONS)
}


def register() -> None:
    """Make onnx know the operators, for its checker and shape inference; a second call does nothing."""
    for name, schema in SCHEMAS.items():
        if not onnx.defs.has(name, VERSION, DOMAIN):
            onnx.defs.register_schema(schema)
