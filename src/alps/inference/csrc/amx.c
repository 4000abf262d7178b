/* AMX with BF16 (Sapphire Rapids and later): products of sixteen rows and sixteen vectors at a time, in bfloat16.

   Words of the mask are expanded as in avx512bf16.c, but into memory. A word of sixteen rows is a tile of 16 x 32, and one
   instruction multiplies it with the same columns of up to sixteen vectors. The product takes a third of the time of the
   expansion and overlaps with it, so that a batch of 32 takes less than twice as long as one vector. amx_one.h multiplies
   single vectors, and avx512.c other types.

   A tile of vectors has a row for every pair of columns; `arrange` brings sixteen vectors at a time into this order. Tiles
   0 to 3 hold sums, tiles 4 and 5 weights, tiles 6 and 7 vectors. */

#include "amx_tiles.h"
#include "amx_one.h"

#include <sys/syscall.h>
#include <unistd.h>

enum { BLOCK = 8, CHUNK = 64, LIMIT = 512 };          /* multiply_many: tiles of rows, words, vectors */
enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* for arch_prctl */

#define CLEAR_SUMS() \
    do {             \
        CLEAR(0);    \
        CLEAR(1);    \
        CLEAR(2);    \
        CLEAR(3);    \
    } while (0)

/* Up to 32 vectors in one or two tiles; other_bytes is 0 without a second tile. */
typedef struct {
    const char *first, *others;
    int64_t bytes, other_bytes;
} vectors;

/* Multiply the expanded word `w` at `tile` with the vectors. Callers alternate between two pairs of sums. */
#define MULTIPLY(x, tile, w, sum, other_sum, weights)                                   \
    do {                                                                                \
        LOAD(weights, tile, WIDTH);                                                     \
        LOAD(6, (x)->first + (w) * TILE * (x)->bytes, (x)->bytes);                      \
        PRODUCT(sum, weights, 6);                                                       \
        if ((x)->other_bytes) {                                                         \
            LOAD(7, (x)->others + (w) * TILE * (x)->other_bytes, (x)->other_bytes);     \
            PRODUCT(other_sum, weights, 7);                                             \
        }                                                                               \
    } while (0)

static void add(sums *even, const sums *odd) {
    for (int r = 0; r < TILE; r++)
        for (int t = 0; t < TILE; t++) (*even)[r][t] += (*odd)[r][t];
}

/* Multiply up to 32 vectors, `others` of them in the second tile. A panel is expanded while the last one is multiplied. */
static void multiply_few(const alps_matrix *matrix, int64_t row, int64_t to, const vectors *x, uint16_t *out, int tokens,
                         int others) {
    panel panels[2] __attribute__((aligned(64)));
    sums even __attribute__((aligned(64))) = {{0}}, odd __attribute__((aligned(64))) = {{0}};
    const int64_t words = matrix->words;
    task task = begin(matrix, row, to);
    CLEAR_SUMS();
    for (int64_t w = 0, turn = 0; w < words + DEPTH; w += DEPTH, turn ^= 1) {
#pragma GCC unroll 4
        for (int quarter = 0; quarter < DEPTH; quarter++) {
            const int64_t last = w - DEPTH + quarter;
            if (w < words) expand_quarter(&task, quarter, w, &panels[turn]);
            if (last < 0 || last >= words) continue;
            if (quarter % 2)
                MULTIPLY(x, panels[turn ^ 1][quarter], last, 1, 3, 5);
            else
                MULTIPLY(x, panels[turn ^ 1][quarter], last, 0, 2, 4);
        }
    }
    STORE(0, even, WIDTH);
    STORE(1, odd, WIDTH);
    add(&even, &odd);
    write_out(matrix, row, task.rows, &even, out, tokens - others);
    if (!others) return;
    STORE(2, even, WIDTH);
    STORE(3, odd, WIDTH);
    add(&even, &odd);
    write_out(matrix, row, task.rows, &even, out + TILE * matrix->rows, others);
}

/* Multiply `words` words of two tiles of rows with two tiles of vectors. With `first`, sums start at zero. */
static void multiply_chunk(panel *left, int64_t words, const char *x, int64_t stride, sums *sum_tiles, int first) {
    panel *right = left + CHUNK / DEPTH;
    const char *more = x + stride * TILE * 2;
    if (first) {
        CLEAR_SUMS();
    } else {
        LOAD(0, sum_tiles, WIDTH);
        LOAD(1, sum_tiles + 1, WIDTH);
        LOAD(2, sum_tiles + BLOCK, WIDTH);
        LOAD(3, sum_tiles + BLOCK + 1, WIDTH);
    }
    for (int64_t w = 0; w < words; w++) {
        for (int line = 0; line < TILE; line++) { /* vectors are farther away in the caches than rows */
            __builtin_prefetch(x + ((w + 2) * TILE + line) * WIDTH, 0, 3);
            __builtin_prefetch(more + ((w + 2) * TILE + line) * WIDTH, 0, 3);
        }
        LOAD(4, left[w / DEPTH][w % DEPTH], WIDTH);
        LOAD(6, x + w * TILE * WIDTH, WIDTH);
        PRODUCT(0, 4, 6);
        LOAD(5, right[w / DEPTH][w % DEPTH], WIDTH);
        PRODUCT(1, 5, 6);
        LOAD(7, more + w * TILE * WIDTH, WIDTH);
        PRODUCT(2, 4, 7);
        PRODUCT(3, 5, 7);
    }
    STORE(0, sum_tiles, WIDTH);
    STORE(1, sum_tiles + 1, WIDTH);
    STORE(2, sum_tiles + BLOCK, WIDTH);
    STORE(3, sum_tiles + BLOCK + 1, WIDTH);
}

/* Number of tiles of many vectors; even, because two are multiplied at a time. */
ALPS_INLINE int groups_of(int tokens) { return (tokens + MOST - 1) / MOST * 2; }

/* Multiply many vectors with up to eight tiles of rows. A chunk of columns is expanded at a time; it fits into a thread's
   cache together with the same columns of 32 vectors. Sums are kept in memory. */
static void multiply_many(const alps_matrix *matrix, int64_t row, int64_t to, const char *x, int64_t stride, uint16_t *out,
                          int tokens, void *room) {
    const int tiles = to - row < BLOCK * TILE ? (int)((to - row + TILE - 1) / TILE) : BLOCK, groups = groups_of(tokens);
    panel *panels = room;
    sums *sum_tiles = (sums *)(panels + BLOCK * CHUNK / DEPTH);
    task tasks[BLOCK];
    for (int i = 0; i < tiles; i++) tasks[i] = begin(matrix, row + i * TILE, to);
    for (int64_t w = 0; w < matrix->words; w += CHUNK) {
        const int64_t end = matrix->words - w < CHUNK ? matrix->words - w : CHUNK;
        for (int i = 0; i < tiles; i++)
            for (int64_t v = 0; v < end; v += DEPTH)
                for (int quarter = 0; quarter < DEPTH; quarter++)
                    expand_quarter(&tasks[i], quarter, w + v, panels + (i * CHUNK + v) / DEPTH);
        for (int group = 0; group < groups; group += 2)
            for (int i = 0; i < tiles; i += 2)
                multiply_chunk(panels + i * CHUNK / DEPTH, end, x + (group * stride + w * ALPS_WORD) * TILE * 2, stride,
                               sum_tiles + group * BLOCK + i, !w);
    }
    for (int group = 0; group < groups; group++)
        for (int i = 0; i < tiles; i++)
            write_out(matrix, row + i * TILE, tasks[i].rows, sum_tiles + group * BLOCK + i,
                      out + group * TILE * matrix->rows, tokens - group * TILE);
}

static void bf16_multiply(const alps_matrix *matrix, int64_t from, int64_t to, const void *x, int64_t stride, void *out,
                          int tokens, void *room) {
    const int first = tokens < TILE ? tokens : TILE, others = tokens - first;
    shapes saved, own = {.palette = 1, .rows = {16, 16, 16, 16, 16, 16, 16, 16}, .bytes = {[4] = WIDTH, [5] = WIDTH}};
    if (tokens == 1) {
        one_rows(matrix, from, to, x, stride, out, 1);
        return;
    }
    own.bytes[0] = own.bytes[1] = own.bytes[6] = (uint16_t)(4 * first);
    own.bytes[2] = own.bytes[3] = own.bytes[7] = (uint16_t)(4 * (!others || tokens > MOST ? TILE : others));
    const vectors both = {x, (const char *)x + stride * 2 * first, 4 * first, 4 * others};
    /* torch's own products rely on the tile configuration of the last product, so it is saved and restored. */
    __asm__ volatile("sttilecfg %0" : "=m"(saved));
    CONFIGURE(own);
    for (int64_t row = from; tokens > MOST && row < to; row += BLOCK * TILE)
        multiply_many(matrix, row, to, x, stride, out, tokens, room);
    for (int64_t row = from; tokens <= MOST && row < to; row += TILE)
        multiply_few(matrix, row, to, &both, out, tokens, others);
    if (saved.palette)
        CONFIGURE(saved);
    else
        __asm__ volatile("tilerelease" ::: "memory");
}

/* Store pairs of columns of up to sixteen vectors next to each other, then those of the next sixteen vectors. If there are
   many vectors, the last tiles are filled with zeros. */
static void arrange(const void *x, void *out, int64_t stride, int tokens) {
    const int64_t pairs = stride / 2;
    const int all = tokens > MOST ? groups_of(tokens) * TILE : tokens;
    uint32_t *target = out;
    if (tokens == 1) {
        one_arrange(x, out, stride);
        return;
    }
    for (int first = 0; first < all; first += TILE) {
        const int width = all - first < TILE ? all - first : TILE;
        for (int64_t pair = 0; pair < pairs; pair += TILE) {
            __m512i at[TILE];
            for (int t = 0; t < TILE; t++)
                at[t] = first + t < tokens ? _mm512_loadu_si512((const uint32_t *)x + (first + t) * pairs + pair)
                                           : _mm512_setzero_si512();
            transpose(at);
            for (int p = 0; p < TILE; p++, target += width)
                _mm512_mask_storeu_epi32(target, (__mmask16)((1u << width) - 1), at[p]);
        }
    }
}

/* Bytes for the panels and sums of many vectors. */
static size_t room(const alps_matrix *matrix, int tokens) {
    (void)matrix;
    return tokens > MOST ? BLOCK * (CHUNK / DEPTH * sizeof(panel) + (size_t)groups_of(tokens) * sizeof(sums)) : 0;
}

int alps_amx_permitted(void) { return !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA); }

const alps_path alps_amx = {
    .name = "amx",
    .below = &alps_avx512bf16,
    .tokens = LIMIT,
    .room = room,
    .arrange = arrange,
    .multiply = {[ALPS_BF16] = bf16_multiply},
};
