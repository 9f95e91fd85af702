"""Four RF8 codes to four weights in PTX, for `tl.inline_asm_elementwise`: P · Q, as in the generator's device.py."""


def _decoder(kind: str, factors: str, shift: int, mask: int) -> str:
    """P · Q for two codes at a time: `factors` looks Q up, `shift` and `mask` form P from a code's exponent."""
    return f"""{{
.reg .b32 residuals, upper, p0, p1, q0, q1, low0, low1, zero;
mov.b32 zero, 0x80008000;
and.b32 residuals, $2, 0x07070707;
shr.b32 upper, residuals, 16;
prmt.b32 p0, $2, 0, 0x1100;
prmt.b32 p1, $2, 0, 0x3322;
{factors}
lop3.b32 q0, p0, 0x80008000, q0, 0xea;
lop3.b32 q1, p1, 0x80008000, q1, 0xea;
shl.b32 p0, p0, {shift};
shl.b32 p1, p1, {shift};
and.b32 p0, p0, {mask:#010x};
and.b32 p1, p1, {mask:#010x};
fma.rn.{kind}x2 $0, p0, q0, zero;
fma.rn.{kind}x2 $1, p1, q1, zero;
}}"""


_FACTORS = {
    "bfloat16": """prmt.b32 q0, 0x80706040, 0xc0a09088, residuals;
prmt.b32 q1, 0x80706040, 0xc0a09088, upper;
xor.b32 q0, q0, 0x37003700;
xor.b32 q1, q1, 0x37003700;""",
    "float16": """prmt.b32 q0, 0x3c3b3b3a, 0x3e3d3c3c, residuals;
prmt.b32 q1, 0x3c3b3b3a, 0x3e3d3c3c, upper;
prmt.b32 low0, 0x00800000, 0x00008040, residuals;
prmt.b32 low1, 0x00800000, 0x00008040, upper;
prmt.b32 q0, low0, q0, 0x6240;
prmt.b32 q1, low1, q1, 0x6240;""",
}

#: By dtype of activations: $2 holds four codes, $0 and $1 two weights each.
DECODE = {
    "bfloat16": _decoder("bf16", _FACTORS["bfloat16"], 4, 0x07800780),
    "float16": _decoder("f16", _FACTORS["float16"], 7, 0x3C003C00),
}
