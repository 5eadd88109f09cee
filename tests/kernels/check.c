/* The kernels against plain loops in double precision, and a row's bits among others against its bits alone, for every
 * instruction set that the machine has. For machines without Python, and under an emulator: test_arm.sh. */

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../llmcad_actors/kernels/kernels.h"

static const char *NAMES[] = {"portable", "avx2", "avx512", "amx", "neon"};
static int failures, checks;

#define CHECK(condition, ...)                                                                                          \
    do {                                                                                                               \
        checks++;                                                                                                      \
        if (!(condition) && failures++ < 20) {                                                                         \
            printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);                                                     \
            printf(__VA_ARGS__);                                                                                       \
            printf("\n");                                                                                              \
        }                                                                                                              \
    } while (0)

static uint64_t state = 1;

static float number(void) /* about normal, in any magnitude around 1 */
{
    double sum = -6;
    for (int i = 0; i < 12; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        sum += (double)(state >> 40) / (1 << 24);
    }
    return (float)sum;
}

static float *numbers(long count)
{
    float *made = malloc((count + 1) * sizeof *made);
    for (long i = 0; i < count; i++)
        made[i] = number();
    return made;
}

static uint16_t bfloat16_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)(bits >> 16);
}

static uint16_t float16_of(float value) /* of numbers that it holds, cut off */
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000, exponent = bits >> 23 & 0xff;
    return exponent < 113 ? (uint16_t)sign : (uint16_t)(sign | (exponent - 112) << 10 | (bits >> 13 & 0x3ff));
}

static double value_of(const char *weights, long index, long kind)
{
    uint16_t half;
    uint32_t bits;
    float value;
    if (kind == FLOAT32)
        memcpy(&value, weights + 4 * index, sizeof value);
    else {
        memcpy(&half, weights + 2 * index, sizeof half);
        if (kind == FLOAT16) {
            const int exponent = half >> 10 & 31;
            const double size = exponent ? ldexp(1024 + (half & 1023), exponent - 25) : ldexp(half & 1023, -24);
            return half & 0x8000 ? -size : size;
        }
        bits = (uint32_t)half << 16;
        memcpy(&value, &bits, sizeof value);
    }
    return value;
}

static void times(int set, const float *rows, const char *weights, float *result, long count, long outputs, long depth,
                  long kind)
{
    struct product p = {rows, weights, 0, result, count, outputs, depth, outputs, kind};
    atomic_long next = 0;
    const long room = llmcad_room(set, &p);
    if (room) {
        p.packed = aligned_alloc(64, (room + 15) / 16 * 64);
        llmcad_pack(set, &p);
    }
    llmcad_times(set, &p, &next);
    free(p.packed);
}

static void check_products(int set)
{
    static const long DEPTHS[] = {1, 3, 4, 7, 16, 31, 33, 640, 700}, COUNTS[] = {1, 2, 3, 4, 5, 6, 7, 8, 13, 40, 41, 100};
    for (long kind = BFLOAT16; kind <= FLOAT32; kind++)
        for (unsigned d = 0; d < sizeof DEPTHS / sizeof *DEPTHS; d++) {
            const long depth = DEPTHS[d], outputs = 29, most = 100, size = kind == FLOAT32 ? 4 : 2;
            float *rows = numbers(most * depth), *alone = malloc(most * outputs * 4), *among = malloc(most * outputs * 4);
            char *weights = malloc(outputs * depth * 4 + 2), *at = weights + 2; /* not at a multiple of four */
            for (long i = 0; i < outputs * depth; i++) {
                const float value = number();
                const uint16_t half = kind == BFLOAT16 ? bfloat16_of(value) : float16_of(value);
                memcpy(at + size * i, kind == FLOAT32 ? (const void *)&value : (const void *)&half, size);
            }
            for (long r = 0; r < most; r++) {
                times(set, rows + r * depth, at, alone + r * outputs, 1, outputs, depth, kind);
                for (long o = 0; o < outputs; o++) {
                    double sum = 0, sizes = 0;
                    for (long i = 0; i < depth; i++) {
                        const double product = value_of(at, o * depth + i, kind) * rows[r * depth + i];
                        sum += product;
                        sizes += fabs(product);
                    }
                    const double error = fabs(alone[r * outputs + o] - sum);
                    CHECK(error <= 1e-6 * sizes, "kind %ld depth %ld row %ld out %ld: %g", kind, depth, r, o, error);
                }
            }
            for (unsigned c = 0; c < sizeof COUNTS / sizeof *COUNTS; c++) {
                times(set, rows, at, among, COUNTS[c], outputs, depth, kind);
                CHECK(!memcmp(among, alone, COUNTS[c] * outputs * 4), "kind %ld depth %ld rows %ld", kind, depth, COUNTS[c]);
            }
            free(rows), free(alone), free(among), free(weights);
        }
}

static void check_special_values(int set)
{
    static const uint16_t HALVES[] = {0x0000, 0x8000, 0x3c00, 0x0001, 0x8203, 0x03ff, 0x0400, 0x7bff, 0x7c00, 0xfc00};
    const long outputs = sizeof HALVES / sizeof *HALVES;
    float one = 1, found[16];
    times(set, &one, (const char *)HALVES, found, 1, outputs, 1, FLOAT16);
    for (long o = 0; o < outputs - 2; o++)
        CHECK(found[o] == value_of((const char *)HALVES, o, FLOAT16), "half %04x: %g", HALVES[o], found[o]);
    CHECK(found[outputs - 2] == INFINITY && found[outputs - 1] == -INFINITY, "%g %g", found[outputs - 2], found[outputs - 1]);
    const uint16_t nan = 0x7e01;
    times(set, &one, (const char *)&nan, found, 1, 1, 1, FLOAT16);
    CHECK(isnan(found[0]), "%g", found[0]);
}

/* One row of one head, plainly. */
static void attend_plainly(const float *query, const float *keys, const float *values, const int *seen, long columns,
                           long width, float scale, float softcap, double *result)
{
    double highest = -INFINITY, all = 0, *scores = malloc(columns * sizeof *scores);
    for (long c = 0; c < columns; c++) {
        scores[c] = 0;
        for (long i = 0; i < width; i++)
            scores[c] += (double)query[i] * keys[c * width + i] * scale;
        if (softcap != 0)
            scores[c] = softcap * tanh(scores[c] / softcap);
        if (seen[c] && scores[c] > highest)
            highest = scores[c];
    }
    for (long i = 0; i < width; i++)
        result[i] = 0;
    for (long c = 0; c < columns; c++)
        if (seen[c]) {
            const double weight = exp(scores[c] - highest);
            all += weight;
            for (long i = 0; i < width; i++)
                result[i] += weight * values[c * width + i];
        }
    for (long i = 0; i < width; i++)
        result[i] /= all;
    free(scores);
}

static void check_attention_of(int set, long groups, long kv_heads, long rows, long columns, long width, float softcap)
{
    const long heads = groups * kv_heads;
    float *queries = numbers(heads * rows * width), *keys = numbers(kv_heads * columns * width);
    float *values = numbers(kv_heads * columns * width), *found = malloc(rows * heads * width * 4);
    float *mask = malloc(rows * columns * 4), *own_keys = malloc(columns * width * 4), *own_values = malloc(columns * width * 4);
    int *seen = malloc(rows * columns * sizeof *seen);
    for (long r = 0; r < rows; r++)
        for (long c = 0; c < columns; c++) {
            seen[r * columns + c] = c == columns - 1 || (c >= r % 3 && c < columns / 2) || number() > 0.8f;
            mask[r * columns + c] = seen[r * columns + c] ? 0 : -1e38f;
        }
    int32_t *first = malloc((rows + 1) * sizeof *first), *runs = malloc((rows * columns + 1) * 2 * sizeof *runs);
    llmcad_runs(mask, columns, rows, columns, first, runs, rows * columns);
    struct attention a = {queries, keys, values, 0, first, runs, found, heads, kv_heads, rows, columns, width,
                          rows * width, width, columns * width, width, columns * width, width, 0, 0, 0.3f, softcap};
    atomic_long next = 0;
    CHECK(llmcad_attend(set, &a, &next) == 0, "no memory");
    double *expected = malloc(width * sizeof *expected);
    float *alone = malloc(width * sizeof *alone);
    for (long r = 0; r < rows; r++)
        for (long h = 0; h < heads; h++) {
            const float *query = queries + (h * rows + r) * width, *of_row = found + (r * heads + h) * width;
            const float *key = keys + h / groups * columns * width, *value = values + h / groups * columns * width;
            attend_plainly(query, key, value, seen + r * columns, columns, width, 0.3f, softcap, expected);
            for (long i = 0; i < width; i++)
                CHECK(fabs(of_row[i] - expected[i]) < 1e-5, "width %ld row %ld: %g, not %g", width, r, of_row[i], expected[i]);
            int32_t count = 0, only[2] = {0, 1};
            for (long c = 0; c < columns; c++)
                if (seen[r * columns + c]) {
                    memcpy(own_keys + count * width, key + c * width, width * 4);
                    memcpy(own_values + count++ * width, value + c * width, width * 4);
                }
            int32_t all[2] = {0, count};
            struct attention one = {query, own_keys, own_values, 0, only, all, alone, 1, 1, 1, count, width,
                                    width, width, count * width, width, count * width, width, 0, 0, 0.3f, softcap};
            next = 0;
            CHECK(llmcad_attend(set, &one, &next) == 0, "no memory");
            CHECK(!memcmp(alone, of_row, width * 4), "width %ld columns %ld row %ld head %ld", width, columns, r, h);
        }
    free(queries), free(keys), free(values), free(found), free(mask), free(own_keys), free(own_values), free(seen);
    free(first), free(runs), free(expected), free(alone);
}

static void check_attention(int set)
{
    static const long WIDTHS[] = {4, 6, 16, 24, 64, 80}, COLUMNS[] = {1, 3, 16, 63, 64, 65, 200};
    for (unsigned w = 0; w < sizeof WIDTHS / sizeof *WIDTHS; w++)
        for (unsigned c = 0; c < sizeof COLUMNS / sizeof *COLUMNS; c++)
            check_attention_of(set, 1 + (w + c) % 3, 1 + c % 2, 1 + 5 * w, COLUMNS[c], WIDTHS[w], c % 2 ? 0 : 2.5f);
}

int main(void)
{
    for (int set = 0; set < SETS; set++) {
        if (!llmcad_has(set))
            continue;
        const int before = checks;
        check_products(set);
        check_special_values(set);
        check_attention(set);
        printf("%s: %d checks\n", NAMES[set], checks - before);
    }
    printf(failures ? "%d of %d failed\n" : "all right (%d of %d failed)\n", failures, checks);
    return failures != 0;
}
