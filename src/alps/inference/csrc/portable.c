/* Portable C: visits the set bits of a word one by one, with products and sums in float32. */

#include "kernel.h"

#define DEFINE(kind, element, wide, narrow)                                                                        \
    static void kind##_multiply(const alps_matrix *matrix, int64_t from, int64_t to, const void *prepared,         \
                                int64_t stride, void *out, int tokens, void *room) {                               \
        (void)room;                                                                                                \
        for (int64_t row = from; row < to; row++) {                                                                \
            const element *value = (const element *)matrix->values + alps_offset(matrix, row);                     \
            const uint32_t *mask = matrix->mask + row * matrix->words;                                             \
            const float *x = prepared, bias = matrix->bias ? wide(((const element *)matrix->bias)[row]) : 0;       \
            float sums[ALPS_TOKENS] = {0};                                                                         \
            for (int64_t w = 0; w < matrix->words; w++, x += ALPS_WORD)                                            \
                for (uint32_t bits = mask[w]; bits; bits &= bits - 1) {                                            \
                    const float weight = wide(*value++), *column = x + __builtin_ctz(bits);                        \
                    sums[0] += weight * column[0];                                                                 \
                    for (int t = 1; t < tokens; t++) sums[t] += weight * column[t * stride];                       \
                }                                                                                                  \
            for (int t = 0; t < tokens; t++) ((element *)out)[t * matrix->rows + row] = narrow(sums[t] + bias);    \
        }                                                                                                          \
    }                                                                                                              \
    static void kind##_unpack(const alps_matrix *matrix, int64_t from, int64_t to, void *out) {                    \
        element *dense = out;                                                                                      \
        memset(out, 0, (size_t)((to - from) * matrix->columns) * sizeof(element));                                 \
        for (int64_t row = from; row < to; row++, dense += matrix->columns) {                                      \
            const element *value = (const element *)matrix->values + alps_offset(matrix, row);                     \
            const uint32_t *mask = matrix->mask + row * matrix->words;                                             \
            for (int64_t w = 0; w < matrix->words; w++)                                                            \
                for (uint32_t bits = mask[w]; bits; bits &= bits - 1)                                              \
                    dense[w * ALPS_WORD + __builtin_ctz(bits)] = *value++;                                         \
        }                                                                                                          \
    }                                                                                                              \
    static void kind##_widen(const void *from, float *to, int64_t count) {                                         \
        for (int64_t i = 0; i < count; i++) to[i] = wide(((const element *)from)[i]);                              \
    }

DEFINE(bf16, uint16_t, alps_from_bf16, alps_to_bf16)
DEFINE(f16, uint16_t, alps_from_f16, alps_to_f16)
DEFINE(f32, float, alps_from_f32, alps_to_f32)

const alps_path alps_portable = {
    .name = "portable",
    .multiply = {bf16_multiply, f16_multiply, f32_multiply},
    .unpack = {bf16_unpack, f16_unpack, f32_unpack},
    .widen = {bf16_widen, f16_widen, f32_widen},
};
