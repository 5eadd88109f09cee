/* Rows in float32 times a matrix of weights that are stored in 16 bits, for CPUs without instructions for those.
 *
 * A matrix library wants the weights in float32 first: written out and read again, they cost more than the products
 * of the few rows of a token tree. Here a block of OUTS x DEPTH weights is widened into the first cache and multiplied
 * there with all rows, sixteen at a time, in twelve vector registers of sums. Each sum is formed in the same order
 * whatever the number of rows, so a row's result does not depend on the rows beside it.
 */

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx2,fma,f16c")
#endif

#define OUTS 6    /* outputs at a time: 6 x 16 sums are 12 registers of 8 */
#define PANEL 16  /* rows at a time */
#define DEPTH 256 /* inputs at a time: a panel's are 16 KiB, the widened weights 6 KiB */
#define GRAB 8    /* groups of outputs that a thread takes at a time */
#define BLOCK 32  /* panels whose sums are held at once */
#define LINES 4   /* of one row: outputs at a time, so many streams of weights from memory */
#define STRIDE 16 /* of one row: inputs at a time, two to a word */

typedef float vector __attribute__((vector_size(32)));
typedef float loose_vector __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(32)));
typedef uint32_t loose_words __attribute__((vector_size(32), aligned(2), may_alias));

enum kind { BFLOAT16, FLOAT16 };

static void widen(float *to, const uint16_t *from, long count, enum kind kind)
{
    long i = 0;
    if (kind == BFLOAT16) {
        for (; i < count; i++) {
            uint32_t bits = (uint32_t)from[i] << 16;
            memcpy(to + i, &bits, sizeof bits);
        }
        return;
    }
#if defined(__x86_64__)
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
    for (; i < count; i++)
        to[i] = _cvtsh_ss(from[i]);
#elif defined(__aarch64__)
    for (; i < count; i++) {
        __fp16 half;
        memcpy(&half, from + i, sizeof half);
        to[i] = half;
    }
#endif
}

/* sums[OUTS][PANEL] += weights[OUTS][depth] times rows[depth][PANEL] */
static inline void multiply(float (*sums)[PANEL], float (*weights)[DEPTH], const float *rows, long depth)
{
    vector part[OUTS][2] = {0};
    for (long i = 0; i < depth; i++) {
        const vector low = *(const vector *)(rows + i * PANEL), high = *(const vector *)(rows + i * PANEL + 8);
#pragma GCC unroll 6
        for (int o = 0; o < OUTS; o++) {
            part[o][0] += weights[o][i] * low;
            part[o][1] += weights[o][i] * high;
        }
    }
#pragma GCC unroll 6
    for (int o = 0; o < OUTS; o++) {
        *(vector *)sums[o] += part[o][0];
        *(vector *)(sums[o] + 8) += part[o][1];
    }
}

/* rows [count][depth] -> packed [panels][depth][PANEL], the last panel filled up with zeros */
void llmcad_pack(const float *rows, float *packed, long count, long depth)
{
    for (long first = 0; first < count; first += PANEL, packed += depth * PANEL) {
        const long filled = count - first < PANEL ? count - first : PANEL;
        for (long i = 0; i < depth; i++)
            for (long r = 0; r < PANEL; r++)
                packed[i * PANEL + r] = r < filled ? rows[(first + r) * depth + i] : 0;
    }
}

/* The next group of a thread that may have those up to `until`, else of the next GRAB that nobody has; 0: none is left. */
static int advance(long *group, long *until, long groups, atomic_long *next)
{
    if (++*group < *until)
        return 1;
    *group = atomic_fetch_add(next, GRAB);
    *until = *group + GRAB < groups ? *group + GRAB : groups;
    return *group < groups;
}

/* Groups of outputs, taken from `next` until there are none: called by several threads at once.
 * packed: 64-byte aligned; weights [outputs][depth], any alignment; result [count][outputs]. */
void llmcad_times(const float *packed, const uint16_t *weights, float *result, long count, long outputs, long depth,
                  int kind, atomic_long *next)
{
    float wide[OUTS][DEPTH] __attribute__((aligned(64))) = {{0}};
    float sums[BLOCK][OUTS][PANEL] __attribute__((aligned(64)));
    const long panels = (count + PANEL - 1) / PANEL, groups = (outputs + OUTS - 1) / OUTS;
    long group = 0, until = 0;

    while (advance(&group, &until, groups, next)) {
        const long out = group * OUTS, outs = outputs - out < OUTS ? outputs - out : OUTS;
        for (long block = 0; block < panels; block += BLOCK) {
            const long held = panels - block < BLOCK ? panels - block : BLOCK;
            memset(sums, 0, held * sizeof sums[0]);
            for (long done = 0; done < depth; done += DEPTH) {
                const long now = depth - done < DEPTH ? depth - done : DEPTH;
                for (long o = 0; o < outs; o++) {
                    const uint16_t *from = weights + (out + o) * depth + done;
                    widen(wide[o], from, now, (enum kind)kind);
                    if (group + 1 < groups && out + OUTS + o < outputs) /* on their way while these are multiplied */
                        for (long i = 0; i < now; i += 32)
                            __builtin_prefetch(from + OUTS * depth + i, 0, 2);
                }
                for (long p = 0; p < held; p++)
                    multiply(sums[p], wide, packed + ((block + p) * depth + done) * PANEL, now);
            }
            for (long p = 0; p < held; p++)
                for (long r = 0, row = (block + p) * PANEL; r < PANEL && row < count; r++, row++)
                    for (long o = 0; o < outs; o++)
                        result[row * outputs + out + o] = sums[p][o][r];
        }
    }
}

static inline float total(vector sums)
{
    float all = 0;
    for (int i = 0; i < 8; i++)
        all += sums[i];
    return all;
}

/* One row times bf16 weights [outputs][depth]: bound by memory. Outputs are taken from `next`, as above.
 * row: of every 16 inputs the eight even ones and then the eight odd ones; the rest in order. A 32-bit word holds two
 * weights: the even one shifted up, and the odd one with the other masked off, are float32 already. */
void llmcad_row(const float *row, const uint16_t *weights, float *result, long outputs, long depth, atomic_long *next)
{
    const long whole = depth / STRIDE * STRIDE, groups = (outputs + LINES - 1) / LINES;
    long group = 0, until = 0;

    while (advance(&group, &until, groups, next)) {
        const long out = group * LINES, lines = outputs - out < LINES ? outputs - out : LINES;
        const uint16_t *from[LINES];
        vector even[LINES] = {0}, odd[LINES] = {0};
        for (long o = 0; o < LINES; o++)
            from[o] = weights + (out + (o < lines ? o : 0)) * depth; /* where there are fewer: the first once more */
        for (long i = 0; i < whole; i += STRIDE) {
            const vector low = *(const loose_vector *)(row + i), high = *(const loose_vector *)(row + i + 8);
#pragma GCC unroll 4
            for (int o = 0; o < LINES; o++) {
                const words pairs = *(const loose_words *)(from[o] + i);
                even[o] += (vector)(pairs << 16) * low;
                odd[o] += (vector)(pairs & 0xffff0000u) * high;
            }
        }
        for (long o = 0; o < lines; o++) {
            float sum = total(even[o] + odd[o]);
            for (long i = whole; i < depth; i++) {
                float weight;
                widen(&weight, from[o] + i, 1, BFLOAT16);
                sum += weight * row[i];
            }
            result[out + o] = sum;
        }
    }
}
