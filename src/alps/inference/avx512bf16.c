/* AVX-512 with VBMI2 and BF16 (Zen 4, Ice Lake's expansion with Cooper Lake's product: Sapphire Rapids and later).

   32 columns a step: vpexpandw puts the kept values under the bits of a word of the mask, vdpbf16ps multiplies pairs of
   bfloat16 exactly and adds them in float32. What has no instruction of its own here is taken from avx512.c. */

#include "kernel.h"

#include <immintrin.h>

#define ROWS 2
#define SUMS 16

/* An expansion waits for what its register held before, even where it zeroes it: a fresh one breaks the chain. And one
   of a memory operand takes several times as long as a load before it. */
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
#include "rows.h"

const alps_path alps_avx512bf16 = {
    .name = "avx512bf16",
    .below = &alps_avx512,
    .multiply = {[ALPS_BF16] = bf16_multiply},
    .unpack = {[ALPS_BF16] = bf16_unpack, [ALPS_F16] = bf16_unpack},
};
