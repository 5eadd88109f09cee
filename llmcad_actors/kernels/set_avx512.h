/* x86 with AVX-512 (F, DQ, BW, VL): vectors of sixteen floats. */

#define LANES 16
#define ROWS 6
#define OUTS 4
#define WIDTH 4
#define IN_REGISTER(value)

typedef float NAME(vector) __attribute__((vector_size(64)));
typedef float NAME(loose) __attribute__((vector_size(64), aligned(4), may_alias));

INLINE NAME(vector) NAME(fma)(NAME(vector) a, NAME(vector) b, NAME(vector) c)
{
    return (NAME(vector))_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

INLINE NAME(vector) NAME(widen)(const void *from, enum kind kind)
{
    if (kind == FLOAT32)
        return (NAME(vector))_mm512_castsi512_ps(_mm512_loadu_si512(from));
    const __m256i narrow = _mm256_loadu_si256((const __m256i *)from);
    if (kind == BFLOAT16)
        return (NAME(vector))_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
    return (NAME(vector))_mm512_cvtph_ps(narrow);
}

INLINE four NAME(quarter)(NAME(vector) sums)
{
    const __m512 all = (__m512)sums;
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return (four)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* Four times four floats, `stride` apart */
INLINE NAME(vector) NAME(quads)(const float *from, long stride)
{
    __m512 quads = _mm512_castps128_ps512(_mm_loadu_ps(from));
    quads = _mm512_insertf32x4(quads, _mm_loadu_ps(from + stride), 1);
    quads = _mm512_insertf32x4(quads, _mm_loadu_ps(from + 2 * stride), 2);
    return (NAME(vector))_mm512_insertf32x4(quads, _mm_loadu_ps(from + 3 * stride), 3);
}

/* Of every quarter its columns become rows. */
INLINE void NAME(transpose)(NAME(vector) *rows)
{
    const __m512 a = _mm512_unpacklo_ps((__m512)rows[0], (__m512)rows[1]);
    const __m512 b = _mm512_unpacklo_ps((__m512)rows[2], (__m512)rows[3]);
    const __m512 c = _mm512_unpackhi_ps((__m512)rows[0], (__m512)rows[1]);
    const __m512 d = _mm512_unpackhi_ps((__m512)rows[2], (__m512)rows[3]);
    rows[0] = (NAME(vector))_mm512_shuffle_ps(a, b, 0x44);
    rows[1] = (NAME(vector))_mm512_shuffle_ps(a, b, 0xee);
    rows[2] = (NAME(vector))_mm512_shuffle_ps(c, d, 0x44);
    rows[3] = (NAME(vector))_mm512_shuffle_ps(c, d, 0xee);
}
