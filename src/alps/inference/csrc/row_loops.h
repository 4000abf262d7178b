/* Loops over rows for all instruction sets with vector registers. A source file defines the names below for one element
   type and includes this file, which defines NAME(multiply) and NAME(unpack).

   STEP                 columns that one expansion fills; divides 32
   ELEMENT, INPUT       type of a value, and of a prepared x
   VECTOR, SUM          an expanded register, and sums in float32
   ROWS, SUMS           limits on rows at a time and on registers for sums; defined once per source file
   NAME(f)              adds the prefix of the element type to a function name
   NAME(expand)         ELEMENT *values, bits -> VECTOR: values at the set bits, zeros elsewhere; reads STEP values
   NAME(expand_last)    as NAME(expand), but reads only as many values as there are set bits
   NAME(store)          ELEMENT *out, VECTOR: stores STEP elements
   NAME(zero), NAME(add), NAME(total)    a SUM of zeros; SUM, VECTOR, INPUT *x -> SUM; SUM -> float
   NAME(narrow), NAME(wide)    float -> ELEMENT, and back */

enum { NAME(PER_WORD) = ALPS_WORD / STEP };

ALPS_INLINE VECTOR NAME(chunk)(const ELEMENT **values, uint32_t word, int chunk, int last) {
    uint32_t bits = STEP == 32 ? word : word >> (chunk * STEP) & (uint32_t)((UINT64_C(1) << STEP) - 1);
    VECTOR vector = last ? NAME(expand_last)(*values, bits) : NAME(expand)(*values, bits);
    *values += __builtin_popcount(bits);
    return vector;
}

/* Multiply `rows` rows with `tokens` vectors. Rows share the loads of x, and vectors share the expansions. With few products,
   each has several sums to hide the latency of additions. `last` is set for rows so close to the end of all values that
   loading a whole register would read past it. */
ALPS_INLINE void NAME(block)(const alps_matrix *matrix, int64_t row, const INPUT *x, int64_t stride, ELEMENT *out,
                             const int rows, const int tokens, const int last) {
    const int ways = rows * tokens == 1 ? 4 : rows * tokens <= 3 ? 2 : 1;
    const int group = ways > NAME(PER_WORD) ? ways / NAME(PER_WORD) : 1;
    const int64_t words = matrix->words;
    /* Every row prefetches the values and mask of the row that follows it in the same slot, because the hardware
       prefetcher is too late with this many streams. */
    const int64_t ahead = (alps_offset(matrix, row + rows) - alps_offset(matrix, row)) * (int64_t)sizeof(ELEMENT);
    const uint32_t *mask = matrix->mask + row * words;
    const ELEMENT *values[ROWS];
    SUM sums[SUMS];
    int64_t w = 0;
#pragma GCC unroll 16
    for (int i = 0; i < rows * tokens * ways; i++) sums[i] = NAME(zero)();
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) values[r] = (const ELEMENT *)matrix->values + alps_offset(matrix, row + r);
    for (; w + group <= words; w += group) {
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) __builtin_prefetch((const char *)values[r] + ahead, 0, 2);
        __builtin_prefetch(mask + rows * (words + w), 0, 2);
#pragma GCC unroll 4
        for (int i = 0; i < group; i++) {
#pragma GCC unroll 8
            for (int chunk = 0; chunk < NAME(PER_WORD); chunk++) {
                const INPUT *column = x + (w + i) * ALPS_WORD + chunk * STEP;
                const int way = (i * NAME(PER_WORD) + chunk) % ways;
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++) {
                    VECTOR vector = NAME(chunk)(&values[r], mask[r * words + w + i], chunk, last);
                    SUM *own = sums + (way * rows + r) * tokens;
#pragma GCC unroll 8
                    for (int t = 0; t < tokens; t++) own[t] = NAME(add)(own[t], vector, column + t * stride);
                }
            }
        }
    }
    for (; w < words; w++)
        for (int chunk = 0; chunk < NAME(PER_WORD); chunk++)
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                VECTOR vector = NAME(chunk)(&values[r], mask[r * words + w], chunk, last);
                const INPUT *column = x + w * ALPS_WORD + chunk * STEP;
#pragma GCC unroll 8
                for (int t = 0; t < tokens; t++)
                    sums[r * tokens + t] = NAME(add)(sums[r * tokens + t], vector, column + t * stride);
            }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        const float bias = matrix->bias ? NAME(wide)(((const ELEMENT *)matrix->bias)[row + r]) : 0;
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++) {
            float total = 0;
#pragma GCC unroll 4
            for (int way = 0; way < ways; way++) total += NAME(total)(sums[(way * rows + r) * tokens + t]);
            out[t * matrix->rows + row + r] = NAME(narrow)(total + bias);
        }
    }
}

ALPS_INLINE void NAME(rows)(const alps_matrix *matrix, int64_t from, int64_t to, const INPUT *x, int64_t stride,
                            ELEMENT *out, const int tokens) {
    const int rows = ROWS * tokens <= SUMS ? ROWS : SUMS / tokens;
    int64_t row = from;
    for (; row + rows <= to && alps_offset(matrix, row + rows) + STEP <= matrix->kept; row += rows)
        NAME(block)(matrix, row, x, stride, out, rows, tokens, 0);
    for (; row < to; row++) NAME(block)(matrix, row, x, stride, out, 1, tokens, 1);
}

static __attribute__((unused)) void NAME(multiply)(const alps_matrix *matrix, int64_t from, int64_t to, const void *x,
                                                   int64_t stride, void *out, int tokens, void *room) {
    (void)room;
    switch (tokens) {
    case 1: NAME(rows)(matrix, from, to, x, stride, out, 1); break;
    case 2: NAME(rows)(matrix, from, to, x, stride, out, 2); break;
    case 3: NAME(rows)(matrix, from, to, x, stride, out, 3); break;
    case 4: NAME(rows)(matrix, from, to, x, stride, out, 4); break;
    case 5: NAME(rows)(matrix, from, to, x, stride, out, 5); break;
    case 6: NAME(rows)(matrix, from, to, x, stride, out, 6); break;
    case 7: NAME(rows)(matrix, from, to, x, stride, out, 7); break;
    case 8: NAME(rows)(matrix, from, to, x, stride, out, 8); break;
    }
}

ALPS_INLINE void NAME(unpack_row)(const alps_matrix *matrix, int64_t row, ELEMENT *out, const int last) {
    const ELEMENT *values = (const ELEMENT *)matrix->values + alps_offset(matrix, row);
    const uint32_t *mask = matrix->mask + row * matrix->words;
    const int64_t whole = matrix->columns / ALPS_WORD;
    for (int64_t w = 0; w < whole; w++) {
        __builtin_prefetch((const char *)values + 4096, 0, 2);
#pragma GCC unroll 8
        for (int chunk = 0; chunk < NAME(PER_WORD); chunk++)
            NAME(store)(out + w * ALPS_WORD + chunk * STEP, NAME(chunk)(&values, mask[w], chunk, last));
    }
    if (whole < matrix->words) {
        ELEMENT end[ALPS_WORD];
        for (int chunk = 0; chunk < NAME(PER_WORD); chunk++)
            NAME(store)(end + chunk * STEP, NAME(chunk)(&values, mask[whole], chunk, last));
        memcpy(out + whole * ALPS_WORD, end, (size_t)(matrix->columns % ALPS_WORD) * sizeof(ELEMENT));
    }
}

static __attribute__((unused)) void NAME(unpack)(const alps_matrix *matrix, int64_t from, int64_t to, void *out) {
    ELEMENT *first = out;
    for (int64_t row = from; row < to; row++) {
        if (alps_offset(matrix, row + 1) + STEP <= matrix->kept)
            NAME(unpack_row)(matrix, row, first + (row - from) * matrix->columns, 0);
        else
            NAME(unpack_row)(matrix, row, first + (row - from) * matrix->columns, 1);
    }
}

#undef STEP
#undef ELEMENT
#undef INPUT
#undef VECTOR
#undef SUM
#undef NAME
