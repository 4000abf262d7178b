"""Processes of alps that start at once: forked from a server that has imported it, which takes seconds otherwise.

They are processes in all else: arguments, environment, folder, exit code, signals, a session of their own. What must
come from the installed command, torchrun or a new interpreter is started as users start it, by `subprocess`.
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

# What commands, and a run on a LLaMA, import.
_SERVER = multiprocessing.get_context("forkserver")
_COMMANDS = sorted({f"alps.cli.{module}" for module, _, _ in COMMANDS.values()})
_SERVER.set_forkserver_preload([*_COMMANDS, "alps.reporting.publish", "transformers.models.llama.modeling_llama"])
_STREAMS = ("stdout", "stderr")
_subprocess_run: Any = subprocess.run


class Started:
    """A process, as `subprocess.Popen` has it; its words are read when it has ended."""

    def __init__(self, work: Callable[[], None], arguments: list[str], settings: dict[str, Any]) -> None:
        self.args = arguments
        self._folder = Path(tempfile.mkdtemp(prefix="started-"))
        self._process = _SERVER.Process(target=_enter, args=(work, arguments, self._folder, settings))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Of a process that has ended; minus the signal that ended it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float | None = 280) -> tuple[str, str]:
        """Wait for the end; what it printed, and what it said on stderr."""
        self._process.join(timeout)
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0, *map(self._said, _STREAMS))
        out, err = map(self._said, _STREAMS)
        shutil.rmtree(self._folder)
        return out, err

    def ended(self) -> subprocess.CompletedProcess[str]:
        """Wait for the end."""
        out, err = self.communicate()
        assert self.returncode is not None
        return subprocess.CompletedProcess(self.args, self.returncode, out, err)

    def _said(self, stream: str) -> str:
        path = self._folder / stream
        return path.read_text() if path.exists() else ""


def start(
    *arguments: object,
    work: Callable[[], None] | None = None,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
    page: bool = False,
) -> Started:
    """Begin `alps ARGUMENTS`.

    Args:
        work: what to run in place of alps, with these arguments; of a module's top level, as `prepare` is.
        cwd: folder, the present one by default.
        environment: variables beside those of this process. Bits depend on the number of threads: one, unless
            OMP_NUM_THREADS says another.
        prepare: run first, in the new process.
        page: draw report.html, which is blank otherwise.
    """
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    settings = {"cwd": str(cwd or Path.cwd()), "environment": variables, "prepare": prepare, "page": page}
    return Started(work or _alps, list(map(str, arguments)), settings)


def run(*arguments: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    """The same, to its end."""
    return start(*arguments, **settings).ended()


def run_script(path: Path, *arguments: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    """`python PATH ARGUMENTS`, to its end; nothing is compiled into files."""
    return run(path, *arguments, work=_script, **settings)


def run_code(code: str, *arguments: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    """`python -c CODE ARGUMENTS`, to its end; torch and alps are imported already."""
    return run(code, *arguments, work=_code, **settings)


def start_group(size: int, *arguments: object, **settings: Any) -> list[Started]:
    """Begin `alps ARGUMENTS` in several processes that meet as those of torchrun do; a single one is alone."""
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
    """Run `alps ARGUMENTS` in several processes, to their end; see `start_group`."""
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
    """Become the process that was asked for, and do its work."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(_STREAMS, start=1):
        os.dup2(os.open(folder / stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(settings["environment"])
    os.chdir(settings["cwd"])
    import torch

    # Read once by the server.
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if not settings["page"]:
        publish._write = write_blank_page
    if settings["prepare"] is not None:
        settings["prepare"]()
    sys.argv = ["alps", *arguments]
    work()
