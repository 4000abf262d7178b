/* What all files of the kernel share: a packed matrix, an instruction set's functions, and conversions of one number.

   A packed matrix is described in docs/format.md: a word of the mask for every 32 columns of a row, and the kept
   values of all rows one after the other. Nothing here reads a byte outside of these arrays. */

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
#define ALPS_TOKENS 8 /* products with that many vectors at once, of one expansion */
#define ALPS_INLINE static inline __attribute__((always_inline))

enum { ALPS_BF16, ALPS_F16, ALPS_F32, ALPS_KINDS };

typedef struct {
    const uint32_t *mask; /* rows x words */
    const void *values;   /* kept */
    const void *offsets;  /* rows + 1, of 32 or 64 bits */
    const void *bias;     /* rows, in the values' type; or NULL */
    int64_t rows, columns, words, kept;
    int wide; /* whether offsets have 64 bits */
    int kind;
} alps_matrix;

/* out (tokens, rows) = x (tokens, stride) times rows `from` to `to` of the matrix, up to ALPS_TOKENS tokens, or
   what the path says. x was prepared: zeros behind the last column up to a whole word, in float32 unless the path takes it
   as it is, and arranged if it does that. `room` is the thread's own, aligned to 64 bytes. */
typedef void (*alps_multiply_rows)(const alps_matrix *, int64_t from, int64_t to, const void *x, int64_t stride,
                                   void *out, int tokens, void *room);

/* Rows `from` to `to` as a dense matrix, the first of them at `out`. */
typedef void (*alps_unpack_rows)(const alps_matrix *, int64_t from, int64_t to, void *out);

/* `count` numbers in the matrix's type as float32. */
typedef void (*alps_widen)(const void *from, float *to, int64_t count);

/* Prepared vectors of `stride` numbers in the order that a path multiplies them in. */
typedef void (*alps_arrange)(const void *x, void *out, int64_t stride, int tokens);

typedef struct alps_path {
    const char *name;
    void (*start)(void);            /* fills tables, once; or NULL */
    const struct alps_path *below;  /* has the functions that are NULL here */
    alps_multiply_rows multiply[ALPS_KINDS];
    alps_unpack_rows unpack[ALPS_KINDS];
    alps_widen widen[ALPS_KINDS];   /* goes with multiply; NULL where that takes x as it is */
    alps_arrange arrange;           /* goes with multiply; or NULL */
    int tokens;                     /* that multiply takes at most; 0 for ALPS_TOKENS */
    size_t (*room)(const alps_matrix *, int tokens); /* bytes that multiply needs in each thread; or NULL */
} alps_path;

extern const alps_path alps_portable, alps_avx2, alps_avx512, alps_avx512bf16, alps_amx, alps_neon;

/* Whether the system lets this process use tiles, which has to be asked for. */
int alps_amx_permitted(void);

/* Runs work(job) on up to `threads` threads at once, this one among them; returns when all have returned. */
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

/* Element types: the numbers' own, and how one of them becomes a float and back, rounded to nearest even. */

ALPS_INLINE float alps_from_bf16(uint16_t half) { return alps_float((uint32_t)half << 16); }

ALPS_INLINE uint16_t alps_to_bf16(float number) {
    uint32_t bits = alps_bits(number);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40); /* NaN stays one */
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
