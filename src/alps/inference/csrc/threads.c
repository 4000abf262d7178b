/* Runs one job on several threads.

   The threads belong to the OpenMP runtime that torch has loaded. They are reached through GOMP_parallel, the entry that
   compiled code calls; LLVM's and Intel's runtimes have it, too. Torch's threads spin for a while after every operation. A
   second pool of threads, or a second copy of the runtime, would compete with them for the cores. Without the entry,
   threads are created and joined for each job, so that none is idle and none has to survive a fork. */

#include "kernel.h"

#include <pthread.h>

enum { MOST = 256 };

static void (*parallel)(void (*)(void *), void *, unsigned, unsigned);

typedef struct {
    void (*work)(void *);
    void *job;
} task;

static void *run(void *argument) {
    task *shared = argument;
    shared->work(shared->job);
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
    /* If a thread cannot be created, the others do its share. */
    while (count < threads - 1 && count < MOST && !pthread_create(&started[count], 0, run, &shared)) count++;
    work(job);
    while (count) pthread_join(started[--count], 0);
}
