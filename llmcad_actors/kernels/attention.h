/* Attention of float32 rows, for one instruction set (SET, LANES, ROWS), after products.h.
 *
 * A row's scores, their sum and its values are summed in the order of its own keys, whatever other rows see and
 * wherever the keys lie. Rows that share keys are computed ROWS at a time: keys, turned so that lanes are keys, and
 * values are read once for all of them.
 */

#ifndef SCORES
#define SCORES (256L << 10) /* floats of scores at once */
#define MOST_LINES 96       /* a line: one row in one head */
#define LEAST_LINES 12      /* however many keys there are */
#define PIECES 8            /* of the work, at least, that threads can share */
#endif

#define KEYS (WIDTH * LANES) /* at a time */

/* Memory of one thread. Lines are rows times the heads of a group, heads fastest. */
struct NAME(space) {
    float *queries; /* [lines][width] */
    float *turned;  /* [width][KEYS] */
    float *scores;  /* [lines][stride] */
    float *sums;    /* [lines][padded] */
    float *values;  /* [columns][padded], where width is no multiple of LANES */
    long lines, stride, padded;
};

/* sums[r][] += factors[r][j] * vectors[j][] for j = 0, 1, ...: `count` lines of `width` vectors each. */
INLINE void NAME(add)(float *const *sums, const float *const *factors, const float *vectors, long stride, long steps,
                      const int count, const int width)
{
    NAME(vector) part[ROWS][WIDTH], v[WIDTH];
#pragma GCC unroll 8
    for (int r = 0; r < count; r++)
#pragma GCC unroll 8
        for (int c = 0; c < width; c++)
            part[r][c] = NAME(load)(sums[r] + c * LANES);
    for (long j = 0; j < steps; j++) {
#pragma GCC unroll 8
        for (int c = 0; c < width; c++)
            v[c] = NAME(load)(vectors + j * stride + c * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < count; r++) {
            const NAME(vector) factor = factors[r][j] - (NAME(vector)){0};
#pragma GCC unroll 8
            for (int c = 0; c < width; c++)
                part[r][c] = NAME(fma)(factor, v[c], part[r][c]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < count; r++)
#pragma GCC unroll 8
        for (int c = 0; c < width; c++)
            *(NAME(loose) *)(sums[r] + c * LANES) = part[r][c];
}

#define LINE_CASE(n, width)                                                                                            \
    case n:                                                                                                            \
        if (n <= ROWS)                                                                                                 \
            NAME(add)(sums, factors, vectors, stride, steps, n, width);                                                \
        break;

#define LINE_CASES(width)                                                                                              \
    switch (count) {                                                                                                   \
        LINE_CASE(1, width)                                                                                            \
        LINE_CASE(2, width)                                                                                            \
        LINE_CASE(3, width)                                                                                            \
        LINE_CASE(4, width)                                                                                            \
        LINE_CASE(5, width)                                                                                            \
        LINE_CASE(6, width)                                                                                            \
    }

static void NAME(add_wide)(float *const *sums, const float *const *factors, const float *vectors, long stride,
                           long steps, int count)
{
    LINE_CASES(WIDTH)
}

static void NAME(add_narrow)(float *const *sums, const float *const *factors, const float *vectors, long stride,
                             long steps, int count)
{
    LINE_CASES(1)
}

#undef LINE_CASES
#undef LINE_CASE

/* The same for `padded` floats a line, a multiple of LANES. */
static void NAME(add_all)(float *const *sums, const float *const *factors, const float *vectors, long stride,
                          long steps, int count, long padded)
{
    float *parts[ROWS];
    for (long c = 0; c < padded;) {
        for (int r = 0; r < count; r++)
            parts[r] = sums[r] + c;
        if (c + KEYS <= padded) {
            NAME(add_wide)(parts, factors, vectors + c, stride, steps, count);
            c += KEYS;
        } else {
            NAME(add_narrow)(parts, factors, vectors + c, stride, steps, count);
            c += LANES;
        }
    }
}

/* turned[i][key] = keys[key][i] for `count` keys, and zeros up to KEYS */
static void NAME(turn)(float *turned, const float *keys, long stride, long count, long width)
{
    if (count < KEYS)
        memset(turned, 0, width * KEYS * sizeof(float));
    const long whole = count / LANES * LANES, even = width / 4 * 4;
    for (long key = 0; key < whole; key += LANES)
        for (long i = 0; i < even; i += 4) {
            NAME(vector) block[4];
            for (int r = 0; r < 4; r++)
                block[r] = NAME(quads)(keys + (key + r) * stride + i, 4 * stride);
            NAME(transpose)(block);
            for (int r = 0; r < 4; r++)
                *(NAME(loose) *)(turned + (i + r) * KEYS + key) = block[r];
        }
    for (long key = 0; key < count; key++)
        for (long i = key < whole ? even : 0; i < width; i++)
            turned[i * KEYS + key] = keys[key * stride + i];
}

typedef int32_t NAME(whole) __attribute__((vector_size(4 * LANES)));

INLINE NAME(vector) NAME(chosen)(NAME(whole) where, NAME(vector) one, NAME(vector) other)
{
    return (NAME(vector))(((NAME(whole))one & where) | ((NAME(whole))other & ~where));
}

/* e to the power of each, within 2 units in the last place; 0 below -87, NaN of NaN. None is above 88. */
INLINE NAME(vector) NAME(power)(NAME(vector) x)
{
    const NAME(vector) zero = {0}, magic = zero + 0x1.8p23f; /* adding it rounds to a whole number */
    const NAME(vector) shifted = NAME(fma)(x, zero + 1.44269504f, magic), n = shifted - magic;
    const NAME(vector) r = NAME(fma)(n, zero + 2.12194440e-4f, NAME(fma)(n, zero - 0.693359375f, x)); /* - n log 2 */
    NAME(vector) p = zero + 1.9875691500e-4f;
    p = NAME(fma)(p, r, zero + 1.3981999507e-3f);
    p = NAME(fma)(p, r, zero + 8.3334519073e-3f);
    p = NAME(fma)(p, r, zero + 4.1665795894e-2f);
    p = NAME(fma)(p, r, zero + 1.6666665459e-1f);
    p = NAME(fma)(p, r, zero + 5.0000001201e-1f);
    p = NAME(fma)(p, r * r, r) + 1.0f;
    const NAME(vector) scaled = (NAME(vector))((NAME(whole))p + ((NAME(whole))shifted << 23));
    return NAME(chosen)(x == x, NAME(chosen)(x < zero - 87.0f, zero, scaled), x);
}

/* tanh of each */
INLINE NAME(vector) NAME(bend)(NAME(vector) x)
{
    const NAME(vector) zero = {0}, square = x * x;
    const NAME(whole) sign = (NAME(whole))x & INT32_MIN;
    const NAME(vector) size = (NAME(vector))((NAME(whole))x & INT32_MAX);
    NAME(vector) p = zero - 5.70498872745e-3f;
    p = NAME(fma)(p, square, zero + 2.06390887954e-2f);
    p = NAME(fma)(p, square, zero - 5.37397155531e-2f);
    p = NAME(fma)(p, square, zero + 1.33314422036e-1f);
    p = NAME(fma)(p, square, zero - 3.33332819422e-1f);
    const NAME(vector) near = NAME(fma)(p * square, x, x);
    const NAME(vector) bounded = NAME(chosen)(size > zero + 40.0f, zero + 40.0f, size);
    const NAME(vector) far = 1.0f - 2.0f / (NAME(power)(bounded + bounded) + 1.0f);
    return NAME(chosen)(size < zero + 0.625f, near, (NAME(vector))((NAME(whole))far | sign));
}

INLINE float NAME(total)(NAME(vector) sums)
{
    const four lanes = NAME(quarter)(sums);
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

static float NAME(highest)(const float *scores, long count)
{
    float highest = scores[0];
    long i = 0;
    if (count >= LANES) {
        NAME(vector) most = NAME(load)(scores);
        for (i = LANES; i + LANES <= count; i += LANES) {
            const NAME(vector) next = NAME(load)(scores + i);
            most = NAME(chosen)(next > most, next, most);
        }
        for (int lane = 0; lane < LANES; lane++)
            highest = most[lane] > highest ? most[lane] : highest;
    }
    for (; i < count; i++)
        highest = scores[i] > highest ? scores[i] : highest;
    return highest;
}

/* Scores become powers of e; lanes beyond `count` become zeros. Returns their sum. */
static float NAME(soften)(float *scores, long count)
{
    const float highest = NAME(highest)(scores, count);
    NAME(vector) sums = {0};
    long i = 0;
    for (; i + LANES <= count; i += LANES) {
        const NAME(vector) p = NAME(power)(NAME(load)(scores + i) - highest);
        *(NAME(loose) *)(scores + i) = p;
        sums += p;
    }
    if (i < count) {
        float rest[LANES];
        for (long r = 0; r < LANES; r++)
            rest[r] = i + r < count ? scores[i + r] - highest : -1000.0f;
        const NAME(vector) p = NAME(power)(NAME(load)(rest));
        sums += p;
        memcpy(rest, &p, sizeof rest);
        memcpy(scores + i, rest, (count - i) * sizeof(float));
    }
    return NAME(total)(sums);
}

static void NAME(cap)(float *scores, long count, float cap)
{
    for (long i = 0; i < count; i += LANES) {
        const long now = least(count - i, LANES);
        const NAME(vector) bent = NAME(bend)(NAME(load_part)(scores + i, now) / cap) * cap;
        memcpy(scores + i, &bent, now * sizeof(float));
    }
}

/* Where a line's row stands, and in which head. */
struct NAME(line) {
    long row, head;
    const int32_t *runs, *end; /* of columns */
    const float *powers;       /* of the keys that it sees, in order */
    float sum;
};

/* Scores that a line needs, moved together: its keys in order. Returns how many. */
static long NAME(collect)(const struct attention *a, const struct NAME(line) *line, float *scores, long low)
{
    const float *bias = a->bias ? a->bias + line->head * a->bias_head + line->row * a->bias_row : 0;
    long count = 0;
    for (const int32_t *run = line->runs; run < line->end; run += 2) {
        long column = run[0];
        for (; column + LANES <= run[1]; column += LANES, count += LANES) {
            NAME(vector) scaled = NAME(load)(scores + column - low) * a->scale;
            if (bias)
                scaled += NAME(load)(bias + column);
            *(NAME(loose) *)(scores + count) = scaled;
        }
        for (; column < run[1]; column++, count++) {
            const float scaled = scores[column - low] * a->scale;
            scores[count] = bias ? scaled + bias[column] : scaled;
        }
    }
    if (a->softcap != 0)
        NAME(cap)(scores, count, a->softcap);
    return count;
}

/* Scores of all lines and the keys from `low` to `high`; those that no line of a tile sees are left out. */
static void NAME(score)(const struct attention *a, const struct NAME(space) *s, const struct NAME(line) *lines,
                        const float *keys, long low, long high)
{
    float *sums[ROWS];
    const float *queries[ROWS];
    for (long key = low; key < high; key += KEYS) {
        NAME(turn)(s->turned, keys + key * a->key_row, a->key_row, least(high - key, KEYS), a->width);
        for (long first = 0; first < s->lines; first += ROWS) {
            const int count = (int)least(s->lines - first, ROWS);
            int is_seen = 0;
            for (int r = 0; r < count; r++) {
                const struct NAME(line) *line = lines + first + r;
                is_seen |= line->runs[0] < key + KEYS && line->end[-1] > key;
                queries[r] = s->queries + (first + r) * a->width;
                sums[r] = s->scores + (first + r) * s->stride + key - low;
            }
            if (!is_seen)
                continue;
            for (int r = 0; r < count; r++)
                memset(sums[r], 0, KEYS * sizeof(float));
            NAME(add_wide)(sums, queries, s->turned, KEYS, a->width, count);
        }
    }
}

/* sums of one line += its powers `from` to `to` of a run, times the values */
INLINE void NAME(weigh_alone)(const struct NAME(line) *line, float *sums, const float *values, long stride, long run,
                              long from, long to, long padded)
{
    const float *powers = line->powers + from - run;
    if (from < to)
        NAME(add_all)(&sums, &powers, values + from * stride, stride, to - from, 1, padded);
}

/* Values of a tile's lines, summed in the order of each one's keys: what their first runs share, together. */
static void NAME(weigh)(struct NAME(line) *lines, float *sums, const float *values, long stride, int count,
                        long padded)
{
    float *targets[ROWS];
    const float *powers[ROWS];
    long low = lines[0].runs[0], high = lines[0].runs[1];
    for (int r = 1; r < count; r++) {
        low = most(low, lines[r].runs[0]);
        high = least(high, lines[r].runs[1]);
    }
    memset(sums, 0, count * padded * sizeof(float));
    if (low >= high)
        low = high = 0;
    for (int r = 0; r < count; r++) {
        targets[r] = sums + r * padded;
        powers[r] = lines[r].powers + low - lines[r].runs[0];
        if (low < high)
            NAME(weigh_alone)(lines + r, targets[r], values, stride, lines[r].runs[0], lines[r].runs[0], low, padded);
    }
    if (low < high)
        NAME(add_all)(targets, powers, values + low * stride, stride, high - low, count, padded);
    for (int r = 0; r < count; r++) {
        struct NAME(line) *line = lines + r;
        const long start = line->runs[0], done = low < high ? high : start;
        NAME(weigh_alone)(line, targets[r], values, stride, start, done, line->runs[1], padded);
        line->powers += line->runs[1] - start;
        for (const int32_t *run = line->runs + 2; run < line->end; run += 2) {
            NAME(weigh_alone)(line, targets[r], values, stride, run[0], run[0], run[1], padded);
            line->powers += run[1] - run[0];
        }
    }
}

/* One group's lines `first` to `first + s->lines`. */
static void NAME(attend_lines)(const struct attention *a, const struct NAME(space) *s, long kv_head, long first)
{
    const long group = a->heads / a->kv_heads;
    struct NAME(line) lines[MOST_LINES];
    long low = a->columns, high = 0;
    for (long i = 0; i < s->lines; i++) {
        const long row = (first + i) / group, head = kv_head * group + (first + i) % group;
        const int32_t *runs = a->runs + 2 * a->first_run[row], *end = a->runs + 2 * a->first_run[row + 1];
        lines[i] = (struct NAME(line)){row, head, runs, end, s->scores + i * s->stride, 0};
        low = least(low, runs[0]);
        high = most(high, end[-1]);
        memcpy(s->queries + i * a->width, a->queries + head * a->query_head + row * a->query_row,
               a->width * sizeof(float));
    }
    NAME(score)(a, s, lines, a->keys + kv_head * a->key_head, low, high);
    for (long i = 0; i < s->lines; i++) {
        float *scores = s->scores + i * s->stride;
        lines[i].sum = NAME(soften)(scores, NAME(collect)(a, lines + i, scores, low));
    }
    const float *values = a->values + kv_head * a->value_head;
    long stride = a->value_row;
    if (s->values) {
        for (long column = low; column < high; column++)
            memcpy(s->values + column * s->padded, values + column * stride, a->width * sizeof(float));
        values = s->values;
        stride = s->padded;
    }
    for (long i = 0; i < s->lines; i += ROWS)
        NAME(weigh)(lines + i, s->sums + i * s->padded, values, stride, (int)least(s->lines - i, ROWS), s->padded);
    for (long i = 0; i < s->lines; i++) {
        float *to = a->result + (lines[i].row * a->heads + lines[i].head) * a->width;
        for (long c = 0; c < a->width; c++)
            to[c] = s->sums[i * s->padded + c] / lines[i].sum;
    }
}

/* Pieces of lines, taken from `next` until there are none. */
static int NAME(attend)(const struct attention *a, atomic_long *next)
{
    const long lines = a->rows * (a->heads / a->kv_heads), stride = (a->columns + 2 * KEYS) / KEYS * KEYS;
    const long padded = (a->width + LANES - 1) / LANES * LANES;
    const long shared = (lines * a->kv_heads / PIECES + LEAST_LINES - 1) / LEAST_LINES * LEAST_LINES;
    const long cached = SCORES / stride / LEAST_LINES * LEAST_LINES;
    const long held = least(most(least(least(cached, MOST_LINES), shared), LEAST_LINES), lines);
    const long pieces = (lines + held - 1) / held;
    const long sizes[] = {held * a->width, a->width * KEYS, held * stride, held * padded,
                          padded == a->width ? 0 : a->columns * padded};
    long whole = 0, at = 0;
    float *parts[5];
    for (int i = 0; i < 5; i++)
        whole += (sizes[i] + 15) / 16 * 16;
    float *memory = aligned_alloc(64, whole * sizeof(float));
    if (!memory)
        return -1;
    for (int i = 0; i < 5; at += (sizes[i++] + 15) / 16 * 16)
        parts[i] = memory + at;
    memset(memory, 0, whole * sizeof(float));

    struct NAME(space) s = {parts[0], parts[1], parts[2], parts[3], sizes[4] ? parts[4] : 0, 0, stride, padded};
    for (long piece; (piece = atomic_fetch_add(next, 1)) < pieces * a->kv_heads;) {
        const long first = piece % pieces * held;
        s.lines = least(lines - first, held);
        NAME(attend_lines)(a, &s, piece / pieces, first);
    }
    free(memory);
    return 0;
}

#undef KEYS
