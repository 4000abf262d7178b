"""Seconds of the pieces of a run, on the project's own functions at a model's shapes, one thread a process.

As a script it measures in the processes that it is started in, all at the same time, and the first one prints what it
found as JSON. `calibrate` starts it in one process and in two, and times two runs that solve nothing:
`alps prune --method magnitude`. Nothing of what the simulator is to reproduce is looked at.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.block_inputs import BlockInputs, batch_tokens
from alps.calibration.input_statistics import discover, observe
from alps.calibration.moe_statistics import LayerInput
from alps.core.device import exact_float32
from alps.core.distributed import ProcessGroup, process_group
from alps.core.provenance import provenance
from alps.core.statistics import InputStats, InputSums, Needs, relative_errors
from alps.data.loaded_model import LoadedModel, open_model
from alps.data.mixture import load_calibration
from alps.models.blocks import on_device
from alps.solvers.alps import Alps
from alps.solvers.hessian import ScaledHessian
from alps.solvers.patterns import Pattern, Unstructured, keep_largest
from alps.solvers.topk import apply_mask
from layers import calibration_options
from machines import PANEL, gram_flops
from scaling_runs import prune

# Calibration tokens that the pieces are timed on.
_TOKENS = 4096
# Size of the matrix product whose rate the other products are held against.
_PRODUCT = 1536
_CPU = torch.device("cpu")

# Seconds by name of the work and shape, as in "inverse 576" or "iteration 192x576".
Found = dict[str, list[float]]


def calibrate(options: argparse.Namespace) -> dict[str, Any]:
    """The constants of this machine and model: alone, beside a second process that does the same, and of messages."""
    alone, beside = (_pieces(options, processes) for processes in (1, 2))
    fixed = {}
    for processes in (1, 2):
        ran = prune(options, processes if processes > 1 else 0, ["--method", "magnitude", "--no-measure-error"])
        spent = ran["seconds"]
        seconds = ran["wall"] - sum(spent.get(phase, 0.0) for phase in ("prepare", "solve", "journal", "communication"))
        fixed[str(processes)] = {"start": seconds, "keep": spent["journal"]}
    return {
        "model": options.model,
        "seqlen": options.seqlen,
        "dtype": options.dtype,
        "sparsity": options.sparsity,
        "shapes": alone["shapes"],
        "counts": alone["counts"],
        "alone": alone["seconds"],
        "beside": beside["seconds"],
        "fixed": fixed,
        "versions": provenance(),
    }


def _pieces(options: argparse.Namespace, processes: int) -> dict[str, Any]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, __file__, "--model", options.model, "--calibration", options.calibration]
    command += ["--samples", str(options.samples), "--seqlen", str(options.seqlen), "--seed", str(options.seed)]
    command += ["--dtype", options.dtype, "--sparsity", str(options.sparsity)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


class _Timer:
    """Seconds by name; all processes begin a piece of work together."""

    def __init__(self, group: ProcessGroup) -> None:
        self.found: Found = {}
        self._group = group

    def time(self, name: str, work: Callable[[], Any], share: float = 1.0) -> Any:
        """Return the result of `work`; `share` converts its seconds into those of a unit."""
        self._group.barrier()
        start = time.perf_counter()
        made = work()
        self.add(name, (time.perf_counter() - start) * share)
        return made

    def add(self, name: str, seconds: float) -> None:
        """A time that was taken elsewhere."""
        self.found.setdefault(name, []).append(seconds)


def main() -> None:
    """Measure, print one line of JSON."""
    options = _options()
    with process_group() as group, exact_float32():
        timer = _Timer(group)
        loaded = open_model(options.model, options.dtype)
        source = load_calibration(options.calibration, options.samples)
        drawn = (source, options.samples, options.seqlen, options.seed)
        windows = timer.time("draw", lambda: loaded.calibration(*drawn))
        batch = max(batch_tokens(loaded.blocks(), _CPU) // options.seqlen, 1)
        ids = windows.ids[: min(max(_TOKENS // options.seqlen, 1), len(windows.ids) // 2)]
        inputs = timer.time("capture", lambda: capture_block_inputs(loaded.model.eval(), loaded.blocks(), ids, batch))
        counts = _blocks(options, loaded, inputs, timer)
        square = torch.randn(_PRODUCT, _PRODUCT)
        for _ in range(5):
            timer.time(f"product {_PRODUCT}", partial(torch.mm, square, square))
        if group.size > 1:
            _messages(group, timer, [int(name.split()[1]) for name in timer.found if name.startswith("inverse ")])
        seconds = [{name: statistics.median(taken) for name, taken in timer.found.items()}]
        every = group.all_gather_object(seconds[0])
        mean = {name: statistics.mean(one[name] for one in every) for name in seconds[0]}
        if group.is_main:
            print(json.dumps({"shapes": _shapes(loaded), "counts": counts, "seconds": mean}))


def _blocks(options: argparse.Namespace, loaded: LoadedModel, inputs: BlockInputs, timer: _Timer) -> dict[str, Any]:
    """Walk the dense model as far as a third of its depth, and solve two blocks on the way."""
    blocks, counts = loaded.blocks(), _Counted()
    share = 1 / sum(hidden.shape[0] * hidden.shape[1] for hidden in inputs.hidden)
    solved = {len(blocks) // 6, len(blocks) // 3}
    for block in blocks[: max(solved) + 1]:
        with on_device(block, _CPU), torch.no_grad():
            if block.index in solved:
                groups = discover(block, inputs, _CPU)
                seen = timer.time("observing", partial(observe, block, inputs, Needs.GRAM, _CPU, groups=groups), share)
                timer.found["observing"][-1] -= seen.seconds * share
                for shared in seen.shared:
                    _input(shared, Unstructured(options.sparsity), options.seqlen, timer, counts)
            timer.time("forward", partial(inputs.advance, block.index, block.module, _CPU), share)
    return counts.means()


class _Counted:
    """Iterations, inverses of an input, steps by shape."""

    def __init__(self) -> None:
        self.iterations: list[float] = []
        self.inverses: list[float] = []
        self.steps: dict[str, list[float]] = {}

    def means(self) -> dict[str, Any]:
        """As a constant each."""
        mean = statistics.mean
        steps = {shape: mean(found) for shape, found in self.steps.items()}
        return {"iterations": mean(self.iterations), "inverses": mean(self.inverses), "steps": steps}


def _input(shared: LayerInput, pattern: Pattern, seqlen: int, timer: _Timer, counts: _Counted) -> None:
    """Everything that is done with one input and its sites."""
    stats, method, n = shared.stats, Alps(), shared.sites[0].shape[1]
    rows, sums = torch.randn(max(_TOKENS // seqlen, 1), seqlen, n), InputSums.zeros(n, Needs.GRAM)
    timer.time(f"gram {n}", partial(sums.update, rows), 1 / (len(rows) * seqlen))
    state = timer.time(f"prepare {n}", lambda: method.prepare(stats))
    # As if they were the first: other penalties than those of the solves.
    for rho in (0.11, 0.12, 0.13):
        timer.time(f"inverse {n}", partial(ScaledHessian(state.matrix, state.scale, 0.0).inverse, rho))
    inverse = statistics.median(timer.found[f"inverse {n}"])
    known: set[float] = set()
    for site in shared.sites:
        aim, name = site.read().float().clone(), "x".join(map(str, site.shape))
        timer._group.barrier()
        start = time.perf_counter()
        solution = method.solve(aim, state, pattern)
        whole, info = time.perf_counter() - start, solution.info
        rhos = {point.rho for point in info.trace}
        splitting = info.seconds["admm"]
        timer.add(f"iteration {name}", (splitting - len(rhos - known) * inverse) / info.iterations)
        timer.add(f"step {name}", (whole - splitting) / (info.refit_steps + 2))
        known |= rhos
        counts.iterations.append(info.iterations)
        counts.steps.setdefault(name, []).append(info.refit_steps)
        timer.time(f"trace {name}", partial(state.lost_energy, aim, solution.weight))
        timer.time(f"errors {name}", partial(_errors, solution.weight, aim, pattern, stats))
    counts.inverses.append(len(known))


def _errors(weight: Tensor, aim: Tensor, pattern: Pattern, stats: InputStats) -> list[float]:
    return relative_errors([weight, apply_mask(aim, keep_largest(aim.abs(), pattern))], aim, stats)


def _messages(group: ProcessGroup, timer: _Timer, sizes: list[int]) -> None:
    for n in dict.fromkeys(sizes):
        sums, values, nbytes = InputSums.zeros(n, Needs.GRAM), torch.zeros(n, n), InputSums.nbytes(n, Needs.GRAM)
        for _ in range(5):
            timer.time(f"reduce {n}", partial(group.reduce_statistics, sums, 0), 1 / nbytes)
            timer.time(f"all-reduce {n}", partial(group.reduce_statistics, sums, None), 1 / nbytes)
            timer.time(f"send {n}", partial(group.broadcast, values, 0), 1 / (4 * n * n))
    histograms = [torch.zeros(size, dtype=torch.int64) for size in (2**15, 2**16, 2)]
    for _ in range(20):
        timer.time("select", lambda: [group.all_reduce_sum(one) for one in histograms])
        timer.time("message", group.barrier)


def shares(seconds: dict[str, float]) -> dict[str, float]:
    """Flops of the products of each piece of work over its seconds, as a share of the rate of a large product."""
    rate, found = 2 * _PRODUCT**3 / seconds[f"product {_PRODUCT}"], {}
    for name, took in seconds.items():
        work, _, size = name.partition(" ")
        if work in ("gram", "inverse"):
            n = int(size)
            found[name] = (gram_flops(n) if work == "gram" else 4 / 3 * n**3) / took / rate
        elif work in ("iteration", "step", "errors"):
            m, n = map(int, size.split("x"))
            found[name] = (3 * m * n * (n + PANEL) if work == "errors" else 2 * m * n * n) / took / rate
    return found


def _shapes(loaded: LoadedModel) -> dict[str, Any]:
    config: Any = loaded.model.config
    return {
        "hidden": config.hidden_size,
        "inner": config.intermediate_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "blocks": config.num_hidden_layers,
        "vocabulary": config.vocab_size,
        "tied": config.tie_word_embeddings,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    calibration_options(parser, samples=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--sparsity", type=float, default=0.7)
    return parser.parse_args()


if __name__ == "__main__":
    main()
