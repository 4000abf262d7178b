"""Compare the waiting policies of OpenMP's threads, alone and beside busy programs: single layers, and `alps prune`.

    python benchmarks/waiting_policy.py --calibration c4.jsonl

The policies take turns, in reverse order in every other round, first on the machine as it is and then beside processes
that compute without a pause. The first table has the seconds of ALPS on one layer of a random problem, in a process for
each policy that waits while the others compute. The second one has `alps prune` of the first blocks of a model in a
new process each time: the phases of report.json, without the start of Python. A ratio is the median over the rounds of
the seconds divided by those of threads that spin, which is libgomp's default. A turn during which programs other than
this script's used more than `--quiet` CPUs is repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import alps
from alps.core.cpu_count import usable_cpus
from alps.core.cpu_load import CpuReading, read_cpu_times
from alps.core.provenance import provenance
from layers import calibration_options, ended_in_words, markdown

_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
# What libgomp does when nothing is set: about 300,000 turns, a few milliseconds.
_SPINNING = "300000"
_BUSY_LOOP = "while True: pass"
_WORKER = Path(__file__).with_name("waiting_worker.py")
# Repetitions of a turn that other programs have disturbed, before the script gives up, and seconds between them.
_TRIES, _PAUSE = 200, 5.0

# Environment variables by policy; what alps chooses is in none of them.
Policies = dict[str, dict[str, str]]
# Seconds of every turn by policy.
Seconds = dict[str, list[float]]


def main() -> None:
    """Print a row for every policy and number of busy processes, of layers and of whole runs."""
    options = _options()
    policies: Policies = {"spinning": {"GOMP_SPINCOUNT": _SPINNING}, "alps": {}}
    policies |= {"passive": {"OMP_WAIT_POLICY": "PASSIVE"}, "one thread": {"OMP_NUM_THREADS": "1"}}
    policies |= {f"{count} turns": {"GOMP_SPINCOUNT": count} for count in options.spin_counts}
    heads = ["policy", "busy", "least s", "median s", "ratio of least", "ratio"]
    tables: dict[str, list[list[str]]] = {"One layer": [], "alps prune": []}
    with tempfile.TemporaryDirectory(prefix="alps-benchmark-") as folder:
        shorten(options.model, options.blocks, Path(folder) / "model")
        for busy in options.busy:
            with busy_processes(busy):
                with layer_solvers(policies if options.layer_rounds else {}, options) as solve:
                    tables["One layer"] += table_rows(busy, measure(solve, policies, options.layer_rounds, options))
                runs = measure(
                    lambda name: prune(Path(folder), policies[name], options), policies, options.rounds, options
                )
                tables["alps prune"] += table_rows(busy, runs)
    for title, rows in tables.items():
        if not rows:
            continue
        print(f"{title}\n\n{markdown(heads, rows)}\n")
    facts = provenance()
    print(
        f"Layers of {options.size} x {options.size}; {options.model}, {options.blocks} blocks, {options.samples} x "
        f"{options.seqlen} tokens; {options.threads} threads, {options.layer_rounds} and {options.rounds} rounds, "
        f"{facts['machine']}, torch {facts['torch']}, commit {facts['commit']}"
    )


def shorten(name: str, blocks: int, folder: Path) -> None:
    """Write the first blocks of a model, with its tokenizer, as a checkpoint of its own."""
    loaded = alps.load(name)
    model = loaded.model
    del model.model.layers[blocks:]
    model.config.num_hidden_layers = len(model.model.layers)
    model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Context in which processes compute without a pause."""
    running = [subprocess.Popen([sys.executable, "-c", _BUSY_LOOP]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def measure(run: Callable[[str], float], policies: Policies, rounds: int, options: argparse.Namespace) -> Seconds:
    """Return the seconds of several rounds, in which all policies take turns.

    Args:
        run: does the work under a policy, and returns its seconds.
        policies: by name.
        rounds: number of turns of each policy.
        options: of the command line.
    """
    seconds: Seconds = {name: [] for name in policies}
    for turn in range(rounds):
        for name in list(policies) if turn % 2 == 0 else list(reversed(policies)):
            seconds[name].append(undisturbed(run, name, options.quiet))
            print(f"{name}: {seconds[name][-1]:.3f} s", file=sys.stderr)
    return seconds


def undisturbed(run: Callable[[str], float], name: str, quiet: float) -> float:
    """Return the seconds of the first turn that other programs have not disturbed."""
    for _ in range(_TRIES):
        before = _reading()
        seconds = run(name)
        # The busy processes are children of this one, and thus no others.
        others = sum(used.seconds for used in _reading().others_since(before)[:1])
        if others <= quiet:
            return seconds
        print(f"Repeated: other programs used {others:.2f} CPUs.", file=sys.stderr)
        time.sleep(_PAUSE)
    raise SystemExit("Other programs do not leave the CPUs alone: end them, or raise --quiet.")


def _reading() -> CpuReading:
    reading = read_cpu_times()
    if reading is None:
        raise SystemExit("This system does not tell the CPU times of other programs: Linux does.")
    return reading


@contextmanager
def layer_solvers(policies: Policies, options: argparse.Namespace) -> Iterator[Callable[[str], float]]:
    """Context with a function that solves a layer in the process of a policy, and returns its seconds."""
    command = [sys.executable, str(_WORKER), str(options.size), str(options.layers)]
    running: dict[str, subprocess.Popen[str]] = {}
    try:
        for name, policy in policies.items():
            running[name] = subprocess.Popen(
                command, env=_environment(policy, options), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            # A turn to warm up. The next process would else take this one for another program that is busy.
            _ask(running[name])
        yield lambda name: _ask(running[name])
    finally:
        for process in running.values():
            process.kill()
            # Closes the pipes, too.
            process.communicate()


def _ask(process: subprocess.Popen[str]) -> float:
    assert process.stdin is not None and process.stdout is not None
    print(file=process.stdin, flush=True)
    return float(process.stdout.readline())


def prune(folder: Path, policy: dict[str, str], options: argparse.Namespace) -> float:
    """Return the seconds of one `alps prune` with these environment variables and no others on waiting."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, "-m", "alps", "prune", str(folder / "model"), f"{out}/pruned", "--sparsity", "0.7"]
        command += ["--calibration", str(Path(options.calibration).resolve()), "--samples", str(options.samples)]
        command += ["--seqlen", str(options.seqlen), "--seed", str(options.seed), "--device", "cpu"]
        done = subprocess.run(command, env=_environment(policy, options), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
        report = json.loads(Path(out, "pruned", "report.json").read_text())
        return float(sum(report["seconds"].values()))


def _environment(policy: dict[str, str], options: argparse.Namespace) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in _VARIABLES}
    return {**environment, "OMP_NUM_THREADS": str(options.threads), **policy}


def table_rows(busy: int, seconds: Seconds) -> list[list[str]]:
    """Return a row for every policy: seconds, and their ratios to threads that spin."""
    base = seconds["spinning"]
    rows: list[list[str]] = []
    if not base:
        return rows
    for name, times in seconds.items():
        ratio = statistics.median(time / spinning for time, spinning in zip(times, base, strict=True))
        figures = [f"{min(times):.3f}", f"{statistics.median(times):.3f}", f"{min(times) / min(base):.2f}"]
        rows.append([name, str(busy), *figures, f"{ratio:.2f}"])
    return rows


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    calibration_options(parser, samples=16)
    parser.add_argument("--blocks", type=int, default=2, help="blocks of the model to prune")
    parser.add_argument("--size", type=int, default=576, help="inputs and outputs of the single layer")
    parser.add_argument("--layers", type=int, default=5, help="layers to solve in a turn")
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 2], help="numbers of busy processes")
    parser.add_argument("--spin-counts", nargs="*", default=[], metavar="N", help="further values of GOMP_SPINCOUNT")
    parser.add_argument("--quiet", type=float, default=0.1, help="CPUs that other programs may use meanwhile")
    parser.add_argument("--layer-rounds", type=int, default=20, help="0 for no layers")
    parser.add_argument("--rounds", type=int, default=5, help="of alps prune; 0 for none")
    return parser.parse_args()


if __name__ == "__main__":
    ended_in_words(main)
