"""Settings of OpenMP's threads, which compute for torch: how they wait, and how many there are.

The runtimes of OpenMP read their environment variables once, when torch is imported. A program sets them before that;
the library itself sets nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from alps.core.cpu_count import affinity_cpus, ranks_on_host, usable_cpus

# Turns of a waiting thread before it sleeps, for GNU's libgomp. By default there are 300,000, some milliseconds, which
# is longer than the usual pause between two products: the threads then never sleep, and take CPUs from other programs.
# Threads that sleep at once cost an idle machine a quarter of the speed, or more (docs/project/performance.md).
_SPIN_COUNT = "1000"
_SPIN_COUNT_WHEN_BUSY = "0"
# Milliseconds that a waiting thread spins, for the OpenMP of LLVM and Intel; 200 by default.
_BLOCK_TIME = "1"
_BLOCK_TIME_WHEN_BUSY = "0"


def openmp_settings(
    environment: Mapping[str, str], is_busy: Callable[[int], bool] = lambda _threads: False
) -> dict[str, str]:
    """Return the environment variables that a program should set before it imports torch.

    Waiting threads soon sleep, and at once on a busy machine, unless the user has chosen by OMP_WAIT_POLICY,
    GOMP_SPINCOUNT, KMP_BLOCKTIME or KMP_LIBRARY. There are no more threads than CPUs that the process may use, which
    ranks of torchrun on one host share equally. A smaller number of the user's is kept, a larger one lowered.

    Args:
        environment: variables of the process.
        is_busy: returns whether other programs use CPUs that a number of threads need; called only where it matters.
    """
    ranks = ranks_on_host(environment)
    limit = max(usable_cpus() // ranks, 1)
    threads = _thread_settings(environment, limit)
    count = _thread_count({**environment, **threads}.get("OMP_NUM_THREADS", "")) or limit
    return threads | _waiting_settings(environment, lambda: count > 1 and is_busy(count * ranks))


def _waiting_settings(environment: Mapping[str, str], is_busy: Callable[[], bool]) -> dict[str, str]:
    # Each runtime ignores the variables of the other.
    gnu, llvm = "GOMP_SPINCOUNT" not in environment, not {"KMP_BLOCKTIME", "KMP_LIBRARY"} & environment.keys()
    if "OMP_WAIT_POLICY" in environment or not (gnu or llvm):
        return {}
    busy, settings = is_busy(), {}
    if gnu:
        settings["GOMP_SPINCOUNT"] = _SPIN_COUNT_WHEN_BUSY if busy else _SPIN_COUNT
    if llvm:
        settings["KMP_BLOCKTIME"] = _BLOCK_TIME_WHEN_BUSY if busy else _BLOCK_TIME
    return settings


def _thread_settings(environment: Mapping[str, str], limit: int) -> dict[str, str]:
    counts = {name: _thread_count(environment.get(name, "")) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    settings = {name: str(limit) for name, count in counts.items() if count is not None and count > limit}
    # The runtimes know the affinity, but neither quotas nor ranks.
    if counts["OMP_NUM_THREADS"] is None and limit < affinity_cpus():
        settings["OMP_NUM_THREADS"] = str(limit)
    return settings


def _thread_count(text: str) -> int | None:
    """Return the number of threads that a variable sets, or None where it sets none.

    A list has a number for each level of nested parallel regions; torch has one level.
    """
    number = text.partition(",")[0].strip().removeprefix("+")
    return int(number) if number.isdecimal() and int(number) else None
