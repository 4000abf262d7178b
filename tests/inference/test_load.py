"""Tests of packed directories: models match the dense ones, and are never dense in memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import alps
from alps.checkpoints.pack import pack_directory
from alps.core.errors import AlpsError, CheckpointError
from alps.data.loaded_model import LoadedModel
from alps.evaluation.perplexity import measure_perplexity
from alps.inference.convert import packed_modules
from alps.inference.packed_linear import PackedLinear
from helpers.cli_process import run_code
from helpers.packed_models import logits, prune

SITES = {"llama": 7, "opt": 6, "opt-postnorm": 6, "gpt2": 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compress", [False, True])
def test_packed_models_match_dense_ones(
    multiplier: str,
    kind: str,
    dtype: torch.dtype,
    compress: bool,
    tiny_model: Callable[..., Any],
    ids: Tensor,
    tmp_path: Path,
) -> None:
    if compress:
        pytest.importorskip("zstandard")
    model = tiny_model(kind, dtype)
    prune(model)
    model.save_pretrained(tmp_path / "dense")
    pack_directory(tmp_path / "dense", tmp_path / "packed", compress)
    packed = alps.load(tmp_path / "packed").model
    assert type(packed) is type(model) and not packed.training
    inside = [name for name, _ in packed_modules(packed) if "layers." in name or ".h." in name]
    assert len(inside) == 3 * SITES[kind]
    for name, weight in model.named_parameters():
        layer = packed.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, PackedLinear) and name.endswith("weight"):
            dense = layer.to_dense()
            assert torch.equal(dense.T if kind == "gpt2" else dense, weight), name
            assert len(layer.values) == int((weight != 0).sum())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.01}[dtype]
    expected = logits(model, ids)
    absolute = tolerance * float(expected.abs().max())
    torch.testing.assert_close(logits(packed, ids), expected, rtol=tolerance, atol=absolute)
    # Generate one token at a time with the cache.
    for either in (model, packed):
        either.generation_config.eos_token_id = None
    outputs = [either.generate(ids[:2], max_new_tokens=5, do_sample=False) for either in (model, packed)]
    if dtype == torch.float32:
        assert torch.equal(*outputs)


def test_greedy_tokens_and_perplexity_match_the_dense_model(
    multiplier: str, packed_stories: tuple[Path, Path], english_file: Path
) -> None:
    dense, packed = AutoModelForCausalLM.from_pretrained(packed_stories[0]), alps.load(packed_stories[1]).model
    tokenizer = AutoTokenizer.from_pretrained(packed_stories[1])
    assert len(list(packed_modules(packed))) == 35
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    settings = {"max_new_tokens": 200, "min_new_tokens": 200, "do_sample": False}
    expected = dense.generate(ids, **settings)
    assert torch.equal(packed.generate(ids, **settings), expected) and expected.shape[1] == ids.shape[1] + 200
    # Generate from a batch of prompts of different lengths, padded on the left, and with beam search.
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    batch = tokenizer(["Once upon a time there was", "Lily"], return_tensors="pt", padding=True)
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    more = {"max_new_tokens": 20, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    assert torch.equal(packed.generate(**batch, **more), dense.generate(**batch, **more))
    values = []
    for model in (dense, packed):
        loaded = LoadedModel("model", model, tokenizer)
        windows = loaded.evaluation(str(english_file), 128, 10)
        values.append(measure_perplexity(model, windows, name="model", device=torch.device("cpu")).perplexity)
    assert f"{values[0]:.4g}" == f"{values[1]:.4g}" and values[0] > 1


def test_dtypes(multiplier: str, packed_stories: tuple[Path, Path], ids: Tensor) -> None:
    for dtype in ("bfloat16", "float16"):
        packed = alps.load(packed_stories[1], dtype=dtype).model
        dense = AutoModelForCausalLM.from_pretrained(packed_stories[0], dtype=dtype)
        assert packed.dtype == dense.dtype and packed.config.dtype == dense.config.dtype
        layer = next(layer for _, layer in packed_modules(packed))
        assert layer.values.dtype == dense.dtype
        expected = logits(dense, ids)
        torch.testing.assert_close(logits(packed, ids), expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))


_PEAK = """
import json, sys
import torch
import alps
from alps.core.memory import peak_host_bytes, reset_peak_memory
for folder in sys.argv[1:]:
    # The small model loads all code before the second model is measured.
    reset_peak_memory(torch.device("cpu"))
    before = peak_host_bytes()
    model = alps.load(folder).model
    model(torch.zeros(1, 40, dtype=torch.long))
    grown = peak_host_bytes() - before
print(json.dumps({"grown": grown, "footprint": model.get_memory_footprint()}))
"""


def write_packed(folder: Path, width: int) -> int:
    """Pack a random model with a tenth of its weights, and return the bytes of the dense one."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.data[torch.rand(parameter.shape) < 0.9] = 0
    # One file: mapped parts, and tensors that are not freed after packing, would count.
    model.save_pretrained(folder.with_name("dense"))
    pack_directory(folder.with_name("dense"), folder)
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="peaks can be reset on Linux alone")
def test_the_dense_model_is_never_in_memory(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    write_packed(tmp_path / "small" / "packed", 32)
    dense = write_packed(tmp_path / "packed", 768)
    done = run_code(_PEAK, tmp_path / "small" / "packed", tmp_path / "packed")
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout)
    assert sizes["footprint"] < 0.15 * dense
    assert sizes["grown"] < 0.55 * dense, (sizes, dense)


def test_tied_and_sparse_embeddings_are_dense(tmp_path: Path, tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = tiny_model("gpt2")
    prune(model)
    model.transformer.wte.weight.data[:, 5:20] = 0
    model.save_pretrained(tmp_path / "dense")
    manifest = pack_directory(tmp_path / "dense", tmp_path / "packed")
    assert manifest.tensors["transformer.wte.weight"].stored == "packed"
    packed = alps.load(tmp_path / "packed").model
    assert packed.lm_head.weight is packed.transformer.wte.weight
    assert torch.equal(packed.lm_head.weight, model.lm_head.weight)
    torch.testing.assert_close(logits(packed, ids), logits(model, ids))
    assert alps.pack_linears(model) == 12 and isinstance(model.lm_head, nn.Linear)


def renamed(source: Path, target: Path, rename: Callable[[str], str | None]) -> Path:
    """Copy a checkpoint of one file with renamed tensors; None leaves a tensor out."""
    target.mkdir()
    tensors = load_file(source / "model.safetensors")
    new = {name: tensor for old, tensor in tensors.items() if (name := rename(old)) is not None}
    save_file(new, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


def test_names_with_and_without_the_prefix(tmp_path: Path, tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = tiny_model("gpt2")
    prune(model)
    model.save_pretrained(tmp_path / "dense")
    bare = renamed(tmp_path / "dense", tmp_path / "bare", lambda name: name.removeprefix("transformer."))
    pack_directory(bare, tmp_path / "packed")
    torch.testing.assert_close(logits(alps.load(tmp_path / "packed").model, ids), logits(model, ids))


def test_directories_that_do_not_fit_are_rejected(tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    prune(model)
    model.save_pretrained(tmp_path / "dense")

    def refused(name: str, rename: Callable[[str], str | None], reason: str, edit: str = "") -> None:
        folder = renamed(tmp_path / "dense", tmp_path / name, rename)
        if edit:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, **json.loads(edit)}))
        pack_directory(folder, tmp_path / f"{name}-packed")
        with pytest.raises(AlpsError, match=reason):
            alps.load(tmp_path / f"{name}-packed")

    refused("other-name", lambda name: name.replace("q_proj", "q_project"), "lacks 3 tensors .*q_proj.weight")
    refused("fewer", lambda name: None if "layers.1.mlp.up" in name else name, "lacks 1 tensors .*layers.1.mlp.up_proj")
    refused("other", lambda name: name, "has shape", edit='{"intermediate_size": 48}')

    pack_directory(tmp_path / "dense", tmp_path / "damaged")
    shard = tmp_path / "damaged" / "packed.safetensors"
    data = bytearray(shard.read_bytes())
    data[-7] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        alps.load(tmp_path / "damaged")
