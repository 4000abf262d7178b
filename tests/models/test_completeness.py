"""Tensors that a checkpoint has and its model has not, and the other way round."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from alps.core.errors import AlpsError, ConfigError, UnsupportedModel
from alps.models.completeness import check_missing, check_unused
from alps.models.lazy_weights import LazyWeights
from alps.models.load import load_model
from alps.models.meta_model import open_lazy_model
from helpers.log_messages import log_messages


def _saved(model: Any, folder: Path, change: Callable[[dict[str, Tensor]], Any], **config: Any) -> str:
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **config}))
    return str(folder)


def _read_both(name: str) -> list[str]:
    """Load a checkpoint whole and streamed; return the errors and warnings of both, which must be equal."""
    told = []
    for read in (load_model, lambda name: open_lazy_model(name, None)):
        with log_messages() as logged:
            try:
                assert not isinstance(read(name), str), "it has to be streamed"
            except AlpsError as error:
                logged.append(str(error))
        told.append(list(logged))
    assert told[0] == told[1]
    return told[0]


def test_a_head_of_another_task_is_told_from_one_beside_the_head(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["v_head.summary.weight"] = torch.ones(1, 32)

    (told,) = _read_both(_saved(tiny_model("llama"), tmp_path / "value", add))
    assert told.endswith("1 tensors that LlamaForCausalLM has not, first v_head.summary.weight: they are not used.")
    (told,) = _read_both(_saved(tiny_model("llama"), tmp_path / "reward", add, architectures=["LlamaRewardModel"]))
    assert told.startswith(f"Model '{tmp_path / 'reward'}' (LlamaRewardModel) holds v_head.summary.weight")
    assert _read_both(_saved(tiny_model("llama"), tmp_path / "own", lambda _: None, architectures=["MyLlama"])) == []


def test_buffers_that_models_compute_are_no_tensors(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    assert _read_both(_saved(tiny_model("llama"), tmp_path, add)) == []


def test_fewer_experts_than_the_file_has(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    config = MixtralConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_local_experts=4, **sizes)
    name = _saved(MixtralForCausalLM(config), tmp_path, lambda _: None, num_local_experts=2)
    assert isinstance(open_lazy_model(name, None), str)
    with pytest.raises(ConfigError, match="has another shape of"):
        load_model(name)


def test_blocks_that_predict_further_tokens_are_left_out(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    used = set(model.state_dict())
    stored = used | {name.replace("layers.0.", "layers.3.") for name in used}
    with pytest.raises(ConfigError, match="fewer layers"):
        check_unused("m", model, stored, used)
    model.config.num_nextn_predict_layers = 1
    check_unused("m", model, stored, used)
    model.config.num_nextn_predict_layers = 2
    check_unused("m", model, stored, used)


def test_single_tensors_and_whole_layers_are_missed_in_other_words(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    check_missing("m", model, [])
    with pytest.raises(ConfigError, match=r"first model\.layers\.2.mlp.up_proj.weight: it is incomplete"):
        check_missing("m", model, ["model.layers.2.mlp.up_proj.weight"])
    layer = [name for name in model.state_dict() if name.startswith("model.layers.2.")]
    with pytest.raises(ConfigError, match=r"lacks 9 tensors .* says more layers or experts than its weights have"):
        check_missing("m", model, layer)
    with pytest.raises(ConfigError, match="it is incomplete"):
        check_missing("m", model, [*layer, "model.norm.weight"])


def test_a_prefix_of_the_base_model_may_be_missing(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    name = _saved(tiny_model("gpt2"), tmp_path / "short", rename)
    assert isinstance(open_lazy_model(name, None), LazyWeights) and _read_both(name) == []
    settings = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps({**settings, "n_layer": 2}))
    with pytest.raises((ConfigError, UnsupportedModel), match="fewer layers"):
        open_lazy_model(name, None)
    with pytest.raises(ConfigError, match="fewer layers"):
        load_model(name)
