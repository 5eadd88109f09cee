/* Float32 rows times weights as stored, for one instruction set (SET; LANES floats a vector; tiles of OUTS x ROWS sums).
 *
 * Every sum is formed in one order whatever the number of rows: LANES partial sums, each over every LANES-th input,
 * ascending; then the lanes' sums in pairs. A few rows are multiplied with weights straight from memory. More are
 * packed first, tile by tile in the order in which they are read; a block of weights is widened into the first cache
 * in that order too, and multiplied there with all of them.
 */

#ifndef BLOCK
#define BLOCK 512 /* inputs of a widened block */
#define FEW 40    /* rows that pass through the cache so fast that two groups at a time do not pay */
#define HELD 96   /* rows whose partial sums are held at once */
#define GRAB 4    /* groups that a thread takes at a time */

/* The next group of a thread that may have those up to `until`, else of the next GRAB that nobody has; 0: none left. */
static int advance(long *group, long *until, long groups, atomic_long *next)
{
    if (++*group < *until)
        return 1;
    *group = atomic_fetch_add(next, GRAB);
    *until = least(*group + GRAB, groups);
    return *group < groups;
}

/* Where the part `index` of `parts` alike ones begins. */
static long share(long all, long index, long parts)
{
    return all * index / parts;
}
#endif

INLINE NAME(vector) NAME(load)(const float *from)
{
    return *(const NAME(loose) *)from;
}

/* `count` < LANES numbers, then zeros */
INLINE NAME(vector) NAME(widen_part)(const void *from, long count, enum kind kind)
{
    char all[4 * LANES] = {0};
    memcpy(all, from, count * (kind == FLOAT32 ? 4 : 2));
    return NAME(widen)(all, kind);
}

/* Partial sums [out][row] of `outs` outputs and `count` rows, over `depth` inputs, on top of what they are. */
INLINE void NAME(accumulate)(NAME(vector) (*sums)[ROWS], const char *weights, long weight_stride, const float *rows,
                             long row_stride, long depth, const int outs, const int count, const enum kind kind)
{
    const long size = kind == FLOAT32 ? 4 : 2;
    NAME(vector) part[OUTS][ROWS], w[OUTS];
#pragma GCC unroll 8
    for (int o = 0; o < outs; o++)
#pragma GCC unroll 8
        for (int r = 0; r < count; r++)
            part[o][r] = sums[o][r];
    long i = 0;
    for (; i + LANES <= depth; i += LANES) {
#pragma GCC unroll 8
        for (int o = 0; o < outs; o++)
            w[o] = NAME(widen)(weights + o * weight_stride + i * size, kind);
#pragma GCC unroll 8
        for (int r = 0; r < count; r++) {
            const NAME(vector) x = NAME(load)(rows + r * row_stride + i);
#pragma GCC unroll 8
            for (int o = 0; o < outs; o++)
                part[o][r] = NAME(fma)(w[o], x, part[o][r]);
        }
    }
    if (i < depth) {
#pragma GCC unroll 8
        for (int o = 0; o < outs; o++)
            w[o] = NAME(widen_part)(weights + o * weight_stride + i * size, depth - i, kind);
#pragma GCC unroll 8
        for (int r = 0; r < count; r++) {
            const NAME(vector) x = NAME(widen_part)(rows + r * row_stride + i, depth - i, FLOAT32);
#pragma GCC unroll 8
            for (int o = 0; o < outs; o++)
                part[o][r] = NAME(fma)(w[o], x, part[o][r]);
        }
    }
#pragma GCC unroll 8
    for (int o = 0; o < outs; o++)
#pragma GCC unroll 8
        for (int r = 0; r < count; r++)
            sums[o][r] = part[o][r];
}

#define ROW_CASE(n, outs, kind)                                                                                        \
    case n:                                                                                                            \
        if (n <= ROWS)                                                                                                 \
            NAME(accumulate)(sums, weights, weight_stride, rows, row_stride, depth, outs, n, kind);                    \
        break;

#define ROW_CASES(outs, kind)                                                                                          \
    switch (count) {                                                                                                   \
        ROW_CASE(1, outs, kind)                                                                                        \
        ROW_CASE(2, outs, kind)                                                                                        \
        ROW_CASE(3, outs, kind)                                                                                        \
        ROW_CASE(4, outs, kind)                                                                                        \
        ROW_CASE(5, outs, kind)                                                                                        \
        ROW_CASE(6, outs, kind)                                                                                        \
    }

#define WEIGHTS_OF(name, kind)                                                                                         \
    static void NAME(name)(NAME(vector) (*sums)[ROWS], const char *weights, long weight_stride, const float *rows,     \
                           long row_stride, long depth, int outs, int count)                                           \
    {                                                                                                                  \
        if (outs == OUTS) {                                                                                            \
            ROW_CASES(OUTS, kind)                                                                                      \
            return;                                                                                                    \
        }                                                                                                              \
        for (int o = 0; o < outs; o++, sums++, weights += weight_stride)                                               \
            ROW_CASES(1, kind)                                                                                         \
    }

WEIGHTS_OF(bfloat16s, BFLOAT16)
WEIGHTS_OF(float16s, FLOAT16)
WEIGHTS_OF(float32s, FLOAT32)

#undef WEIGHTS_OF
#undef ROW_CASES
#undef ROW_CASE

/* result[row][o] = the sum of the lanes of sums[o][row], for outs outputs and count rows */
static void NAME(finish)(NAME(vector) (*sums)[ROWS], float *result, long stride, int outs, int count)
{
    for (int r = 0; r < count; r++) {
        four lanes[4] = {0};
        for (int o = 0; o < outs; o++)
            lanes[o] = NAME(quarter)(sums[o][r]);
        transpose(lanes);
        const four sum = (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
        memcpy(result + r * stride, &sum, outs * sizeof(float));
    }
}

/* At most ROWS rows: weights straight from memory. */
static void NAME(few_rows)(const struct product *p, atomic_long *next)
{
    const long groups = (p->outputs + OUTS - 1) / OUTS, stride = p->depth * SIZES[p->kind];
    const int count = (int)p->count;
    long group = 0, until = 0;

    while (advance(&group, &until, groups, next)) {
        const long out = group * OUTS;
        const int outs = (int)least(p->outputs - out, OUTS);
        const char *weights = (const char *)p->weights + out * stride;
        NAME(vector) sums[OUTS][ROWS];
        memset(sums, 0, sizeof sums);
        if (p->kind == BFLOAT16)
            NAME(bfloat16s)(sums, weights, stride, p->rows, p->depth, p->depth, outs, count);
        else if (p->kind == FLOAT16)
            NAME(float16s)(sums, weights, stride, p->rows, p->depth, p->depth, outs, count);
        else
            NAME(float32s)(sums, weights, stride, p->rows, p->depth, p->depth, outs, count);
        NAME(finish)(sums, p->result + out, p->stride, outs, count);
    }
}

/* More rows: `packed` holds for each tile of rows, for each LANES inputs, these of each of its rows. */
static long NAME(room)(const struct product *p)
{
    return p->count <= ROWS ? 0 : p->count * ((p->depth + LANES - 1) / LANES * LANES);
}

static void NAME(pack)(const struct product *p)
{
    const long tiles = (p->count + ROWS - 1) / ROWS;
    float *to = p->packed;
    for (long tile = 0; tile < tiles; tile++) {
        const long first = share(p->count, tile, tiles), last = share(p->count, tile + 1, tiles);
        for (long i = 0; i < p->depth; i += LANES)
            for (long row = first; row < last; row++, to += LANES)
                if (i + LANES <= p->depth)
                    *(NAME(vector) *)to = NAME(load)(p->rows + row * p->depth + i);
                else
                    *(NAME(vector) *)to = NAME(widen_part)(p->rows + row * p->depth + i, p->depth - i, FLOAT32);
    }
}

/* Partial sums [out][row] of OUTS outputs and `count` rows, over LANES inputs a step, on top of what they are. */
INLINE void NAME(multiply)(NAME(vector) (*sums)[ROWS], const NAME(vector) *weights, const NAME(vector) *rows,
                           long steps, const int count)
{
    NAME(vector) part[OUTS][ROWS], w[OUTS];
#pragma GCC unroll 8
    for (int o = 0; o < OUTS; o++)
#pragma GCC unroll 8
        for (int r = 0; r < count; r++)
            part[o][r] = sums[o][r];
    for (long i = 0; i < steps; i++, weights += OUTS, rows += count) {
#pragma GCC unroll 8
        for (int o = 0; o < OUTS; o++)
            w[o] = weights[o];
#pragma GCC unroll 8
        for (int r = 0; r < count; r++)
#pragma GCC unroll 8
            for (int o = 0; o < OUTS; o++)
                part[o][r] = NAME(fma)(w[o], rows[r], part[o][r]);
    }
#pragma GCC unroll 8
    for (int o = 0; o < OUTS; o++)
#pragma GCC unroll 8
        for (int r = 0; r < count; r++)
            sums[o][r] = part[o][r];
}

#define TILE_CASE(n)                                                                                                   \
    case n:                                                                                                            \
        if (n <= ROWS)                                                                                                 \
            NAME(multiply)(sums, weights, rows, steps, n);                                                             \
        break;

static void NAME(multiply_tile)(NAME(vector) (*sums)[ROWS], const NAME(vector) *weights, const NAME(vector) *rows,
                                long steps, int count)
{
    switch (count) {
        TILE_CASE(1)
        TILE_CASE(2)
        TILE_CASE(3)
        TILE_CASE(4)
        TILE_CASE(5)
        TILE_CASE(6)
    }
}

#undef TILE_CASE

INLINE void NAME(widen_line)(NAME(vector) *to, const char *from, long count, const enum kind kind)
{
    const long size = kind == FLOAT32 ? 4 : 2;
    long i = 0;
    for (; i + LANES <= count; i += LANES, to += OUTS)
        *to = NAME(widen)(from + i * size, kind);
    if (i < count)
        *to = NAME(widen_part)(from + i * size, count - i, kind);
}

/* A block of inputs, `done` to `done + now`, of `outs` outputs from `out` on: [step][OUTS]; those that are not: zeros. */
static void NAME(widen_block)(const struct product *p, NAME(vector) *wide, long out, long outs, long done, long now)
{
    const long size = SIZES[p->kind], stride = p->depth * size;
    if (outs < OUTS)
        memset(wide, 0, (now + LANES - 1) / LANES * OUTS * sizeof *wide);
    for (long o = 0; o < outs; o++) {
        const char *from = (const char *)p->weights + (out + o) * stride + done * size;
        if (p->kind == BFLOAT16)
            NAME(widen_line)(wide + o, from, now, BFLOAT16);
        else if (p->kind == FLOAT16)
            NAME(widen_line)(wide + o, from, now, FLOAT16);
        else
            NAME(widen_line)(wide + o, from, now, FLOAT32);
    }
}

/* On their way while others are multiplied: a block of inputs of the outputs from `out` on. */
static void NAME(fetch_block)(const struct product *p, long out, long outs, long done, long now)
{
    const long size = SIZES[p->kind], stride = p->depth * size;
    for (long o = out; o < least(out + outs, p->outputs); o++)
        for (long i = 0; i < now * size; i += 64)
            __builtin_prefetch((const char *)p->weights + o * stride + done * size + i, 0, 3);
}

/* Tiles `first` to `last` times `parts` times OUTS outputs from `out` on: block by block of inputs. */
static void NAME(block_of_tiles)(const struct product *p, long out, long parts, long first, long last,
                                 NAME(vector) (*sums)[2][OUTS][ROWS], NAME(vector) (*wide)[OUTS * BLOCK / LANES])
{
    const long tiles = (p->count + ROWS - 1) / ROWS, padded = (p->depth + LANES - 1) / LANES * LANES;

    memset(sums, 0, (last - first) * sizeof sums[0]);
    for (long done = 0; done < p->depth; done += BLOCK) {
        const long now = least(p->depth - done, BLOCK), steps = (now + LANES - 1) / LANES;
        for (long part = 0; part < parts; part++)
            NAME(widen_block)(p, wide[part], out + part * OUTS, least(p->outputs - out - part * OUTS, OUTS), done, now);
        if (first == 0)
            NAME(fetch_block)(p, out + parts * OUTS, parts * OUTS, done, now);
        for (long tile = first; tile < last; tile++) {
            const long row = share(p->count, tile, tiles), count = share(p->count, tile + 1, tiles) - row;
            const float *rows = p->packed + row * padded + done * count;
            for (long part = 0; part < parts; part++)
                NAME(multiply_tile)(sums[tile - first][part], wide[part], (const NAME(vector) *)rows, steps, (int)count);
        }
    }
    for (long tile = first; tile < last; tile++) {
        const long row = share(p->count, tile, tiles), count = share(p->count, tile + 1, tiles) - row;
        for (long part = 0; part < parts; part++)
            NAME(finish)(sums[tile - first][part], p->result + row * p->stride + out + part * OUTS, p->stride,
                         (int)least(p->outputs - out - part * OUTS, OUTS), (int)count);
    }
}

static void NAME(many_rows)(const struct product *p, atomic_long *next)
{
    NAME(vector) wide[2][OUTS * BLOCK / LANES];
    NAME(vector) sums[HELD / ROWS][2][OUTS][ROWS];
    const long parts = p->count <= FEW ? 1 : 2, size = parts * OUTS, groups = (p->outputs + size - 1) / size;
    const long tiles = (p->count + ROWS - 1) / ROWS, turns = (tiles + HELD / ROWS - 1) / (HELD / ROWS);
    long group = 0, until = 0;

    while (advance(&group, &until, groups, next)) {
        const long out = group * size, here = out + OUTS < p->outputs ? parts : 1;
        for (long turn = 0; turn < turns; turn++)
            NAME(block_of_tiles)(p, out, here, share(tiles, turn, turns), share(tiles, turn + 1, turns), sums, wide);
    }
}

static void NAME(times)(const struct product *p, atomic_long *next)
{
    if (p->count <= ROWS)
        NAME(few_rows)(p, next);
    else
        NAME(many_rows)(p, next);
}
