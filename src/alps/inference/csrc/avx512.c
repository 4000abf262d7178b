/* AVX-512 F, BW, VL and DQ (Skylake-X and later): 16 columns per step, widened to float32, expanded by vexpandps with 16
   bits of the mask, then multiplied and added in float32. */

#include "kernel.h"

#include <immintrin.h>

#define ROWS 2
#define SUMS 16

/* An expansion depends on the old value of its target register, even if it zeroes it; a zeroed register breaks this
   dependency. An expansion of a memory operand takes several times as long as a load followed by an expansion. */
ALPS_INLINE __m512i expand32(__m512i packed, uint32_t bits) {
    __m512i fresh = _mm512_setzero_si512();
    __asm__("" : "+v"(packed), "+v"(fresh));
    return _mm512_mask_expand_epi32(fresh, (__mmask16)bits, packed);
}
ALPS_INLINE __m256i load_last16(const uint16_t *values, uint32_t bits) {
    return _mm256_maskz_loadu_epi16((__mmask16)_bzhi_u32(0xffff, (unsigned)__builtin_popcount(bits)), values);
}
ALPS_INLINE __m512i expand16(__m256i values, uint32_t bits) {
    return expand32(_mm512_cvtepu16_epi32(values), bits);
}
ALPS_INLINE void store16(uint16_t *out, __m512i vector) {
    _mm256_storeu_si256((__m256i *)out, _mm512_cvtepi32_epi16(vector));
}

#define STEP 16
#define ELEMENT uint16_t
#define INPUT float
#define VECTOR __m512i
#define SUM __m512
#define NAME(f) bf16_##f
ALPS_INLINE __m512i bf16_expand(const uint16_t *values, uint32_t bits) {
    return expand16(_mm256_loadu_si256((const __m256i *)values), bits);
}
ALPS_INLINE __m512i bf16_expand_last(const uint16_t *values, uint32_t bits) {
    return expand16(load_last16(values, bits), bits);
}
ALPS_INLINE void bf16_store(uint16_t *out, __m512i vector) { store16(out, vector); }
ALPS_INLINE __m512 bf16_zero(void) { return _mm512_setzero_ps(); }
ALPS_INLINE __m512 bf16_add(__m512 sum, __m512i vector, const float *x) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(vector, 16)), _mm512_loadu_ps(x), sum);
}
ALPS_INLINE float bf16_total(__m512 sum) { return _mm512_reduce_add_ps(sum); }
ALPS_INLINE uint16_t bf16_narrow(float number) { return alps_to_bf16(number); }
ALPS_INLINE float bf16_wide(uint16_t half) { return alps_from_bf16(half); }
#include "row_loops.h"

#define STEP 16
#define ELEMENT uint16_t
#define INPUT float
#define VECTOR __m512i
#define SUM __m512
#define NAME(f) f16_##f
ALPS_INLINE __m512i f16_expand(const uint16_t *values, uint32_t bits) { return bf16_expand(values, bits); }
ALPS_INLINE __m512i f16_expand_last(const uint16_t *values, uint32_t bits) { return bf16_expand_last(values, bits); }
ALPS_INLINE void f16_store(uint16_t *out, __m512i vector) { store16(out, vector); }
ALPS_INLINE __m512 f16_zero(void) { return _mm512_setzero_ps(); }
ALPS_INLINE __m512 f16_add(__m512 sum, __m512i vector, const float *x) {
    return _mm512_fmadd_ps(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(vector)), _mm512_loadu_ps(x), sum);
}
ALPS_INLINE float f16_total(__m512 sum) { return _mm512_reduce_add_ps(sum); }
ALPS_INLINE uint16_t f16_narrow(float number) { return alps_to_f16(number); }
ALPS_INLINE float f16_wide(uint16_t half) { return alps_from_f16(half); }
#include "row_loops.h"

#define STEP 16
#define ELEMENT float
#define INPUT float
#define VECTOR __m512
#define SUM __m512
#define NAME(f) f32_##f
ALPS_INLINE __m512 f32_expand(const float *values, uint32_t bits) {
    return _mm512_castsi512_ps(expand32(_mm512_loadu_si512(values), bits));
}
ALPS_INLINE __m512 f32_expand_last(const float *values, uint32_t bits) {
    const __mmask16 some = (__mmask16)_bzhi_u32(0xffff, (unsigned)__builtin_popcount(bits));
    return _mm512_castsi512_ps(expand32(_mm512_maskz_loadu_epi32(some, values), bits));
}
ALPS_INLINE void f32_store(float *out, __m512 vector) { _mm512_storeu_ps(out, vector); }
ALPS_INLINE __m512 f32_zero(void) { return _mm512_setzero_ps(); }
ALPS_INLINE __m512 f32_add(__m512 sum, __m512 vector, const float *x) {
    return _mm512_fmadd_ps(vector, _mm512_loadu_ps(x), sum);
}
ALPS_INLINE float f32_total(__m512 sum) { return _mm512_reduce_add_ps(sum); }
ALPS_INLINE float f32_narrow(float number) { return number; }
ALPS_INLINE float f32_wide(float number) { return number; }
#include "row_loops.h"

static void widen_bf16(const void *from, float *to, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] = alps_from_bf16(((const uint16_t *)from)[i]);
}

static void widen_f16(const void *from, float *to, int64_t count) {
    const uint16_t *halves = from;
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
        _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(halves + i))));
    for (; i < count; i++) to[i] = alps_from_f16(halves[i]);
}

const alps_path alps_avx512 = {
    .name = "avx512",
    .multiply = {bf16_multiply, f16_multiply, f32_multiply},
    .unpack = {bf16_unpack, f16_unpack, f32_unpack},
    .widen = {widen_bf16, widen_f16, 0},
};
