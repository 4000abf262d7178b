/* Products with one vector on a processor with AMX: in float32, first the even columns of a word, then the odd ones.
   vdpbf16ps is no faster here than the instructions that it replaces, and it occupies the port of the expansion. */

#ifndef ALPS_AMX_ONE_H
#define ALPS_AMX_ONE_H

#define ROWS 4
#define SUMS 4
#define STEP 32
#define ELEMENT uint16_t
#define INPUT float
#define VECTOR __m512i
#define SUM __m512
#define NAME(f) one_##f
ALPS_INLINE __m512i one_expand(const uint16_t *values, uint32_t bits) {
    return expand_loaded(_mm512_loadu_si512(values), bits);
}
ALPS_INLINE __m512i one_expand_last(const uint16_t *values, uint32_t bits) {
    return expand_loaded(load_last(values, (unsigned)__builtin_popcount(bits)), bits);
}
ALPS_INLINE void one_store(uint16_t *out, __m512i vector) { _mm512_storeu_si512(out, vector); }
ALPS_INLINE __m512 one_zero(void) { return _mm512_setzero_ps(); }
ALPS_INLINE __m512 one_add(__m512 sum, __m512i vector, const float *x) {
    const __m512i odd = _mm512_and_si512(vector, _mm512_set1_epi32((int)0xffff0000));
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(vector, 16)), _mm512_loadu_ps(x), sum);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(odd), _mm512_loadu_ps(x + 16), sum);
}
ALPS_INLINE float one_total(__m512 sum) { return _mm512_reduce_add_ps(sum); }
ALPS_INLINE uint16_t one_narrow(float number) { return alps_to_bf16(number); }
ALPS_INLINE float one_wide(uint16_t half) { return alps_from_bf16(half); }
#include "row_loops.h"

/* Store the even columns of every word and then the odd ones, in float32. */
static void one_arrange(const uint16_t *x, float *out, int64_t stride) {
    for (int64_t at = 0; at < stride; at += ALPS_WORD) {
        const __m512i pairs = _mm512_loadu_si512(x + at);
        _mm512_storeu_si512(out + at, _mm512_slli_epi32(pairs, 16));
        _mm512_storeu_si512(out + at + 16, _mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)));
    }
}

#endif
