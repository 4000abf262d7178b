/* AVX-512 with VBMI2 and BF16 (Zen 4, Sapphire Rapids and later).

   32 columns per step: vpexpandw expands the kept values by a word of the mask, vdpbf16ps multiplies pairs of bfloat16
   exactly and adds them in float32. Other types use the functions of avx512.c. */

#include "kernel.h"

#include <immintrin.h>

#define ROWS 2
#define SUMS 16

/* An expansion depends on the old value of its target register, even if it zeroes it; a zeroed register breaks this
   dependency. An expansion of a memory operand takes several times as long as a load followed by an expansion. */
ALPS_INLINE __m512i expand(__m512i packed, uint32_t bits) {
    __m512i fresh = _mm512_setzero_si512();
    __asm__("" : "+v"(packed), "+v"(fresh));
    return _mm512_mask_expand_epi16(fresh, bits, packed);
}

#define STEP 32
#define ELEMENT uint16_t
#define INPUT uint16_t
#define VECTOR __m512i
#define SUM __m512
#define NAME(f) bf16_##f
ALPS_INLINE __m512i bf16_expand(const uint16_t *values, uint32_t bits) {
    return expand(_mm512_loadu_si512(values), bits);
}
ALPS_INLINE __m512i bf16_expand_last(const uint16_t *values, uint32_t bits) {
    const __mmask32 some = _bzhi_u32(UINT32_MAX, (unsigned)__builtin_popcount(bits));
    return expand(_mm512_maskz_loadu_epi16(some, values), bits);
}
ALPS_INLINE void bf16_store(uint16_t *out, __m512i vector) { _mm512_storeu_si512(out, vector); }
ALPS_INLINE __m512 bf16_zero(void) { return _mm512_setzero_ps(); }
ALPS_INLINE __m512 bf16_add(__m512 sum, __m512i vector, const uint16_t *x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)vector, (__m512bh)_mm512_loadu_si512(x));
}
ALPS_INLINE float bf16_total(__m512 sum) { return _mm512_reduce_add_ps(sum); }
ALPS_INLINE uint16_t bf16_narrow(float number) { return alps_to_bf16(number); }
ALPS_INLINE float bf16_wide(uint16_t half) { return alps_from_bf16(half); }
#include "row_loops.h"

/* If there are too many vectors for one expansion in registers, four rows are expanded into memory first. */
enum { FOUR = 4, LIMIT = 64 };

/* Return the sum of each of sixteen registers, in order. */
ALPS_INLINE __m512 totals(__m512 at[16]) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        at[i] = _mm512_add_ps(_mm512_unpacklo_ps(at[2 * i], at[2 * i + 1]), _mm512_unpackhi_ps(at[2 * i], at[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512d even = _mm512_castps_pd(at[2 * i]), odd = _mm512_castps_pd(at[2 * i + 1]);
        at[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)), _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
    }
    const __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(at[0], at[1], 0x88), _mm512_shuffle_f32x4(at[0], at[1], 0xdd));
    const __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(at[2], at[3], 0x88), _mm512_shuffle_f32x4(at[2], at[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}

/* Multiply four consecutive expanded rows with `tokens` vectors; returns the four sums of each vector in turn. */
ALPS_INLINE __m512 multiply_four(const uint16_t *rows, const uint16_t *x, int64_t stride, const int tokens) {
    __m512 sums[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) sums[i] = _mm512_setzero_ps();
    for (int64_t column = 0; column < stride; column += ALPS_WORD) {
        __m512bh weights[FOUR];
#pragma GCC unroll 4
        for (int r = 0; r < FOUR; r++) weights[r] = (__m512bh)_mm512_load_si512(rows + r * stride + column);
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++) {
            const __m512bh vector = (__m512bh)_mm512_loadu_si512(x + t * stride + column);
#pragma GCC unroll 4
            for (int r = 0; r < FOUR; r++) sums[t * FOUR + r] = _mm512_dpbf16_ps(sums[t * FOUR + r], weights[r], vector);
        }
    }
    return totals(sums);
}

static void many_multiply(const alps_matrix *matrix, int64_t from, int64_t to, const void *prepared, int64_t stride,
                          void *target, int tokens, void *room) {
    const uint16_t *x = prepared;
    uint16_t *out = target, *rows = room;
    alps_matrix padded = *matrix;
    padded.columns = stride;
    if (tokens <= ALPS_TOKENS) {
        bf16_multiply(matrix, from, to, x, stride, out, tokens, room);
        return;
    }
    for (int64_t row = from; row < to; row += FOUR) {
        const int count = to - row < FOUR ? (int)(to - row) : FOUR;
        float bias[FOUR] = {0};
        for (int r = 0; matrix->bias && r < count; r++)
            bias[r] = alps_from_bf16(((const uint16_t *)matrix->bias)[row + r]);
        bf16_unpack(&padded, row, row + count, rows);
        for (int first = 0; first < tokens; first += FOUR) {
            const uint16_t *vectors = x + first * stride;
            const int some = tokens - first < FOUR ? tokens - first : FOUR;
            uint16_t halves[4][FOUR];
            __m512 sums = _mm512_setzero_ps();
            switch (some) {
            case 1: sums = multiply_four(rows, vectors, stride, 1); break;
            case 2: sums = multiply_four(rows, vectors, stride, 2); break;
            case 3: sums = multiply_four(rows, vectors, stride, 3); break;
            case 4: sums = multiply_four(rows, vectors, stride, 4); break;
            }
            sums = _mm512_add_ps(sums, _mm512_broadcast_f32x4(_mm_loadu_ps(bias)));
            _mm256_storeu_si256((__m256i *)halves, (__m256i)_mm512_cvtneps_pbh(sums));
            for (int t = 0; t < some; t++)
                memcpy(out + (first + t) * matrix->rows + row, halves[t], (size_t)count * sizeof(uint16_t));
        }
    }
}

static size_t room(const alps_matrix *matrix, int tokens) {
    return tokens > ALPS_TOKENS ? (size_t)(FOUR * matrix->words) * 64 : 0;
}

const alps_path alps_avx512bf16 = {
    .name = "avx512bf16",
    .below = &alps_avx512,
    .tokens = LIMIT,
    .room = room,
    .multiply = {[ALPS_BF16] = many_multiply},
    .unpack = {[ALPS_BF16] = bf16_unpack, [ALPS_F16] = bf16_unpack},
};
