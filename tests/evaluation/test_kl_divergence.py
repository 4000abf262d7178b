"""The divergence from a dense model against a plain float64 loop, and what cannot be compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import alps
from alps.core.errors import ConfigError
from alps.data.loaded_model import LoadedModel, load
from alps.evaluation.kl_divergence import token_divergences
from alps.reporting.records import ComparisonRecord, EvaluationRecord


def _other(model: Any, scale: float = 0.05) -> Any:
    """The model with every weight moved a little."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def _compare(model: LoadedModel, reference: LoadedModel, text: Path, seqlen: int, windows: int) -> ComparisonRecord:
    (record,) = alps.evaluate(model, [str(text)], seqlen=seqlen, windows=windows, reference=reference)
    assert isinstance(record, ComparisonRecord)
    return record


def _naive(model: Any, reference: Any, ids: Tensor) -> tuple[float, float]:
    """Mean KL(reference || model) and agreement, token by token in float64."""
    total, same, count = 0.0, 0, 0
    for window in ids:
        with torch.no_grad():
            q, p = (one(input_ids=window[None]).logits[0].double().softmax(-1) for one in (model, reference))
        for i in range(len(window) - 1):
            total += sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p[i], q[i], strict=True))
            same += int(p[i].argmax()) == int(q[i].argmax())
            count += 1
    return total / count, same / count


def test_divergence_is_that_of_a_plain_loop(
    tiny_model: Callable[..., Any], word_tokenizer: Any, english_file: Path, kind: str
) -> None:
    reference = LoadedModel("dense", tiny_model(kind), word_tokenizer)
    model = LoadedModel("pruned", _other(tiny_model(kind)), word_tokenizer)
    found = _compare(model, reference, english_file, 16, 5)
    kl, agreement = _naive(model.model, reference.model, model.evaluation(str(english_file), 16, 5).ids)
    assert found.kl == pytest.approx(kl, rel=1e-4) and kl > 1e-3
    assert found.agreement == agreement and 0 < agreement < 1
    assert found.predicted_tokens == 5 * 15


def test_perplexities_are_those_measured_alone(stories: Path, english_file: Path) -> None:
    dense, pruned = load(str(stories)), load(str(stories))
    alps.prune(pruned.model, sparsity=0.5, method="magnitude", measure_error=False)
    # 20 windows of 150 tokens are two batches, and more rows than are in float32 at a time.
    found = _compare(pruned, dense, english_file, 150, 20)
    alone = [alps.evaluate(one, [str(english_file)], seqlen=150, windows=20)[0] for one in (pruned, dense)]
    assert found.loss == pytest.approx(alone[0].loss, rel=1e-12)
    assert found.perplexity == pytest.approx(alone[0].perplexity, rel=1e-12)
    assert found.reference_perplexity == pytest.approx(alone[1].perplexity, rel=1e-12)
    assert found.ratio == pytest.approx(alone[0].perplexity / alone[1].perplexity, rel=1e-12) and found.ratio > 1.1
    assert 0.01 < found.kl < 5 and 0.1 < found.agreement < 0.99
    other = _compare(dense, pruned, english_file, 150, 20)
    assert other.kl != pytest.approx(found.kl, rel=1e-3), "the divergence has a direction"
    assert other.agreement == found.agreement and other.ratio == pytest.approx(1 / found.ratio)


def test_a_model_is_nowhere_from_itself(stories: Path, english_file: Path) -> None:
    loaded = load(str(stories))
    found = _compare(loaded, loaded, english_file, 32, 4)
    assert (found.kl, found.agreement, found.ratio) == (0.0, 1.0, 1.0)


def test_known_divergence_between_coins() -> None:
    """Fair coin against one of 3/4: ln(2/sqrt(3)); the last position predicts nothing; the middle one agrees."""
    fair, biased, sure = [0.0, 0.0], [math.log(3.0), 0.0], [9.0, 0.0]
    kl, same = token_divergences(torch.tensor([[biased, sure, fair]]), torch.tensor([[fair, sure, sure]]))
    assert kl.tolist() == pytest.approx([math.log(2 / math.sqrt(3)), 0.0])
    assert same.tolist() == [True, True]
    assert token_divergences(torch.tensor([[biased, fair]]), torch.tensor([[biased[::-1], fair]]))[1].tolist() == [
        False
    ]


def test_training_modes_come_back_and_records_without_reference_stay_as_they_were(
    tiny_model: Callable[..., Any], word_tokenizer: Any, english_file: Path
) -> None:
    model = LoadedModel("a", tiny_model("opt").train(), word_tokenizer)
    reference = LoadedModel("b", tiny_model("opt"), word_tokenizer)
    found = _compare(model, reference, english_file, 16, 2)
    assert found.kl == 0.0 and model.model.training and not reference.model.training
    (plain,) = alps.evaluate(reference, [str(english_file)], seqlen=16, windows=2)
    assert type(plain) is EvaluationRecord
    assert set(found.model_dump()) - set(plain.model_dump()) == {
        "reference",
        "reference_perplexity",
        "ratio",
        "kl",
        "agreement",
    }


def test_what_cannot_be_compared(
    tiny_model: Callable[..., Any], word_tokenizer: Any, stories: Path, english_file: Path
) -> None:
    model, text = LoadedModel("tiny", tiny_model("llama"), word_tokenizer), [str(english_file)]
    with pytest.raises(ConfigError, match=r"cuts 'english\.txt' into other tokens"):
        alps.evaluate(model, text, seqlen=16, windows=2, reference=load(str(stories)))
    wider = load(str(stories))
    wider.tokenizer = None
    with pytest.raises(ConfigError, match="predicts over 64 tokens and the reference over 512"):
        alps.evaluate(model, text, seqlen=16, windows=2, reference=wider)
    with pytest.raises(ConfigError, match="longer than the 128"):
        alps.evaluate(
            load(str(stories)), text, seqlen=129, windows=2, reference=LoadedModel("t", tiny_model("gpt2"), None)
        )
