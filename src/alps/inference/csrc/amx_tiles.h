/* Building blocks of amx.c: tile instructions, expansion of rows into tiles, and output of sums. */

#ifndef ALPS_AMX_TILES_H
#define ALPS_AMX_TILES_H

#include "kernel.h"

#include <immintrin.h>

enum { TILE = 16, WIDTH = 64, DEPTH = 4, QUARTER = TILE / DEPTH, MOST = 2 * TILE };

typedef struct {
    uint8_t palette, start, none[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} shapes;

/* DEPTH words of sixteen rows. Rows past the last one are undefined, which is harmless because rows have separate sums. */
typedef uint16_t panel[DEPTH][TILE][ALPS_WORD];
typedef float sums[TILE][TILE];

/* Load before expanding, as in avx512bf16.c. On these processors there is no dependency on the register's old value. */
ALPS_INLINE __m512i expand_loaded(__m512i packed, uint32_t bits) {
    __asm__("" : "+v"(packed));
    return _mm512_maskz_expand_epi16(bits, packed);
}
ALPS_INLINE __m512i load_last(const uint16_t *values, unsigned count) {
    return _mm512_maskz_loadu_epi16(_bzhi_u32(UINT32_MAX, count), values);
}

/* Inline assembly, because the compiler assumes that its intrinsics for tiles do not read memory. */
#define CONFIGURE(shapes) __asm__ volatile("ldtilecfg %0" ::"m"(shapes) : "memory")
#define LOAD(tile, from, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"((int64_t)(stride)) : "memory")
#define STORE(tile, to, stride) \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"((int64_t)(stride)) : "memory")
#define PRODUCT(sum, weights, vectors) \
    __asm__ volatile("tdpbf16ps %%tmm" #vectors ", %%tmm" #weights ", %%tmm" #sum ::: "memory")
#define CLEAR(tile) __asm__ volatile("tilezero %%tmm" #tile ::: "memory")

/* The unread rest of up to sixteen rows. */
typedef struct {
    const uint32_t *mask;
    const uint16_t *values[TILE];
    int64_t words, ahead;
    int rows, last;
} task;

/* Expand words `w` to `w + depth` of row `r`. */
ALPS_INLINE void expand(task *task, int r, int64_t w, panel *out, const int depth, const int last) {
    const uint16_t *values = task->values[r];
    const uint32_t *mask = task->mask + r * task->words + w;
    __builtin_prefetch((const char *)values + task->ahead, 0, 2);
    __builtin_prefetch(mask + TILE * task->words, 0, 2);
#pragma GCC unroll 4
    for (int d = 0; d < depth; d++) {
        const uint32_t bits = mask[d];
        const unsigned count = (unsigned)__builtin_popcount(bits);
        const __m512i packed = last ? load_last(values, count) : _mm512_loadu_si512(values);
        _mm512_store_si512((*out)[d][r], expand_loaded(packed, bits));
        values += count;
    }
    task->values[r] = values;
}

/* Expand up to DEPTH words, from `w` on, of a quarter of the rows. */
ALPS_INLINE void expand_quarter(task *task, int quarter, int64_t w, panel *out) {
    const int first = quarter * QUARTER;
    if (w + DEPTH <= task->words && first + QUARTER <= task->rows && !task->last) {
#pragma GCC unroll 4
        for (int r = 0; r < QUARTER; r++) expand(task, first + r, w, out, DEPTH, 0);
        return;
    }
    const int depth = task->words - w < DEPTH ? (int)(task->words - w) : DEPTH;
    for (int r = first; r < first + QUARTER && r < task->rows; r++) expand(task, r, w, out, depth, 1);
}

/* Start with up to sixteen rows from `row` to `to`. */
static task begin(const alps_matrix *matrix, int64_t row, int64_t to) {
    task task = {.mask = matrix->mask + row * matrix->words, .words = matrix->words};
    if (row >= to) return task;
    task.rows = to - row < TILE ? (int)(to - row) : TILE;
    const int64_t first = alps_offset(matrix, row), end = alps_offset(matrix, row + task.rows);
    task.last = end + ALPS_WORD > matrix->kept;
    task.ahead = (end - first) * (int64_t)sizeof(uint16_t);
    for (int r = 0; r < task.rows; r++)
        task.values[r] = (const uint16_t *)matrix->values + alps_offset(matrix, row + r);
    return task;
}

/* Transpose 16 x 16 numbers of 32 bits: within quarters of registers, then quarters between registers. */
ALPS_INLINE void transpose(__m512i at[TILE]) {
    __m512i by[TILE];
    for (int i = 0; i < TILE; i += 2) {
        by[i] = _mm512_unpacklo_epi32(at[i], at[i + 1]);
        by[i + 1] = _mm512_unpackhi_epi32(at[i], at[i + 1]);
    }
    for (int i = 0; i < TILE; i += 4) {
        at[i] = _mm512_unpacklo_epi64(by[i], by[i + 2]);
        at[i + 1] = _mm512_unpackhi_epi64(by[i], by[i + 2]);
        at[i + 2] = _mm512_unpacklo_epi64(by[i + 1], by[i + 3]);
        at[i + 3] = _mm512_unpackhi_epi64(by[i + 1], by[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        const __m512i even = _mm512_shuffle_i32x4(at[i], at[i + 4], 0x88), odd = _mm512_shuffle_i32x4(at[i], at[i + 4], 0xdd);
        const __m512i later = _mm512_shuffle_i32x4(at[i + 8], at[i + 12], 0x88);
        const __m512i last = _mm512_shuffle_i32x4(at[i + 8], at[i + 12], 0xdd);
        by[i] = _mm512_shuffle_i32x4(even, later, 0x88);
        by[i + 4] = _mm512_shuffle_i32x4(odd, last, 0x88);
        by[i + 8] = _mm512_shuffle_i32x4(even, later, 0xdd);
        by[i + 12] = _mm512_shuffle_i32x4(odd, last, 0xdd);
    }
    for (int i = 0; i < TILE; i++) at[i] = by[i];
}

/* Write the sums of `tokens` vectors, which are columns, with the bias as rows of out. */
static void write_out(const alps_matrix *matrix, int64_t row, int rows, sums *totals, uint16_t *out, int tokens) {
    const __mmask16 some = (__mmask16)((1u << rows) - 1);
    __m512 bias = _mm512_setzero_ps();
    __m512i at[TILE];
    if (matrix->bias) {
        const __m256i half = _mm256_maskz_loadu_epi16(some, (const uint16_t *)matrix->bias + row);
        bias = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    for (int r = 0; r < TILE; r++) at[r] = _mm512_load_si512((*totals)[r]);
    transpose(at);
    for (int t = 0; t < tokens && t < TILE; t++) {
        const __m512 total = _mm512_add_ps(_mm512_castsi512_ps(at[t]), bias);
        _mm256_mask_storeu_epi16(out + t * matrix->rows + row, some, (__m256i)_mm512_cvtneps_pbh(total));
    }
}

#endif
