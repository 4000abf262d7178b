"""Comparison of a packed model of 135 million parameters with the dense one: text and perplexity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import alps
from alps.data.loaded_model import LoadedModel, load
from alps.evaluation.perplexity import measure_perplexity
from alps.inference.convert import packed_modules
from alps.solvers.patterns import Unstructured, keep_largest

PROMPT = "Once upon a time, in a small village by the sea, there lived"


def _greedy(model: Any, ids: Tensor, count: int) -> list[int]:
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False
        )
    result: list[int] = out[0, ids.shape[1] :].tolist()
    return result


def _perplexity(loaded: LoadedModel, text: Path) -> float:
    windows = loaded.evaluation(str(text), 256, 4)
    return measure_perplexity(loaded.model, windows, name="it", device=torch.device("cpu")).perplexity


@pytest.mark.slow
def test_two_hundred_tokens_and_four_digits_of_perplexity(english_file: Path) -> None:
    loaded = load("smollm2-135m", "float32")
    model = loaded.model
    for block in loaded.blocks():
        for site in block.sites:
            weight = site.read().float()
            site.write(weight * keep_largest(weight.abs(), Unstructured(0.2)))
    ids = loaded.tokenizer(PROMPT, return_tensors="pt").input_ids
    dense = _greedy(model, ids, 200), _perplexity(loaded, english_file)
    assert alps.pack_linears(model) == 210 == len(list(packed_modules(model)))
    packed = _greedy(model, ids, 200), _perplexity(loaded, english_file)
    assert packed[0] == dense[0] and len(set(dense[0])) > 20

    assert packed[1] == pytest.approx(dense[1], rel=1e-4)
