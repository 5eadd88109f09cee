/* What the kernels offer, whatever the instruction set. */

#ifndef LLMCAD_KERNELS_H
#define LLMCAD_KERNELS_H

#include <stdatomic.h>
#include <stdint.h>

enum set { PORTABLE, AVX2, AVX512, AMX, NEON, SETS }; /* of instructions, slow ones first */
enum kind { BFLOAT16, FLOAT16, FLOAT32 };        /* of stored weights */

/* Rows in float32 times weights as stored: result[row][out] = sum over i of weights[out][i] * rows[row][i].
 * Weights may lie at any address; rows and result as floats do. */
struct product {
    const float *rows;   /* [count][depth] */
    const void *weights; /* [outputs][depth] */
    float *packed;       /* room for llmcad_room() floats, 64-byte aligned, that llmcad_pack has filled */
    float *result;       /* [count][outputs], rows `stride` floats apart */
    long count, outputs, depth, stride;
    long kind; /* enum kind */
};

/* Attention in float32. Strides are in floats; the last dimension of everything is dense. Heads share keys in groups
 * of heads / kv_heads. What a row sees: its runs of columns, ascending, at least one and none of them empty. */
struct attention {
    const float *queries, *keys, *values; /* [heads][rows][width], [kv_heads][columns][width] twice */
    const float *bias;                    /* added to the scores, [heads][rows][columns]; or none */
    const int32_t *first_run;             /* [rows + 1]: a row's runs are first_run[row] to first_run[row + 1] */
    const int32_t *runs;                  /* [runs][2]: from this column, to before that one */
    float *result;                        /* [rows][heads][width], dense */
    long heads, kv_heads, rows, columns, width;
    long query_head, query_row, key_head, key_row, value_head, value_row, bias_head, bias_row;
    float scale, softcap; /* scores * scale, then softcap * tanh(scores / softcap) unless it is 0 */
};

long llmcad_room(int set, const struct product *product); /* 0: rows need no packing */
void llmcad_pack(int set, const struct product *product);

/* Both take pieces of the work from `next` until there are none: called by several threads at once with one `next`. */
void llmcad_times(int set, const struct product *product, atomic_long *next);
int llmcad_attend(int set, const struct attention *attention, atomic_long *next); /* 0, or -1: no memory */

/* The runs of columns where an additive mask is 0. Returns how many there are, and writes the first `room` of them. */
long llmcad_runs(const float *mask, long row_stride, long rows, long columns, int32_t *first_run, int32_t *runs,
                 long room);

int llmcad_has(int set); /* whether this machine has the instructions, and this build the kernels */

#endif
