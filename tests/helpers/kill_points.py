"""Prune or shrink in processes that are killed at random moments and resumed until the run is complete.

    python tests/helpers/kill_points.py MODEL FOLDER SETTINGS.yaml --kills 20 --seed 0 --command prune

Every process is forked from this one, which has pruned once and so has imported everything. The moments are drawn over
the time of an undisturbed run; every third kill instead falls while a file is written. Prints a line of JSON: kills by
what they interrupted, and whether all results have the same bits as the undisturbed run's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch

import alps.checkpoints.safetensors_io as shards
from alps.checkpoints.journal import journal_directory
from alps.core.progress import NoProgress
from alps.pruning.config import load_prune_config
from alps.pruning.job import prune_checkpoint
from alps.pruning.shrink_config import load_shrink_config
from alps.pruning.shrink_job import shrink_checkpoint


def main() -> None:
    """Prune undisturbed, then with kills, and print the comparison."""
    options = _options()
    torch.set_num_threads(1)
    random.seed(options.seed)
    _prune(options, "first")
    begun = time.monotonic()
    assert _wait(_start(options, "whole")) == 0
    whole = time.monotonic() - begun
    kills: Counter[str] = Counter()
    attempts = 0
    while kills.total() < options.kills:
        kills[_kill_once(options, whole, attempts)] += 1
        attempts += 1
        if (options.folder / "killed").exists():
            (options.folder / "killed").rename(options.folder / f"done-{attempts}")
    assert _wait(_start(options, "killed")) == 0
    results = [options.folder / "first", options.folder / "killed", *options.folder.glob("done-*")]
    leftovers = [path.name for path in options.folder.iterdir() if path.name.startswith(".") or "partial" in path.name]
    print(
        json.dumps(
            {
                "kills": dict(kills),
                "results": len(results),
                "equal": all(_weights(result) == _weights(options.folder / "whole") for result in results),
                "leftovers": leftovers,
                "seconds": round(whole, 2),
            }
        )
    )


def _kill_once(options: argparse.Namespace, whole: float, attempt: int) -> str:
    """Start a process, kill it, and return what the kill interrupted, in words."""
    while_writing = attempt % 3 == 2
    journal = journal_directory(options.folder / "killed")
    before, stale = len(list(journal.glob("block-*.json"))), _half_written(options.folder)
    child = _start(options, "killed", slow=while_writing)
    if while_writing:
        skipped = random.randrange(4)
        while len(_half_written(options.folder) - stale) == 0 or skipped > 0:
            if _half_written(options.folder) - stale:
                stale |= _half_written(options.folder)
                skipped -= 1
            if _over(child):
                return "after the end"
            time.sleep(0.0005)
    else:
        time.sleep(random.random() * whole)
    writing = bool(_half_written(options.folder) - stale)
    os.kill(child, signal.SIGKILL)
    if _wait(child) == 0:
        return "after the end"
    after = len(list(journal.glob("block-*.json")))
    assert after >= before or (options.folder / "killed").exists()
    return "while a file was written" if writing else f"after {after} blocks"


def _start(options: argparse.Namespace, name: str, slow: bool = False) -> int:
    child = os.fork()
    if child:
        return child
    if slow:
        real = os.fsync

        def slowly(handle: int) -> None:
            time.sleep(0.05)  # long enough for a kill to fall into it
            real(handle)

        shards.os.fsync = slowly  # type: ignore[attr-defined]
    try:
        _prune(options, name)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)


def _prune(options: argparse.Namespace, name: str) -> None:
    model = {"model": str(options.model)}
    if options.command == "shrink":
        shrink_checkpoint(load_shrink_config(options.settings, model), options.folder / name, NoProgress())
    else:
        prune_checkpoint(load_prune_config(options.settings, model), options.folder / name, NoProgress())


def _wait(child: int) -> int:
    return os.waitpid(child, 0)[1]


def _over(child: int) -> bool:
    return os.waitpid(child, os.WNOHANG)[0] != 0


def _half_written(folder: Path) -> set[Path]:
    """Return the files of blocks and of the checkpoint that are not renamed into place yet."""
    with contextlib.suppress(FileNotFoundError):  # a folder may be renamed or removed in between
        return {*folder.glob("killed.partial/.*.partial-*"), *folder.glob(".killed.partial-*/.*")}
    return set()


def _weights(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(folder.glob("*.safetensors"))]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("settings", type=Path)
    parser.add_argument("--command", choices=("prune", "shrink"), default="prune")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
