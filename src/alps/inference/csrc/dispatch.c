/* The functions that Python calls: they choose an instruction set, and distribute rows over threads such that all threads
   read about the same number of bytes. The result of a row does not depend on the thread that computes it. */

#include "kernel.h"

#include <stdlib.h>
#if defined(ALPS_AMX)
#include <cpuid.h>
#endif

/* Shares per thread, minimum bytes per thread, and a common multiple of all ROWS. */
enum { SHARES = 4, MIN_BYTES = 1 << 16, TOGETHER = 16 };

static const size_t sizes[ALPS_KINDS] = {2, 2, 4};

/* From slow to fast. */
static const alps_path *const paths[] = {
    &alps_portable,
#ifdef ALPS_NEON
    &alps_neon,
#endif
#ifdef ALPS_AVX2
    &alps_avx2,
#endif
#ifdef ALPS_AVX512
    &alps_avx512,
#endif
#ifdef ALPS_AVX512BF16
    &alps_avx512bf16,
#endif
#ifdef ALPS_AMX
    &alps_amx,
#endif
};

enum { PATHS = sizeof paths / sizeof *paths };

#ifdef ALPS_AMX
static int has_tiles(void) {
    const unsigned bf16 = 1u << 22, tile = 1u << 24;
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & bf16) && (d & tile);
}
#endif

static int available(const alps_path *path) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#ifdef ALPS_AVX512BF16
    const int halves = avx512 && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16");
    if (path == &alps_avx512bf16) return halves;
#endif
#ifdef ALPS_AMX
    if (path == &alps_amx) return halves && has_tiles() && alps_amx_permitted();
#endif
#ifdef ALPS_AVX512
    if (path == &alps_avx512) return avx512;
#endif
#ifdef ALPS_AVX2
    if (path == &alps_avx2) return avx2;
#endif
    (void)avx512;
#endif
    return path != 0;
}

/* Initialise the library; must be called before all other functions. `parallel`: GOMP_parallel, or NULL. */
int alps_start(void *parallel) {
    alps_use_openmp(parallel);
    for (int i = 0; i < PATHS; i++)
        if (paths[i]->start) paths[i]->start();
    return ALPS_VERSION;
}

/* Return the name of path `i`, from slow to fast; empty if the processor lacks it, NULL past the last path. */
const char *alps_path_name(int i) {
    if (i >= PATHS) return 0;
    return available(paths[i]) ? paths[i]->name : "";
}

/* Return whether mask, offsets and `kept` are consistent, on which all functions below rely. */
int alps_is_sound(const alps_matrix *matrix) {
    const int spare = (int)(matrix->words * ALPS_WORD - matrix->columns);
    if (alps_offset(matrix, 0)) return 0;
    for (int64_t row = 0; row < matrix->rows; row++) {
        const uint32_t *mask = matrix->mask + row * matrix->words;
        int64_t count = 0;
        for (int64_t w = 0; w < matrix->words; w++) count += __builtin_popcount(mask[w]);
        if (alps_offset(matrix, row + 1) - alps_offset(matrix, row) != count) return 0;
        if (spare && mask[matrix->words - 1] >> (ALPS_WORD - spare)) return 0;
    }
    return alps_offset(matrix, matrix->rows) == matrix->kept;
}

typedef struct {
    const alps_matrix *matrix;
    const alps_path *path;
    const void *x; /* NULL to unpack */
    int64_t stride, from, to;
    void *out;
    char *rooms; /* of all threads */
    size_t room; /* bytes of each */
    int tokens, shares, next, threads;
} job;

static int64_t cost(const alps_matrix *matrix, int64_t row) {
    return alps_offset(matrix, row) * (int64_t)sizes[matrix->kind] + 4 * row * matrix->words;
}

/* Return the first row of a share. Shares have about the same number of bytes. The row is a multiple of TOGETHER, so that
   the same rows are multiplied together, and summed in the same order, with any number of threads. */
static int64_t boundary(const job *job, int share) {
    const int64_t begin = cost(job->matrix, job->from), all = cost(job->matrix, job->to) - begin;
    int64_t low = job->from, high = job->to;
    if (share == job->shares) return job->to;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (cost(job->matrix, middle) - begin < all / job->shares * share)
            low = middle + 1;
        else
            high = middle;
    }
    low -= low % TOGETHER;
    return low > job->from ? low : job->from;
}

static void work(void *argument) {
    job *job = argument;
    const alps_matrix *matrix = job->matrix;
    const size_t size = sizes[matrix->kind];
    void *room = job->rooms + job->room * (size_t)__atomic_fetch_add(&job->threads, 1, __ATOMIC_RELAXED);
    for (int share; (share = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < job->shares;) {
        const int64_t from = boundary(job, share), to = boundary(job, share + 1);
        if (job->x)
            job->path->multiply[matrix->kind](matrix, from, to, job->x, job->stride, job->out, job->tokens, room);
        else
            job->path->unpack[matrix->kind](
                matrix, from, to, (char *)job->out + (size_t)((from - job->from) * matrix->columns) * size);
    }
}

static void share_out(job *job, int threads) {
    const int64_t worth = (cost(job->matrix, job->to) - cost(job->matrix, job->from)) / MIN_BYTES + 1;
    if (threads > worth) threads = (int)worth;
    job->shares = threads > 1 ? threads * SHARES : 1;
    job->next = job->threads = 0;
    alps_team(work, job, threads);
}

/* Return x in the form that the path multiplies, stored in `room` if it differs from x. */
static const void *prepare(const alps_matrix *matrix, const alps_path *path, const void *x, char *room, int tokens) {
    const int64_t stride = matrix->words * ALPS_WORD, columns = matrix->columns;
    const alps_widen widen = path->widen[matrix->kind];
    const size_t from = sizes[matrix->kind], to = widen ? sizeof(float) : from;
    if (widen || stride != columns) {
        for (int t = 0; t < tokens; t++) {
            const char *source = (const char *)x + (size_t)(t * columns) * from;
            char *target = room + (size_t)(t * stride) * to;
            if (widen)
                widen(source, (float *)target, columns);
            else
                memcpy(target, source, (size_t)columns * from);
            memset(target + (size_t)columns * to, 0, (size_t)(stride - columns) * to);
        }
        x = room;
    }
    if (!path->arrange) return x;
    room += (size_t)(tokens * stride) * to;
    path->arrange(x, room, stride, tokens);
    return room;
}

/* Compute out (tokens, rows) = x (tokens, columns) times the transposed matrix, plus the bias, all in the matrix's type.
   Returns 0, or 1 if memory is exhausted. */
int alps_multiply(const alps_matrix *matrix, const void *x, void *out, int64_t tokens, int threads, int path) {
    const size_t size = sizes[matrix->kind];
    const alps_path *chosen = paths[path];
    while (!chosen->multiply[matrix->kind]) chosen = chosen->below;
    const int64_t stride = matrix->words * ALPS_WORD, limit = chosen->tokens ? chosen->tokens : ALPS_TOKENS;
    const int64_t most = tokens < limit ? tokens : limit;
    const int as_it_is = !chosen->widen[matrix->kind] && !chosen->arrange && stride == matrix->columns;
    /* Two copies in 16 bits or one in float32; `arrange` adds up to 31 vectors of zeros, or one vector in float32. */
    const size_t prepared = as_it_is ? 0 : (size_t)((most + 16) * stride) * sizeof(float);
    const size_t own = chosen->room ? chosen->room(matrix, (int)most) : 0;
    void *room = 0;
    if (tokens && prepared + own && posix_memalign(&room, 64, prepared + own * (size_t)threads)) return 1;
    for (int64_t first = 0; first < tokens; first += most) {
        const int some = (int)(tokens - first < most ? tokens - first : most);
        const char *source = (const char *)x + (size_t)(first * matrix->columns) * size;
        job job = {.matrix = matrix, .path = chosen, .stride = stride, .to = matrix->rows, .tokens = some};
        job.x = prepare(matrix, chosen, source, room, some);
        job.rooms = (char *)room + prepared, job.room = own;
        job.out = (char *)out + (size_t)(first * matrix->rows) * size;
        share_out(&job, threads);
    }
    free(room);
    return 0;
}

/* Write rows `from` to `to` as a dense matrix to `out`. */
void alps_unpack(const alps_matrix *matrix, int64_t from, int64_t to, void *out, int threads, int path) {
    const alps_path *chosen = paths[path];
    while (!chosen->unpack[matrix->kind]) chosen = chosen->below;
    job job = {.matrix = matrix, .path = chosen, .from = from, .to = to, .out = out};
    share_out(&job, threads);
}
