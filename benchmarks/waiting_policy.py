"""Compare the waiting policies of OpenMP's threads in whole runs of `alps prune`, alone and beside busy programs.

    python benchmarks/waiting_policy.py --calibration c4.jsonl

Every run prunes the first blocks of a model in a new process. The policies take turns, in reverse order in every other
round, first on the machine as it is and then beside processes that compute without a pause. Seconds are those of the
phases in report.json, without the start of Python. A ratio is the median over the rounds of the seconds divided by
those of threads that spin, which is libgomp's default.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
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
# Repetitions of a run that other programs have disturbed, before the script gives up.
_TRIES = 50

# Seconds of every run by policy.
Seconds = dict[str, list[float]]


def main() -> None:
    """Print a row for every policy and number of busy processes."""
    options = _options()
    policies = {"spinning": {"GOMP_SPINCOUNT": _SPINNING}, "alps": {}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}}
    policies |= {"one thread": {"OMP_NUM_THREADS": "1"}}
    policies |= {f"{count} turns": {"GOMP_SPINCOUNT": count} for count in options.spin_counts}
    rows = []
    with tempfile.TemporaryDirectory(prefix="alps-benchmark-") as folder:
        shorten(options.model, options.blocks, Path(folder) / "model")
        for busy in options.busy:
            with busy_processes(busy):
                rows += table_rows(busy, measure(Path(folder), policies, options))
    print(markdown(["policy", "busy", "least s", "median s", "ratio of least", "ratio"], rows))
    facts = provenance()
    print(
        f"\n{options.model}, {options.blocks} blocks, {options.samples} x {options.seqlen} tokens, "
        f"{options.threads} threads, {options.rounds} rounds, {facts['machine']}, torch {facts['torch']}, "
        f"commit {facts['commit']}"
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


def measure(folder: Path, policies: dict[str, dict[str, str]], options: argparse.Namespace) -> Seconds:
    """Return the seconds of `--rounds` runs with every policy, in turns."""
    seconds: Seconds = {name: [] for name in policies}
    for turn in range(options.rounds):
        order = list(policies) if turn % 2 == 0 else list(reversed(policies))
        for name in order:
            seconds[name].append(undisturbed_prune(folder, policies[name], options))
            print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr)
    return seconds


def undisturbed_prune(folder: Path, policy: dict[str, str], options: argparse.Namespace) -> float:
    """Return the seconds of the first `alps prune` that other programs have not disturbed."""
    for _ in range(_TRIES):
        before = _reading()
        seconds = prune(folder, policy, options)
        # The busy processes are children of this one, and thus no others.
        others = _reading().others_since(before)[0].seconds
        if others <= options.quiet:
            return seconds
        print(f"Repeated: other programs used {others:.2f} CPUs.", file=sys.stderr)
    raise SystemExit("Other programs do not leave the CPUs alone: end them, or raise --quiet.")


def _reading() -> CpuReading:
    reading = read_cpu_times()
    if reading is None:
        raise SystemExit("This system does not tell the CPU times of other programs: Linux does.")
    return reading


def prune(folder: Path, policy: dict[str, str], options: argparse.Namespace) -> float:
    """Return the seconds of one `alps prune` with these environment variables and no others on waiting."""
    environment = {name: value for name, value in os.environ.items() if name not in _VARIABLES}
    environment |= {"OMP_NUM_THREADS": str(options.threads), **policy}
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, "-m", "alps", "prune", str(folder / "model"), f"{out}/pruned", "--sparsity", "0.7"]
        command += ["--calibration", str(Path(options.calibration).resolve()), "--samples", str(options.samples)]
        command += ["--seqlen", str(options.seqlen), "--seed", str(options.seed), "--device", "cpu"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
        report = json.loads(Path(out, "pruned", "report.json").read_text())
        return float(sum(report["seconds"].values()))


def table_rows(busy: int, seconds: Seconds) -> list[list[str]]:
    """Return a row for every policy: seconds, and their ratios to threads that spin."""
    base = seconds["spinning"]
    rows = []
    for name, times in seconds.items():
        ratio = statistics.median(time / spinning for time, spinning in zip(times, base, strict=True))
        figures = [min(times), statistics.median(times), min(times) / min(base), ratio]
        rows.append([name, str(busy), *(f"{figure:.2f}" for figure in figures)])
    return rows


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    calibration_options(parser, samples=16)
    parser.add_argument("--blocks", type=int, default=2, help="blocks of the model to prune")
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 2], help="numbers of busy processes")
    parser.add_argument("--spin-counts", nargs="*", default=[], metavar="N", help="further values of GOMP_SPINCOUNT")
    parser.add_argument("--quiet", type=float, default=0.1, help="CPUs that other programs may use meanwhile")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    ended_in_words(main)
