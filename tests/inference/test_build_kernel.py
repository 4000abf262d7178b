"""Compilation of the kernel: without a compiler, without an instruction set, and the size of its sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from alps.inference import build_kernel as building
from alps.inference.build_kernel import LIBRARY_NAME, SOURCES, compile_library
from alps.inference.cpu_backend import Kernel


def test_a_missing_compiler_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / LIBRARY_NAME
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert compile_library(target) == "no C compiler was found (cc, gcc or clang)"
    monkeypatch.setenv("CC", str(tmp_path / "none"))
    assert "the C compiler failed" in str(compile_library(target))
    assert list(tmp_path.iterdir()) == []


def test_unsupported_instruction_sets_are_left_out(tmp_path: Path, kernel_file: Path) -> None:
    if "avx2" not in Kernel(kernel_file).paths:
        pytest.skip("needs AVX2")
    wrapper = tmp_path / "cc"
    real = (building._compiler() or [""])[0]
    wrapper.write_text(f'#!/bin/sh\ncase "$*" in *avx512f*) exit 1;; esac\nexec {real} "$@" -O1\n')
    wrapper.chmod(0o755)
    assert compile_library(tmp_path / LIBRARY_NAME, [str(wrapper)]) is None
    assert Kernel(tmp_path / LIBRARY_NAME).paths == ["portable", "avx2"]


def test_no_source_is_longer_than_250_lines() -> None:
    files = [*SOURCES.glob("*.c"), *SOURCES.glob("*.h")]
    assert len(files) == 12
    assert {file.name for file in files if len(file.read_text().splitlines()) > 250} == set()
