"""Models that look ahead are refused, in memory and from files; causal ones, and those with a cache, are not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import alps
from alps.core.errors import UnsupportedModel
from alps.data.loaded_model import open_model
from alps.models.causality import check_causal
from helpers.decoders import MOE, decoder

_XLNET: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
_XLM: dict[str, Any] = {"n_words": 64, "emb_dim": 32, "n_layers": 2, "n_heads": 4}
_CPM: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "dim_head": 8,
    "dim_ff": 48,
    "num_hidden_layers": 2,
    "prompt_length": 4,
}


def random(kind: str, **sizes: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()


@pytest.mark.parametrize(("kind", "sizes"), [("xlnet", _XLNET), ("xlm", _XLM)])
def test_a_model_that_looks_ahead_is_refused(
    kind: str, sizes: dict[str, Any], tmp_path: Path, ids: Tensor, word_tokenizer: Any
) -> None:
    model = random(kind, **sizes)
    with pytest.raises(UnsupportedModel, match=f"^{type(model).__name__} is not causal: .* takes only causal language"):
        alps.prune(model, sparsity=0.5, calibration=ids)
    model.save_pretrained(tmp_path / "model")
    word_tokenizer.save_pretrained(tmp_path / "model")
    opened = open_model(str(tmp_path / "model"))
    assert opened.store is not None
    with pytest.raises(UnsupportedModel, match="is not causal"):
        opened.check_causal()
    for act in (
        lambda: alps.prune(tmp_path / "model", sparsity=0.5, calibration=ids, out=tmp_path / "out"),
        lambda: alps.evaluate(tmp_path / "model", ["python-docs"]),
    ):
        with pytest.raises(UnsupportedModel, match="is not causal"):
            act()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_causal_masked_language_model_passes() -> None:
    check_causal(random("xlm", **_XLM, causal=True))


@pytest.mark.parametrize("kind", ["gpt2", *MOE])
def test_rounding_of_experts_is_no_look_ahead(kind: str) -> None:
    check_causal(decoder(kind))
    check_causal(decoder(kind, torch.bfloat16))


def test_a_model_that_attends_both_ways_within_a_prompt_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "alps"):
        check_causal(random("cpmant", **_CPM))
    assert caplog.messages == ["CpmAntForCausalLM looks ahead within a text: its perplexity has no meaning."]


def test_a_model_that_cannot_be_run_is_not_judged_and_keeps_its_mode(tiny_model: Any) -> None:
    class Broken(nn.Module):
        def forward(self) -> None:
            raise ValueError

    check_causal(Broken())
    model = tiny_model("llama").train()
    check_causal(model)
    assert model.training and all(module.training for module in model.modules())


def test_generators_keep_their_state(tiny_model: Any) -> None:
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    check_causal(tiny_model("llama"))
    assert torch.equal(torch.rand(3), expected)
