/* Every instruction set of the kernel against plain loops, on random matrices of which all arrays end where memory ends:
   a read or a write one byte past them is a crash. Prints the paths that were tried; exit code 1 at the first mistake. */

#include "kernel.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

int alps_start(void *);
const char *alps_path_name(int);
int alps_is_sound(const alps_matrix *);
int alps_multiply(const alps_matrix *, const void *, void *, int64_t, int, int);
void alps_unpack(const alps_matrix *, int64_t, int64_t, void *, int, int);

static uint64_t state = 1;

static uint32_t draw(uint32_t below) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((state >> 33) % below);
}

/* Memory whose last byte is the last that may be touched. */
static void *guarded(size_t bytes) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = (bytes + page - 1) / page;
    char *start = mmap(0, (pages + 1) * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED || mprotect(start + pages * page, page, PROT_NONE)) exit(3);
    return start + pages * page - bytes;
}

static void release(void *memory, size_t bytes) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = (bytes + page - 1) / page;
    munmap((char *)memory + bytes - pages * page, (pages + 1) * page);
}

static void put(void *array, int64_t i, float number, int kind) {
    if (kind == ALPS_F32) ((float *)array)[i] = number;
    else ((uint16_t *)array)[i] = kind == ALPS_BF16 ? alps_to_bf16(number) : alps_to_f16(number);
}

static float get(const void *array, int64_t i, int kind) {
    if (kind == ALPS_F32) return ((const float *)array)[i];
    const uint16_t half = ((const uint16_t *)array)[i];
    return kind == ALPS_BF16 ? alps_from_bf16(half) : alps_from_f16(half);
}

static float small(void) { return ((float)draw(2001) - 1000) / 1000; }

static int try(int path, int kind, int64_t rows, int64_t columns, uint32_t percent, int64_t tokens, int wide, int threads) {
    const size_t size = kind == ALPS_F32 ? 4 : 2, offset = wide ? 8 : 4;
    const double rounding = kind == ALPS_F32 ? 1e-5 : kind == ALPS_F16 ? 1.0 / 1024 : 1.0 / 128;
    const int64_t words = (columns + 31) / 32;
    const size_t all = (size_t)(rows * columns) * size;
    alps_matrix matrix = {.rows = rows, .columns = columns, .words = words, .wide = wide, .kind = kind};
    uint32_t *mask = guarded((size_t)(rows * words) * 4);
    char *offsets = guarded((size_t)(rows + 1) * offset);
    char *dense = guarded(all), *unpacked = guarded(all);
    memset(dense, 0, all);
    for (int64_t i = 0; i < rows * columns; i++)
        if (draw(100) < percent) {
            put(dense, i, small() + 2, kind);
            mask[i / columns * words + i % columns / 32] |= 1u << (i % columns % 32);
            matrix.kept++;
        }
    char *values = guarded((size_t)matrix.kept * size);
    int64_t position = 0;
    for (int64_t i = 0; i <= rows * columns; i++) {
        if (i % columns == 0) {
            if (wide) ((int64_t *)offsets)[i / columns] = position;
            else ((int32_t *)offsets)[i / columns] = (int32_t)position;
        }
        if (i < rows * columns && get(dense, i, kind) != 0) {
            memcpy(values + (size_t)position * size, dense + (size_t)i * size, size);
            position++;
        }
    }
    char *bias = guarded((size_t)rows * size), *x = guarded((size_t)(tokens * columns) * size);
    char *out = guarded((size_t)(tokens * rows) * size);
    for (int64_t i = 0; i < rows; i++) put(bias, i, small(), kind);
    for (int64_t i = 0; i < tokens * columns; i++) put(x, i, small(), kind);
    matrix.mask = mask, matrix.values = values, matrix.offsets = offsets, matrix.bias = bias;
    int wrong = !alps_is_sound(&matrix);
    alps_unpack(&matrix, 0, rows, unpacked, threads, path);
    wrong |= memcmp(dense, unpacked, all) ? 2 : 0;
    wrong |= alps_multiply(&matrix, x, out, tokens, threads, path) ? 4 : 0;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t row = 0; row < rows; row++) {
            double sum = get(bias, row, kind), most = fabs(sum);
            for (int64_t column = 0; column < columns; column++) {
                const double product =
                    (double)get(dense, row * columns + column, kind) * get(x, t * columns + column, kind);
                sum += product, most += fabs(product);
            }
            if (!(fabs(sum - get(out, t * rows + row, kind)) <= rounding * fabs(sum) + 1e-5 * most)) wrong |= 8;
        }
    release(mask, (size_t)(rows * words) * 4), release(offsets, (size_t)(rows + 1) * offset);
    release(dense, all), release(unpacked, all), release(values, (size_t)matrix.kept * size);
    release(bias, (size_t)rows * size), release(x, (size_t)(tokens * columns) * size);
    release(out, (size_t)(tokens * rows) * size);
    if (wrong)
        printf("path %d kind %d: %lld x %lld, %u %%, %lld tokens: %d\n", path, kind, (long long)rows,
               (long long)columns, percent, (long long)tokens, wrong);
    return wrong;
}

/* Whether products leave the shapes of AMX's tiles as they were, of which torch's own may rely on what it left: 0 if so. */
static int disturbs_tiles(int path) {
#ifdef __x86_64__
    struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } before, own, after;
    for (int configured = 0; configured < 2; configured++) {
        memset(&own, 0, sizeof own);
        own.palette = 1, own.bytes[3] = 24, own.rows[3] = 5;
        if (configured) __asm__ volatile("ldtilecfg %0" ::"m"(own));
        __asm__ volatile("sttilecfg %0" : "=m"(before));
        if (before.palette != configured || try(path, ALPS_BF16, 20, 40, 50, 3, 0, 1)) return 1;
        __asm__ volatile("sttilecfg %0" : "=m"(after));
        if (memcmp(&before, &after, sizeof before)) return 1;
    }
    __asm__ volatile("tilerelease");
#endif
    return path < 0;
}

int main(void) {
    static const uint32_t percents[] = {0, 3, 30, 50, 100};
    const char *name;
    if (alps_start(0) != ALPS_VERSION) return 2;
    for (int path = 0; (name = alps_path_name(path)); path++) {
        if (!*name) continue;
        for (int i = 0; i < 600; i++) {
            const int64_t rows = 1 + draw(40), columns = 1 + draw(i % 3 ? 70 : 300), tokens = 1 + draw(i % 4 ? 10 : 70);
            if (try(path, i % ALPS_KINDS, rows, columns, percents[draw(5)], tokens, i & 1, 1)) return 1;
        }
        if (try(path, ALPS_BF16, 400, 600, 50, 3, 0, 3)) return 1;
        /* More columns, rows and vectors than are taken in one go. */
        if (try(path, ALPS_BF16, 150, 4300, 30, 70, 0, 1)) return 1;
        if (try(path, ALPS_BF16, 20, 40, 50, 530, 0, 1)) return 1;
        if (!strcmp(name, "amx") && disturbs_tiles(path)) return 1;
        printf("%s\n", name);
    }
    return 0;
}
