/* x86 with AVX2, FMA and F16C: vectors of eight floats. */

#define LANES 8
#define ROWS 3
#define OUTS 4
#define WIDTH 2
#define IN_REGISTER(value) __asm__("" : "+x"(value)) /* where gcc would read it from memory for each use */

typedef float NAME(vector) __attribute__((vector_size(32)));
typedef float NAME(loose) __attribute__((vector_size(32), aligned(4), may_alias));

INLINE NAME(vector) NAME(fma)(NAME(vector) a, NAME(vector) b, NAME(vector) c)
{
    return (NAME(vector))_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

INLINE NAME(vector) NAME(widen)(const void *from, enum kind kind)
{
    if (kind == FLOAT32)
        return (NAME(vector))_mm256_castsi256_ps(_mm256_loadu_si256((const __m256i *)from));
    const __m128i narrow = _mm_loadu_si128((const __m128i *)from);
    if (kind == BFLOAT16)
        return (NAME(vector))_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
    return (NAME(vector))_mm256_cvtph_ps(narrow);
}

INLINE four NAME(quarter)(NAME(vector) sums)
{
    return (four)_mm_add_ps(_mm256_castps256_ps128((__m256)sums), _mm256_extractf128_ps((__m256)sums, 1));
}

/* Twice four floats, `stride` apart */
INLINE NAME(vector) NAME(quads)(const float *from, long stride)
{
    return (NAME(vector))_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from)), _mm_loadu_ps(from + stride), 1);
}

/* Of every quarter its columns become rows. */
INLINE void NAME(transpose)(NAME(vector) *rows)
{
    const __m256 a = _mm256_unpacklo_ps((__m256)rows[0], (__m256)rows[1]);
    const __m256 b = _mm256_unpacklo_ps((__m256)rows[2], (__m256)rows[3]);
    const __m256 c = _mm256_unpackhi_ps((__m256)rows[0], (__m256)rows[1]);
    const __m256 d = _mm256_unpackhi_ps((__m256)rows[2], (__m256)rows[3]);
    rows[0] = (NAME(vector))_mm256_shuffle_ps(a, b, 0x44);
    rows[1] = (NAME(vector))_mm256_shuffle_ps(a, b, 0xee);
    rows[2] = (NAME(vector))_mm256_shuffle_ps(c, d, 0x44);
    rows[3] = (NAME(vector))_mm256_shuffle_ps(c, d, 0xee);
}
