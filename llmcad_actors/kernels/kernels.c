/* The package's own kernels, once for each instruction set; which one runs is decided when they are called.
 *
 * A result's bits depend on the instruction set, and on nothing but the row that it belongs to: not on the number of
 * rows beside it, not on threads, not on where in memory something lies.
 */

#include "kernels.h"

#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define JOINED_(name, set) name##_##set
#define JOINED(name, set) JOINED_(name, set)
#define NAME(name) JOINED(name, SET)

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

typedef float four __attribute__((vector_size(16)));
typedef float loose_four __attribute__((vector_size(16), aligned(4), may_alias));

#if defined(__clang__)
#define SHUFFLED(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t four_places __attribute__((vector_size(16)));
#define SHUFFLED(a, b, i, j, k, l) __builtin_shuffle(a, b, (four_places){i, j, k, l})
#endif

static const long SIZES[] = {2, 2, 4}; /* bytes, by kind */

/* Columns become rows. */
INLINE void transpose(four *rows)
{
    const four a = SHUFFLED(rows[0], rows[1], 0, 4, 1, 5), b = SHUFFLED(rows[2], rows[3], 0, 4, 1, 5);
    const four c = SHUFFLED(rows[0], rows[1], 2, 6, 3, 7), d = SHUFFLED(rows[2], rows[3], 2, 6, 3, 7);
    rows[0] = SHUFFLED(a, b, 0, 1, 4, 5);
    rows[1] = SHUFFLED(a, b, 2, 3, 6, 7);
    rows[2] = SHUFFLED(c, d, 0, 1, 4, 5);
    rows[3] = SHUFFLED(c, d, 2, 3, 6, 7);
}

INLINE long least(long one, long other)
{
    return one < other ? one : other;
}

INLINE long most(long one, long other)
{
    return one > other ? one : other;
}

/* What AMX leaves to another set */
#if defined(LLMCAD_EMULATED_TILES)
#define OTHER_SET PORTABLE
#define OTHER(name) JOINED(name, portable)
#elif defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define OTHER_SET AVX512
#define OTHER(name) JOINED(name, avx512)
#endif
#if defined(OTHER)
#include "tiles.h"
#endif

#define SET portable
#include "set_portable.h"
#include "products.h"
#include "attention.h"
#include "end_of_set.h"

#if defined(LLMCAD_EMULATED_TILES)
#define SET amx
#include "set_amx.h"
#include "end_of_set.h"
#endif

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define SET avx2
#include "set_avx2.h"
#include "products.h"
#include "attention.h"
#include "end_of_set.h"
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define SET avx512
#include "set_avx512.h"
#include "products.h"
#include "attention.h"
#include "end_of_set.h"
#if defined(OTHER) && !defined(LLMCAD_EMULATED_TILES)
#define SET amx
#include "set_amx.h"
#include "end_of_set.h"
#endif
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#if defined(__aarch64__)
#include <arm_neon.h>
#define SET neon
#include "set_neon.h"
#include "products.h"
#include "attention.h"
#include "end_of_set.h"
#endif

int llmcad_has(int set)
{
    if (set == PORTABLE)
        return 1;
#if defined(OTHER)
    if (set == AMX)
        return llmcad_has(OTHER_SET) && tiles_allowed() && works_amx();
#endif
#if defined(__x86_64__)
    __builtin_cpu_init();
    const int has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (set == AVX2)
        return has_avx2;
    if (set == AVX512)
        return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#elif defined(__aarch64__)
    if (set == NEON)
        return 1;
#endif
    return 0;
}

long llmcad_room(int set, const struct product *product)
{
#if defined(OTHER)
    if (set == AMX)
        return room_amx(product);
#endif
#if defined(__x86_64__)
    if (set == AVX512)
        return room_avx512(product);
    if (set == AVX2)
        return room_avx2(product);
#elif defined(__aarch64__)
    if (set == NEON)
        return room_neon(product);
#endif
    return room_portable(product);
}

void llmcad_pack(int set, const struct product *product)
{
#if defined(OTHER)
    if (set == AMX)
        pack_amx(product);
    else
#endif
#if defined(__x86_64__)
    if (set == AVX512)
        pack_avx512(product);
    else if (set == AVX2)
        pack_avx2(product);
    else
#elif defined(__aarch64__)
    if (set == NEON)
        pack_neon(product);
    else
#endif
        pack_portable(product);
}

void llmcad_times(int set, const struct product *product, atomic_long *next)
{
#if defined(OTHER)
    if (set == AMX)
        times_amx(product, next);
    else
#endif
#if defined(__x86_64__)
    if (set == AVX512)
        times_avx512(product, next);
    else if (set == AVX2)
        times_avx2(product, next);
    else
#elif defined(__aarch64__)
    if (set == NEON)
        times_neon(product, next);
    else
#endif
        times_portable(product, next);
}

int llmcad_attend(int set, const struct attention *attention, atomic_long *next)
{
#if defined(OTHER)
    if (set == AMX)
        return OTHER(attend)(attention, next);
#endif
#if defined(__x86_64__)
    if (set == AVX512)
        return attend_avx512(attention, next);
    if (set == AVX2)
        return attend_avx2(attention, next);
#elif defined(__aarch64__)
    if (set == NEON)
        return attend_neon(attention, next);
#endif
    return attend_portable(attention, next);
}

long llmcad_runs(const float *mask, long row_stride, long rows, long columns, int32_t *first_run, int32_t *runs,
                 long room)
{
    long found = 0;
    for (long row = 0; row < rows; row++, mask += row_stride) {
        first_run[row] = (int32_t)found;
        for (long at = 0; at < columns;) {
            while (at < columns && mask[at] != 0)
                at++;
            if (at == columns)
                break;
            const long start = at;
            while (at < columns && mask[at] == 0)
                at++;
            if (found < room) {
                runs[2 * found] = (int32_t)start;
                runs[2 * found + 1] = (int32_t)at;
            }
            found++;
        }
    }
    first_run[rows] = (int32_t)found;
    return found;
}
