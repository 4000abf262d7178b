"""Kinds of directories that are no checkpoint of transformers with weights: each is named, with what to do.

Only names of files, a few small JSON files and the first bytes of other files are read.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from alps.checkpoints.weight_files import INDEX_NAME, PICKLE_INDEX_NAME, SINGLE_NAME, is_inside
from alps.core.errors import CheckpointError, truncate

PICKLE_NAME = "pytorch_model.bin"
_ADAPTER_CONFIG = "adapter_config.json"
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
)
_SIDE_FILES = ("config.json", "generation_config.json", *_TOKENIZER_FILES)
_SHARD = re.compile(r"(model|pytorch_model)-\d{5}-of-\d{5}\.(safetensors|bin)")
_POINTER = b"version https://git-lfs.github.com/spec/"
# Weights of other programs, by the ends of their names.
_OTHER_FORMATS = {
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
    ".onnx": "ONNX",
    ".ot": "Rust",
    ".mlmodel": "Core ML",
    ".mlpackage": "Core ML",
    ".tflite": "TensorFlow Lite",
    ".pth": "its authors' own code",
    ".pt": "torch alone",
    ".ckpt": "a training program",
    ".nemo": "NeMo",
    ".distcp": "distributed training",
}


def is_lfs_pointer(path: Path) -> bool:
    """Check if a file is the pointer that Git LFS leaves in place of a large file that was not fetched."""
    try:
        with path.open("rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except (OSError, ValueError):  # no file, or no name of one
        return False


def check_no_pointer(path: Path) -> None:
    """Refuse a file that is a pointer of Git LFS.

    Raises:
        CheckpointError: saying how to fetch it.
    """
    if is_lfs_pointer(path):
        raise CheckpointError(
            f"'{truncate(path)}' is a pointer of Git LFS and not the file itself: run `git lfs pull` in its "
            "repository, or download the file."
        )


def check_side_files(directory: Path) -> None:
    """Refuse side files of a model, such as its tokenizer, that are pointers of Git LFS.

    Raises:
        CheckpointError: naming the first of them.
    """
    for name in _SIDE_FILES:
        check_no_pointer(directory / name)


def check_layout(directory: Path) -> None:
    """Refuse a directory that holds something else than a model of transformers, or files that were not fetched.

    Args:
        directory: that exists.

    Raises:
        CheckpointError: saying what it is, and what to do.
    """
    names = sorted(path.name for path in directory.iterdir())
    where = f"Model directory '{directory}'"
    if not names:
        raise CheckpointError(f"{where} is empty: give the directory of a checkpoint.")
    check_side_files(directory)
    if _ADAPTER_CONFIG in names:
        raise CheckpointError(f"{where} {_describe_adapter(directory, 'config.json' in names)}")
    if "model_index.json" in names:
        kind = _read(directory / "model_index.json").get("_class_name", "unknown")
        raise CheckpointError(
            f"{where} is a pipeline of diffusers ({truncate(kind)}), which makes images: give the directory of a "
            "causal language model."
        )
    if gguf := [name for name in names if name.endswith(".gguf")]:
        _check_gguf(where, names, gguf)
    if "config.json" not in names:
        raise CheckpointError(f"{where} {_describe_without_config(directory, names)}")


def check_weight_layout(directory: Path) -> None:
    """Refuse a directory with a configuration whose weights are missing, not fetched, or of another program.

    Raises:
        CheckpointError: saying what is there, and what to do.
    """
    names = sorted(path.name for path in directory.iterdir())
    for name in (SINGLE_NAME, INDEX_NAME, PICKLE_NAME, PICKLE_INDEX_NAME):
        if name in names:
            check_no_pointer(directory / name)
            for shard in _shards(directory / name) if ".index" in name else ():
                check_no_pointer(directory / shard)
            return
    where = f"Model directory '{directory}'"
    if shards := [name for name in names if _SHARD.fullmatch(name)]:
        index = INDEX_NAME if shards[0].endswith(".safetensors") else PICKLE_INDEX_NAME
        raise CheckpointError(
            f"{where} holds {len(shards)} shards of weights (first {shards[0]}) without their index: fetch {index} as "
            "well."
        )
    if "adapter_model.safetensors" in names:
        raise CheckpointError(f"{where} holds the weights of an adapter only: merge it into its base model first.")
    raise CheckpointError(f"{where} {_describe_other_format(names)}")


def check_json_files(directory: Path) -> None:
    """Refuse side files of a model that are not JSON; nothing is read unless `directory` is one.

    Raises:
        CheckpointError: naming the first of them.
    """
    for name in _SIDE_FILES:
        path = directory / name
        if path.suffix == ".json" and path.is_file():
            try:
                content = json.loads(path.read_text())
            except (OSError, ValueError, RecursionError):
                content = None
            if not isinstance(content, dict):
                raise CheckpointError(f"'{path}' is no JSON object: fetch or save the model again.")


def _describe_adapter(directory: Path, has_config: bool) -> str:
    config = _read(directory / _ADAPTER_CONFIG)
    kind, base = config.get("peft_type") or "PEFT", config.get("base_model_name_or_path") or "of an unknown name"
    if has_config:
        return (
            f"holds a model and a {truncate(kind)} adapter: move {_ADAPTER_CONFIG} and the adapter's weights elsewhere "
            "to use the model alone."
        )
    return (
        f"is a {truncate(kind)} adapter of the base model '{truncate(base)}', and no model: merge it by "
        "peft.AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(NEW), and give NEW."
    )


def _check_gguf(where: str, names: list[str], gguf: list[str]) -> None:
    """Refuse a directory of GGUF files unless it has other weights too."""
    if any(name in names for name in (SINGLE_NAME, INDEX_NAME, PICKLE_NAME, PICKLE_INDEX_NAME)):
        return
    files = ", ".join(map(truncate, gguf[:5])) + (f" and {len(gguf) - 5} more" if len(gguf) > 5 else "")
    raise CheckpointError(
        f"{where} holds GGUF files: give {'that file' if len(gguf) == 1 else 'one of them'} as the model ({files})."
    )


def _describe_without_config(directory: Path, names: list[str]) -> str:
    if inner := [name for name in names if (directory / name / "config.json").is_file()]:
        listed = ", ".join(map(truncate, inner[:5]))
        return f"has no config.json, but its folders do: give one of them as the model ({listed})."
    if any(name in names for name in _TOKENIZER_FILES) and not any(map(_is_weight, names)):
        return "holds only a tokenizer: fetch config.json and the weights as well."
    if "params.json" in names:
        return (
            "is in the format of the model's authors (params.json): fetch the checkpoint for transformers, or convert "
            "it by the script that transformers has for the model."
        )
    return "has no config.json: it is not a Hugging Face checkpoint."


def _describe_other_format(names: list[str]) -> str:
    for name in names:
        if (program := _OTHER_FORMATS.get(Path(name).suffix)) is not None:
            return (
                f"holds weights for {program} only ({truncate(name)}): fetch them as {SINGLE_NAME}, or load the model "
                "with the program that wrote them and save it with save_pretrained."
            )
    return f"holds a config.json and no weights: fetch {SINGLE_NAME} as well."


def _is_weight(name: str) -> bool:
    return Path(name).suffix in {".safetensors", ".bin", ".gguf", *_OTHER_FORMATS}


def _shards(index: Path) -> list[str]:
    """Return the files that an index names in its directory; none for a broken index, which is refused elsewhere."""
    files = _read(index).get("weight_map")
    names = {str(file) for file in files.values()} if isinstance(files, dict) else set[str]()
    return sorted(filter(is_inside, names))


def _read(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one for a file that holds something else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
