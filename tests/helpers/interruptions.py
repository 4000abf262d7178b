"""What happens to runs that are cut off, and what is lost: the table of docs/long-runs.md.

    python tests/helpers/interruptions.py MODEL TEXT.txt

Every row is a real process of `alps prune` on a small model, stopped in one way after its second block was finished and
begun again. Its words are the last line that it printed; its result is compared with that of a run which nobody
disturbed.
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
    """One fault: what it is, how the run ended, what it said last, what was there afterwards."""

    fault: str
    code: int
    said: str
    lost: str

    def __str__(self) -> str:
        return f"| {self.fault} | {self.code} | {self.said or '(nothing: it was killed)'} | {self.lost} |"


class Bench:
    """A folder with an undisturbed result, and the command that makes another."""

    def __init__(self, model: Path, text: Path, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self._command: Command = [sys.executable, "-m", "alps", "prune", model]
        for key, value in {**_SETTINGS, "calibration": text}.items():
            option = f"--{key.replace('_', '-')}"
            self._command += [option] if value is True else [option, str(value)]
        self._finish(folder / "whole")

    def command(self, out: Path) -> Command:
        """The command line that writes `out`."""
        return [*self._command[:5], out, *self._command[5:]]

    def start(self, prepare: Callable[[], None] = lambda: None) -> subprocess.Popen[str]:
        """A run in a process of its own."""

        def begin() -> None:
            # A shell has its background jobs ignore SIGINT, and they hand that on.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            prepare()

        return subprocess.Popen(
            self.command(self.out), stderr=subprocess.PIPE, text=True, env=_ENVIRONMENT, preexec_fn=begin
        )

    def stopped(self, stop: Callable[[subprocess.Popen[str]], None]) -> tuple[int, str]:
        """How a run ends, and its last words, that is stopped once two blocks are finished."""
        running = self.start()
        record = self.folder / "out.partial" / f"block-{_BLOCKS - 1:05}.json"
        while not record.is_file() and running.poll() is None:
            time.sleep(0.005)
        stop(running)
        return self._end(running)

    def again(self) -> str:
        """Begin again, and say what was lost."""
        kept = len(list((self.folder / "out.partial").glob("block-*.json")))
        self._finish(self.out)
        same = (self.out / "model.safetensors").read_bytes() == (
            self.folder / "whole" / "model.safetensors"
        ).read_bytes()
        shutil.rmtree(self.out)
        assert same and sorted(path.name for path in self.folder.iterdir()) == ["whole"]
        return f"nothing of {kept} finished blocks; the same bits in the end"

    def full(self) -> tuple[int, str]:
        """A run whose disk has room for blocks, and none for the checkpoint."""
        size = (self.folder / "whole" / "model.safetensors").stat().st_size // 2

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

        return self._end(self.start(limit))

    def second_process(self) -> Row:
        """A run that meets another at work, which is frozen meanwhile."""
        met: list[tuple[int, str]] = []

        def meet(running: subprocess.Popen[str]) -> None:
            running.send_signal(signal.SIGSTOP)
            met.append(self._end(self.start()))
            running.send_signal(signal.SIGCONT)

        code, _ = self.stopped(meet)
        assert code == 0
        same = [(self.folder / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
        assert same[0] == same[1]
        shutil.rmtree(self.out)
        return Row("a second process on the same OUT", *met[0], "nothing: the first goes on to the same bits")

    def _finish(self, out: Path) -> None:
        subprocess.run(self.command(out), check=True, capture_output=True, env=_ENVIRONMENT)

    def _end(self, running: subprocess.Popen[str]) -> tuple[int, str]:
        _, words = running.communicate()
        assert "Traceback" not in words
        lines = [line for line in words.splitlines() if line.startswith(("Error", "Interrupted"))]
        return running.returncode, lines[-1].replace(str(self.folder) + "/", "") if lines else ""


def rows(model: Path, text: Path) -> Iterator[Row]:
    """Every fault in turn."""
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(model, text, Path(place))
        for fault, number in (
            ("kill -9 after the second block", signal.SIGKILL),
            ("SIGINT (Ctrl-C)", signal.SIGINT),
            ("SIGTERM", signal.SIGTERM),
        ):
            code, said = bench.stopped(lambda running, number=number: running.send_signal(number))  # type: ignore[misc]
            yield Row(fault, code, said, bench.again())
        code, said = bench.full()
        yield Row("no room for the checkpoint", code, said, bench.again())
        yield bench.second_process()
        bench.stopped(lambda running: running.send_signal(signal.SIGKILL))
        changed = [*bench.command(bench.out), "--seed", "3"]
        other = subprocess.run(changed, capture_output=True, text=True, env=_ENVIRONMENT)
        said = other.stderr.strip().splitlines()[-1].replace(f"{place}/", "")
        yield Row("begun again with another seed", other.returncode, said, bench.again())
        yield _kills(model, text)


def _kills(model: Path, text: Path) -> Row:
    with tempfile.TemporaryDirectory() as place:
        settings = Path(place) / "settings.yaml"
        settings.write_text(yaml.safe_dump({**_SETTINGS, "calibration": str(text)}))
        (Path(place) / "runs").mkdir()
        script = Path(__file__).parent / "kill_points.py"
        command: Command = [sys.executable, script, model, Path(place) / "runs", settings, "--kills", "20"]
        done = subprocess.run(command, capture_output=True, text=True, env=_ENVIRONMENT, check=True)
    found = json.loads(done.stdout)
    assert found["equal"] and not found["leftovers"]
    moments = ", ".join(f"{count} {when}" for when, count in sorted(found["kills"].items()))
    return Row(
        "kill -9 at 20 random moments, one run after the other", -9, "", f"nothing: {moments}; the same bits in the end"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    options = parser.parse_args()
    print("| fault | exit code | what it says last | what is lost |\n|---|---:|---|---|")
    for row in rows(options.model, options.text):
        print(row, flush=True)


if __name__ == "__main__":
    main()
