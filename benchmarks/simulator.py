"""Simulate the time of `alps prune` with ALPS on several ranks.

Every rank has a clock. Work advances one clock; a collective call first advances all clocks to the latest one.
`alps.pruning.work_distribution` assigns layers to ranks, and `machines.py` gives the time of each piece of work.
"""

from __future__ import annotations

from collections.abc import Sequence

from alps.core.statistics import InputSums, Needs
from alps.pruning.work_distribution import assign_inputs, solve_cost
from alps.solvers import get_method
from cost_model import Machine, Run


class Clocks:
    """Clocks of all ranks.

    Attributes:
        now: time by rank.
        spent: seconds by phase and rank; waiting counts to the phase in which it happens.
        waited: seconds of waiting in `spent`, by phase and rank.
        nbytes: bytes sent by phase.
    """

    def __init__(self, size: int) -> None:
        self.now = [0.0] * size
        self.spent: dict[str, list[float]] = {}
        self.waited: dict[str, list[float]] = {}
        self.nbytes: dict[str, float] = {}

    def work(self, rank: int, phase: str, seconds: float) -> None:
        """Advance the clock of one rank."""
        self.now[rank] += seconds
        if phase not in self.spent:
            self.spent[phase] = [0.0] * len(self.now)
        self.spent[phase][rank] += seconds

    def together(self, phase: str, seconds: float = 0.0, nbytes: float = 0.0) -> None:
        """Advance all clocks to the latest one, then by the seconds of a collective call."""
        latest = max(self.now)
        waited = self.waited.setdefault(phase, [0.0] * len(self.now))
        for rank, now in enumerate(self.now):
            waited[rank] += latest - now
            self.work(rank, phase, latest - now + seconds)
        self.nbytes[phase] = self.nbytes.get(phase, 0.0) + nbytes

    @property
    def busy(self) -> float:
        """Seconds of work over all ranks, without waiting."""
        return sum(map(sum, self.spent.values())) - sum(map(sum, self.waited.values()))


def simulate(run: Run, machine: Machine) -> Clocks:
    """Return the clocks after one run.

    Each block has these steps: a pass that collects statistics, their reduction, solves of split inputs on all ranks
        and of
    whole inputs on their owners, a broadcast of weights, a second pass except after the last block, and the journal.
    """
    clocks, ranks = Clocks(run.size), range(run.size)
    owners = assignment(run)
    traced = {0, run.model.blocks // 2, run.model.blocks - 1}
    shares = {run.share(rank) for rank in ranks}
    observing, passing = ({share: machine.forward(share, seen) for share in shares} for seen in (True, False))
    inputs = [sites[0][1] for sites in run.model.inputs]
    grams = {share: sum(machine.gram(n, share * run.seqlen) for n in inputs) for share in shares}
    for rank in ranks:
        clocks.work(rank, "start", machine.start())
    for block in range(run.model.blocks):
        for rank in ranks:
            clocks.work(rank, "fetch", 0.0 if run.changes.aside and block else machine.fetch())
            clocks.work(rank, "forward", observing[run.share(rank)])
            clocks.work(rank, "gram", grams[run.share(rank)])
        _sums(clocks, run, machine, owners)
        for sites, owner in zip(run.model.inputs, owners, strict=True):
            if owner is None:
                _split(clocks, run, machine, sites, block in traced)
        for sites, owner in zip(run.model.inputs, owners, strict=True):
            if owner is not None:
                _whole(clocks, run, machine, sites, owner, block in traced)
        _answers(clocks, run, machine, owners)
        if block + 1 < run.model.blocks:
            for rank in ranks:
                clocks.work(rank, "forward", passing[run.share(rank)])
        if not run.changes.aside:
            clocks.work(block % run.size, "journal", machine.keep())
            if run.size > 1:
                clocks.together("journal")
    return clocks


def assignment(run: Run) -> list[int | None]:
    """Return the rank that solves each input of a block; None if all ranks do."""
    jobs = [solve_cost(get_method("alps"), sites, run.size) for sites in run.model.inputs]
    return assign_inputs(jobs, run.size) if run.size > 1 else [0] * len(jobs)


def _sums(clocks: Clocks, run: Run, machine: Machine, owners: Sequence[int | None]) -> None:
    if run.size == 1:
        return
    for sites, owner in zip(run.model.inputs, owners, strict=True):
        nbytes = float(InputSums.nbytes(sites[0][1], Needs.GRAM))
        clocks.together("communication", machine.reduce(nbytes, owner is None), nbytes * (run.size - 1))


def _split(clocks: Clocks, run: Run, machine: Machine, sites: Sequence[tuple[int, int]], traced: bool) -> None:
    """Solve some rows of every layer of one input on each rank; each rank measures the errors of some layers."""
    n, size, part = sites[0][1], run.size, 1 / run.size
    inverses = run.inverses(sites) * machine.inverse(n)
    for rank in range(size):
        clocks.work(rank, "prepare", machine.prepare(n))
        clocks.work(rank, "inverses", inverses)
    for index, shape in enumerate(sites):
        seconds = _solve(run, machine, shape, part, traced) + run.counts.iterations * machine.select()
        for rank in range(size):
            clocks.work(rank, "solve", seconds)
        whole = 4.0 * shape[0] * n
        clocks.together("communication", machine.reduce(whole, True), whole * (size - 1))
        errors = machine.errors(shape)
        for rank in range(size):
            if run.changes.aside:
                clocks.work(rank, "measure_error", errors * part)
            elif index % size == rank:
                clocks.work(rank, "measure_error", errors)


def _whole(
    clocks: Clocks, run: Run, machine: Machine, sites: Sequence[tuple[int, int]], owner: int, traced: bool
) -> None:
    n = sites[0][1]
    clocks.work(owner, "prepare", machine.prepare(n))
    clocks.work(owner, "inverses", run.inverses(sites) * machine.inverse(n))
    for shape in sites:
        clocks.work(owner, "solve", _solve(run, machine, shape, 1.0, traced))
        clocks.work(owner, "measure_error", machine.errors(shape))


def _solve(run: Run, machine: Machine, shape: tuple[int, int], part: float, traced: bool) -> float:
    seconds = run.counts.iterations * machine.iteration(shape, part)
    seconds += (run.counts.steps_of(shape) + 2) * machine.step(shape, part)
    return seconds + (run.counts.inverses * machine.trace(shape, part) if traced else 0.0)


def _answers(clocks: Clocks, run: Run, machine: Machine, owners: Sequence[int | None]) -> None:
    if run.size == 1:
        return
    clocks.together("communication")
    for sites, owner in zip(run.model.inputs, owners, strict=True):
        if owner is not None:
            nbytes = float(sum(m * n for m, n in sites) * run.itemsize)
            clocks.together("communication", machine.send(nbytes), nbytes * (run.size - 1))
