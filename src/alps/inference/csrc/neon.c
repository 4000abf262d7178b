/* NEON of 64-bit ARM: 8 columns per step for elements of 16 bits, 4 for those of 32. A byte or half a byte of the mask
   selects a byte shuffle from a table; an index out of range gives zero. Sums are in float32. */

#include "kernel.h"

#include <arm_neon.h>

#define ROWS 2
#define SUMS 8

static _Alignas(64) uint8_t shuffles16[256][16];
static _Alignas(64) uint8_t shuffles32[16][16];

static void fill(uint8_t *shuffle, int bits, int columns, int bytes) {
    for (int column = 0, position = 0; column < columns; column++) {
        const int is_kept = bits >> column & 1;
        for (int k = 0; k < bytes; k++) shuffle[bytes * column + k] = is_kept ? (uint8_t)(bytes * position + k) : 0xff;
        position += is_kept;
    }
}

static void start(void) {
    for (int bits = 0; bits < 256; bits++) fill(shuffles16[bits], bits, 8, 2);
    for (int bits = 0; bits < 16; bits++) fill(shuffles32[bits], bits, 4, 4);
}

typedef struct {
    float32x4_t low, high;
} eight;

ALPS_INLINE uint16x8_t expand16(uint16x8_t values, uint32_t bits) {
    return vreinterpretq_u16_u8(vqtbl1q_u8(vreinterpretq_u8_u16(values), vld1q_u8(shuffles16[bits])));
}
ALPS_INLINE uint16x8_t load_last16(const uint16_t *values, uint32_t bits) {
    uint16_t some[8] = {0};
    memcpy(some, values, 2 * (size_t)__builtin_popcount(bits));
    return vld1q_u16(some);
}
ALPS_INLINE eight zero8(void) { return (eight){vdupq_n_f32(0), vdupq_n_f32(0)}; }
ALPS_INLINE eight add8(eight sum, float32x4_t low, float32x4_t high, const float *x) {
    return (eight){vfmaq_f32(sum.low, low, vld1q_f32(x)), vfmaq_f32(sum.high, high, vld1q_f32(x + 4))};
}
ALPS_INLINE float total8(eight sum) { return vaddvq_f32(vaddq_f32(sum.low, sum.high)); }

#define STEP 8
#define ELEMENT uint16_t
#define INPUT float
#define VECTOR uint16x8_t
#define SUM eight
#define NAME(f) bf16_##f
ALPS_INLINE uint16x8_t bf16_expand(const uint16_t *values, uint32_t bits) { return expand16(vld1q_u16(values), bits); }
ALPS_INLINE uint16x8_t bf16_expand_last(const uint16_t *values, uint32_t bits) {
    return expand16(load_last16(values, bits), bits);
}
ALPS_INLINE void bf16_store(uint16_t *out, uint16x8_t vector) { vst1q_u16(out, vector); }
ALPS_INLINE eight bf16_zero(void) { return zero8(); }
ALPS_INLINE eight bf16_add(eight sum, uint16x8_t vector, const float *x) {
    return add8(sum, vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(vector), 16)),
                vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(vector), 16)), x);
}
ALPS_INLINE float bf16_total(eight sum) { return total8(sum); }
ALPS_INLINE uint16_t bf16_narrow(float number) { return alps_to_bf16(number); }
ALPS_INLINE float bf16_wide(uint16_t half) { return alps_from_bf16(half); }
#include "row_loops.h"

#define STEP 8
#define ELEMENT uint16_t
#define INPUT float
#define VECTOR uint16x8_t
#define SUM eight
#define NAME(f) f16_##f
ALPS_INLINE uint16x8_t f16_expand(const uint16_t *values, uint32_t bits) { return bf16_expand(values, bits); }
ALPS_INLINE uint16x8_t f16_expand_last(const uint16_t *values, uint32_t bits) { return bf16_expand_last(values, bits); }
ALPS_INLINE void f16_store(uint16_t *out, uint16x8_t vector) { vst1q_u16(out, vector); }
ALPS_INLINE eight f16_zero(void) { return zero8(); }
ALPS_INLINE eight f16_add(eight sum, uint16x8_t vector, const float *x) {
    return add8(sum, vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(vector))),
                vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(vector))), x);
}
ALPS_INLINE float f16_total(eight sum) { return total8(sum); }
ALPS_INLINE uint16_t f16_narrow(float number) { return alps_to_f16(number); }
ALPS_INLINE float f16_wide(uint16_t half) { return alps_from_f16(half); }
#include "row_loops.h"

#define STEP 4
#define ELEMENT float
#define INPUT float
#define VECTOR float32x4_t
#define SUM float32x4_t
#define NAME(f) f32_##f
ALPS_INLINE float32x4_t f32_expand(const float *values, uint32_t bits) {
    const uint8x16_t octets = vreinterpretq_u8_f32(vld1q_f32(values));
    return vreinterpretq_f32_u8(vqtbl1q_u8(octets, vld1q_u8(shuffles32[bits])));
}
ALPS_INLINE float32x4_t f32_expand_last(const float *values, uint32_t bits) {
    float some[4] = {0};
    memcpy(some, values, 4 * (size_t)__builtin_popcount(bits));
    return f32_expand(some, bits);
}
ALPS_INLINE void f32_store(float *out, float32x4_t vector) { vst1q_f32(out, vector); }
ALPS_INLINE float32x4_t f32_zero(void) { return vdupq_n_f32(0); }
ALPS_INLINE float32x4_t f32_add(float32x4_t sum, float32x4_t vector, const float *x) {
    return vfmaq_f32(sum, vector, vld1q_f32(x));
}
ALPS_INLINE float f32_total(float32x4_t sum) { return vaddvq_f32(sum); }
ALPS_INLINE float f32_narrow(float number) { return number; }
ALPS_INLINE float f32_wide(float number) { return number; }
#include "row_loops.h"

static void widen_bf16(const void *from, float *to, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] = alps_from_bf16(((const uint16_t *)from)[i]);
}

static void widen_f16(const void *from, float *to, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] = alps_from_f16(((const uint16_t *)from)[i]);
}

const alps_path alps_neon = {
    .name = "neon",
    .start = start,
    .multiply = {bf16_multiply, f16_multiply, f32_multiply},
    .unpack = {bf16_unpack, f16_unpack, f32_unpack},
    .widen = {widen_bf16, widen_f16, 0},
};
