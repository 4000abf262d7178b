/* AVX2 with FMA and F16C: 8 columns per step. AVX2 has no expand instruction. Instead a byte of the mask selects a byte
   shuffle from a table for elements of 16 bits, or a lane permutation for those of 32. Sums are in float32. */

#include "kernel.h"

#include <immintrin.h>

#define ROWS 2
#define SUMS 8

static _Alignas(64) uint8_t shuffles[256][16];
/* Low bits: source lane. Sign bit: set if the column is kept. */
static _Alignas(64) uint32_t lanes[256][8];

static void start(void) {
    for (int bits = 0; bits < 256; bits++)
        for (int column = 0, position = 0; column < 8; column++) {
            const int is_kept = bits >> column & 1;
            shuffles[bits][2 * column] = is_kept ? (uint8_t)(2 * position) : 0x80;
            shuffles[bits][2 * column + 1] = is_kept ? (uint8_t)(2 * position + 1) : 0x80;
            lanes[bits][column] = is_kept ? 0x80000000u | (uint32_t)position : 0;
            position += is_kept;
        }
}

ALPS_INLINE __m128i expand16(__m128i values, uint32_t bits) {
    return _mm_shuffle_epi8(values, _mm_load_si128((const __m128i *)shuffles[bits]));
}
ALPS_INLINE __m128i load_last16(const uint16_t *values, uint32_t bits) {
    uint16_t some[8] = {0};
    memcpy(some, values, 2 * (size_t)__builtin_popcount(bits));
    return _mm_loadu_si128((const __m128i *)some);
}
ALPS_INLINE float total(__m256 sum) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

#define STEP 8
#define ELEMENT uint16_t
#define INPUT float
#define VECTOR __m128i
#define SUM __m256
#define NAME(f) bf16_##f
ALPS_INLINE __m128i bf16_expand(const uint16_t *values, uint32_t bits) {
    return expand16(_mm_loadu_si128((const __m128i *)values), bits);
}
ALPS_INLINE __m128i bf16_expand_last(const uint16_t *values, uint32_t bits) {
    return expand16(load_last16(values, bits), bits);
}
ALPS_INLINE void bf16_store(uint16_t *out, __m128i vector) { _mm_storeu_si128((__m128i *)out, vector); }
ALPS_INLINE __m256 bf16_zero(void) { return _mm256_setzero_ps(); }
ALPS_INLINE __m256 bf16_add(__m256 sum, __m128i vector, const float *x) {
    const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(vector), 16);
    return _mm256_fmadd_ps(_mm256_castsi256_ps(wide), _mm256_loadu_ps(x), sum);
}
ALPS_INLINE float bf16_total(__m256 sum) { return total(sum); }
ALPS_INLINE uint16_t bf16_narrow(float number) { return alps_to_bf16(number); }
ALPS_INLINE float bf16_wide(uint16_t half) { return alps_from_bf16(half); }
#include "row_loops.h"

#define STEP 8
#define ELEMENT uint16_t
#define INPUT float
#define VECTOR __m128i
#define SUM __m256
#define NAME(f) f16_##f
ALPS_INLINE __m128i f16_expand(const uint16_t *values, uint32_t bits) { return bf16_expand(values, bits); }
ALPS_INLINE __m128i f16_expand_last(const uint16_t *values, uint32_t bits) { return bf16_expand_last(values, bits); }
ALPS_INLINE void f16_store(uint16_t *out, __m128i vector) { _mm_storeu_si128((__m128i *)out, vector); }
ALPS_INLINE __m256 f16_zero(void) { return _mm256_setzero_ps(); }
ALPS_INLINE __m256 f16_add(__m256 sum, __m128i vector, const float *x) {
    return _mm256_fmadd_ps(_mm256_cvtph_ps(vector), _mm256_loadu_ps(x), sum);
}
ALPS_INLINE float f16_total(__m256 sum) { return total(sum); }
ALPS_INLINE uint16_t f16_narrow(float number) { return alps_to_f16(number); }
ALPS_INLINE float f16_wide(uint16_t half) { return alps_from_f16(half); }
#include "row_loops.h"

#define STEP 8
#define ELEMENT float
#define INPUT float
#define VECTOR __m256
#define SUM __m256
#define NAME(f) f32_##f
ALPS_INLINE __m256 f32_expand(const float *values, uint32_t bits) {
    const __m256i lane = _mm256_load_si256((const __m256i *)lanes[bits]);
    const __m256 placed = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), lane);
    return _mm256_and_ps(placed, _mm256_castsi256_ps(_mm256_srai_epi32(lane, 31)));
}
ALPS_INLINE __m256 f32_expand_last(const float *values, uint32_t bits) {
    float some[8] = {0};
    memcpy(some, values, 4 * (size_t)__builtin_popcount(bits));
    return f32_expand(some, bits);
}
ALPS_INLINE void f32_store(float *out, __m256 vector) { _mm256_storeu_ps(out, vector); }
ALPS_INLINE __m256 f32_zero(void) { return _mm256_setzero_ps(); }
ALPS_INLINE __m256 f32_add(__m256 sum, __m256 vector, const float *x) {
    return _mm256_fmadd_ps(vector, _mm256_loadu_ps(x), sum);
}
ALPS_INLINE float f32_total(__m256 sum) { return total(sum); }
ALPS_INLINE float f32_narrow(float number) { return number; }
ALPS_INLINE float f32_wide(float number) { return number; }
#include "row_loops.h"

static void widen_bf16(const void *from, float *to, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] = alps_from_bf16(((const uint16_t *)from)[i]);
}

static void widen_f16(const void *from, float *to, int64_t count) {
    const uint16_t *halves = from;
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(halves + i))));
    for (; i < count; i++) to[i] = alps_from_f16(halves[i]);
}

const alps_path alps_avx2 = {
    .name = "avx2",
    .start = start,
    .multiply = {bf16_multiply, f16_multiply, f32_multiply},
    .unpack = {bf16_unpack, f16_unpack, f32_unpack},
    .widen = {widen_bf16, widen_f16, 0},
};
