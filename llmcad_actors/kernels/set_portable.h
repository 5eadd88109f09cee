/* Vectors of four floats in plain C: multiplied and added in two steps, each rounded. */

#define LANES 4
#if defined(__x86_64__) /* 16 registers */
#define ROWS 2
#else
#define ROWS 4
#endif
#define OUTS 4
#define WIDTH 4
#define IN_REGISTER(value)

typedef four NAME(vector);
typedef loose_four NAME(loose);

INLINE four NAME(fma)(four a, four b, four c)
{
    return a * b + c;
}

INLINE float NAME(of_half)(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    uint32_t bits = sign | (rest << 13);
    float value;
    if (rest >= 0x7c00)
        bits += (uint32_t)(255 - 31) << 23;
    else if (rest >= 0x0400)
        bits += (uint32_t)(127 - 15) << 23;
    else { /* subnormal: a whole number of 2^-24 */
        value = (float)rest * 0x1p-24f;
        return sign ? -value : value;
    }
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE four NAME(widen)(const void *from, enum kind kind)
{
    four wide;
    if (kind == FLOAT32) {
        memcpy(&wide, from, sizeof wide);
        return wide;
    }
    uint16_t narrow[4];
    memcpy(narrow, from, sizeof narrow);
    if (kind == BFLOAT16) {
        uint32_t bits[4];
        for (int i = 0; i < 4; i++)
            bits[i] = (uint32_t)narrow[i] << 16;
        memcpy(&wide, bits, sizeof wide);
    } else
        for (int i = 0; i < 4; i++)
            wide[i] = NAME(of_half)(narrow[i]);
    return wide;
}

/* Sums that come next to each other: first half plus second half, until there are four. */
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
