"""Whole runs of `alps prune` in one process and in two, in turns: wall time, phases, memory of every process."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layers import markdown

# Seconds between two looks at the memory of the processes: rare enough not to disturb them.
_LOOK = 1.0
# How a run is started: by itself, as a group of one, as a group of two.
WAYS = {"plain": 0, "group of 1": 1, "group of 2": 2}
PHASES = ("load", "capture", "forward", "gram", "prepare", "solve", "measure_error", "communication", "journal", "save")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """`--rounds` runs of every way, which take turns; the record of all."""
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    arguments = ["--calibration", options.calibration, "--samples", str(options.samples)]
    arguments += ["--seqlen", str(options.seqlen), "--seed", str(options.seed)]
    for _ in range(options.rounds):
        for way, processes in WAYS.items():
            found = prune(options, processes, arguments)
            assert abs(found["sparsity"] - options.sparsity) < 1e-3, (way, found["sparsity"])
            runs[way].append(found)
            print(f"{way}: {found['wall']:.1f} s", file=sys.stderr)
    asked = ("model", "samples", "seqlen", "seed", "dtype", "sparsity", "rounds")
    return {**{name: getattr(options, name) for name in asked}, "runs": runs, "versions": runs["plain"][0]["versions"]}


def prune(options: argparse.Namespace, processes: int, arguments: Sequence[str]) -> dict[str, Any]:
    """One `alps prune`, one thread a process, under torchrun unless `processes` is 0: what is to be known of it.

    Seconds are wall time from the command to its end, `seconds` the first process's phases; bytes are resident peaks
    by process, and the peak of all of them together with shared pages counted once (PSS), where the system tells it.
    """
    folder = Path(tempfile.mkdtemp(prefix="alps-benchmark-", dir=options.folder))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    command = [sys.executable, *launcher, "-m", "alps", "prune", options.model, str(folder / "out"), *arguments]
    command += ["--sparsity", str(options.sparsity), "--dtype", options.dtype, "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        with tempfile.TemporaryFile(mode="w+") as words:
            start = time.perf_counter()
            running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=words)
            resident, together = _watch(running, bool(processes))
            seconds = time.perf_counter() - start
            if running.returncode:
                words.seek(0)
                raise SystemExit(f"{' '.join(command)} failed:\n{words.read()}")
        report = json.loads((folder / "out" / "report.json").read_text())
        return {
            "wall": seconds,
            "seconds": report["seconds"],
            "sparsity": report["summary"]["sparsity"],
            "mean_error": report["summary"]["mean_error"],
            "resident_bytes": resident,
            "together_bytes": together,
            "versions": report["versions"],
        }
    finally:
        shutil.rmtree(folder)


def _watch(running: subprocess.Popen[bytes], launched: bool) -> tuple[list[int], int]:
    """Wait for a command; peaks of its processes, and of their sum."""
    peaks: dict[int, int] = {}
    together = 0
    while True:
        try:
            running.wait(_LOOK)
        except subprocess.TimeoutExpired:
            ranks = _children(running.pid) if launched else [running.pid]
            sizes = [_field(Path(f"/proc/{pid}/smaps_rollup"), "Pss:") for pid in ranks]
            together = max(together, sum(sizes))
            for pid in ranks:
                peaks[pid] = max(peaks.get(pid, 0), _field(Path(f"/proc/{pid}/status"), "VmHWM:"))
        else:
            # What a launcher starts besides, to ask for the system's release, say, is small and soon gone.
            return [peak for peak in peaks.values() if peak > max(peaks.values()) / 4], together


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _field(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def table(record: dict[str, Any]) -> str:
    """Medians by way: wall time, the first process's phases, speed-up, memory."""
    heads = ["", "wall s", "least-most", *(f"{phase} s" for phase in PHASES), "speed-up", "MiB a process", "MiB all"]
    rows = []
    plain = [run["wall"] for run in record["runs"]["plain"]]
    for way, runs in record["runs"].items():
        walls = [run["wall"] for run in runs]
        cells = [f"{statistics.median(walls):.1f}", f"{min(walls):.1f}-{max(walls):.1f}"]
        cells += [f"{statistics.median(run['seconds'].get(phase, 0.0) for run in runs):.1f}" for phase in PHASES]
        cells.append(f"{statistics.median(a / b for a, b in zip(plain, walls, strict=True)):.2f}")
        cells.append(" ".join(f"{size / 2**20:.0f}" for size in sorted(runs[0]["resident_bytes"], reverse=True)))
        rows.append([way, *cells, f"{max(run['together_bytes'] for run in runs) / 2**20:.0f}"])
    return markdown(heads, rows)
