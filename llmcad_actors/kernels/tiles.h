/* AMX: eight tiles, 0 to 7, of 16 rows of up to 64 bytes each, which belong to the thread. Tiles are named by number.
 *
 * With LLMCAD_EMULATED_TILES the same in plain C, for tests on other machines: after the operations' description in
 * Intel's Software Developer's Manual, volume 2. What the processor refuses ends the program.
 */

struct tile_shapes { /* as LDTILECFG reads it */
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16]; /* of a row */
    uint8_t rows[16];
};

#if !defined(LLMCAD_EMULATED_TILES)
#include <asm/prctl.h>
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#if !defined(ARCH_REQ_XCOMP_PERM)
#define ARCH_REQ_XCOMP_PERM 0x1023
#endif

/* Whether processor and system have tiles, and the system lets this process use them. */
static int tiles_allowed(void)
{
    enum { TILES = 18, BOTH_STATES = 3 << 17, OSXSAVE = 1 << 27, AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24 };
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & OSXSAVE))
        return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & AMX_BF16) || !(d & AMX_TILE))
        return 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & BOTH_STATES) == BOTH_STATES && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILES) == 0;
}

#define TILE_SHAPES(shapes) __asm__ volatile("ldtilecfg %0" ::"m"(*(shapes)))
#define TILE_RELEASE() __asm__ volatile("tilerelease" ::)
#define TILE_LOAD(tile, from, stride)                                                                                  \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"((long)(stride)) : "memory")
#define TILE_STORE(tile, to, stride)                                                                                   \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"((long)(stride)) : "memory")
/* sums[m][n] += sum over k of a[m][k] * b[k / 2][n][k % 2], bfloat16 into float */
#define TILE_MULTIPLY(sums, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sums ::)

#else
#include <math.h>

static _Thread_local struct tile_shapes emulated_shapes;
static _Thread_local char emulated_tiles[8][16][64];

static int tiles_allowed(void)
{
    return 1;
}

static float flushed(float value) /* numbers too small for a full mantissa count as 0 */
{
    return fabsf(value) < 0x1p-126f ? copysignf(0, value) : value;
}

static float emulated_bfloat16(const char *row, long index)
{
    uint16_t half;
    memcpy(&half, row + 2 * index, sizeof half);
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return flushed(value);
}

static void emulated_shape(const struct tile_shapes *shapes)
{
    for (int tile = 0; tile < 16; tile++)
        if (shapes->palette != 1 || shapes->start_row || shapes->rows[tile] > (tile < 8 ? 16 : 0) ||
            shapes->bytes[tile] > (tile < 8 ? 64 : 0) || !shapes->rows[tile] != !shapes->bytes[tile])
            abort();
    emulated_shapes = *shapes;
    memset(emulated_tiles, 0, sizeof emulated_tiles);
}

static void emulated_load(int tile, const char *from, long stride)
{
    memset(emulated_tiles[tile], 0, sizeof emulated_tiles[tile]);
    for (int row = 0; row < emulated_shapes.rows[tile]; row++)
        memcpy(emulated_tiles[tile][row], from + row * stride, emulated_shapes.bytes[tile]);
}

static void emulated_store(int tile, char *to, long stride)
{
    for (int row = 0; row < emulated_shapes.rows[tile]; row++)
        memcpy(to + row * stride, emulated_tiles[tile][row], emulated_shapes.bytes[tile]);
}

/* Even and odd inputs are summed apart, each step rounded once; then both, then what was there. */
static void emulated_multiply(int sums, int a, int b)
{
    const struct tile_shapes *s = &emulated_shapes;
    if (!s->rows[sums] || s->rows[sums] != s->rows[a] || s->bytes[sums] != s->bytes[b] || s->bytes[a] != 4 * s->rows[b])
        abort();
    for (int m = 0; m < s->rows[sums]; m++)
        for (int n = 0; n < s->bytes[sums] / 4; n++) {
            float part[2] = {0, 0}, sum;
            for (int k = 0; k < s->bytes[a] / 2; k++)
                part[k % 2] = flushed(fmaf(emulated_bfloat16(emulated_tiles[a][m], k),
                                           emulated_bfloat16(emulated_tiles[b][k / 2], 2 * n + k % 2), part[k % 2]));
            memcpy(&sum, emulated_tiles[sums][m] + 4 * n, sizeof sum);
            sum = flushed(flushed(sum) + flushed(part[0] + part[1]));
            memcpy(emulated_tiles[sums][m] + 4 * n, &sum, sizeof sum);
        }
}

#define TILE_SHAPES(shapes) emulated_shape(shapes)
#define TILE_RELEASE() memset(&emulated_shapes, 0, sizeof emulated_shapes)
#define TILE_LOAD(tile, from, stride) emulated_load(tile, (const char *)(from), stride)
#define TILE_STORE(tile, to, stride) emulated_store(tile, (char *)(to), stride)
#define TILE_MULTIPLY(sums, a, b) emulated_multiply(sums, a, b)
#endif
