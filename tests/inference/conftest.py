"""The kernel, compiled for the tests from the sources as they are, so that no older build can pass for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from alps.inference import packed_linear as linear
from alps.inference.build_kernel import LIBRARY_NAME, compile_library
from alps.inference.cpu_backend import Kernel


@pytest.fixture(scope="session")
def kernel_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled library, one for all workers of pytest-xdist; skips without a compiler."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    target = folder / LIBRARY_NAME
    with FileLock(f"{target}.lock"):
        if not target.exists() and (failed := compile_library(target)):
            if "was found" not in failed:
                pytest.fail(failed)
            pytest.skip(failed)
    return target


@pytest.fixture(params=["kernel", "torch"])
def multiplier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Packed layers multiply by the kernel, or by torch alone as where it was not built."""
    name: str = request.param
    kernel = Kernel(request.getfixturevalue("kernel_file")) if name == "kernel" else None
    monkeypatch.setattr(linear, "find_kernel", lambda: kernel)
    return name


@pytest.fixture
def threads() -> Iterator[None]:
    """Torch's number of threads, back afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
