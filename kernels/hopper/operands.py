"""Left operands of products that come from registers: rounded when the code says so, and kept two to a register.

Left to itself the compiler rounds values late, where they are used, and keeps them twice as wide until then. As single
16-bit values it would pack them again and again; as pairs in an int32 they are what the tensor cores take.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def pack(x, dtype: gl.constexpr):
    """Neighbours of a row of float32 `[R, N]` in one int32, `[R, N / 2]`, rounded to dtype."""
    even, odd = x.reshape([x.shape[0], x.shape[1] // 2, 2]).split()
    ROUND: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if dtype == gl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(ROUND, "=r,r,r", [even, odd], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def unpack(pairs, dtype: gl.constexpr, layout: gl.constexpr):
    """The rounded values, `[R, N]`; costs no instruction."""
    twice = gl.join(pairs, pairs).reshape([pairs.shape[0], pairs.shape[1] * 2])
    x = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [twice], dtype=dtype.value, is_pure=True, pack=2)
    return gl.convert_layout(x, layout, assert_trivial=True)
