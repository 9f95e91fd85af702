"""w = codebook[codes] · scale by standard operators: model-local functions, so that any ONNX runtime runs our files.

1. A registered custom-op library wins over these functions; without one, the runtime inlines them.
2. `fast`: the dequantization depends on constants only, so ONNX Runtime folds it to float weights at load: its own
   speed. Folding keeps every intermediate result of all weights until it ends, so a body makes as few as it can.
3. `lowmem`: matrices are decoded by a loop over blocks of rows, which nothing folds: the codes stay codes.
4. A gather decodes the rows it reads either way: they are few beside the table.
5. RF8X is CodebookX with RF8's codebook, made of constants of at most eight numbers. ONNX Runtime shares equal
   constants only up to that size. Then it finds equal dequantizations equal: a weight used twice is decoded once.
6. Every input and attribute is given, since a function cannot ask whether an optional one is there: a bias is zeros
   where there is none.
7. Arithmetic is in float32 and is rounded once to the result's type, as in `ggpass.lowering.operators`.
"""

from collections.abc import Iterable
from typing import Literal

import onnx
import onnx.parser
import onnx_ir as ir
from torch import Tensor

from ggpass.errors import InputError
from ggpass.formats.rf8 import RESIDUALS, RF8
from ggpass.onnx.names import DOMAIN, VERSION

Fallback = Literal["fast", "lowmem"]

#: The first opset whose Unsqueeze and constants are those of the bodies.
MIN_OPSET = 13
#: The first opset with CastLike; below it a body can only compute in float32.
CAST_LIKE_OPSET = 15

#: Weights decoded at a time by `lowmem`: 1 MB of codes, 4 MB of floats.
BLOCK_WEIGHTS = 1 << 20

_DEQUANTIZE_FAST = """
CodebookDequantize <to: int = 1> (codes, scale, codebook) => (w) {
    index = Cast <to: int = 6> (codes)
    value = Gather (codebook, index)
    column = Constant <value_ints: ints = [-1, 1]> ()
    factor = Reshape (scale, column)
    product = Mul (value, factor)
    w = Cast <to: int = @to> (product)
}"""

# The codes are transposed, not the weights: a byte each instead of four. Scales multiply the result, as in our kernels.
_MATMUL_FAST = """
CodebookMatMul (x, codes, scale, codebook, bias) => (y) {
    transposed = Transpose <perm: ints = [1, 0]> (codes)
    index = Cast <to: int = 6> (transposed)
    values = Gather (codebook, index)
    x32 = Cast <to: int = 1> (x)
    product = MatMul (x32, values)
    scaled = Mul (product, scale)
    bias32 = Cast <to: int = 1> (bias)
    y32 = Add (scaled, bias32)
    y = {LIKE} (y32{OTHER})
}"""

#: What both loops share: the number of blocks, and block i of codes and (N) scales, decoded as `w`.
_BLOCKS = """
    shape = Shape (codes)
    first = Constant <value_int: int = 0> ()
    second = Constant <value_int: int = 1> ()
    rows = Gather (shape, first)
    columns = Gather (shape, second)
    weights = Constant <value_int: int = {BLOCK}> ()
    one = Constant <value_int: int = 1> ()
    fit = Div (weights, columns)
    block = Add (fit, one)
    padded = Add (rows, block)
    last = Sub (padded, one)
    trips = Div (last, block)
    vector = Constant <value_ints: ints = [-1]> ()
    length = Reshape (rows, vector)
    scales = Expand (scale, length)
    yes = Cast <to: int = 9> (one)
    none = SequenceEmpty <dtype: int = 1> ()"""
_DECODE = """\
        start = Mul (i, block)
        end = Add (start, block)
        from = Reshape (start, vector)
        until = Reshape (end, vector)
        axis = Constant <value_ints: ints = [0]> ()
        part = Slice (codes, from, until, axis)
        index = Cast <to: int = 6> (part)
        value = Gather (codebook, index)
        factor = Slice (scales, from, until, axis)
        column = Constant <value_ints: ints = [-1, 1]> ()
        factors = Reshape (factor, column)
        w = Mul (value, factors)"""

_DEQUANTIZE_LOWMEM = f"""
CodebookDequantize <to: int = 1> (codes, scale, codebook) => (w) {{{_BLOCKS}
    blocks = Loop <body: graph = decode (int64 i, bool go, seq(float[]) done) => (bool go_on, seq(float[]) more) {{
{_DECODE}
        more = SequenceInsert (done, w)
        go_on = Identity (go)
    }}> (trips, yes, none)
    whole = ConcatFromSequence <axis: int = 0> (blocks)
    w = Cast <to: int = @to> (whole)
}}"""

_MATMUL_LOWMEM = f"""
CodebookMatMul (x, codes, scale, codebook, bias) => (y) {{{_BLOCKS}
    x32 = Cast <to: int = 1> (x)
    blocks = Loop <body: graph = multiply (int64 i, bool go, seq(float[]) done) => (bool go_on, seq(float[]) more) {{
{_DECODE}
        wt = Transpose <perm: ints = [1, 0]> (w)
        product = MatMul (x32, wt)
        more = SequenceInsert (done, product)
        go_on = Identity (go)
    }}> (trips, yes, none)
    whole = ConcatFromSequence <axis: int = -1> (blocks)
    bias32 = Cast <to: int = 1> (bias)
    y32 = Add (whole, bias32)
    y = {{LIKE}} (y32{{OTHER}})
}}"""

_GATHER = """
CodebookGather <to: int = 1> (ids, codes, scale, codebook) => (y) {
    part = Gather (codes, ids)
    index = Cast <to: int = 6> (part)
    value = Gather (codebook, index)
    shape = Shape (codes)
    axis = Constant <value_ints: ints = [0]> ()
    rows = Gather (shape, axis)
    scales = Expand (scale, rows)
    factor = Gather (scales, ids)
    last = Constant <value_ints: ints = [-1]> ()
    factors = Unsqueeze (factor, last)
    product = Mul (value, factors)
    y = Cast <to: int = @to> (product)
}"""

_CONV = """
CodebookConv <kernel_shape, strides, pads, dilations, group: int = 1> (x, codes, scale, codebook, bias) => (y) {
    channels = Constant <value_ints: ints = [0, -1]> ()
    kernel = Constant <value_ints: ints = @kernel_shape> ()
    shape = Concat <axis: int = 0> (channels, kernel)
    shaped = Reshape (codes, shape)
    index = Cast <to: int = 6> (shaped)
    value = Gather (codebook, index)
    column = Constant <value_ints: ints = [-1, 1]> ()
    ones = Div (kernel, kernel)
    spread = Concat <axis: int = 0> (column, ones)
    factors = Reshape (scale, spread)
    w = Mul (value, factors)
    x32 = Cast <to: int = 1> (x)
    bias32 = Cast <to: int = 1> (bias)
    y32 = Conv <kernel_shape: ints = @kernel_shape, strides: ints = @strides, pads: ints = @pads,
                dilations: ints = @dilations, group: int = @group> (x32, w, bias32)
    y = {LIKE} (y32{OTHER})
}"""

#: The 256 values of RF8 from its 16 powers of two (0 for e = 0) and its 8 mantissas; code 128 + i is −code i, never −0.
_CODEBOOK = """low = Constant <value = float[8] {LOW}> ()
    high = Constant <value = float[8] {HIGH}> ()
    mantissas = Constant <value = float[8] {MANTISSAS}> ()
    zero = Constant <value_float: float = 0.0> ()
    column = Constant <value_ints: ints = [-1, 1]> ()
    vector = Constant <value_ints: ints = [-1]> ()
    powers = Concat <axis: int = 0> (low, high)
    powers_column = Reshape (powers, column)
    positive = Mul (powers_column, mantissas)
    negative = Sub (zero, positive)
    both = Concat <axis: int = 0> (positive, negative)
    codebook = Reshape (both, vector)"""
_RF8 = {
    "RF8MatMul": f"""
RF8MatMul (x, codes, scale, bias) => (y) {{
    {_CODEBOOK}
    y = ai.ggpass.CodebookMatMul (x, codes, scale, codebook, bias)
}}""",
    "RF8Gather": f"""
RF8Gather <to: int = 1> (ids, codes, scale) => (y) {{
    {_CODEBOOK}
    y = ai.ggpass.CodebookGather <to: int = @to> (ids, codes, scale, codebook)
}}""",
    "RF8Dequantize": f"""
RF8Dequantize <to: int = 1> (codes, scale) => (w) {{
    {_CODEBOOK}
    w = ai.ggpass.CodebookDequantize <to: int = @to> (codes, scale, codebook)
}}""",
    "RF8Conv": f"""
RF8Conv <kernel_shape, strides, pads, dilations, group: int = 1> (x, codes, scale, bias) => (y) {{
    {_CODEBOOK}
    y = ai.ggpass.CodebookConv <kernel_shape: ints = @kernel_shape, strides: ints = @strides, pads: ints = @pads,
                                dilations: ints = @dilations, group: int = @group> (x, codes, scale, codebook, bias)
}}""",
}

_BODIES: dict[Fallback, dict[str, str]] = {
    "fast": {"CodebookDequantize": _DEQUANTIZE_FAST, "CodebookMatMul": _MATMUL_FAST},
    "lowmem": {"CodebookDequantize": _DEQUANTIZE_LOWMEM, "CodebookMatMul": _MATMUL_LOWMEM},
}
for _texts in _BODIES.values():
    _texts |= {"CodebookGather": _GATHER, "CodebookConv": _CONV, **_RF8}


def _floats(values: Tensor) -> str:
    return "{" + ", ".join(map(repr, values.tolist())) + "}"


def _parse(text: str, opset: int) -> onnx.FunctionProto:
    like = opset >= CAST_LIKE_OPSET
    grid = RF8.codebook[:128].view(16, 8)
    mantissas = grid[-1] / grid[-1, RESIDUALS.index(0.0)]
    powers = grid[:, RESIDUALS.index(0.0)]
    filled = (
        text.replace("{LOW}", _floats(powers[:8]))
        .replace("{HIGH}", _floats(powers[8:]))
        .replace("{MANTISSAS}", _floats(mantissas))
        .replace("{BLOCK}", str(BLOCK_WEIGHTS))
        .replace("{LIKE}", "CastLike" if like else "Identity")
        .replace("{OTHER}", ", x" if like else "")
    )
    head = f'<opset_import: ["" : {opset}, "{DOMAIN}" : {VERSION}], domain: "{DOMAIN}">'
    return onnx.parser.parse_function(head + filled)


def functions(operators: Iterable[str], opset: int, fallback: Fallback) -> list[onnx.FunctionProto]:
    """Return the functions of the named operators and of those that their bodies call.

    Args:
        operators: names of our operators, as `RF8MatMul`.
        opset: of the standard operators in the model.
        fallback: `fast` or `lowmem`.

    Raises:
        InputError: an opset below MIN_OPSET, or an unknown fallback.
    """
    if fallback not in _BODIES:
        raise InputError(f"fallback is 'fast', 'lowmem' or None, not {fallback!r}")
    if opset < MIN_OPSET:
        raise InputError(
            f"the fallback needs opset {MIN_OPSET}, and the model has {opset}; convert it with onnx.version_converter, "
            "or give fallback=None and run it with the custom-op library"
        )
    found: dict[str, onnx.FunctionProto] = {}

    def add(name: str) -> None:
        function = _parse(_BODIES[fallback][name], opset)
        # Callees first: onnx.reference reads the list in order, and applies no default to a nested attribute either.
        for node in function.node:
            if node.domain == DOMAIN:
                add(node.op_type)
        found.setdefault(name, function)

    for name in sorted(operators):
        add(name)
    return list(found.values())


def attach_functions(model: ir.Model, fallback: Fallback | None) -> None:
    """Give the model the bodies of the `ai.ggpass` operators in it, or none, and every one its version.

    The version stands in an attribute because ONNX Runtime shows a library no domain's version: so an older library
    can say what it lacks, in any language.

    Raises:
        InputError: an opset that the bodies cannot be written in.
    """
    for identifier in [key for key, function in model.functions.items() if function.domain == DOMAIN]:
        del model.functions[identifier]
    nodes = [node for graph in model.graphs() for node in graph if node.domain == DOMAIN]
    if not nodes:
        return
    for node in nodes:
        node.attributes.add(ir.AttrInt64("op_version", VERSION))
    used = {node.op_type for node in nodes}
    model.opset_imports[DOMAIN] = VERSION
    if fallback is None:
        return
    # Functions exist since IR version 8.
    model.ir_version = max(model.ir_version, 8)
    for proto in functions(used, model.opset_imports[""], fallback):
        function = ir.serde.deserialize_function(proto)
        model.functions[function.identifier()] = function
