"""Vision-language models: the text decoder is found, walked and pruned, and nothing else is touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    Blip2Config,
    Blip2ForConditionalGeneration,
    MllamaConfig,
)
from typer.testing import CliRunner

import alps
from alps.cli.main import app
from alps.core.errors import ConfigError, UnsupportedModel
from alps.evaluation.inspect import inspect
from alps.models.auto_class import reads_images
from alps.models.blocks import find_blocks
from alps.reporting.run_report import RunReport
from helpers.decoders import check_walk
from helpers.vision import VISION, vision_model

_CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", VISION)
def test_the_blocks_are_those_of_the_text_decoder_and_walk_like_the_model(kind: str, ids: Tensor) -> None:
    ids = ids.clamp_max(59)  # the last ones stand for images
    model = vision_model(kind)
    blocks = find_blocks(model)
    assert [block.name for block in blocks] == [f"{VISION[kind][1]}.{i}" for i in range(3)]
    check_walk(model, blocks, ids)


@pytest.mark.parametrize(
    "settings",
    [{}, {"true_sequential": True, "dense_target": 0.4, "reconstruct_epochs": 1, "allocation": "sensitivity"}],
    ids=str,
)
@pytest.mark.parametrize("kind", VISION)
def test_the_text_decoder_is_pruned_exactly_and_all_else_keeps_its_bits(
    kind: str, settings: dict[str, Any], ids: Tensor
) -> None:
    model, dense, inside = vision_model(kind), vision_model(kind), f"{VISION[kind][1]}."
    report = alps.prune(model, sparsity=0.6, calibration=ids.clamp_max(59), **settings)
    assert report.zeros == sum(round(0.6 * record.entries) for record in report.layers) and len(report.layers) == 3 * 7
    assert all(record.name.startswith(inside) for record in report.layers)
    sites = {site.name: site for block in find_blocks(model) for site in block.sites}
    for record in report.layers:
        assert int((sites[record.name].read() == 0).sum()) == record.zeros
        assert settings or record.zeros == round(0.6 * record.entries)
    outside = [name for name, _ in dense.named_parameters() if not name.startswith(inside)]
    assert any("vis" in name for name in outside)
    assert all(torch.equal(model.get_parameter(name), dense.get_parameter(name)) for name in outside)
    reasons = {row.name: row.reason for row in report.dense}
    tower = [name for name in outside if "vis" in name and model.get_parameter(name).ndim == 2 and "embed" not in name]
    assert tower and {reasons[name] for name in tower} == {"outside the decoder blocks"}
    assert report.notes == [
        f"of {type(model).__name__} the text decoder was pruned, on text alone; all other parts are unchanged."
    ]


@pytest.mark.parametrize("kind", VISION)
def test_a_directory_goes_through_the_command_line(
    kind: str, word_tokenizer: Any, english_file: Path, tmp_path: Path
) -> None:
    dense, out = tmp_path / "dense", tmp_path / "out"
    model = vision_model(kind)
    model.save_pretrained(dense)
    word_tokenizer.save_pretrained(dense)
    (dense / "preprocessor_config.json").write_text('{"image_processor_type": "any"}')
    flags = ["--pattern", "2:4", "--method", "wanda", "--samples", "4", "--seqlen", "32", "--calibration"]
    result = CliRunner().invoke(app, ["prune", str(dense), str(out), *flags, str(english_file)])
    assert result.exit_code == 0, result.output
    assert "the text decoder was pruned, on text alone" in result.stdout
    again = AutoModelForImageTextToText.from_pretrained(out)
    assert type(again) is type(model)
    before, after = dict(model.named_parameters()), dict(again.named_parameters())
    assert before.keys() == after.keys()
    report = RunReport.read(out)
    assert report is not None and report.architecture == type(model).__name__
    pruned = {f"{record.name}.weight" for record in report.layers}
    for name, parameter in after.items():
        if name in pruned:
            assert bool(((parameter != 0).reshape(-1, 4).sum(dim=1) == 2).all())
            assert torch.equal(parameter[parameter != 0], before[name][parameter != 0])
        else:
            assert torch.equal(parameter, before[name]), name
    assert (out / "preprocessor_config.json").read_text() == (dense / "preprocessor_config.json").read_text()
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__] and "text_config" in config
    card, whole = (out / "README.md").read_text(), reads_images(type(model).__name__)
    assert whole == (kind != "gemma3-vision")
    assert ("AutoModelForImageTextToText.from_pretrained" in card) == whole
    assert ("pipeline_tag: image-text-to-text" in card) == whole
    assert [(check.pattern, check.violations) for check in inspect(str(out)).checks] == [("2:4", 0)]


def test_the_text_decoder_samples_its_own_calibration() -> None:
    report = alps.prune(vision_model("llava"), sparsity=0.5, method="wanda", calibration="self", samples=2, seqlen=16)
    assert report.calibration is not None and report.calibration.tokens == 32 and report.sparsity == 0.5


def test_layers_that_read_images_stay_dense(ids: Tensor) -> None:
    """The text decoder has layers of two classes, and the vision tower more layers than it."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    tower = {"num_hidden_layers": 6, "num_global_layers": 2, "image_size": 16, "patch_size": 8}
    more = {"attention_heads": 4, "intermediate_layers_indices": [1, 2], "vision_output_dim": 96}
    text = {"vocab_size": 64, "num_hidden_layers": 4, "num_key_value_heads": 2, "cross_attention_layers": [1]}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = MllamaConfig(
        vision_config={**sizes, **tower, **more},
        text_config={**sizes, **text, "rope_parameters": rope, "pad_token_id": 2},
    )
    model = AutoModelForImageTextToText.from_config(config)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    report = alps.prune(model, sparsity=0.5, method="wanda", calibration=ids)
    prefix = "model.language_model.layers"
    assert {layer.name.rpartition(".layers.")[0] + ".layers" for layer in report.layers} == {prefix}
    assert {layer.name.removeprefix(f"{prefix}.").split(".")[0] for layer in report.layers} == {"0", "2", "3"}
    told = {row.name: row.reason for row in report.dense}
    assert told[f"{prefix}.1.cross_attn.q_proj.weight"] == "a forward on text does not call it as a layer"
    pruned = {f"{layer.name}.weight" for layer in report.layers}
    assert all(
        torch.equal(parameter, before[name]) for name, parameter in model.named_parameters() if name not in pruned
    )


def test_windows_longer_than_the_text_part_takes_are_refused(ids: Tensor) -> None:
    with pytest.raises(ConfigError, match="longer than the 128 this model takes"):
        alps.prune(vision_model("llava"), sparsity=0.5, calibration=torch.zeros(1, 129, dtype=torch.int64))


def test_a_part_that_is_an_encoder_decoder_is_refused() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "t5", "vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = Blip2Config(
        vision_config={**sizes, "image_size": 16, "patch_size": 8}, qformer_config=sizes, text_config=text
    )
    with pytest.raises(UnsupportedModel, match="Blip2ForConditionalGeneration is an encoder-decoder"):
        find_blocks(Blip2ForConditionalGeneration(config))
