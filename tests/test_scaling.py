"""The cost model of several processes: by hand on tiny runs, against counted flops, and what it must conserve."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import scaling
import scaling_rates
import scaling_runs
from alps.core.statistics import InputSums, Needs, relative_errors
from alps.solvers.hessian import invert_
from cost_model import Counts, Model, Run
from helpers import cli_process
from machines import Card, Measured, gram_flops
from scaling_plan import MODELS, VARIANTS, memory, plan_table
from simulator import Clocks, assignment, simulate

SMOLLM2 = Model(576, 1536, 9, 3, 30, 49152, tied=True)


@dataclass
class Flat:
    """A machine on which every piece of work takes a stated time, whatever its size."""

    inverses: float = 0.0
    messages: float = 0.0
    run: Run | None = None

    def start(self) -> float:
        return 10.0

    def forward(self, windows: int, observing: bool) -> float:
        return windows * (1.0 if observing else 2.0)

    def gram(self, n: int, tokens: int) -> float:
        return tokens * 0.25

    def prepare(self, n: int) -> float:
        return 10 * self.inverses

    def inverse(self, n: int) -> float:
        return self.inverses

    def iteration(self, shape: tuple[int, int], part: float) -> float:
        return shape[0] * shape[1] ** 2 * 1e-9 * part

    def step(self, shape: tuple[int, int], part: float) -> float:
        return 0.0

    def trace(self, shape: tuple[int, int], part: float) -> float:
        return 0.0

    def errors(self, shape: tuple[int, int]) -> float:
        return 0.5

    def reduce(self, nbytes: float, everywhere: bool) -> float:
        return self.messages * (2 if everywhere else 1)

    def send(self, nbytes: float) -> float:
        return self.messages

    def select(self) -> float:
        return 0.0

    def fetch(self) -> float:
        return 3.0

    def keep(self) -> float:
        return 4.0


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (MODELS["LLaMA-3-8B"], 8_030_261_248),
        (MODELS["LLaMA-3-70B"], 70_553_706_496),
        (MODELS["LLaMA-3.1-405B"], 405_853_388_800),
        (SMOLLM2, 134_515_008),
    ],
)
def test_shapes_hold_as_many_parameters_as_published(model: Model, parameters: int) -> None:
    assert model.parameters == parameters


def test_one_process_by_hand() -> None:
    """Two blocks, five windows of four tokens; seven sites of a block, all solved by the only process."""
    run = Run(Model(100, 200, 10, 5, 2, 64), 5, 4, counts=Counts(10, 3))
    clocks = simulate(run, Flat(inverses=0.1))
    # Four inputs, each with the Gram of 20 tokens; a second pass after the first block alone.
    passes = [3 + 5 + 4 * 20 * 0.25, 3 + 5 + 4 * 20 * 0.25]
    prepared, inverses, errors = 4 * 1.0, 4 * 3 * 0.1, 7 * 0.5
    entries = 100 * 100 + 2 * 50 * 100 + 100 * 100 + 2 * 200 * 100 + 100 * 200 * 2
    iterations = 10 * entries * 100 * 1e-9
    solved = prepared + inverses + iterations + errors
    assert clocks.now == [pytest.approx(10 + sum(passes) + 2 * solved + 2 * 5 + 2 * 4)]
    assert clocks.waited == {} and clocks.nbytes == {}


def test_two_processes_by_hand() -> None:
    """SmolLM2's shapes: down against all others. The one with less to do waits; the kept block is waited for."""
    run = Run(replace(SMOLLM2, blocks=1), 5, 4, 2, Counts(10, 0), itemsize=4)
    assert assignment(run) == [1, 1, 1, 0]
    clocks = simulate(run, Flat(messages=0.01))
    d, w = 576, 1536
    solves = [10 * d * w**2 * 1e-9 + 0.5, 10 * (2 * d * d + 2 * 192 * d + 2 * w * d) * d * 1e-9 + 6 * 0.5]
    # Three windows against two; four sums; the longer solve; four sets of weights; one writes.
    expected = 10 + 3 + 3 + 4 * 12 * 0.25 + 4 * 0.01 + max(solves) + 4 * 0.01 + 4
    assert clocks.now == [pytest.approx(expected)] * 2
    waits = [max(solves) - solves[0], (3 - 2) + 4 * (12 - 8) * 0.25 + max(solves) - solves[1]]
    assert clocks.waited["communication"] == [pytest.approx(wait) for wait in waits]
    assert clocks.waited["journal"] == [0.0, pytest.approx(4.0)]
    sums = 3 * InputSums.nbytes(d, Needs.GRAM) + InputSums.nbytes(w, Needs.GRAM)
    assert clocks.nbytes["communication"] == sums + 4 * run.model.weights


def test_later_sites_find_the_inverses_that_fit_into_what_is_kept() -> None:
    """256 MiB hold all 11 of 576 inputs, 8 of 4096 in bfloat16, none of 16384, of which a GPU keeps 10."""
    run = Run(MODELS["LLaMA-3-8B"], 128, 2048)
    small = replace(run, inverse_bytes=2**28)
    for n, expected in ((576, 11), (4096, 11 + 2 * 3), (16384, 3 * 11)):
        sites = [(64, n)] * 3
        assert small.inverses(sites) == expected and small.inverses(sites[:1]) == 11
    assert run.inverses([(64, 16384)] * 3) == 11 + 2 * 1


@given(st.integers(1, 40), st.sampled_from(list(MODELS.values())), st.floats(0, 2))
@settings(max_examples=40)
def test_no_work_is_lost_and_only_inverses_are_done_twice(size: int, model: Model, inverses: float) -> None:
    small = replace(model, blocks=3)
    one, several = Run(small, 40, 8), Run(small, 40, 8, size)
    alone, shared = simulate(one, Flat(inverses)), simulate(several, Flat(inverses))
    split = [sites for sites, owner in zip(small.inputs, assignment(several), strict=True) if owner is None]
    again = (size - 1) * inverses * sum(several.inverses(sites) + 10 for sites in split)
    # Every process starts, and reads every block.
    again += (size - 1) * (10 / 3 + 3)
    assert shared.busy == pytest.approx(alone.busy + 3 * again, rel=1e-9)
    for rank in range(size):
        assert shared.now[rank] == pytest.approx(sum(seconds[rank] for seconds in shared.spent.values()))
    assert max(shared.now) >= shared.busy / size * (1 - 1e-9)


def test_clocks_wait_for_the_last() -> None:
    clocks = Clocks(2)
    clocks.work(0, "solve", 3.0)
    clocks.work(1, "solve", 1.0)
    clocks.together("communication", 0.5, 7.0)
    assert clocks.now == [3.5, 3.5] and clocks.waited == {"communication": [0.0, 2.0]}
    assert clocks.spent == {"solve": [3.0, 1.0], "communication": [0.5, 2.5]}
    assert clocks.busy == 5.0 and clocks.nbytes == {"communication": 7.0}


def _wall(run: Run, **other: float) -> float:
    return max(simulate(run, Card(run, **other)).now)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [8, 128])
def test_slower_parts_make_no_run_faster_and_every_change_helps(size: int) -> None:
    run = Run(replace(MODELS["LLaMA-3.1-405B"], blocks=4), 128, 2048, size)
    wall = _wall(run)
    for name in ("bfloat16", "float32", "memory", "read", "write", "inside" if size <= 8 else "between"):
        assert _wall(run, **{name: getattr(Card, name) / 2}) > wall, name
    for name in ("message", "wait", "leaf", "begin"):
        assert _wall(run, **{name: 2 * getattr(Card, name)}) > wall, name
    walls = [_wall(replace(run, changes=changes)) for changes in VARIANTS.values()]
    assert walls[0] == wall and walls == sorted(walls, reverse=True)


def _flops(work: Callable[[], object]) -> int:
    def in_place(_: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], **rest: object) -> int:
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        work()
    return int(counter.get_total_flops())


def test_flops_are_those_of_the_program() -> None:
    n, m, tokens = 1280, 96, 64
    rows, weight = torch.randn(tokens, n), torch.randn(m, n)
    sums = InputSums.zeros(n, Needs.GRAM)
    assert _flops(lambda: sums.update(rows)) == tokens * gram_flops(n)
    stats = sums.to_stats()
    # Three energies over the triangle, whose diagonal blocks are whole.
    assert _flops(lambda: relative_errors([weight, weight], weight, stats)) == 3 * m * n * (n + 256)
    definite = torch.eye(n)
    # Products of halves; what LAPACK does with the smallest ones is not counted.
    assert 0.85 < _flops(lambda: invert_(definite)) / (4 / 3 * n**3) < 1


def test_memory_is_added_up_and_shrinks_with_the_processes() -> None:
    run = Run(MODELS["LLaMA-3.1-405B"], 128, 2048)
    one = memory(run)
    d, w = 16384, 53248
    assert one["statistics"] == 3 * InputSums.nbytes(d, Needs.GRAM) + InputSums.nbytes(w, Needs.GRAM)
    assert one["activations"] == 128 * 2048 * d * 2 and one["block"] == 2 * run.model.weights
    assert one["solver"] == 4 * (8 * d * w + 3 * w * w)
    split = memory(replace(run, size=128))
    assert split["solver"] == 4 * (7 * 128 * w + 2 * d * w + 3 * w * w)
    assert split["activations"] == one["activations"] / 128
    # The largest site alone takes more than half of a GPU, however many there are.
    assert Card.capacity / 2 < sum(split.values()) < Card.capacity < sum(one.values())


def test_efficiency_is_of_the_first_line() -> None:
    lines = plan_table(Run(MODELS["LLaMA-3-8B"], 16, 2048), [1, 2, 32]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    # 16 windows are not split over 32 processes.
    assert [row[0] for row in cells[2:]] == ["1", "2"] and cells[2][2] == "1.00"
    assert float(cells[3][2]) == pytest.approx(float(cells[2][1]) / (2 * float(cells[3][1])), abs=0.02)


def test_plan_prints_every_size(tmp_path: Path) -> None:
    options = ("plan", "--models", "LLaMA-3-8B", "--sizes", "1,4", "--goal", "8")
    done = cli_process.run_script(Path(scaling.__file__), *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")]
    # Times, memory, and times with every change; the goal is planned for, too.
    assert [first.count(size) for size in ("1", "4", "8")] == [3, 3, 3] and set(VARIANTS) <= set(first)


def test_pieces_are_measured_and_a_run_predicted_from_them(
    short_stories: Path, english_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Namespace(model=str(short_stories), calibration=str(english_file), samples=4, seqlen=64, seed=0)
    options.dtype, options.sparsity = "float32", 0.7
    monkeypatch.setattr("subprocess.run", cli_process.run_command)
    pieces = scaling_rates._pieces(options, 1)
    monkeypatch.undo()
    assert all(seconds > 0 for seconds in pieces["seconds"].values())
    assert pieces["counts"]["iterations"] >= pieces["counts"]["inverses"] > 1
    record = {**pieces, "alone": pieces["seconds"], "beside": pieces["seconds"]}
    record |= {"model": "it", "seqlen": 64, "dtype": "float32", "sparsity": 0.7}
    record["fixed"] = {"1": {"start": 5.0, "keep": 0.1}}
    machine = Measured(record, 4, 1)
    assert machine.run.model.blocks == 2
    wall = max(simulate(machine.run, machine).now)
    assert 5.1 < wall < 15
    other = {"model": "it", "seqlen": 32, "dtype": "float32", "sparsity": 0.7}
    with pytest.raises(SystemExit, match="calibrate anew"):
        scaling.deviations(record, other)


_CHILDREN = """
import mmap, os, time
shared = mmap.mmap(-1, 2**25)
shared.write(b"1" * 2**25)
for _ in range(2):
    if os.fork() == 0:
        own = b"1" * 3 * 2**24
        sum(memoryview(shared)[::4096])
        time.sleep(0.6)
        os._exit(0)
os.wait(), os.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_pages_that_processes_share_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling_runs, "_LOOK", 0.02)
    resident, together = scaling_runs._watch(subprocess.Popen([sys.executable, "-c", _CHILDREN]), launched=True)
    assert len(resident) == 2 and min(resident) > 2**25 + 3 * 2**24
    assert max(resident) < together < sum(resident) - 2**24


@pytest.mark.slow
def test_memory_of_both_processes_of_a_run_is_measured(stories: Path, tmp_path: Path) -> None:
    options = Namespace(model=str(stories), sparsity=0.6, dtype="float32", folder=str(tmp_path))
    measured = scaling_runs.prune(options, 2, ["--method", "magnitude", "--no-measure-error"])
    assert abs(measured["sparsity"] - 0.6) < 1e-3 and measured["wall"] > measured["seconds"]["total"]
    assert len(measured["resident_bytes"]) == 2 and list(tmp_path.iterdir()) == []
    assert max(measured["resident_bytes"]) < measured["together_bytes"] < sum(measured["resident_bytes"])


def test_runs_are_tabled_by_their_medians() -> None:
    def ran(wall: float) -> dict[str, object]:
        return {"wall": wall, "seconds": {"solve": wall / 2}, "resident_bytes": [2**20], "together_bytes": 2**21}

    runs = {"plain": [ran(10), ran(12), ran(11)], "group of 2": [ran(5), ran(8), ran(5)]}
    lines = scaling_runs.table(json.loads(json.dumps({"runs": runs}))).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    heads = cells[0]
    plain, two = (dict(zip(heads, row, strict=True)) for row in cells[2:])
    assert (plain["wall s"], plain["solve s"], plain["speed-up"]) == ("11.0", "5.5", "1.00")
    assert (two["wall s"], two["least-most"], two["speed-up"], two["MiB all"]) == ("5.0", "5.0-8.0", "2.00", "2")
