"""Checkpoints and models in memory that are not decoder-only causal language models are refused for what they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
)

import alps
from alps.core.errors import UnsupportedModel
from alps.models.architecture_check import check_config, check_model_class
from alps.models.load import check_checkpoint

_ENCODER_DECODER = "is an encoder-decoder: alps takes only decoder-only causal language models"
_ADVICE = ": alps takes only decoder-only causal language models"
_LLAMA = ": prune the LlamaForCausalLM that it was made from"
# Type of the configuration, class that it names, part of the sentence.
REFUSED = [
    ("whisper", "WhisperForConditionalGeneration", _ENCODER_DECODER),
    ("bart", "BartForConditionalGeneration", _ENCODER_DECODER),
    ("bart", "BartForSequenceClassification", _ENCODER_DECODER),
    ("marian", "MarianMTModel", _ENCODER_DECODER),
    ("t5", "T5ForConditionalGeneration", _ENCODER_DECODER),
    ("t5", None, _ENCODER_DECODER),
    ("led", "LEDForConditionalGeneration", _ENCODER_DECODER),
    ("florence2", "Florence2ForConditionalGeneration", _ENCODER_DECODER),
    ("speecht5", "SpeechT5ForSpeechToText", _ENCODER_DECODER),
    ("vision-encoder-decoder", "VisionEncoderDecoderModel", _ENCODER_DECODER),
    ("trocr", "TrOCRForCausalLM", "is the decoder of an encoder-decoder, and its cross-attention needs the encoder"),
    ("bert", "BertForMaskedLM", "is for masked language modelling" + _ADVICE),
    ("bert", "BertForPreTraining", "is for pretraining" + _ADVICE),
    ("bert", "BertLMHeadModel", "is an encoder, since is_decoder is false in its configuration" + _ADVICE),
    ("bert", None, "(of type bert) is an encoder, since is_decoder is false"),
    ("distilbert", None, "(of type distilbert) is not a causal language model of transformers" + _ADVICE),
    ("llama", "LlamaForSequenceClassification", "is for sequence classification" + _LLAMA),
    ("llama", "LlamaForTokenClassification", "is for token classification" + _LLAMA),
    ("llama", "LlamaForQuestionAnswering", "is for question answering" + _LLAMA),
    ("llama", "LlamaForRewardModel", "is not a causal language model" + _LLAMA),
    ("gpt2", "GPT2DoubleHeadsModel", "is not a causal language model: prune the GPT2LMHeadModel that it was made from"),
    ("llama", "LlamaModel", "is a base model without an output head: give a checkpoint of LlamaForCausalLM"),
    ("gemma", "GemmaModel", 'write GemmaForCausalLM for "architectures" into its config.json'),
    ("vit", "ViTForImageClassification", "is for image classification" + _ADVICE),
    ("clip", "CLIPModel", "is for zero shot image classification" + _ADVICE),
    ("wav2vec2", "Wav2Vec2ForCTC", "is for CTC" + _ADVICE),
    ("bark", "BarkModel", "is for text to waveform" + _ADVICE),
    ("qwen2_audio", "Qwen2AudioForConditionalGeneration", "is for multimodal language modelling" + _ADVICE),
]


def config(kind: str, architecture: str | None, **more: Any) -> Any:
    made: Any = AutoConfig.for_model(kind, **more)
    made.architectures = None if architecture is None else [architecture]
    return made


@pytest.mark.parametrize(("kind", "architecture", "words"), REFUSED)
def test_a_checkpoint_is_refused_by_its_configuration(
    kind: str, architecture: str | None, words: str, tmp_path: Path
) -> None:
    config(kind, architecture).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel) as caught:
        check_checkpoint(str(tmp_path))
    sentence = str(caught.value)
    assert words in sentence and sentence.startswith(f"Model '{tmp_path}' (") and sentence.endswith(".")
    assert architecture is None or f"({architecture})" in sentence
    # There are no weights and no text: neither may be missed before the model is refused.
    acts: dict[str, Callable[[], Any]] = {
        "prune": lambda: alps.prune(tmp_path, sparsity=0.5, calibration="c4", out=tmp_path / "out"),
        "eval": lambda: alps.evaluate(tmp_path, ["c4"]),
        "pack": lambda: alps.pack(tmp_path, tmp_path / "out"),
        "compare": lambda: alps.compare(tmp_path, tmp_path / "out", sparsity=[0.5]),
        "load": lambda: alps.load(tmp_path),
    }
    for name, act in acts.items():
        with pytest.raises(UnsupportedModel) as caught:
            act()
        assert str(caught.value) == sentence, name
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("kind", "architecture", "more"),
    [
        ("llama", "LlamaForCausalLM", {}),
        ("llama", "LLaMAForCausalLM", {}),  # an old spelling
        ("llama", "CustomLlama", {}),  # of code that comes with the model
        ("llama", None, {}),
        ("bert", "BertLMHeadModel", {"is_decoder": True}),
        ("gpt2", "GPT2LMHeadModel", {}),
        ("gpt_neox", "GPTNeoXForCausalLM", {}),  # has is_decoder, without a meaning
        ("llava", "LlavaForConditionalGeneration", {}),
        ("blip-2", "Blip2ForConditionalGeneration", {}),
        ("mllama", "MllamaForConditionalGeneration", {}),
    ],
)
def test_decoders_pass(kind: str, architecture: str | None, more: dict[str, Any]) -> None:
    check_config(config(kind, architecture, **more), "name")


def test_a_decoder_with_cross_attention_or_an_encoder_decoder_inside_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="is the decoder of an encoder-decoder"):
        check_config(config("gpt2", "GPT2LMHeadModel", add_cross_attention=True), "name")
    blip = config("blip-2", "Blip2ForConditionalGeneration", text_config={"model_type": "t5"})
    with pytest.raises(UnsupportedModel, match="is an encoder-decoder"):
        check_config(blip, "name")


_BART: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
}


def test_a_lone_decoder_is_refused_although_its_constructor_changes_the_configuration(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bart", **_BART))
    assert not model.config.is_encoder_decoder
    with pytest.raises(UnsupportedModel, match=r"^The model \(BartForCausalLM\) is the decoder of an encoder-decoder"):
        alps.prune(model, sparsity=0.5)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"\(BartForCausalLM\) is the decoder of an encoder-decoder"):
        alps.load(tmp_path)


class _Subclass(LlamaForCausalLM):  # type: ignore[misc]
    """Language model of a user."""


class _OtherHead(PreTrainedModel):  # type: ignore[misc]
    """Model of a user that shares nothing with a class of transformers."""

    _supports_sdpa = True


def test_models_in_memory_are_judged_by_their_class(tiny_model: Any, ids: Tensor) -> None:
    model = tiny_model("llama")
    check_model_class(model)
    check_model_class(_Subclass(model.config))
    check_model_class(_OtherHead(model.config))
    check_model_class(torch.nn.Linear(2, 2))
    before = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    with pytest.raises(UnsupportedModel, match=r"^The model \(LlamaModel\) is a base model without an output head"):
        alps.prune(model.model, sparsity=0.5, calibration=ids)
    assert all(torch.equal(weight, before[name]) for name, weight in model.model.state_dict().items())
    classifier = AutoModelForSequenceClassification.from_config(model.config)
    with pytest.raises(UnsupportedModel, match=r"\(LlamaForSequenceClassification\) is for sequence classification"):
        alps.prune(classifier, sparsity=0.5, calibration=ids)
    with pytest.raises(UnsupportedModel, match=r"\(LlamaModel\) is a base model"):
        alps.evaluate(alps.LoadedModel("name", LlamaModel(model.config), None), ["text.txt"])


def test_a_classifier_with_tied_embeddings_does_not_become_a_language_model(tiny_model: Any, tmp_path: Path) -> None:
    settings = tiny_model("llama").config.to_dict() | {"tie_word_embeddings": True}
    AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**settings)).save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModel, match="is for sequence classification"):
        alps.prune(tmp_path / "model", sparsity=0.5, method="magnitude", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
