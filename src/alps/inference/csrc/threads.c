/* Several threads on one job.

   The threads are those of the OpenMP runtime that torch itself has loaded, by the entry that compiled code calls
   (GOMP_parallel; LLVM's and Intel's runtimes have it, too). A pool of our own beside it would fight for the cores with
   torch's threads, which spin for a while after every operation, and a second copy of a runtime would do the same.
   Without that entry, threads are started for each job and joined: nothing idles, nothing survives a fork. */

#include "kernel.h"

#include <pthread.h>

enum { MOST = 256 };

static void (*parallel)(void (*)(void *), void *, unsigned, unsigned);

typedef struct {
    void (*work)(void *);
    void *job;
} task;

static void *run(void *given) {
    task *mine = given;
    mine->work(mine->job);
    return 0;
}

void alps_use_openmp(void *entry) { memcpy(&parallel, &entry, sizeof entry); }

void alps_team(void (*work)(void *), void *job, int threads) {
    pthread_t started[MOST];
    task shared = {work, job};
    int count = 0;
    if (threads > 1 && parallel) {
        parallel(work, job, (unsigned)threads, 0);
        return;
    }
    /* Where a thread cannot be started, the others do its share. */
    while (count < threads - 1 && count < MOST && !pthread_create(&started[count], 0, run, &shared)) count++;
    work(job);
    while (count) pthread_join(started[--count], 0);
}
