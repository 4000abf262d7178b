"""The files that a weight passes between the checkpoint that is read and the one that is written."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from alps.core.progress import NoProgress
from alps.pruning.config import PruneConfig
from alps.pruning.job import prune_checkpoint

_PACKAGE = str(Path(__file__).parents[1] / "src" / "alps")
# A query projection whose shape no other matrix of the model has.
_SIZES = {"hidden_size": 40, "intermediate_size": 44, "num_attention_heads": 4, "num_key_value_heads": 2}
_SHAPE = (48, 40)
_MOST_FILES = 15


@contextmanager
def files_with_a_weight() -> Iterator[set[str]]:
    """Collect the files of the package in whose functions a local variable or a result has the shape of the weight."""
    files: set[str] = set()

    def is_weight(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.shape == _SHAPE and value.is_floating_point()

    def watch(frame: FrameType, event: str, result: Any) -> None:
        path = frame.f_code.co_filename
        if event == "return" and path.startswith(_PACKAGE):
            values = [*frame.f_locals.values(), result]
            if any(is_weight(value) and not value.is_meta for value in values):
                files.add(path.removeprefix(_PACKAGE))

    sys.setprofile(watch)
    try:
        yield files
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("fused", [False, True])
def test_a_weight_passes_few_files(fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alps.data.loaded_model.load_tokenizer", lambda name: None)
    monkeypatch.setattr("alps.solvers.alps._MIN_FUSED_ENTRIES", 0 if fused else 10**6)
    config = LlamaConfig(**_SIZES, head_dim=12, num_hidden_layers=2, vocab_size=64)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    settings = PruneConfig(model=str(tmp_path / "dense"), sparsity=0.7)
    ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    with files_with_a_weight() as files:
        prune_checkpoint(settings, tmp_path / "out", NoProgress(), token_ids=ids)
    assert {"/models/sites.py", "/solvers/pcg.py", "/checkpoints/journal.py"} <= files
    assert len(files) <= _MOST_FILES, sorted(files)
    # Small layers take the steps of admm.py alone.
    assert files | {"/solvers/admm_fused.py"} == {f"/{name}" for name in _documented_files()}


def _documented_files() -> list[str]:
    """Return the files that the page on architecture names for the journey, in its order."""
    page = (Path(__file__).parents[1] / "docs" / "explanation" / "architecture.md").read_text()
    journey = page.split("## The journey of a weight")[1].split("\n## ")[0]
    return re.findall(r"^\d+\. `([\w/]+\.py)`", journey, re.MULTILINE)
