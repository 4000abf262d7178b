"""A whole model, end to end: `alps prune` with several methods in turn, timed as a user would see it.

Every run is a process of its own: load, calibrate, prune, write. Example:

    python benchmarks/model.py --calibration c4.jsonl --methods alps,sparsegpt,wanda
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layers import calibration_options, markdown

_PHASES = ("load", "capture", "forward", "gram", "prepare", "solve", "measure_error")


@dataclass
class Runs:
    """The runs of one method: wall seconds of the process, and the reports it wrote."""

    seconds: list[float] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)


def main() -> None:
    """Run every method `--repeats` times, taking turns, and print one table of medians."""
    options = _options()
    runs = {method: Runs() for method in options.methods.split(",")}
    for _ in range(options.repeats):
        for method, found in runs.items():
            seconds, report = prune(options, method)
            found.seconds.append(seconds)
            found.reports.append(report)
            print(f"{method}: {seconds:.1f} s", file=sys.stderr)
    for method, found in runs.items() if options.reports else ():
        folder = Path(options.reports)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{method}.json").write_text(json.dumps(found.reports[-1]))
    report = next(iter(runs.values())).reports[0]
    versions = report["versions"]
    print(
        f"{options.model}, {options.sparsity:g}, {options.samples} x {options.seqlen} tokens of {options.calibration}, "
        f"seed {options.seed}, {options.repeats} runs each, medians; {versions['machine']}, torch {versions['torch']}, "
        f"commit {versions['commit']}\n"
    )
    print(table(runs))


def prune(options: argparse.Namespace, method: str) -> tuple[float, dict[str, Any]]:
    """One `alps prune`: wall seconds and its report."""
    folder = Path(tempfile.mkdtemp(prefix="alps-benchmark-"))
    try:
        command = [sys.executable, "-m", "alps", "prune", options.model, str(folder / "out"), "--method", method]
        command += ["--sparsity", str(options.sparsity), "--calibration", options.calibration]
        command += ["--samples", str(options.samples), "--seqlen", str(options.seqlen), "--seed", str(options.seed)]
        start = time.perf_counter()
        subprocess.run([*command, "--device", options.device], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        report: dict[str, Any] = json.loads((folder / "out" / "report.json").read_text())
        return seconds, report
    finally:
        shutil.rmtree(folder)


def table(runs: dict[str, Runs]) -> str:
    """Wall seconds and how often every other method's, then the phases, the mean error and the peak memory."""
    heads = ["method", "wall s", *(f"of {name}" for name in runs), *(f"{p} s" for p in _PHASES), "mean error", "GiB"]
    rows = []
    walls = {method: statistics.median(found.seconds) for method, found in runs.items()}
    for method, found in runs.items():
        cells = [f"{walls[method]:.1f}", *(f"{walls[method] / walls[other]:.2f}" for other in runs)]
        for phase in _PHASES:
            cells.append(f"{statistics.median(r['seconds'].get(phase, 0.0) for r in found.reports):.1f}")
        errors = [site["error"] for site in found.reports[0]["layers"]]
        cells.append(f"{statistics.mean(errors):.4f}")
        cells.append(f"{max(r['peak_host_bytes'] for r in found.reports) / 2**30:.2f}")
        rows.append([method, *cells])
    return markdown(heads, rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    calibration_options(parser, samples=128)
    parser.add_argument("--methods", default="alps,sparsegpt,wanda")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--reports", default="", help="folder for the last report.json of every method")
    return parser.parse_args()


if __name__ == "__main__":
    main()
