"""Four RF8 codes to four weights in PTX, for `tl.inline_asm_elementwise`: P · Q, as in generate/cuda/device.py."""

#: By dtype of activations: $2 holds four codes, $0 and $1 two weights each.
DECODE = {
    "bfloat16": """{
.reg .b32 residuals, upper, p0, p1, q0, q1, zero;
mov.b32 zero, 0x80008000;
and.b32 residuals, $2, 0x07070707;
shr.b32 upper, residuals, 16;
prmt.b32 p0, $2, 0, 0x1100;
prmt.b32 p1, $2, 0, 0x3322;
prmt.b32 q0, 0x80706040, 0xc0a09088, residuals;
prmt.b32 q1, 0x80706040, 0xc0a09088, upper;
xor.b32 q0, q0, 0x37003700;
xor.b32 q1, q1, 0x37003700;
lop3.b32 q0, p0, 0x80008000, q0, 0xea;
lop3.b32 q1, p1, 0x80008000, q1, 0xea;
shl.b32 p0, p0, 4;
shl.b32 p1, p1, 4;
and.b32 p0, p0, 0x07800780;
and.b32 p1, p1, 0x07800780;
fma.rn.bf16x2 $0, p0, q0, zero;
fma.rn.bf16x2 $1, p1, q1, zero;
}""",
    "float16": """{
.reg .b32 residuals, upper, p0, p1, q0, q1, low0, low1, zero;
mov.b32 zero, 0x80008000;
and.b32 residuals, $2, 0x07070707;
shr.b32 upper, residuals, 16;
prmt.b32 p0, $2, 0, 0x1100;
prmt.b32 p1, $2, 0, 0x3322;
prmt.b32 q0, 0x3c3b3b3a, 0x3e3d3c3c, residuals;
prmt.b32 q1, 0x3c3b3b3a, 0x3e3d3c3c, upper;
prmt.b32 low0, 0x00800000, 0x00008040, residuals;
prmt.b32 low1, 0x00800000, 0x00008040, upper;
prmt.b32 q0, low0, q0, 0x6240;
prmt.b32 q1, low1, q1, 0x6240;
lop3.b32 q0, p0, 0x80008000, q0, 0xea;
lop3.b32 q1, p1, 0x80008000, q1, 0xea;
shl.b32 p0, p0, 7;
shl.b32 p1, p1, 7;
and.b32 p0, p0, 0x3c003c00;
and.b32 p1, p1, 0x3c003c00;
fma.rn.f16x2 $0, p0, q0, zero;
fma.rn.f16x2 $1, p1, q1, zero;
}""",
}
