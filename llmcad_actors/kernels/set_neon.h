/* 64-bit ARM, any: vectors of four floats. */

#define LANES 4
#define ROWS 6
#define OUTS 4
#define WIDTH 4
#define IN_REGISTER(value)

typedef four NAME(vector);
typedef loose_four NAME(loose);

INLINE four NAME(fma)(four a, four b, four c)
{
    return (four)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}

INLINE four NAME(widen)(const void *from, enum kind kind)
{
    if (kind == FLOAT32)
        return (four)vreinterpretq_f32_u8(vld1q_u8(from));
    const uint16x4_t narrow = vreinterpret_u16_u8(vld1_u8(from));
    if (kind == BFLOAT16)
        return (four)vreinterpretq_f32_u32(vshll_n_u16(narrow, 16));
    return (four)vcvt_f32_f16(vreinterpret_f16_u16(narrow));
}

INLINE four NAME(quarter)(four sums)
{
    return sums;
}

/* Four floats at `from` */
INLINE four NAME(quads)(const float *from, long stride)
{
    (void)stride;
    return *(const loose_four *)from;
}

INLINE void NAME(transpose)(four *rows)
{
    transpose(rows);
}
