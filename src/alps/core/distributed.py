"""Ranks of a run that torchrun has started: collective operations, and errors when one of them is lost.

`ProcessGroup()` has a single rank; every operation on it is a no-op, so that one code path serves any number of ranks.
Tensors on GPUs travel by NCCL, everything else by gloo.
"""

from __future__ import annotations

import datetime
import importlib
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from alps.core.errors import AlpsError, ConfigError, RankLost, first_line
from alps.core.launch import is_distributed
from alps.core.statistics import InputSums

# Seconds that a rank waits for the others before it gives up, unless ALPS_RANK_TIMEOUT is set.
_TIMEOUT = 1800.0
# Seconds that the other ranks wait for each other's exit reasons once one is lost.
_EXIT_REASON_TIMEOUT = 3.0


class ProcessGroup:
    """The ranks of one run.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        local_rank: number of this process on its host, which is that of its GPU.
        current_stage: work of this rank, for the error message if another rank is lost meanwhile; set by the caller.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, store: Any = None) -> None:
        """Describe this process; `store` holds the exit reasons of all ranks."""
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.current_stage = "the start"
        self._store = store

    @property
    def is_main(self) -> bool:
        """True for the rank that prints, and writes what is written once."""
        return self.rank == 0

    def device(self, name: str, device: torch.device) -> torch.device:
        """Return the device of this rank: `device`, or the GPU of its local rank if there are several ranks.

        Args:
            name: of the device as the user gave it.
            device: that a single process would use.

        Raises:
            ConfigError: for one GPU for several ranks, or fewer GPUs than ranks.
        """
        if self.size == 1 or device.type != "cuda":
            return device
        if name not in ("auto", "cuda"):
            raise ConfigError(f"Device '{name}' is one GPU for {self.size} processes: leave --device out.")
        if self.local_rank >= torch.cuda.device_count():
            raise ConfigError(f"{torch.cuda.device_count()} GPUs are here for more processes: start one for each GPU.")
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def shard(self, values: Tensor) -> Tensor:
        """Return the rows of this rank: every `size`-th row of a tensor, from row `rank` on.

        Raises:
            ConfigError: when there are fewer rows than ranks.
        """
        if len(values) < self.size:
            raise ConfigError(f"{len(values)} windows cannot be split over {self.size} processes: give more samples.")
        return values[self.rank :: self.size]

    def shard_batch_sizes(self, count: int, batch: int) -> list[int]:
        """Return the numbers of rows in the batches of this rank's shard.

        Every batch of all ranks has at least one row of each rank. The last batch may have none of this rank, and is
        left out then.

        Args:
            count: rows of all ranks.
            batch: rows in a batch of all ranks.
        """
        ends = [*range(0, count, max(batch, self.size)), count]
        # Rows of this rank before each end.
        local = [-(-max(end - self.rank, 0) // self.size) for end in ends]
        return [after - before for before, after in pairwise(local) if after > before]

    def broadcast_from_main(self, compute: Callable[[], Any]) -> Any:
        """Call a function on the main rank alone, and return its picklable result on all ranks.

        An exception in it ends all ranks.
        """
        if self.size == 1:
            return compute()
        values = [compute()] if self.is_main else [None]
        with self._communication():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def run_on_main(self, start: Callable[[], Generator[None, None, Any]], on_step: Callable[[], None]) -> Any:
        """Run a generator on the main rank alone, and return its picklable result on all ranks.

        All ranks meet after every step, so that none waits for the others longer than a step takes.

        Args:
            start: makes the generator; it is called on the main rank alone.
            on_step: called on each rank after every step.
        """
        steps = start() if self.is_main else None

        def advance() -> tuple[bool, Any]:
            assert steps is not None
            try:
                next(steps)
            except StopIteration as end:
                return True, end.value
            return False, None

        while True:
            is_done, result = self.broadcast_from_main(advance)
            if is_done:
                return result
            on_step()

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the values of all ranks, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._communication():
            dist.all_gather_object(values, value)
        return values

    def sum_counters(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Return the sums over all ranks by name; a missing name counts 0. The names of rank 0 come first."""
        total: dict[str, int] = {}
        for part in self.all_gather_object(dict(counts)):
            for name, count in part.items():
                total[name] = total.get(name, 0) + count
        return total

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Return the sums over all ranks, with the same bits on each of them; may overwrite `values`."""
        if self.size > 1:
            with self._communication():
                dist.all_reduce(values)
        return values

    def reduce_statistics(self, sums: InputSums, owner: int | None) -> None:
        """Add up input statistics over all ranks in place.

        Args:
            sums: of this rank.
            owner: rank that gets the total, while the others free their sums; None for all ranks.
        """
        if self.size == 1:
            return
        tokens = torch.tensor([sums.tokens], dtype=torch.int64)
        with self._communication():
            for tensor in (tokens, *sums.tensors()):
                if owner is None:
                    dist.all_reduce(tensor)
                else:
                    dist.reduce(tensor, dst=owner)
        sums.tokens = int(tokens)
        if owner not in (None, self.rank):
            sums.free()

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrite a tensor on all ranks by its values on the rank `source`."""
        if self.size > 1:
            with self._communication():
                dist.broadcast(tensor, src=source)

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        self.all_reduce_sum(torch.zeros(1))

    @contextmanager
    def _communication(self) -> Iterator[None]:
        """Context that raises `RankLost` if a collective operation fails."""
        try:
            yield
        except RuntimeError as error:
            raise RankLost(self._describe_lost_rank(error)) from error

    def post_exit_reason(self, reason: str) -> None:
        """Publish the reason why this rank ends, for the error messages of the others."""
        if self.size > 1:
            with suppress(Exception):
                self._store.set(f"end/{self.rank}", reason.encode())

    def _describe_lost_rank(self, error: Exception) -> str:
        """Return which rank is lost, where, and why, as far as the remaining ranks can find out."""
        self.post_exit_reason("")
        deadline, reasons = time.monotonic() + _EXIT_REASON_TIMEOUT, dict[int, str]()
        # torchrun soon interrupts the remaining ranks as well.
        with suppress(KeyboardInterrupt):
            while time.monotonic() < deadline and not any(reasons.values()) and len(reasons) < self.size:
                reasons |= {rank: text for rank in range(self.size) if (text := self._exit_reason(rank)) is not None}
                time.sleep(0.1)
        for rank, reason in reasons.items():
            if reason:
                return f"Rank {rank} ended: {reason}"
        lost = [rank for rank in range(self.size) if rank not in reasons]
        if not lost:
            return f"Rank {self.rank} lost the connection to the others at {self.current_stage} ({first_line(error)})."
        return (
            f"Rank {', '.join(map(str, lost))} of {self.size} died or hangs: rank {self.rank} timed out at "
            f"{self.current_stage}; the system's log says whether it was killed for its memory."
        )

    def _exit_reason(self, rank: int) -> str | None:
        try:
            return self._store.get(f"end/{rank}").decode() if self._store.check([f"end/{rank}"]) else None
        except Exception:  # the store ends with the process that keeps it
            return None


# Group of a process that works alone, for default arguments.
SINGLE_PROCESS = ProcessGroup()


def timeout() -> float:
    """Return the seconds to wait for other ranks.

    Raises:
        ConfigError: when ALPS_RANK_TIMEOUT is no positive number.
    """
    text = os.environ.get("ALPS_RANK_TIMEOUT", str(_TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e7:
        raise ConfigError(f"ALPS_RANK_TIMEOUT is '{text}': give seconds, as a positive number.")
    return seconds


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Context of the processes that torchrun has started, or of a single one without torchrun.

    The error with which a rank ends becomes the error message of the ranks that wait for it.

    Raises:
        RankLost: when another rank is lost.
    """
    if not is_distributed():
        yield ProcessGroup()
        return
    # Its functions have the default group as a default argument. Imported while there is one, as torch._dynamo does,
    # they keep it alive: its threads would outlive `destroy_process_group`, and sometimes abort the exiting process.
    importlib.import_module("torch.distributed.nn.functional")
    limit = datetime.timedelta(seconds=timeout())
    store, rank, size = next(dist.rendezvous("env://", timeout=limit))  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    reasons, calls = (dist.PrefixStore(name, store) for name in ("reasons", "run"))  # type: ignore[attr-defined]
    group = ProcessGroup(rank, size, int(os.environ.get("LOCAL_RANK", "0")), reasons)
    dist.init_process_group(backend, store=calls, rank=rank, world_size=size, timeout=limit)
    try:
        yield group
    except RankLost:
        raise
    except BaseException as error:
        group.post_exit_reason(_sentence(error))
        raise
    else:
        group.barrier()
    finally:
        with suppress(Exception):
            dist.destroy_process_group()


def _sentence(error: BaseException) -> str:
    return str(error) if isinstance(error, AlpsError) and str(error) else f"{type(error).__name__}: {error}"
