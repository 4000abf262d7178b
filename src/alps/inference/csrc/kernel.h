/* Common declarations: the packed matrix, the functions of an instruction set, and conversions of single numbers.

   A packed matrix is described in docs/reference/format.md: a word of the mask for every 32 columns of a row, and the kept
   values of all rows one after the other. No function reads a byte outside of these arrays. */

#ifndef ALPS_KERNEL_H
#define ALPS_KERNEL_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the packed format is little-endian"
#endif

#define ALPS_VERSION 1
#define ALPS_WORD 32
#define ALPS_TOKENS 8 /* largest number of vectors that share one expansion */
#define ALPS_INLINE static inline __attribute__((always_inline))

enum { ALPS_BF16, ALPS_F16, ALPS_F32, ALPS_KINDS };

typedef struct {
    const uint32_t *mask; /* rows x words */
    const void *values;   /* kept */
    const void *offsets;  /* rows + 1, of 32 or 64 bits */
    const void *bias;     /* rows, in the values' type; or NULL */
    int64_t rows, columns, words, kept;
    int wide; /* 1 if offsets have 64 bits */
    int kind;
} alps_matrix;

/* Compute out (tokens, rows) = x (tokens, stride) times rows `from` to `to` of the matrix, for up to ALPS_TOKENS tokens or
   the path's own limit. x is prepared: padded with zeros to a whole word, widened to float32 if the path has `widen`, and
   reordered if it has `arrange`. `room` is memory of this thread, aligned to 64 bytes. */
typedef void (*alps_multiply_rows)(const alps_matrix *, int64_t from, int64_t to, const void *x, int64_t stride,
                                   void *out, int tokens, void *room);

/* Write rows `from` to `to` as a dense matrix to `out`. */
typedef void (*alps_unpack_rows)(const alps_matrix *, int64_t from, int64_t to, void *out);

/* Convert `count` numbers from the matrix's type to float32. */
typedef void (*alps_widen)(const void *from, float *to, int64_t count);

/* Reorder padded vectors of `stride` numbers for the path's products. */
typedef void (*alps_arrange)(const void *x, void *out, int64_t stride, int tokens);

typedef struct alps_path {
    const char *name;
    void (*start)(void);            /* fills tables, once; or NULL */
    const struct alps_path *below;  /* provides the functions that are NULL here */
    alps_multiply_rows multiply[ALPS_KINDS];
    alps_unpack_rows unpack[ALPS_KINDS];
    alps_widen widen[ALPS_KINDS];   /* for multiply; NULL if that takes x in its own type */
    alps_arrange arrange;           /* for multiply; or NULL */
    int tokens;                     /* limit of multiply; 0 for ALPS_TOKENS */
    size_t (*room)(const alps_matrix *, int tokens); /* bytes that multiply needs in each thread; or NULL */
} alps_path;

extern const alps_path alps_portable, alps_avx2, alps_avx512, alps_avx512bf16, alps_amx, alps_neon;

/* Request the system's permission to use tiles, and return whether it was granted. */
int alps_amx_permitted(void);

/* Run work(job) on up to `threads` threads at once, including this one, and return when all have returned. */
void alps_team(void (*work)(void *), void *job, int threads);
void alps_use_openmp(void *parallel);

ALPS_INLINE int64_t alps_offset(const alps_matrix *matrix, int64_t row) {
    return matrix->wide ? ((const int64_t *)matrix->offsets)[row] : ((const int32_t *)matrix->offsets)[row];
}

ALPS_INLINE uint32_t alps_bits(float number) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    return bits;
}

ALPS_INLINE float alps_float(uint32_t bits) {
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

/* Conversions of each element type to and from float, rounded to nearest even. */

ALPS_INLINE float alps_from_bf16(uint16_t half) { return alps_float((uint32_t)half << 16); }

ALPS_INLINE uint16_t alps_to_bf16(float number) {
    uint32_t bits = alps_bits(number);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40); /* NaN stays NaN */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

ALPS_INLINE float alps_from_f16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return alps_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    /* The exponent's bias differs by 112; the product is exact, for subnormal numbers, too. */
    return alps_float(sign | alps_bits(alps_float(rest << 13) * 0x1p112f));
}

ALPS_INLINE uint16_t alps_to_f16(float number) {
    uint32_t bits = alps_bits(number), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* 65520 and more */
    /* Below 2^-14 the last bit is worth 2^-24, as it is in 0.5. */
    if (rest < 0x38800000) return (uint16_t)(sign | (alps_bits(alps_float(rest) + 0.5f) - alps_bits(0.5f)));
    return (uint16_t)(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}

ALPS_INLINE float alps_from_f32(float number) { return number; }
ALPS_INLINE float alps_to_f32(float number) { return number; }

#endif
