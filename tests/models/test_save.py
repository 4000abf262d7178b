"""Writing of pruned models: whole ones by transformers, lazy ones file by file, shared among ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from alps.checkpoints.journal import open_journal
from alps.models.blocks import find_blocks
from alps.models.lazy_weights import LazyWeights
from alps.models.load import load_model, load_tokenizer
from alps.models.meta_model import open_lazy_model
from alps.models.save import CheckpointWriter
from helpers.log_messages import log_messages
from helpers.vision import vision_model


def test_a_model_in_memory_is_saved_with_tokenizer_and_processor(word_tokenizer: Any, tmp_path: Path) -> None:
    source = tmp_path / "dense"
    model = vision_model("llava")
    source.mkdir()
    (source / "preprocessor_config.json").write_text('{"size": 16}')
    model.name_or_path = str(source)
    (tmp_path / "out").mkdir()
    writer = CheckpointWriter(model, word_tokenizer)
    writer.write_side_files(tmp_path / "out")
    writer.write_weights(tmp_path / "out")
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"size": 16}'
    assert load_tokenizer(str(tmp_path / "out"))("abc").input_ids == word_tokenizer("abc").input_ids
    again = load_model(str(tmp_path / "out"))
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in again.named_parameters())


def test_ranks_write_every_file_once_with_the_blocks_of_the_journal(
    tiny_model: Callable[..., Any], word_tokenizer: Any, tmp_path: Path
) -> None:
    dense = tiny_model("llama")
    dense.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    word_tokenizer.save_pretrained(tmp_path / "dense")
    store = open_lazy_model(str(tmp_path / "dense"), None)
    assert isinstance(store, LazyWeights)
    blocks, writer = find_blocks(store.model), CheckpointWriter(store.model, None, tmp_path / "dense", store)
    names = sorted(file.name for file in store.files)
    assert len(names) > 3
    out = tmp_path / "out"
    out.mkdir()
    with open_journal(tmp_path / "run", {}) as journal:
        for block in blocks:
            halved = {name: p / 2 for name, p in dense.get_submodule(block.name).named_parameters()}
            journal.save_tensors(block.index, halved)
            journal.save_record(block.index, {})
        writer.write_weights(out, blocks, journal, first=1, step=2)
        first = sorted(path.name for path in out.iterdir())
        assert len(first) == len(names) // 2
        writer.write_weights(out, blocks, journal, first=0, step=2)
    assert sorted(path.name for path in out.iterdir()) == names
    writer.write_side_files(out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    written = {name: (path.name, t) for path in out.glob("*.safetensors") for name, t in load_file(path).items()}
    assert index["weight_map"] == {name: file for name, (file, _) in sorted(written.items())}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in written.values())
    inside = tuple(f"{block.name}." for block in blocks)
    for name, parameter in dense.named_parameters():
        expected = parameter / 2 if name.startswith(inside) else parameter
        assert torch.equal(written[name][1], expected), name
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert load_tokenizer(str(out))("abc").input_ids == word_tokenizer("abc").input_ids


def test_a_tokenizer_that_its_class_rebuilds_is_told(
    tiny_model: Callable[..., Any], word_tokenizer: Any, tmp_path: Path
) -> None:
    """Qwen 2's class ignores how the characters of this tokenizer are split."""
    config = Qwen2Config(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4)
    for model, count in ((tiny_model("llama"), 0), (Qwen2ForCausalLM(config), 1)):
        folder = tmp_path / str(count)
        folder.mkdir()
        with log_messages() as messages:
            CheckpointWriter(model, word_tokenizer).write_side_files(folder)
        assert len(messages) == count and all("other token ids" in message for message in messages)
