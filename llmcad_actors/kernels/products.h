/* Float32 rows times stored weights, for one instruction set (SET; LANES floats a vector; tiles of OUTS x ROWS sums).
 *
 * Every sum is formed in one order whatever the number of rows: LANES partial sums, to which inputs are added a STEP at
 * a time, in two halves; then the lanes' sums in pairs. Of bfloat16 weights the even ones of a STEP are its first half,
 * and the odd ones its second: in a word of 32 bits, one shifted up, and the other with the rest masked off, are float32
 * already.
 *
 * Rows are packed first, in tiles of at most ROWS, in the order in which they are read. The first tile is multiplied
 * with weights straight from memory; if there are more, it leaves them, widened, in the first cache for the others.
 */

#ifndef BLOCK
#define BLOCK 640 /* inputs of a widened block */
#define FEW 40    /* rows that pass through the cache so fast that two groups at a time do not pay */
#define HELD 192  /* rows whose partial sums are held at once */
#define GRAB 4    /* groups that a thread takes at a time */

#define KEPT ((enum kind)(FLOAT32 + 1)) /* weights that are widened already */

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define UPPER 1 /* the half that upper halves of words belong to */
#else
#define UPPER 0
#endif

/* The next group of a thread that may have those up to `until`, else of the next GRAB that nobody has; 0: none left. */
static int advance(long *group, long *until, long groups, atomic_long *next)
{
    if (++*group < *until)
        return 1;
    *group = atomic_fetch_add(next, GRAB);
    *until = least(*group + GRAB, groups);
    return *group < groups;
}
#endif

#define STEP (2 * LANES) /* inputs at a time */

typedef uint32_t NAME(words) __attribute__((vector_size(4 * LANES)));
typedef uint32_t NAME(loose_words) __attribute__((vector_size(4 * LANES), aligned(1), may_alias));

INLINE NAME(vector) NAME(load)(const float *from)
{
    return *(const NAME(loose) *)from;
}

/* `count` < LANES floats, then zeros */
INLINE NAME(vector) NAME(load_part)(const float *from, long count)
{
    float all[LANES] = {0};
    memcpy(all, from, count * sizeof *from);
    return NAME(load)(all);
}

/* Half of STEP weights, as float32 */
INLINE NAME(vector) NAME(half)(const char *from, const int half, const enum kind kind)
{
    if (kind == BFLOAT16) {
        const NAME(words) both = *(const NAME(loose_words) *)from;
        return (NAME(vector))(half == UPPER ? both & 0xffff0000u : both << 16);
    }
    return NAME(widen)(from + half * LANES * (kind == FLOAT16 ? 2 : 4), kind);
}

/* The tiles of the rows: `larger` ones of rows + 1, then of `rows`. */
struct NAME(tiles) {
    long count, rows, larger;
};

static struct NAME(tiles) NAME(tiles_of)(const struct product *p)
{
    const long count = (p->count + ROWS - 1) / ROWS;
    return (struct NAME(tiles)){count, p->count / count, p->count % count};
}

INLINE long NAME(first_row)(const struct NAME(tiles) *tiles, long tile)
{
    return tile * tiles->rows + least(tile, tiles->larger);
}

INLINE long NAME(padded)(long inputs)
{
    return (inputs + STEP - 1) / STEP * STEP;
}

static long NAME(room)(const struct product *p)
{
    return p->count * NAME(padded)(p->depth);
}

/* STEP inputs in two halves, as their weights are */
static void NAME(pack_step)(float *to, const float *from, long row_step, enum kind kind)
{
    if (kind == BFLOAT16)
        for (int i = 0; i < LANES; i++)
            to[i] = from[2 * i], to[row_step + i] = from[2 * i + 1];
    else
        for (int i = 0; i < LANES; i++)
            to[i] = from[i], to[row_step + i] = from[LANES + i];
}

/* Inputs `done` to `done + now` of rows `first` to `first + count`, a tile */
static float *NAME(pack_tile)(const struct product *p, float *to, long first, long count, long done, long now)
{
    for (long i = 0; i < now; i += STEP, to += count * STEP)
        for (long row = 0; row < count; row++) {
            const float *from = p->rows + (first + row) * p->depth + done + i;
            float rest[STEP] = {0};
            if (i + STEP > now)
                from = memcpy(rest, from, (now - i) * sizeof *rest);
            NAME(pack_step)(to + row * LANES, from, count * LANES, (enum kind)p->kind);
        }
    return to;
}

/* `packed` holds for each block of inputs, for each tile, for each half of a STEP, the inputs of each of its rows; and
 * zeros after the last ones. */
static void NAME(pack)(const struct product *p)
{
    const struct NAME(tiles) tiles = NAME(tiles_of)(p);
    float *to = p->packed;
    for (long done = 0; done < p->depth; done += BLOCK)
        for (long tile = 0; tile < tiles.count; tile++) {
            const long first = NAME(first_row)(&tiles, tile), count = NAME(first_row)(&tiles, tile + 1) - first;
            to = NAME(pack_tile)(p, to, first, count, done, least(p->depth - done, BLOCK));
        }
}

/* One STEP on top of `part` [out][row]: weights of output o at from[o] + at, or in `wide` [half][out] if they are KEPT;
 * `keep`: they are left there. */
INLINE void NAME(add_step)(NAME(vector) (*part)[ROWS], const char *const *from, long at, NAME(vector) *wide,
                           const NAME(vector) *rows, const int outs, const int count, const enum kind kind,
                           const int keep)
{
    NAME(vector) x[ROWS];
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
#pragma GCC unroll 8
        for (int r = 0; r < count; r++) {
            x[r] = rows[half * count + r];
            IN_REGISTER(x[r]);
        }
#pragma GCC unroll 8
        for (int o = 0; o < outs; o++) {
            NAME(vector) w = kind == KEPT ? wide[half * outs + o] : NAME(half)(from[o] + at, half, kind);
            if (keep)
                wide[half * outs + o] = w;
#pragma GCC unroll 8
            for (int r = 0; r < count; r++)
                part[o][r] = NAME(fma)(w, x[r], part[o][r]);
        }
    }
}

/* Partial sums [out][row] over `depth` inputs, on top of what they are: `rows` packed, the rest as above. */
INLINE void NAME(multiply)(NAME(vector) (*sums)[ROWS], const char *const *from, NAME(vector) *wide,
                           const NAME(vector) *rows, long depth, const int outs, const int count, const enum kind kind,
                           const int keep)
{
    const long size = kind == FLOAT32 ? 4 : 2;
    NAME(vector) part[2 * OUTS][ROWS];
    long i = 0;
#pragma GCC unroll 8
    for (int o = 0; o < outs; o++)
#pragma GCC unroll 8
        for (int r = 0; r < count; r++)
            part[o][r] = sums[o][r];
    for (; kind == KEPT ? i < depth : i + STEP <= depth; i += STEP, rows += 2 * count, wide += 2 * outs)
        NAME(add_step)(part, from, i * size, wide, rows, outs, count, kind, keep);
    if (i < depth) {
        char rest[2 * OUTS][4 * STEP];
        const char *rests[2 * OUTS];
        memset(rest, 0, sizeof rest);
        for (int o = 0; o < outs; o++)
            rests[o] = memcpy(rest[o], from[o] + i * size, (depth - i) * size);
        NAME(add_step)(part, rests, 0, wide, rows, outs, count, kind, keep);
    }
#pragma GCC unroll 8
    for (int o = 0; o < outs; o++)
#pragma GCC unroll 8
        for (int r = 0; r < count; r++)
            sums[o][r] = part[o][r];
}

#define ROW_CASE(n, outs, kind, keep)                                                                                  \
    case n:                                                                                                            \
        if (n * outs <= ROWS * OUTS)                                                                                   \
            NAME(multiply)(sums, from, wide, rows, depth, outs, n, kind, keep);                                        \
        break;

#define MULTIPLICATION(name, outs, kind, keep)                                                                         \
    static void NAME(name)(NAME(vector) (*sums)[ROWS], const char *const *from, NAME(vector) *wide,                    \
                           const NAME(vector) *rows, long depth, long count)                                           \
    {                                                                                                                  \
        switch (count) {                                                                                               \
            ROW_CASE(1, outs, kind, keep)                                                                              \
            ROW_CASE(2, outs, kind, keep)                                                                              \
            ROW_CASE(3, outs, kind, keep)                                                                              \
            ROW_CASE(4, outs, kind, keep)                                                                              \
            ROW_CASE(5, outs, kind, keep)                                                                              \
            ROW_CASE(6, outs, kind, keep)                                                                              \
        }                                                                                                              \
    }

#define MULTIPLICATIONS(name, kind)                                                                                    \
    MULTIPLICATION(name, OUTS, kind, 0)                                                                                \
    MULTIPLICATION(name##_for_few, 2 * OUTS, kind, 0)                                                                  \
    MULTIPLICATION(name##_kept, OUTS, kind, 1)

MULTIPLICATIONS(bfloat16s, BFLOAT16)
MULTIPLICATIONS(float16s, FLOAT16)
MULTIPLICATIONS(float32s, FLOAT32)
MULTIPLICATION(kept, OUTS, KEPT, 0)

#undef MULTIPLICATIONS
#undef MULTIPLICATION
#undef ROW_CASE

typedef void NAME(multiplication)(NAME(vector) (*sums)[ROWS], const char *const *from, NAME(vector) *wide,
                                  const NAME(vector) *rows, long depth, long count);

/* Where the weights of outputs `out` and on begin; beyond the last one: its own. */
static void NAME(find)(const struct product *p, const char **from, long out, long outs)
{
    for (long o = 0; o < outs; o++)
        from[o] = (const char *)p->weights + least(out + o, p->outputs - 1) * p->depth * SIZES[p->kind];
}

/* The sums of the lanes of sums[out][row] become results from `out` on. */
static void NAME(finish)(NAME(vector) (*sums)[ROWS], const struct product *p, long out, long row, long count)
{
    const long outs = least(p->outputs - out, OUTS);
    float *result = p->result + row * p->stride + out;
    for (long r = 0; r < count; r++, result += p->stride) {
        four lanes[4] = {0};
#pragma GCC unroll 8
        for (int o = 0; o < OUTS; o++)
            lanes[o] = NAME(quarter)(sums[o][r]);
        transpose(lanes);
        const four sum = (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
        if (outs == OUTS)
            memcpy(result, &sum, OUTS * sizeof(float));
        else
            memcpy(result, &sum, outs * sizeof(float));
    }
}

/* One tile: `outs` outputs at a time, OUTS or twice that. */
static void NAME(one_tile)(const struct product *p, atomic_long *next, long outs, NAME(multiplication) *multiply)
{
    const long groups = (p->outputs + outs - 1) / outs;
    long group = 0, until = 0;

    while (advance(&group, &until, groups, next)) {
        const long out = group * outs;
        const char *from[2 * OUTS];
        NAME(vector) sums[2 * OUTS][ROWS];
        NAME(find)(p, from, out, outs);
        memset(sums, 0, sizeof sums);
        multiply(sums, from, NULL, (const NAME(vector) *)p->packed, p->depth, p->count);
        for (long part = 0; part < outs && out + part < p->outputs; part += OUTS)
            NAME(finish)(sums + part, p, out + part, 0, p->count);
    }
}

/* Brings `bytes` of weights into the second cache, but none from `end` on. Returns where to go on. */
INLINE const char *NAME(fetch)(const char *from, const char *end, long bytes)
{
    for (long i = 0; i < bytes && from < end; i += 64, from += 64)
        __builtin_prefetch(from, 0, 2);
    return from;
}

/* Tiles `begin` to `end` times `parts` times OUTS outputs from `out` on: block by block of inputs. */
static void NAME(block_of_tiles)(const struct product *p, const struct NAME(tiles) *tiles, long out, long parts,
                                 long begin, long end, NAME(multiplication) *multiply)
{
    NAME(vector) wide[2][OUTS * BLOCK / LANES], sums[HELD / ROWS][2][OUTS][ROWS];
    const long size = SIZES[p->kind];
    const char *from[2][OUTS];
    /* Weights of the next outputs are fetched meanwhile, some before every tile: all at once would hold up rows. */
    const long line = p->depth * size, here = least(parts * OUTS, p->outputs - out) * line;
    const char *ahead = (const char *)p->weights + out * line + here;
    const char *const last = begin ? ahead : ahead + least(here, (p->outputs - out) * line - here);
    const long blocks = most((p->depth + BLOCK - 1) / BLOCK, 1), some = here / (blocks * (end - begin)) / 64 * 64 + 64;

    memset(sums, 0, (end - begin) * sizeof sums[0]);
    for (long part = 0; part < parts; part++)
        NAME(find)(p, from[part], out + part * OUTS, OUTS);
    for (long done = 0; done < p->depth; done += BLOCK) {
        const long now = least(p->depth - done, BLOCK), padded = NAME(padded)(now);
        const float *rows = p->packed + p->count * done;
        for (long tile = begin; tile < end; tile++) {
            const long row = NAME(first_row)(tiles, tile), count = NAME(first_row)(tiles, tile + 1) - row;
            ahead = NAME(fetch)(ahead, last, some);
            for (long part = 0; part < parts; part++)
                (tile == begin ? multiply : NAME(kept))(sums[tile - begin][part], from[part], wide[part],
                                                        (const NAME(vector) *)(rows + row * padded), now, count);
        }
        for (long part = 0; part < parts; part++)
            for (int o = 0; o < OUTS; o++)
                from[part][o] += now * size;
    }
    for (long tile = begin; tile < end; tile++) {
        const long row = NAME(first_row)(tiles, tile), count = NAME(first_row)(tiles, tile + 1) - row;
        for (long part = 0; part < parts; part++)
            NAME(finish)(sums[tile - begin][part], p, out + part * OUTS, row, count);
    }
}

static void NAME(many_tiles)(const struct product *p, atomic_long *next, NAME(multiplication) *multiply)
{
    const struct NAME(tiles) tiles = NAME(tiles_of)(p);
    const long parts = p->count <= FEW ? 1 : 2, size = parts * OUTS, groups = (p->outputs + size - 1) / size;
    const long turns = (tiles.count + HELD / ROWS - 1) / (HELD / ROWS);
    long group = 0, until = 0;

    while (advance(&group, &until, groups, next)) {
        const long out = group * size, here = out + OUTS < p->outputs ? parts : 1;
        for (long turn = 0; turn < turns; turn++)
            NAME(block_of_tiles)(p, &tiles, out, here, tiles.count * turn / turns, tiles.count * (turn + 1) / turns,
                                 multiply);
    }
}

static void NAME(times)(const struct product *p, atomic_long *next)
{
    static NAME(multiplication) *const ALL[][3] = {
        {NAME(bfloat16s_for_few), NAME(bfloat16s), NAME(bfloat16s_kept)},
        {NAME(float16s_for_few), NAME(float16s), NAME(float16s_kept)},
        {NAME(float32s_for_few), NAME(float32s), NAME(float32s_kept)},
    };
    if (p->count <= ROWS / 2)
        NAME(one_tile)(p, next, 2 * OUTS, ALL[p->kind][0]);
    else if (p->count <= ROWS)
        NAME(one_tile)(p, next, OUTS, ALL[p->kind][1]);
    else
        NAME(many_tiles)(p, next, ALL[p->kind][2]);
}

#undef STEP
