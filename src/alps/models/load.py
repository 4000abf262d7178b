"""Loading of causal language models and their tokenizers from a directory, a GGUF file or a hub."""

from __future__ import annotations

import contextlib
import io
import logging
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from alps.checkpoints.layout import (
    check_json_files,
    check_layout,
    check_no_pointer,
    check_side_files,
    check_weight_layout,
)
from alps.checkpoints.manifest import MANIFEST_NAME
from alps.checkpoints.quantization import check_quantization
from alps.checkpoints.safetensors_io import check_finite
from alps.checkpoints.weight_files import INDEX_NAME, SINGLE_NAME, check_pickle_index, find_weight_files, read_config
from alps.core.errors import AlpsError, ConfigError, UnsupportedModel
from alps.models.architecture_check import check_config
from alps.models.auto_class import auto_class
from alps.models.completeness import check_missing, check_unused
from alps.models.configuration import load_config
from alps.models.gguf_metadata import GgufMetadata, check_tensors, check_uniform, complete_config, read_gguf_metadata
from alps.models.tied_head import is_other_head, untie_config
from alps.models.tokenizer_check import check_own_class, compare_with_data

# What an auto class says of a configuration that it does not take, such as that of a T5 in a GGUF file.
_NO_CAUSAL_LM = re.compile(r"Unrecognized configuration class (?:<class '[\w.]*\.)?(\w+)")
# What Python says of a setting that transformers computes from others, such as use_return_dict.
_COMPUTED = re.compile(r"property '(\w+)' of '\w+' object has no setter")
# Opcode with which pickles of protocol 4 and 5 begin.
_FRAME = 149
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_dtype(name: str) -> torch.dtype | None:
    """Return the dtype of that name; None for `auto`, which keeps the checkpoint's dtype.

    Raises:
        ConfigError: when the name is neither `auto` nor one of `DTYPES`.
    """
    if name == "auto":
        return None
    if name not in DTYPES:
        raise ConfigError(f"Dtype '{name}' is unknown: choose auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def looks_local(name: str) -> bool:
    """Check if a model's name is a path: it exists, is absolute, starts with a dot or `~`, or ends in .gguf."""
    return Path(name).exists() or name.startswith(("/", ".", "~")) or name.endswith(".gguf")


def check_model_path(name: str) -> None:
    """Refuse a name that cannot be a model, before anything slow begins.

    Raises:
        ConfigError: when the path does not exist or is a file, is a packed directory, or no hub has such names.
        CheckpointError: see `check_layout`.
    """
    path = Path(name).expanduser()
    if not looks_local(name):
        if name.count("/") != 1:
            raise ConfigError(
                f"Model '{name}' is neither an existing directory or GGUF file nor a hub name of the form owner/name."
            )
        return
    if not path.exists():
        raise ConfigError(f"Model '{name}' does not exist: give a directory, a .gguf file or a hub name.")
    if (path / MANIFEST_NAME).is_file():
        raise ConfigError(f"Model directory '{name}' is packed: use what `alps unpack {name} NEW-DIRECTORY` writes.")
    if path.is_dir():
        check_layout(path)
    elif path.suffix == ".gguf":
        check_no_pointer(path)
    else:
        raise ConfigError(
            f"Model '{name}' is a file but not a .gguf: give the directory of the checkpoint, '{path.parent}'."
        )


def check_checkpoint(name: str) -> None:
    """Refuse a name that cannot be a model, or a model that its configuration says is of another kind.

    Nothing but the configuration is read. That of a GGUF file is not, because all of the file would have to be read.

    Raises:
        ConfigError: see `check_model_path`; or when the configuration cannot be used.
        CheckpointError: see `check_model_path` and `check_weight_layout`; or when the configuration is not JSON.
        UnsupportedModel: see `check_config`.
    """
    check_model_path(name)
    source, extra = _source(name)
    if not extra:
        directory = Path(source)
        # The error message is clearer than that of transformers.
        check_quantization(read_config(directory), name)
        with quiet(), readable(name):
            check_config(load_config(source, name), name)
        if directory.is_dir():
            check_weight_layout(directory)


def check_architecture(name: str | Path) -> None:
    """Refuse a directory, packed or not, that its configuration says is no decoder-only causal language model.

    Other names are not refused, and neither are directories without a configuration that transformers knows.

    Raises:
        CheckpointError: see `check_layout` and `check_weight_layout`.
        UnsupportedModel: see `check_config`.
    """
    directory = Path(name).expanduser()
    if not directory.is_dir():
        return
    if not any((directory / file).is_file() for file in (SINGLE_NAME, INDEX_NAME, MANIFEST_NAME)):
        check_layout(directory)
    check_side_files(directory)
    with contextlib.suppress(_Unknown):
        check_config(_known_config(directory), str(name))
    if not (directory / MANIFEST_NAME).is_file():
        check_weight_layout(directory)


class _Unknown(Exception):
    """Configuration that cannot be read."""


def _known_config(directory: Path) -> Any:
    try:
        with quiet():
            return load_config(str(directory), packed=(directory / MANIFEST_NAME).is_file())
    except AlpsError:
        raise
    except Exception as error:  # broken files reach many parsers, which raise anything
        raise _Unknown from error


def load_model(name: str, dtype: torch.dtype | None = None) -> nn.Module:
    """Load a causal language model on the CPU, in evaluation mode.

    Args:
        name: directory, GGUF file, or hub name.
        dtype: of the weights; None keeps that of the checkpoint, and makes weights of a GGUF file bfloat16.

    Raises:
        ConfigError: when the path is missing, or the hub cannot be reached.
        CheckpointError: when a file of the weights is damaged, or holds NaN.
        UnsupportedModel: when it is no causal language model of transformers, or the weights are quantized.
    """
    check_checkpoint(name)
    source, extra = _source(name)
    directory = Path(source)
    if not extra and any((directory / file).is_file() for file in (SINGLE_NAME, INDEX_NAME)):
        find_weight_files(directory)  # its error messages are clearer than those of transformers
    check_pickle_index(directory)
    if extra:
        # Newer releases can keep the weights of a GGUF file quantized; older ones always dequantize.
        if hasattr(transformers, "GgufConfig"):
            extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
        extra["dtype"] = dtype or torch.bfloat16
    else:
        extra["dtype"] = dtype or "auto"
    metadata = None
    with quiet(), readable(name):
        if "gguf_file" in extra:
            metadata = read_gguf_metadata(Path(source) / extra["gguf_file"])
            extra["config"] = _gguf_config(name, source, extra["gguf_file"], metadata)
            model_class: Any = AutoModelForCausalLM
        else:
            extra["config"] = load_config(source, name)
            model_class = auto_class(extra["config"])
        model, info = model_class.from_pretrained(
            source,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            weights_only=True,
            trust_remote_code=False,
            **extra,
        )
    _check_complete(name, model, info)
    if metadata is not None:
        check_tensors(model, metadata, name)
    if is_other_head(model):
        untie_config(model.config, name)
    check_finite(model.named_parameters(), name)
    _remove_quantizer(model)
    return model.eval()  # type: ignore[no-any-return]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        name: directory, GGUF file, or hub name.

    Raises:
        ConfigError: when there is none.
        UnsupportedModel: when only code of the checkpoint could read it.
    """
    source, extra = _source(name)
    if not extra:
        check_own_class(source, name)
    with quiet(), readable(name, "The tokenizer of"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **extra)
    if not extra:
        compare_with_data(tokenizer, source, name)
    return tokenizer


def _source(name: str) -> tuple[str, dict[str, Any]]:
    """Return the directory or hub name for `from_pretrained`, and its argument `gguf_file` if there is one."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return str(path.resolve().parent), {"gguf_file": path.name}
    return (str(path) if looks_local(name) else name), {}


def _gguf_config(name: str, directory: str, file: str, metadata: GgufMetadata) -> Any:
    """Return the configuration of a GGUF file with all that the file says."""
    check_uniform(metadata, name)
    config = AutoConfig.from_pretrained(directory, gguf_file=file, trust_remote_code=False)
    complete_config(config, metadata, name)
    return config


def _check_complete(name: str, model: nn.Module, info: dict[str, Any]) -> None:
    check_missing(name, model, info.get("missing_keys", ()))
    check_unused(name, model, info.get("unexpected_keys", ()))
    if mismatched := sorted(str(key if isinstance(key, str) else key[0]) for key in info.get("mismatched_keys", ())):
        raise ConfigError(
            f"Checkpoint '{name}' has another shape of {mismatched[0]} than its config.json says: "
            "fetch or save the model again."
        )
    if any(not p.is_floating_point() for p in model.parameters()):
        raise UnsupportedModel(f"Checkpoint '{name}' holds quantized weights: prune the unquantized model.")


def _remove_quantizer(model: nn.Module) -> None:
    """Remove the traces of a GGUF file's quantizer, which would make `save_pretrained` refuse the dense model."""
    config: Any = model.config
    if getattr(config, "quantization_config", None) is not None:
        if (
            getattr(getattr(model, "hf_quantizer", None), "quantization_config", None) is None
            or "gguf" not in str(config.quantization_config).lower()
        ):
            raise UnsupportedModel("The model is quantized: prune the unquantized checkpoint instead.")
        del config.quantization_config
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(attribute, None)


@contextmanager
def readable(name: str, subject: str = "Model") -> Iterator[None]:
    """Context that turns errors of transformers about an unusable checkpoint into one sentence.

    Args:
        name: of the checkpoint, as the user gave it.
        subject: what is loaded, in words before the name.
    """
    try:
        yield
    except AlpsError:
        raise
    except pickle.UnpicklingError as error:
        reason = "hold more than tensors, and code in pickles is never run; fetch it as safetensors"
        message = str(error)
        # Opcodes of plain pickles are unsupported, but so is the first byte of any other file.
        if "Unsupported operand" in message and f"Unsupported operand {_FRAME}" not in message:
            reason = "are damaged or no pickle at all: fetch them again, or as safetensors"
        raise ConfigError(f"Model '{name}' cannot be loaded: its pickled weights {reason}.") from error
    except EOFError as error:
        raise ConfigError(f"Model '{name}' cannot be loaded: a file of its weights is empty or cut short.") from error
    except Exception as error:  # broken files reach many parsers, which raise anything
        check_json_files(Path(name).expanduser())
        reason = _summarize(error)
        if "trust_remote_code" in reason or "custom code" in reason:
            raise UnsupportedModel(
                f"Model '{name}' needs code of its own, which is never run: use an architecture that transformers has."
            ) from error
        if match := _COMPUTED.search(reason):
            raise ConfigError(
                f"Model '{name}' cannot be loaded: its config.json sets {match[1]}, which follows from others: remove "
                "it there."
            ) from error
        if match := _NO_CAUSAL_LM.search(reason):
            raise UnsupportedModel(
                f"Model '{name}' has the configuration {match[1]}, for which transformers has no causal language model."
            ) from error
        raise ConfigError(f"{subject} '{name}' cannot be loaded: {reason}.") from error


def _summarize(error: Exception) -> str:
    """Return the message of an error in at most 300 characters, without the full stop."""
    text = " ".join(str(error).split())
    if len(text) > 300:
        text = text[:300].rpartition(". ")[0] or text[:300]
    if not text or isinstance(error, KeyError):
        text = f"{type(error).__name__} {text}".rstrip()
    return text.rstrip(".!")


@contextmanager
def quiet() -> Iterator[None]:
    """Context that silences progress bars and load messages of transformers; real problems are checked and raised."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        # The GGUF reader draws its bar with tqdm directly, which no setting of transformers affects.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
