"""Rates of work on a machine: measured on this one, or assumed for GPUs that were not available.

legend  n  inputs of a site, m its outputs    scalars
        T  calibration tokens                 scalar
Counts of flops are those of docs/project/performance.md. A pass is reading or writing a matrix of the site once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alps.solvers import hessian
from cost_model import Counts, Model, Run

# Columns of a panel of the Gram, and inputs up to which an inverse is LAPACK's.
PANEL, _DIRECT = 256, 320
# Passes over float32 matrices of a site: of an iteration, of a step of the refit, and of the errors.
_ITERATION, _STEP, _ERRORS = 36, 27, 20


class Measured:
    """This machine with one or two processes, from the constants that `scaling.py calibrate` has written.

    Attributes:
        run: of the model that the constants are of.
    """

    def __init__(self, constants: dict[str, Any], windows: int, size: int) -> None:
        counted, itemsize = constants["counts"], 4 if constants["dtype"] == "float32" else 2
        steps = {_shape(name): steps for name, steps in counted["steps"].items()}
        counts = Counts(counted["iterations"], counted["inverses"], by_shape=steps)
        model = Model(**constants["shapes"])
        self.run = Run(model, windows, constants["seqlen"], size, counts, itemsize, itemsize, hessian._CACHE_BYTES)
        self._fixed: dict[str, float] = constants["fixed"][str(size)]
        self._seconds: dict[str, float] = constants["alone" if size == 1 else "beside"]

    def start(self) -> float:
        return self._fixed["start"] + self._seconds["draw"] + self._seconds["capture"]

    def forward(self, windows: int, observing: bool) -> float:
        # The first batch of the first block, which runs to its end, is not told apart.
        return self.run.seqlen * windows * self._seconds["observing" if observing else "forward"]

    def gram(self, n: int, tokens: int) -> float:
        return tokens * self._seconds[f"gram {n}"]

    def prepare(self, n: int) -> float:
        return self._seconds[f"prepare {n}"]

    def inverse(self, n: int) -> float:
        return self._seconds[f"inverse {n}"]

    def iteration(self, shape: tuple[int, int], part: float) -> float:
        return self._of("iteration", shape) * part

    def step(self, shape: tuple[int, int], part: float) -> float:
        return self._of("step", shape) * part

    def trace(self, shape: tuple[int, int], part: float) -> float:
        return self._of("trace", shape) * part

    def errors(self, shape: tuple[int, int]) -> float:
        return self._of("errors", shape)

    def reduce(self, nbytes: float, everywhere: bool) -> float:
        return nbytes * self._nearest("all-reduce" if everywhere else "reduce", nbytes)

    def send(self, nbytes: float) -> float:
        return nbytes * self._nearest("send", nbytes)

    def select(self) -> float:
        return self._seconds["select"]

    def fetch(self) -> float:
        return 0.0  # a part of `start`

    def keep(self) -> float:
        return self._fixed["keep"] / self.run.model.blocks

    def _of(self, work: str, shape: tuple[int, int]) -> float:
        return self._seconds[f"{work} {shape[0]}x{shape[1]}"]

    def _nearest(self, message: str, nbytes: float) -> float:
        """Seconds a byte, of the message whose size is the nearest of those measured."""
        sizes = [int(name.split()[-1]) for name in self._seconds if name.startswith(f"{message} ")]
        return self._seconds[f"{message} {min(sizes, key=lambda n: abs(4 * n * n - nbytes))}"]


def gram_flops(n: int) -> float:
    """Flops of a token's share of the Gram, whose upper triangle is summed in panels."""
    return 2.0 * sum(min(PANEL, n - start) * (n - start) for start in range(0, n, PANEL))


def _shape(name: str) -> tuple[int, int]:
    m, n = map(int, name.split("x"))
    return m, n


@dataclass(frozen=True)
class Card:
    """An H100 SXM in a host of eight. Nothing of it was measured: peaks as published, times a share that is assumed.

    Attributes:
        run: what is done.
        bfloat16, float32: flops a second of dense products; published 989 and 67 TFLOP/s.
        halves, definite: shares of the float32 rate that an inverse by halves and a Cholesky factor reach; the first
            is about what this project's CPUs were seen to reach.
        memory: bytes a second; published 3.35 TB/s.
        inside, between: bytes a second of a message inside a host (NVLink, published 450 GB/s each way) and between
            hosts (one 400 Gb/s adapter a GPU, of which a message uses one).
        message: seconds of a message of tensors on GPUs.
        wait: seconds that an iteration waits for its counts; leaf: of an inverse of at most 320 inputs, which is a
            few small calls.
        read, write: bytes a second of a host from the files that all share, and of one process into them.
        upload: bytes a second of one process from the host's memory to its GPU.
        begin: seconds of starting and of ending a run.
        host: GPUs of one host; capacity: bytes of one GPU.
    """

    run: Run
    bfloat16: float = 0.6 * 989e12
    float32: float = 0.75 * 67e12
    halves: float = 0.85
    definite: float = 0.5
    memory: float = 0.8 * 3.35e12
    inside: float = 0.8 * 450e9
    between: float = 0.8 * 50e9
    message: float = 5e-5
    wait: float = 2e-4
    leaf: float = 5e-4
    read: float = 5e9
    write: float = 2e9
    upload: float = 10e9
    begin: float = 30.0
    host: int = 8
    capacity: float = 80 * 2**30

    def start(self) -> float:
        # Every process looks at its share of all weights, and writes its share of the files.
        whole = self.run.model.parameters * self.run.itemsize
        hosts = -(-self.run.size // self.host)
        return self.begin + whole / (self.read * hosts) + whole / (self.write * self.run.size)

    def forward(self, windows: int, observing: bool) -> float:
        model, tokens = self.run.model, windows * self.run.seqlen
        flops = 2.0 * model.weights * tokens
        if observing:
            flops -= 2.0 * model.hidden * model.inner * tokens
        # Causal attention: two products over half of the positions.
        flops += 2.0 * tokens * self.run.seqlen * model.hidden
        passes = (20.0 * model.hidden + 6.0 * model.inner) * self.run.itemsize * tokens
        return flops / self.bfloat16 + passes / self.memory

    def gram(self, n: int, tokens: int) -> float:
        # Every window's products are written, read, and added to sums of 8 bytes an entry.
        added = 24.0 * gram_flops(n) / 2 / self.run.seqlen
        return tokens * (gram_flops(n) / self.float32 + (18.0 * n + added) / self.memory)

    def prepare(self, n: int) -> float:
        return n**3 / 3 / (self.definite * self.float32) + 10 * 4.0 * n * n / self.memory

    def inverse(self, n: int) -> float:
        return 4 / 3 * n**3 / (self.halves * self.float32) + -(-n // _DIRECT) * self.leaf

    def iteration(self, shape: tuple[int, int], part: float) -> float:
        m, n = shape
        return part * (2.0 * m * n * n / self.bfloat16 + _ITERATION * 4.0 * m * n / self.memory) + self.wait

    def step(self, shape: tuple[int, int], part: float) -> float:
        m, n = shape
        return part * (2.0 * m * n * n / self.float32 + _STEP * 4.0 * m * n / self.memory)

    def trace(self, shape: tuple[int, int], part: float) -> float:
        return self.step(shape, part)

    def errors(self, shape: tuple[int, int]) -> float:
        m, n = shape
        return 3.0 * m * n * (n + PANEL) / self.float32 + _ERRORS * 4.0 * m * n / self.memory

    def reduce(self, nbytes: float, everywhere: bool) -> float:
        return self.message + (2.0 if everywhere else 1.0) * nbytes / self._link()

    def send(self, nbytes: float) -> float:
        return self.message + nbytes / self._link()

    def select(self) -> float:
        # The counts at every third iteration are a fourth message.
        return (3 + 1 / 3) * self.message

    def fetch(self) -> float:
        # The processes of a host read the same block, once from the files and then from the host's memory.
        nbytes = self.run.model.weights * self.run.itemsize
        return nbytes / self.read + nbytes / self.upload

    def keep(self) -> float:
        return self.run.model.weights * self.run.itemsize / self.write

    def _link(self) -> float:
        return self.inside if self.run.size <= self.host else self.between
