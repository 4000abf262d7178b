"""Logits that are not finite: the first window and the first block are named, for every command that reads them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import alps
from alps.core.distributed import SINGLE_PROCESS
from alps.core.errors import NotFinite
from alps.core.json_text import to_json
from alps.data.loaded_model import load
from alps.data.sampling import sample_windows
from alps.data.windows import Windows
from alps.evaluation.cached_reference import CachedReferenceModel
from alps.evaluation.kl_divergence import measure_divergence
from alps.evaluation.perplexity import measure_perplexity
from alps.evaluation.sample_outputs import continue_prompts
from alps.inference.text_generation import generate_text
from alps.models.finite_logits import check_logits
from alps.reporting.records import EvaluationRecord

_CPU = torch.device("cpu")
_IDS = torch.arange(40).view(5, 8)
# The token whose embedding overflows a block, and the window that holds it.
_BAD, _WINDOW = 27, 3


def _overflowing(model: Any, block: int) -> Any:
    """Make one token overflow in a block: its first feature is large, and the block's MLP squares it."""
    layers = model.model.layers

    def overflow(_module: nn.Module, args: Any, output: Any) -> Any:
        return torch.where(model.bad, output * torch.inf, output)

    def remember(_module: nn.Module, args: Any) -> None:
        model.bad = (args[0] == _BAD)[..., None]

    model.model.embed_tokens.register_forward_pre_hook(remember)
    layers[block].mlp.register_forward_hook(overflow)
    return model


@pytest.fixture
def overflowing(tiny_model: Callable[..., Any]) -> Any:
    return _overflowing(tiny_model("llama"), 1)


_MESSAGE = r"for window 4 of 'text', first in block 1 \(model.layers.1\), in float32: its weights are damaged"


def test_perplexity_names_window_and_block(overflowing: Any) -> None:
    with pytest.raises(NotFinite, match=f"Model 'm' computes NaN or infinite logits {_MESSAGE}"):
        measure_perplexity(overflowing, Windows(_IDS, "text", 5), name="m", device=_CPU)
    assert not overflowing.training
    handles = [block._forward_hooks for block in overflowing.model.layers]
    assert handles == [{}, {}, {}], "the search removes its hooks"


def test_a_cached_reference_names_them_too(overflowing: Any) -> None:
    with pytest.raises(NotFinite, match=_MESSAGE):
        measure_perplexity(CachedReferenceModel(overflowing), Windows(_IDS, "text", 5), name="m", device=_CPU)


@pytest.mark.parametrize("bad", ["model", "reference"])
def test_divergence_names_the_model_as_well(bad: str, overflowing: Any, tiny_model: Callable[..., Any]) -> None:
    models = {"model": tiny_model("llama"), "reference": tiny_model("llama"), bad: overflowing}
    with pytest.raises(NotFinite, match=f"Model '{bad}' computes NaN or infinite logits {_MESSAGE}"):
        measure_divergence(
            models["model"],
            models["reference"],
            Windows(_IDS, "text", 5),
            names=("model", "reference"),
            device=_CPU,
        )


def test_a_bad_embedding_and_a_bad_head_are_no_blocks(tiny_model: Callable[..., Any]) -> None:
    for part, place in (("model.embed_tokens", "what precedes block 0"), ("lm_head", "what follows the last block")):
        model = tiny_model("llama")
        with torch.no_grad():
            model.get_submodule(part).weight[:] = torch.inf
        with pytest.raises(NotFinite, match=place):
            measure_perplexity(model, Windows(_IDS, "text", 5), name="m", device=_CPU)


def test_tokens_that_are_never_predicted_are_no_fault(tiny_model: Callable[..., Any]) -> None:
    logits = torch.randn(2, 3, 8)
    logits[..., 5] = -torch.inf
    check_logits(logits, tiny_model("llama"), _IDS[:2], subject="m", where="w")
    logits[1, 2] = -torch.inf
    with pytest.raises(NotFinite, match="for w"):
        check_logits(logits, tiny_model("llama"), _IDS[:2], subject="m", where="w")


def test_sampled_windows(overflowing: Any) -> None:
    with pytest.raises(NotFinite, match="for 1 sampled tokens, first in block 1"):
        sample_windows(overflowing, _BAD, samples=2, seqlen=4, seed=0)


@pytest.fixture
def float16_stories(stories: Path) -> Any:
    """Real float16 overflow: the third block multiplies beyond 65504."""
    loaded = load(stories, "float16")
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            loaded.model.model.layers[2].mlp.get_submodule(name).weight *= 2000
    return loaded


def test_generated_text_and_samples(float16_stories: Any) -> None:
    model, tokenizer = float16_stories.model, float16_stories.tokenizer
    words = r"LlamaForCausalLM .* for \d+ tokens of a prompt, first in block 2 \(model.layers.2\), in float16: use"
    with pytest.raises(NotFinite, match=words):
        generate_text(model, tokenizer, "Once upon a time", 4)
    with pytest.raises(NotFinite, match=words):
        continue_prompts(float16_stories, ["Once upon a time"], 4, _CPU)


def test_items_of_tasks(float16_stories: Any) -> None:
    pytest.importorskip("lm_eval")
    from alps.evaluation.distributed_lm import DistributedModel

    model = DistributedModel(SINGLE_PROCESS, float16_stories.model, float16_stories.tokenizer, 2, "m")
    words = r"Model 'm' .* for the item that begins with '.*Once upon.*', first in block 2"
    ids = float16_stories.tokenizer("Once upon a time there was", return_tensors="pt").input_ids
    with pytest.raises(NotFinite, match=words):
        model._model_call(ids)


def test_a_loss_beyond_every_perplexity_is_a_loss(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight *= 10_000
    (record,) = [measure_perplexity(model, Windows(_IDS, "text", 5), name="m", device=_CPU)]
    assert record.loss > 709 and math.isinf(record.perplexity)
    assert json.loads(record.model_dump_json())["perplexity"] is None and to_json(record.model_dump())
    assert EvaluationRecord.model_validate_json(record.model_dump_json()) == record
    assert record.perplexity_text(".3f") == f"loss {record.loss:.1f}"
    pair = measure_divergence(model, tiny_model("llama"), Windows(_IDS, "text", 5), names=("m", "r"), device=_CPU)
    assert pair.loss == record.loss and math.isinf(pair.perplexity) and math.isinf(pair.ratio)
    assert math.isfinite(pair.reference_perplexity)


def test_evaluate_refuses(float16_stories: Any, english_file: Path) -> None:
    with pytest.raises(NotFinite, match=r"window 1 of 'english\.txt'"):
        alps.evaluate(float16_stories, english_file, seqlen=32, windows=2)
