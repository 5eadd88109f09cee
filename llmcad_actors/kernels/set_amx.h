/* x86 with AMX, for bfloat16 weights; everything else is done by another set, OTHER.
 *
 * A tile of weights, 16 outputs x 32 inputs, is loaded as it is stored. Rows are split once into three bfloat16
 * numbers each, whose sum they are, and lie in tiles of 32 inputs x up to 16 rows. For every 32 inputs a tile of
 * products is added to the sums of the high parts, and two, low and middle, to those of the rest; the end adds both.
 * So sums are formed in one order whatever the number of rows.
 *
 * Tiles take numbers too small for a full mantissa as 0, and lower parts make infinity times them no number. Results
 * that this may have touched are computed anew without them: those that are not finite, and those so small beside the
 * largest number of their row that 2^-126 for every product (with weights up to 2^15) could be seen in them.
 */

#define TALL 16         /* outputs, or rows, of a tile */
#define DEEP 32         /* inputs of a tile */
#define PARTS 3         /* of a number */
#define PAIR (2 * TALL) /* outputs multiplied at a time */
#define HELD_GROUPS 16  /* groups of rows whose partial sums are held at once */

typedef float NAME(tile)[TALL][TALL];

/* Where the part `index` of `parts` alike ones begins. */
static long NAME(share)(long all, long index, long parts)
{
    return all * index / parts;
}

/* How rows are packed: in `groups` of `width` rows, those that are not there zeros. */
struct NAME(layout) {
    long groups, width, steps; /* each of DEEP inputs */
    float *least;              /* [count]: smaller results, but for 0, are not to be trusted */
    uint32_t *pairs;           /* [group][step][part][DEEP / 2][width] of bfloat16 */
};

static int NAME(fits)(const struct product *p)
{
    return p->kind == BFLOAT16 && p->count > 0;
}

static struct NAME(layout) NAME(layout_of)(const struct product *p)
{
    struct NAME(layout) l = {.groups = (p->count + TALL - 1) / TALL, .steps = (p->depth + DEEP - 1) / DEEP};
    l.width = (p->count + l.groups - 1) / l.groups;
    l.least = p->packed;
    l.pairs = (uint32_t *)(p->packed + (p->count + 15) / 16 * 16);
    return l;
}

static uint32_t *NAME(pairs_of)(const struct NAME(layout) *l, long group, long step)
{
    return l->pairs + (group * l->steps + step) * PARTS * DEEP / 2 * l->width;
}

static long NAME(room)(const struct product *p)
{
    if (!NAME(fits)(p))
        return OTHER(room)(p);
    const struct NAME(layout) l = NAME(layout_of)(p);
    return (p->count + 15) / 16 * 16 + l.groups * l.steps * PARTS * DEEP / 2 * l.width;
}

INLINE uint32_t NAME(bits)(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float NAME(value)(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The nearest bfloat16, of two the even one, in the upper half; the next one to 0 where that would be infinity. */
INLINE uint32_t NAME(rounded)(uint32_t bits)
{
    const uint32_t up = (bits & 0x7fffffff) >= 0x7f7f8000 ? 0 : 0x7fff + (bits >> 16 & 1);
    return (bits + up) & 0xffff0000;
}

/* The parts of DEEP numbers. Returns the bits of the largest of their sizes and `largest`. */
static uint32_t NAME(split)(uint16_t (*parts)[DEEP], const float *from, uint32_t largest)
{
    for (int i = 0; i < DEEP; i++) {
        const uint32_t size = NAME(bits)(from[i]) & 0x7fffffff;
        const uint32_t high = NAME(rounded)(NAME(bits)(from[i]));
        const float rest = from[i] - NAME(value)(high);
        const uint32_t middle = NAME(rounded)(NAME(bits)(rest));
        const uint32_t low = NAME(rounded)(NAME(bits)(rest - NAME(value)(middle)));
        parts[0][i] = (uint16_t)(high >> 16);
        parts[1][i] = (uint16_t)(middle >> 16);
        parts[2][i] = (uint16_t)(low >> 16);
        largest = size > largest ? size : largest;
    }
    return largest;
}

/* A row becomes a column of its group. Returns the least result to be trusted. */
static float NAME(pack_row)(const struct NAME(layout) *l, const float *row, long depth, long group, long column)
{
    uint32_t largest = 0;
    for (long step = 0; step < l->steps; step++) {
        const long here = least(depth - step * DEEP, DEEP);
        float all[DEEP] = {0};
        uint16_t parts[PARTS][DEEP];
        uint32_t pairs[PARTS * DEEP / 2], *to = NAME(pairs_of)(l, group, step) + column;
        memcpy(all, row + step * DEEP, here * sizeof *all);
        largest = NAME(split)(parts, all, largest);
        memcpy(pairs, parts, sizeof pairs);
        for (int i = 0; i < PARTS * DEEP / 2; i++, to += l->width)
            *to = pairs[i];
    }
    const float size = NAME(value)(largest);
    return size == 0 ? 0 : 0x1p-60f * (size < 1 ? 1 : size);
}

static void NAME(pack)(const struct product *p)
{
    if (!NAME(fits)(p)) {
        OTHER(pack)(p);
        return;
    }
    const struct NAME(layout) l = NAME(layout_of)(p);
    if (l.groups * l.width > p->count)
        memset(NAME(pairs_of)(&l, l.groups - 1, 0), 0, l.steps * PARTS * DEEP / 2 * l.width * sizeof *l.pairs);
    for (long row = 0; row < p->count; row++)
        l.least[row] = NAME(pack_row)(&l, p->rows + row * p->depth, p->depth, row / l.width, row % l.width);
}

/* PAIR outputs and DEEP inputs, in full: as they lie if all are there, else a copy, with zeros. Sets the stride. */
INLINE const char *NAME(weights_at)(const struct product *p, long out, long step, char (*copy)[2 * DEEP], long *stride)
{
    const long outs = least(p->outputs - out, PAIR), inputs = least(p->depth - step * DEEP, DEEP);
    const char *weights = (const char *)p->weights + 2 * (out * p->depth + step * DEEP);
    *stride = 2 * p->depth;
    if (outs == PAIR && inputs == DEEP)
        return weights;
    memset(copy, 0, PAIR * sizeof *copy);
    for (long o = 0; o < outs; o++)
        memcpy(copy[o], weights + o * *stride, 2 * inputs);
    *stride = sizeof *copy;
    return *copy;
}

/* Adds to the sums of a group of rows, [two of TALL outputs][high parts, the rest], those of the inputs of some steps. */
static void NAME(multiply)(const struct product *p, const struct NAME(layout) *l, NAME(tile) *sums, long out, long group,
                           long step, long last)
{
    char copy[PAIR][2 * DEEP];
    const long line = 4 * l->width, part = DEEP / 2 * l->width;
    TILE_LOAD(0, sums[0], sizeof **sums);
    TILE_LOAD(1, sums[1], sizeof **sums);
    TILE_LOAD(2, sums[2], sizeof **sums);
    TILE_LOAD(3, sums[3], sizeof **sums);
    for (; step < last; step++) {
        long stride;
        const char *weights = NAME(weights_at)(p, out, step, copy, &stride);
        const uint32_t *rows = NAME(pairs_of)(l, group, step);
        TILE_LOAD(4, weights, stride);
        TILE_LOAD(5, weights + TALL * stride, stride);
        TILE_LOAD(6, rows + 2 * part, line);
        TILE_MULTIPLY(1, 4, 6);
        TILE_MULTIPLY(3, 5, 6);
        TILE_LOAD(7, rows, line);
        TILE_MULTIPLY(0, 4, 7);
        TILE_MULTIPLY(2, 5, 7);
        TILE_LOAD(6, rows + part, line);
        TILE_MULTIPLY(1, 4, 6);
        TILE_MULTIPLY(3, 5, 6);
    }
    TILE_STORE(0, sums[0], sizeof **sums);
    TILE_STORE(1, sums[1], sizeof **sums);
    TILE_STORE(2, sums[2], sizeof **sums);
    TILE_STORE(3, sums[3], sizeof **sums);
}

/* One result, by the processor's own numbers. */
static void NAME(compute_anew)(const struct product *p, long row, long out)
{
    const uint16_t *weights = (const uint16_t *)p->weights + out * p->depth;
    double sum = 0;
    for (long i = 0; i < p->depth; i++)
        sum += (double)NAME(value)((uint32_t)weights[i] << 16) * p->rows[row * p->depth + i];
    p->result[row * p->stride + out] = (float)sum;
}

/* `outs` results of a row from `out` on. */
static void NAME(write)(const struct product *p, const float *results, float least, long row, long out, long outs)
{
    int doubtful = 0;
    memcpy(p->result + row * p->stride + out, results, outs * sizeof *results);
    for (long o = 0; o < TALL; o++) {
        const float size = __builtin_fabsf(results[o]);
        doubtful |= !((size >= least) & (size <= __FLT_MAX__));
    }
    for (long o = 0; doubtful && o < outs; o++) {
        const float size = __builtin_fabsf(results[o]);
        if (!(size >= least && size <= __FLT_MAX__))
            NAME(compute_anew)(p, row, out + o);
    }
}

/* results[row][out] = high[out][row] + rest[out][row] */
static void NAME(turn)(NAME(tile) results, NAME(tile) high, NAME(tile) rest, long rows)
{
    for (long r = 0; r < rows; r += 4)
        for (long o = 0; o < TALL; o += 4) {
            four square[4];
            for (long i = 0; i < 4; i++)
                square[i] = *(loose_four *)&high[o + i][r] + *(loose_four *)&rest[o + i][r];
            transpose(square);
            for (long i = 0; i < 4; i++)
                *(loose_four *)&results[r + i][o] = square[i];
        }
}

static void NAME(finish)(const struct product *p, const struct NAME(layout) *l, NAME(tile) *sums, long out, long group)
{
    const long first = group * l->width, rows = least(p->count - first, l->width);
    for (long half = 0; half < 2 && out < p->outputs; half++, out += TALL) {
        NAME(tile) results;
        NAME(turn)(results, sums[2 * half], sums[2 * half + 1], rows);
        for (long r = 0; r < rows; r++)
            NAME(write)(p, results[r], l->least[first + r], first + r, out, least(p->outputs - out, TALL));
    }
}

/* Some groups of rows times PAIR outputs from `out` on: block by block of inputs, so that weights stay in the cache. */
static void NAME(block_of_groups)(const struct product *p, const struct NAME(layout) *l, NAME(tile) (*sums)[4], long out,
                                  long first, long last)
{
    const long block = l->groups == 1 ? l->steps : BLOCK / DEEP;
    memset(sums, 0, (last - first) * sizeof *sums);
    for (long step = 0; step < l->steps; step += block)
        for (long group = first; group < last; group++)
            NAME(multiply)(p, l, sums[group - first], out, group, step, least(step + block, l->steps));
    for (long group = first; group < last; group++)
        NAME(finish)(p, l, sums[group - first], out, group);
}

static void NAME(shape)(long width)
{
    struct tile_shapes shapes = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        shapes.rows[tile] = TALL;
        shapes.bytes[tile] = (uint16_t)(tile == 4 || tile == 5 ? 2 * DEEP : 4 * width);
    }
    TILE_SHAPES(&shapes);
}

static void NAME(times)(const struct product *p, atomic_long *next)
{
    if (!NAME(fits)(p)) {
        OTHER(times)(p, next);
        return;
    }
    const struct NAME(layout) l = NAME(layout_of)(p);
    const long turns = (l.groups + HELD_GROUPS - 1) / HELD_GROUPS;
    NAME(tile) sums[HELD_GROUPS][4] __attribute__((aligned(64)));

    NAME(shape)(l.width);
    for (long out; (out = atomic_fetch_add(next, 1) * PAIR) < p->outputs;)
        for (long turn = 0; turn < turns; turn++)
            NAME(block_of_groups)(p, &l, sums, out, NAME(share)(l.groups, turn, turns),
                                  NAME(share)(l.groups, turn + 1, turns));
    TILE_RELEASE();
}

/* Whether this machine's tiles do as they should: a small product with edges, beside the other set's. */
static int NAME(works)(void)
{
    enum { COUNT = 2, OUTPUTS = 35, DEPTH = 75, ROOM = 4096 };
    float rows[COUNT * DEPTH], results[2][COUNT * OUTPUTS];
    uint16_t weights[OUTPUTS * DEPTH];
    float packed[ROOM] __attribute__((aligned(64)));
    for (int i = 0; i < COUNT * DEPTH; i++)
        rows[i] = (float)(i * 37 % 101 - 50) / 101;
    for (int i = 0; i < OUTPUTS * DEPTH; i++)
        weights[i] = (uint16_t)(NAME(bits)((float)(i * 29 % 97 - 48) / 97) >> 16);
    struct product p = {rows, weights, packed, results[0], COUNT, OUTPUTS, DEPTH, OUTPUTS, BFLOAT16};
    atomic_long next = 0, others = 0;
    if (NAME(room)(&p) > ROOM || OTHER(room)(&p) > ROOM)
        return 0;
    NAME(pack)(&p);
    NAME(times)(&p, &next);
    p.result = results[1];
    OTHER(pack)(&p);
    OTHER(times)(&p, &others);
    for (int i = 0; i < COUNT * OUTPUTS; i++)
        if (!(__builtin_fabsf(results[0][i] - results[1][i]) < 1e-5f))
            return 0;
    return 1;
}

#undef TALL
#undef DEEP
#undef PARTS
#undef PAIR
#undef HELD_GROUPS
