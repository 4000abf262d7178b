"""Outputs mean the same to transformers 4.57, in an environment of its own, and to the release that is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import torch

import alps
from helpers.older_transformers import CONFIGS, read_checkpoints

_SCRIPT = Path(__file__).parent.parent / "helpers" / "older_transformers.py"
_OLDER = "transformers==4.57.6"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def older_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python with the older release, and with this environment's torch; skips where pip cannot install it."""
    folder = tmp_path_factory.mktemp("older") / "venv"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    done = subprocess.run([python, "-m", "pip", "install", "-q", _OLDER], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs {_OLDER}: {done.stderr.strip().splitlines()[-1:]}")
    # A gigabyte less to install: what the environment lacks is looked up in this one.
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(str(Path(torch.__file__).parent.parent))
    return python


def _run(python: Path, *arguments: object) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(python), str(_SCRIPT), *map(str, arguments)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(sys.platform == "win32", reason="the environment's layout is another")
@pytest.mark.filterwarnings("ignore")
def test_logits_and_ids_are_those_of_both_releases(older_python: Path, english_file: Path, tmp_path: Path) -> None:
    dense, streamed, in_memory = (tmp_path / name for name in ("dense", "streamed", "in memory"))
    dense.mkdir()
    _run(older_python, "write", dense)
    settings: dict[str, Any] = {"sparsity": 0.5, "method": "magnitude", "measure_error": False}
    for name in CONFIGS:
        alps.prune(dense / name, out=streamed / name, **settings)
        loaded = alps.load(dense / name)
        alps.prune(loaded.model, tokenizer=loaded.tokenizer, out=in_memory / name, **settings)
    results = {}
    for folder in (dense, streamed, in_memory):
        _run(older_python, "read", folder, tmp_path / "older.pt")
        results[folder.name] = torch.load(tmp_path / "older.pt"), read_checkpoints(folder)
    for folder_name, (older, newer) in results.items():
        assert older.keys() == newer.keys() == CONFIGS.keys()
        for name, (logits, ids) in older.items():
            torch.testing.assert_close(logits, newer[name][0], rtol=1e-4, atol=1e-4, msg=f"{folder_name}, {name}")
            assert ids == newer[name][1] == results["dense"][0][name][1], f"{folder_name}, {name}"
            assert not torch.equal(logits, results["dense"][0][name][0]) or folder_name == "dense", name
