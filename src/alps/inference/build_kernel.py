"""Builds the kernel with the system's C compiler, at installation or by `python -m alps.inference.build_kernel`.

Every instruction set is a file with flags of its own; a file that this compiler cannot build is left out, and so is the
whole library where there is no compiler. This file imports nothing but the standard library: the package's build loads
it alone.
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
_NEEDED = ("portable.c", "threads.c")
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mpopcnt")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
_AVX512BF16 = (*_AVX512, "-mavx512vbmi2", "-mavx512bf16")
# In this order: a later file may use what an earlier one has.
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
        target: the file to write; it appears whole or not at all.
        compiler: the command; None for $CC, or the first of cc, gcc and clang.
        flags: for every file and for linking.

    Returns:
        None, or why there is no library.
    """
    command = compiler or _compiler()
    if command is None:
        return "no C compiler was found (cc, gcc or clang)"
    with tempfile.TemporaryDirectory(prefix=".kernel-", dir=target.parent) as temporary:
        folder = Path(temporary)
        try:
            objects, defined = _compile_paths(command, flags, folder)
            for name in _NEEDED:
                objects.append(_compile(command, (*flags,), SOURCES / name, folder))
            objects.append(_compile(command, (*flags, *defined), SOURCES / "dispatch.c", folder))
            _run([*command, *flags, "-shared", "-o", str(folder / LIBRARY_NAME), *map(str, objects), "-pthread"])
        except (OSError, subprocess.SubprocessError) as error:
            return _reason(error)
        (folder / LIBRARY_NAME).replace(target)
    return None


def _compile_paths(command: list[str], flags: tuple[str, ...], folder: Path) -> tuple[list[Path], list[str]]:
    """Objects of the instruction sets that could be built, and what tells the dispatch of them."""
    objects, defined = [], []
    for name, own in _candidates(command).items():
        try:
            objects.append(_compile(command, (*flags, *own), SOURCES / name, folder))
        except subprocess.CalledProcessError:
            break
        defined.append(f"-DALPS_{Path(name).stem.upper()}")
    return objects, defined


def _candidates(command: list[str]) -> dict[str, tuple[str, ...]]:
    """Files for the machine that the compiler builds for, which need not be this one."""
    done = subprocess.run([*command, "-dumpmachine"], capture_output=True, text=True)
    machine = (done.stdout or platform.machine()).lower()
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
    if own := shlex.split(os.environ.get("CC", "")):
        return own
    found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    return None if found is None else [found]


def _reason(error: Exception) -> str:
    said = str(getattr(error, "stderr", "") or "").strip().splitlines()
    code = f"exit code {error.returncode}" if isinstance(error, subprocess.CalledProcessError) else str(error)
    return f"the C compiler failed ({said[0] if said else code})"


if __name__ == "__main__":
    failed = compile_library(FOLDER / LIBRARY_NAME)
    print(f"No kernel: {failed}." if failed else f"Built {FOLDER / LIBRARY_NAME}.")
    sys.exit(failed is not None)
