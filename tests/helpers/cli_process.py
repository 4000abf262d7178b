"""Processes of alps that are forked from a server with all imports done, which saves seconds per process.

They have arguments, environment, folder, exit code, signals and session of their own. Tests of the installed command,
of torchrun or of a new interpreter use `subprocess`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alps.cli.main import COMMANDS
from alps.reporting import publish
from helpers.blank_page import write_blank_page

# Modules that commands, and a run on a LLaMA, import.
_SERVER = multiprocessing.get_context("forkserver")
_COMMANDS = sorted({f"alps.cli.{module}" for module, _, _ in COMMANDS.values()})
_SERVER.set_forkserver_preload([*_COMMANDS, "alps.reporting.publish", "transformers.models.llama.modeling_llama"])
_STREAMS = ("stdout", "stderr")
_subprocess_run: Any = subprocess.run


class ForkedProcess:
    """Process with the interface of `subprocess.Popen`; its output can be read when it has ended."""

    def __init__(self, work: Callable[[], None], arguments: list[str], settings: dict[str, Any]) -> None:
        self.args = arguments
        self._folder = Path(tempfile.mkdtemp(prefix="started-"))
        self._process = _SERVER.Process(target=_enter, args=(work, arguments, self._folder, settings))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code, or minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float | None = 280) -> tuple[str, str]:
        """Wait for the end, and return stdout and stderr."""
        self._process.join(timeout)
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0, *map(self._output, _STREAMS))
        out, err = map(self._output, _STREAMS)
        shutil.rmtree(self._folder)
        return out, err

    def ended(self) -> subprocess.CompletedProcess[str]:
        """Wait for the end, and return exit code and output."""
        out, err = self.communicate()
        assert self.returncode is not None
        return subprocess.CompletedProcess(self.args, self.returncode, out, err)

    def _output(self, stream: str) -> str:
        path = self._folder / stream
        return path.read_text() if path.exists() else ""


def start(
    *arguments: object,
    work: Callable[[], None] | None = None,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
    page: bool = False,
) -> ForkedProcess:
    """Start `alps ARGUMENTS`.

    Args:
        *arguments: of the command line.
        work: function at the top level of a module to run in place of alps, with these arguments.
        cwd: folder; None for the present one.
        environment: variables in addition to those of this process. The number of threads, on which bits depend, is one
            unless OMP_NUM_THREADS is given.
        prepare: function at the top level of a module to run first, in the new process.
        page: draw report.html, which is blank otherwise.
    """
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    settings = {"cwd": str(cwd or Path.cwd()), "environment": variables, "prepare": prepare, "page": page}
    return ForkedProcess(work or _alps, list(map(str, arguments)), settings)


def run(*arguments: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run `alps ARGUMENTS` to its end; see `start`."""
    return start(*arguments, **settings).ended()


def run_script(path: Path, *arguments: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run `python PATH ARGUMENTS` to its end, without writing bytecode files."""
    return run(path, *arguments, work=_script, **settings)


def run_code(code: str, *arguments: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run `python -c CODE ARGUMENTS` to its end, with torch and alps already imported."""
    return run(code, *arguments, work=_code, **settings)


def start_group(size: int, *arguments: object, **settings: Any) -> list[ForkedProcess]:
    """Start `alps ARGUMENTS` in several processes that form a group as under torchrun; one process forms none."""
    if size == 1:
        return [start(*arguments, **settings)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": size, "TORCHELASTIC_RUN_ID": "started"}
    processes = []
    for rank in range(size):
        environment = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        processes.append(start(*arguments, environment=environment, **settings))
    return processes


def run_group(size: int, *arguments: object, **settings: Any) -> list[subprocess.CompletedProcess[str]]:
    """Run `alps ARGUMENTS` in several processes to their end; see `start_group`."""
    return [process.ended() for process in start_group(size, *arguments, **settings)]


def run_command(command: Sequence[object], **settings: Any) -> subprocess.CompletedProcess[str]:
    """Stand in for `subprocess.run`: fork what would start this interpreter again, and run all else as it does."""
    program, *arguments = map(str, command)
    if program != sys.executable:
        done: subprocess.CompletedProcess[str] = _subprocess_run(command, **settings)
        return done
    if arguments[:2] == ["-m", "alps"]:
        return run(*arguments[2:])
    return run_script(Path(arguments[0]), *arguments[1:])


def _script() -> None:
    _, path, *arguments = sys.argv
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    sys.dont_write_bytecode = True
    runpy.run_path(path, run_name="__main__")


def _code() -> None:
    _, code, *arguments = sys.argv
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})


def _alps() -> None:
    from alps.cli.main import run as run_alps

    run_alps()


def _enter(work: Callable[[], None], arguments: list[str], folder: Path, settings: dict[str, Any]) -> None:
    """Set up the forked process, and do its work."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(_STREAMS, start=1):
        os.dup2(os.open(folder / stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(settings["environment"])
    os.chdir(settings["cwd"])
    import torch

    # The variable itself was read when the server imported torch.
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if not settings["page"]:
        publish._write = write_blank_page
    if settings["prepare"] is not None:
        settings["prepare"]()
    sys.argv = ["alps", *arguments]
    work()
