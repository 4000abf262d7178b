"""Faults of whole directories: what is no checkpoint, or holds other files than its configuration says."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from helpers.fault_fixture import PICKLES, Scene

Layout = tuple[str, str, Callable[[Scene], None], str]
_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f\nsize 1000\n"
_ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-2-7b-hf"}
_HIDDEN = 64


def _pointer(name: str) -> Callable[[Scene], None]:
    def create(scene: Scene) -> None:
        if name == PICKLES:
            scene.weights.unlink()
        (scene.model / name).write_text(_POINTER)

    return create


def _only(*names: str, **contents: Any) -> Callable[[Scene], None]:
    """Leave the named files of the model, and add others with some content."""

    def create(scene: Scene) -> None:
        for path in scene.model.iterdir():
            if path.name not in names:
                path.unlink()
        for name, content in contents.items():
            (scene.model / name.replace("__", ".")).write_text(json.dumps(content))

    return create


def _shard_pointer(scene: Scene) -> None:
    scene.index()
    (scene.model / "model-00001-of-00001.safetensors").write_text(_POINTER)


def _text_pointer(scene: Scene) -> None:
    scene.text.write_text(_POINTER)


def _without_index(scene: Scene) -> None:
    scene.index()
    (scene.model / "model.safetensors.index.json").unlink()


def _pickled_shard(scene: Scene) -> None:
    scene.weights.unlink()
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model-00002-of-00002.bin"}}
    (scene.model / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def _inner(scene: Scene) -> None:
    for name in ("checkpoint-100", "checkpoint-200"):
        (scene.model / name).mkdir()
        (scene.model / name / "config.json").write_text("{}")
    (scene.model / "config.json").unlink()


def _quantized(**settings: Any) -> Callable[[Scene], None]:
    return lambda scene: scene.settings("config.json", quantization_config=settings)


def _layers(count: int) -> Callable[[Scene], None]:
    return lambda scene: scene.settings("config.json", num_hidden_layers=count)


def _reward_model(scene: Scene) -> None:
    scene.settings("config.json", architectures=["LlamaRewardModel"])
    scene.tensors(lambda tensors: tensors.update({"score.weight": torch.ones(1, _HIDDEN)}))


def _adapter_beside(scene: Scene) -> None:
    (scene.model / "adapter_config.json").write_text(json.dumps(_ADAPTER))


def _overflowing(scene: Scene) -> None:
    """Weights that float16 holds, and products in the third block that it does not."""
    names = ("gate_proj", "up_proj")
    scene.tensors(lambda tensors: [tensors[f"model.layers.2.mlp.{name}.weight"].mul_(2000) for name in names])
    scene.settings("config.json", dtype="float16", torch_dtype="float16")
    scene.tensors(lambda tensors: tensors.update({name: tensor.half() for name, tensor in tensors.items()}))


_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_LFS = "is a pointer of Git LFS"
_OVERFLOW = r"in block 2 (model.layers.2), in float16: use --dtype bfloat16 or float32"
_COMPRESSED = "compressed-tensors"
LAYOUT_FAULTS: list[Layout] = [
    ("a Git LFS pointer for the weights", f"model.safetensors' {_LFS}", _pointer(_WEIGHTS), "prune"),
    ("a pointer for pickled weights; `alps eval`", f"pytorch_model.bin' {_LFS}", _pointer(PICKLES), "eval"),
    ("a pointer for a shard; `alps pack`", f"of-00001.safetensors' {_LFS}", _shard_pointer, "pack"),
    ("a pointer for the configuration", f"config.json' {_LFS}", _pointer(_CONFIG), "prune"),
    ("a pointer for the tokenizer; `alps eval`", f"tokenizer.json' {_LFS}", _pointer("tokenizer.json"), "eval"),
    ("a pointer for the text", f"text.txt' {_LFS}", _text_pointer, "prune"),
    (
        "an adapter (LoRA)",
        "is a LORA adapter of the base model 'meta-llama/Llama-2-7b-hf'",
        _only(adapter_config__json=_ADAPTER),
        "prune",
    ),
    ("a model with an adapter beside it", "holds a model and a LORA adapter", _adapter_beside, "prune"),
    ("an empty directory; `alps eval`", "is empty: give the directory", _only(), "eval"),
    ("a directory with a tokenizer alone", "holds only a tokenizer", _only("tokenizer.json"), "prune"),
    ("a directory of checkpoints", "its folders do: give one of them", _inner, "prune"),
    ("shards without their index", "without their index: fetch model.safetensors.index.json", _without_index, "prune"),
    ("a missing shard of pickles", "-00002-of-00002.bin' is missing, though", _pickled_shard, "eval"),
    (
        "a folder of GGUF files",
        "give one of them as the model (m-Q4_K_M.gguf, m-Q8_0.gguf)",
        _only(**{"m-Q4_K_M__gguf": 1, "m-Q8_0__gguf": 1}),
        "prune",
    ),
    ("weights for ONNX alone", "holds weights for ONNX only", _only(_CONFIG, model__onnx=1), "prune"),
    ("weights for TensorFlow; `alps eval`", "for TensorFlow only", _only(_CONFIG, tf_model__h5=1), "eval"),
    ("weights for Flax; `alps pack`", "for Flax only", _only(_CONFIG, flax_model__msgpack=1), "pack"),
    (
        "a pipeline of diffusers",
        "is a pipeline of diffusers (StableDiffusionPipeline)",
        _only(model_index__json={"_class_name": "StableDiffusionPipeline"}),
        "prune",
    ),
    ("weights in the authors' format", "convert it by the script", _only(params__json={"dim": 1}), "prune"),
    ("GPTQ", "are quantized (gptq, 4 bits)", _quantized(quant_method="gptq", bits=4), "eval"),
    (
        "a sparse format",
        "are compressed (compressed-tensors, sparse-24-bitmask)",
        _quantized(quant_method=_COMPRESSED, format="dense", sparsity_config={"format": "sparse-24-bitmask"}),
        "pack",
    ),
    ("more layers than the configuration says", "says fewer layers or experts than its weights", _layers(3), "prune"),
    ("the same; `alps eval`", "says fewer layers or experts than its weights", _layers(3), "eval"),
    ("fewer layers than the configuration says", "says more layers or experts than its weights", _layers(7), "prune"),
    ("a reward model with tied embeddings", "such as a reward model", _reward_model, "prune"),
    ("the same; `alps eval`", "such as a reward model", _reward_model, "eval"),
    (
        "a setting that follows from others",
        "sets use_return_dict, which follows from others",
        lambda scene: scene.settings("config.json", use_return_dict=False),
        "prune",
    ),
    ("a float16 model that overflows; `alps eval`", _OVERFLOW, _overflowing, "eval"),
    ("the same; `alps generate`", _OVERFLOW, _overflowing, "generate"),
]
