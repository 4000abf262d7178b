"""Compile the CPU kernel with the system's C compiler, at installation or by `python -m alps.inference.build_kernel`.

Each instruction set is one source file with its own compiler flags. A file that the compiler cannot build is left out.
Without a compiler there is no library, and torch multiplies instead. This module imports only the standard library,
because the build of the package loads it on its own.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = FOLDER / "csrc"
LIBRARY_NAME = "_kernel.so"
_COMMON = ("-std=gnu11", "-O3", "-fPIC", "-fvisibility=default", "-Wall", "-Wextra")
_REQUIRED = ("portable.c", "threads.c")
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mpopcnt")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
_AVX512BF16 = (*_AVX512, "-mavx512vbmi2", "-mavx512bf16")
# The order matters: a file may use functions of the files before it.
_X86 = {
    "avx2.c": _AVX2,
    "avx512.c": _AVX512,
    "avx512bf16.c": _AVX512BF16,
    "amx.c": (*_AVX512BF16, "-mamx-tile", "-mamx-bf16"),
}
_ARM: dict[str, tuple[str, ...]] = {"neon.c": ()}


def compile_library(target: Path, compiler: list[str] | None = None, flags: tuple[str, ...] = ()) -> str | None:
    """Build the library.

    Args:
        target: file to write, atomically.
        compiler: command of the compiler; None for $CC, or else the first of cc, gcc and clang.
        flags: additional flags for every file and for linking.

    Returns:
        None on success, or the reason for which there is no library.
    """
    command = compiler or _compiler()
    if command is None:
        return "no C compiler was found (cc, gcc or clang)"
    with tempfile.TemporaryDirectory(prefix=".kernel-", dir=target.parent) as temporary:
        folder = Path(temporary)
        try:
            objects, defined = _compile_paths(command, flags, folder)
            for name in _REQUIRED:
                objects.append(_compile(command, (*flags,), SOURCES / name, folder))
            objects.append(_compile(command, (*flags, *defined), SOURCES / "dispatch.c", folder))
            _run([*command, *flags, "-shared", "-o", str(folder / LIBRARY_NAME), *map(str, objects), "-pthread"])
        except (OSError, subprocess.SubprocessError) as error:
            return _reason(error)
        (folder / LIBRARY_NAME).replace(target)
    return None


def _compile_paths(command: list[str], flags: tuple[str, ...], folder: Path) -> tuple[list[Path], list[str]]:
    """Return the objects of the instruction sets that could be built, and the defines that dispatch.c needs."""
    objects, defined = [], []
    for name, own_flags in _candidates(command).items():
        try:
            objects.append(_compile(command, (*flags, *own_flags), SOURCES / name, folder))
        except subprocess.CalledProcessError:
            break
        defined.append(f"-DALPS_{Path(name).stem.upper()}")
    return objects, defined


def _candidates(command: list[str]) -> dict[str, tuple[str, ...]]:
    """Return the source files, with flags, for the target machine of the compiler, which may differ from this one."""
    result = subprocess.run([*command, "-dumpmachine"], capture_output=True, text=True)
    machine = (result.stdout or platform.machine()).lower()
    if machine.startswith(("x86_64", "amd64")):
        return _X86
    return _ARM if machine.startswith(("aarch64", "arm64")) else {}


def _compile(command: list[str], flags: tuple[str, ...], source: Path, folder: Path) -> Path:
    target = folder / f"{source.stem}.o"
    _run([*command, *_COMMON, *flags, "-c", str(source), "-o", str(target)])
    return target


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)


def _compiler() -> list[str] | None:
    if command := shlex.split(os.environ.get("CC", "")):
        return command
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    return None if compiler is None else [compiler]


def _reason(error: Exception) -> str:
    lines = str(getattr(error, "stderr", "") or "").strip().splitlines()
    code = f"exit code {error.returncode}" if isinstance(error, subprocess.CalledProcessError) else str(error)
    return f"the C compiler failed ({lines[0] if lines else code})"


if __name__ == "__main__":
    failure = compile_library(FOLDER / LIBRARY_NAME)
    print(f"No kernel: {failure}." if failure else f"Built {FOLDER / LIBRARY_NAME}.")
    sys.exit(failure is not None)
