"""Several processes on one model, started by torchrun: who this one is, what they tell each other, and how they end.

`ProcessGroup()` is a group of one process, in which every call is a no-op: one code path serves
one process and many. Tensors travel by NCCL where they are on GPUs, everything else by gloo.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from alps.core.errors import AlpsError, ConfigError, RankLost, first_line
from alps.core.statistics import InputSums

# How long a process waits for the others before it gives up, in seconds; ALPS_RANK_TIMEOUT says otherwise.
_TIMEOUT = 1800.0
# How long the survivors wait for each other's last words once one is lost, in seconds.
_LAST_WORDS = 3.0


class ProcessGroup:
    """The processes of one run.

    Attributes:
        rank, size: which one this is, counted from 0, and how many there are.
        local: its number on this host, which is that of its GPU.
        place: what it is doing, for the sentence that is said when it is lost; set by whoever does it.
    """

    def __init__(self, rank: int = 0, size: int = 1, local: int = 0, store: Any = None) -> None:
        self.rank, self.size, self.local, self.current_stage = rank, size, local, "the start"
        self._store = store

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints, and keeps what there is only one of."""
        return self.rank == 0

    def device(self, asked: str, found: torch.device) -> torch.device:
        """Where this process works: on `found`, or on the GPU of its own number where several are to be used.

        Args:
            asked: as the user named it.
            found: what that is for one process.

        Raises:
            ConfigError: for one GPU for several processes, or without a GPU for each.
        """
        if self.size == 1 or found.type != "cuda":
            return found
        if asked not in ("auto", "cuda"):
            raise ConfigError(f"Device '{asked}' is one GPU for {self.size} processes: leave --device out.")
        if self.local >= torch.cuda.device_count():
            raise ConfigError(f"{torch.cuda.device_count()} GPUs are here for more processes: start one for each GPU.")
        torch.cuda.set_device(self.local)
        return torch.device("cuda", self.local)

    def shard(self, values: Tensor) -> Tensor:
        """Every `size`-th of the rows of a tensor, those of this process.

        Raises:
            ConfigError: when there are fewer rows than processes.
        """
        if len(values) < self.size:
            raise ConfigError(f"{len(values)} windows cannot be split over {self.size} processes: give more samples.")
        return values[self.rank :: self.size]

    def shard_batch_sizes(self, count: int, batch: int) -> list[int]:
        """How many of every `batch` consecutive ones of all processes' `count` rows are this process's by `share`.

        A batch has at least one row of each process, but for the last, which is left out where it has none of this one.
        """
        ends = [*range(0, count, max(batch, self.size)), count]
        # So many of the rows before each end are this process's.
        mine = [-(-max(end - self.rank, 0) // self.size) for end in ends]
        return [after - before for before, after in pairwise(mine) if after > before]

    def broadcast_from_main(self, value: Callable[[], Any]) -> Any:
        """What the first process makes of `value`, which no other calls; it must be picklable.

        What it raises ends all of them.
        """
        if self.size == 1:
            return value()
        made = [value()] if self.is_main else [None]
        with self._together():
            dist.broadcast_object_list(made, src=0)
        return made[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """The values of all processes, by rank, on every one of them."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self._together():
            dist.all_gather_object(found, value)
        return found

    def sum_counters(self, mine: Mapping[str, int]) -> dict[str, int]:
        """Sums by name, in the first process's order and then the others'; who lacks a name counts nothing for it."""
        total: dict[str, int] = {}
        for one in self.all_gather_object(dict(mine)):
            for name, count in one.items():
                total[name] = total.get(name, 0) + count
        return total

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sums over all processes, the same bits on every one of them; may overwrite `values`."""
        if self.size > 1:
            with self._together():
                dist.all_reduce(values)
        return values

    def reduce_statistics(self, mine: InputSums, owner: int | None) -> None:
        """Add up the sums of all processes in place: on `owner`, the others let go of theirs, or on all for None."""
        if self.size == 1:
            return
        tokens = torch.tensor([mine.tokens], dtype=torch.int64)
        with self._together():
            for part in (tokens, *mine.tensors()):
                if owner is None:
                    dist.all_reduce(part)
                else:
                    dist.reduce(part, dst=owner)
        mine.tokens = int(tokens)
        if owner not in (None, self.rank):
            mine.free()

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Give every process the values that `tensor` has on `source`, in place."""
        if self.size > 1:
            with self._together():
                dist.broadcast(tensor, src=source)

    def barrier(self) -> None:
        """Go on when every process is here."""
        self.all_reduce_sum(torch.zeros(1))

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Turn the loss of another process into one sentence."""
        try:
            yield
        except RuntimeError as error:
            raise RankLost(self._loss(error)) from error

    def post_exit_reason(self, sentence: str) -> None:
        """Leave last words for the others: why this process ends."""
        if self.size > 1:
            with suppress(Exception):
                self._store.set(f"end/{self.rank}", sentence.encode())

    def _loss(self, error: Exception) -> str:
        """Who is lost, where, and why, as far as those who are left know."""
        self.post_exit_reason("")
        deadline, words = time.monotonic() + _LAST_WORDS, dict[int, str]()
        # torchrun soon asks those who are left to end, too.
        with suppress(KeyboardInterrupt):
            while time.monotonic() < deadline and not any(words.values()) and len(words) < self.size:
                words |= {rank: found for rank in range(self.size) if (found := self._words(rank)) is not None}
                time.sleep(0.1)
        for rank, sentence in words.items():
            if sentence:
                return f"Rank {rank} ended: {sentence}"
        gone = [rank for rank in range(self.size) if rank not in words]
        if not gone:
            return f"Rank {self.rank} lost touch with the others at {self.current_stage} ({first_line(error)})."
        return (
            f"Rank {', '.join(map(str, gone))} of {self.size} died or hangs: rank {self.rank} waited in vain at "
            f"{self.current_stage}; the system's log says whether it was killed for its memory."
        )

    def _words(self, rank: int) -> str | None:
        try:
            return self._store.get(f"end/{rank}").decode() if self._store.check([f"end/{rank}"]) else None
        except Exception:  # the store ends with the process that keeps it
            return None


def timeout() -> float:
    """Seconds to wait for other processes.

    Raises:
        ConfigError: when ALPS_RANK_TIMEOUT is no positive number.
    """
    given = os.environ.get("ALPS_RANK_TIMEOUT", str(_TIMEOUT))
    try:
        found = float(given)
    except ValueError:
        found = 0.0
    if not 0 < found < 1e7:
        raise ConfigError(f"ALPS_RANK_TIMEOUT is '{given}': give seconds, as a positive number.")
    return found


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """The processes that torchrun has started, or this one alone; they part at the end of the body.

    What a process fails with is told to the others, who wait for it in vain.

    Raises:
        RankLost: when another process is lost.
    """
    if not dist.is_torchelastic_launched() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ProcessGroup()
        return
    limit = datetime.timedelta(seconds=timeout())
    store, rank, size = next(dist.rendezvous("env://", timeout=limit))  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    words, calls = (dist.PrefixStore(name, store) for name in ("words", "run"))  # type: ignore[attr-defined]
    group = ProcessGroup(rank, size, int(os.environ.get("LOCAL_RANK", "0")), words)
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


def require_single_process(command: str) -> None:
    """Refuse to run a command in several processes.

    Raises:
        ConfigError: under torchrun with more than one process.
    """
    if dist.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"alps {command} runs in one process: start it without torchrun.")
