"""Generator of the table of interrupted runs in docs/how-to/long-runs.md.

    python tests/helpers/interruptions.py MODEL TEXT.txt

Every row is a real process of `alps prune` on a small model, stopped in one way after its second block was finished,
and resumed. The table shows the last line that it printed. The result is compared with that of an undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

_SETTINGS = {
    "sparsity": 0.7,
    "true_sequential": True,
    "dense_target": 0.4,
    "reconstruct_epochs": 2,
    "samples": 16,
    "seqlen": 64,
}
_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
_BLOCKS = 2
Command = list[str | Path]


@dataclass(frozen=True)
class Row:
    """Row of the table: the fault, exit code and last message of the run, and what was lost."""

    fault: str
    code: int
    message: str
    lost: str

    def __str__(self) -> str:
        return f"| {self.fault} | {self.code} | {self.message or '(nothing: it was killed)'} | {self.lost} |"


class Bench:
    """Folder with an undisturbed result, and the command that makes another."""

    def __init__(self, model: Path, text: Path, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self._command: Command = [sys.executable, "-m", "alps", "prune", model]
        for key, value in {**_SETTINGS, "calibration": text}.items():
            option = f"--{key.replace('_', '-')}"
            self._command += [option] if value is True else [option, str(value)]
        self._finish(folder / "whole")

    def command(self, out: Path) -> Command:
        """Return the command line that writes `out`."""
        return [*self._command[:5], out, *self._command[5:]]

    def start(self, prepare: Callable[[], None] = lambda: None) -> subprocess.Popen[str]:
        """Start a run in a process of its own."""

        def begin() -> None:
            # Background jobs of a shell ignore SIGINT, and their children inherit that.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            prepare()

        return subprocess.Popen(
            self.command(self.out), stderr=subprocess.PIPE, text=True, env=_ENVIRONMENT, preexec_fn=begin
        )

    def run_and_stop(self, stop: Callable[[subprocess.Popen[str]], None]) -> tuple[int, str]:
        """Start a run, stop it after two finished blocks, and return its exit code and last message."""
        running = self.start()
        record = self.folder / "out.partial" / f"block-{_BLOCKS - 1:05}.json"
        while not record.is_file() and running.poll() is None:
            time.sleep(0.005)
        stop(running)
        return self._end(running)

    def resume(self) -> str:
        """Resume the run, and return what was lost."""
        finished = len(list((self.folder / "out.partial").glob("block-*.json")))
        self._finish(self.out)
        same = (self.out / "model.safetensors").read_bytes() == (
            self.folder / "whole" / "model.safetensors"
        ).read_bytes()
        shutil.rmtree(self.out)
        assert same and sorted(path.name for path in self.folder.iterdir()) == ["whole"]
        return f"nothing of {finished} finished blocks; the same bits in the end"

    def run_on_full_disk(self) -> tuple[int, str]:
        """Run with room on the disk for the blocks but not for the checkpoint; return exit code and last message."""
        size = (self.folder / "whole" / "model.safetensors").stat().st_size // 2

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

        return self._end(self.start(limit))

    def second_process(self) -> Row:
        """Start a second run on the same OUT while the first is stopped; return the row of the second."""
        second: list[tuple[int, str]] = []

        def start_second(running: subprocess.Popen[str]) -> None:
            running.send_signal(signal.SIGSTOP)
            second.append(self._end(self.start()))
            running.send_signal(signal.SIGCONT)

        code, _ = self.run_and_stop(start_second)
        assert code == 0
        same = [(self.folder / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
        assert same[0] == same[1]
        shutil.rmtree(self.out)
        return Row("a second process on the same OUT", *second[0], "nothing: the first run ends with the same bits")

    def _finish(self, out: Path) -> None:
        subprocess.run(self.command(out), check=True, capture_output=True, env=_ENVIRONMENT)

    def _end(self, running: subprocess.Popen[str]) -> tuple[int, str]:
        _, stderr = running.communicate()
        assert "Traceback" not in stderr
        lines = [line for line in stderr.splitlines() if line.startswith(("Error", "Interrupted"))]
        return running.returncode, lines[-1].replace(str(self.folder) + "/", "") if lines else ""


def rows(model: Path, text: Path) -> Iterator[Row]:
    """Yield the rows of the table, running one fault after the other."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(model, text, Path(folder))
        for fault, number in (
            ("kill -9 after the second block", signal.SIGKILL),
            ("SIGINT (Ctrl-C)", signal.SIGINT),
            ("SIGTERM", signal.SIGTERM),
        ):
            code, message = bench.run_and_stop(lambda running, number=number: running.send_signal(number))  # type: ignore[misc]
            yield Row(fault, code, message, bench.resume())
        code, message = bench.run_on_full_disk()
        yield Row("no room for the checkpoint", code, message, bench.resume())
        yield bench.second_process()
        bench.run_and_stop(lambda running: running.send_signal(signal.SIGKILL))
        changed = [*bench.command(bench.out), "--seed", "3"]
        other = subprocess.run(changed, capture_output=True, text=True, env=_ENVIRONMENT)
        message = other.stderr.strip().splitlines()[-1].replace(f"{folder}/", "")
        yield Row("begun again with another seed", other.returncode, message, bench.resume())
        yield _kills(model, text)


def _kills(model: Path, text: Path) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "settings.yaml"
        settings.write_text(yaml.safe_dump({**_SETTINGS, "calibration": str(text)}))
        (Path(folder) / "runs").mkdir()
        script = Path(__file__).parent / "kill_points.py"
        command: Command = [sys.executable, script, model, Path(folder) / "runs", settings, "--kills", "20"]
        done = subprocess.run(command, capture_output=True, text=True, env=_ENVIRONMENT, check=True)
    outcome = json.loads(done.stdout)
    assert outcome["equal"] and not outcome["leftovers"]
    moments = ", ".join(f"{count} {when}" for when, count in sorted(outcome["kills"].items()))
    return Row(
        "kill -9 at 20 random moments, one run after the other", -9, "", f"nothing: {moments}; the same bits in the end"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    options = parser.parse_args()
    print("| fault | exit code | last message | what is lost |\n|---|---:|---|---|")
    for row in rows(options.model, options.text):
        print(row, flush=True)


if __name__ == "__main__":
    main()
