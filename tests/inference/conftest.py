"""Fixtures of the inference tests: the kernel is compiled from the current sources."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from alps.checkpoints.pack import pack_directory
from alps.inference import packed_linear as linear
from alps.inference.build_kernel import LIBRARY_NAME, compile_library
from alps.inference.cpu_backend import Kernel
from helpers.packed_models import prune


@pytest.fixture(scope="session")
def kernel_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the library once for all workers of pytest-xdist; skip the test without a compiler."""
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
    """Let packed layers use the kernel, or torch only as if the kernel was not built."""
    name: str = request.param
    kernel = Kernel(request.getfixturevalue("kernel_file")) if name == "kernel" else None
    monkeypatch.setattr(linear, "find_kernel", lambda: kernel)
    return name


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore torch's number of threads after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def packed_stories(stories: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Return the directories of a trained model at 70 % sparsity in float32, dense and packed."""
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    prune(model)
    model.save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(stories).save_pretrained(tmp_path / "dense")
    pack_directory(tmp_path / "dense", tmp_path / "packed")
    return tmp_path / "dense", tmp_path / "packed"
