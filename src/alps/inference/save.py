"""Saving of a model that was loaded packed: its `save_pretrained` writes a packed directory again."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from alps.checkpoints.atomic_io import temporary_directory
from alps.checkpoints.manifest import MANIFEST_NAME, Manifest
from alps.checkpoints.pack import SHARD_BYTES, write_pack
from alps.checkpoints.packed_config import CONFIG_NAME
from alps.checkpoints.safetensors_io import TensorToWrite, renew_header
from alps.checkpoints.weight_files import INDEX_NAME, PICKLE_INDEX_NAME, SINGLE_NAME, HeaderEntry, parse_header
from alps.core.errors import CheckpointError, ConfigError
from alps.core.json_text import to_json
from alps.inference.packed_experts import PackedExperts
from alps.inference.packed_linear import PackedLinear
from alps.models.configuration import remove_packing
from alps.models.recorded_load import record_checkpoint
from alps.models.recorded_tensor import RecordedTensor

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
# Options of `save_pretrained` that change nothing about a directory that is only written.
_WITHOUT_EFFECT = ("token", "save_peft_format", "save_original_format", "safe_serialization")
# Fused parameters that are dense at a time: those of one layer.
_CACHED_EXPERTS = 2
_Stored: TypeAlias = Tensor | PackedLinear | PackedExperts
_SHARD = re.compile(r"packed(-\d+-of-\d+)?\.safetensors")


def save_packed(model: nn.Module, manifest: Manifest) -> None:
    """Make `save_pretrained` of a model write a packed directory.

    Args:
        model: loaded from a packed directory.
        manifest: of that directory; weight files, tensor names, and compression of the new one are those in it.
    """
    for part in model.modules():
        if hasattr(part, "save_pretrained"):
            part.save_pretrained = _refuse_part  # type: ignore[assignment]
    saver = PackedSaver(model, manifest.headers, bool(manifest.compression), manifest.dense_in_memory)
    model.save_pretrained = saver  # type: ignore[assignment]


def _refuse_part(*_args: object, **_options: object) -> None:
    raise CheckpointError("A part of a packed model cannot be saved: save the whole model.")


@dataclass(eq=False)
class PackedSaver:
    """Function that writes a packed model to a directory, in the place of the method of transformers.

    Attributes:
        model: to be saved.
        headers: headers of the weight files of its checkpoint, by their names.
        compress: whether its directory is compressed.
        dense_in_memory: reasons why tensors of the checkpoint are dense in the model, by their names.
    """

    model: Any
    headers: dict[str, str]
    compress: bool
    dense_in_memory: dict[str, str]

    def __call__(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        *,
        max_shard_size: int | str = SHARD_BYTES,
        **options: Any,
    ) -> None:
        """Write shards, manifest, configuration and generation settings; the tokenizer saves itself.

        An unchanged model is written as the same shards, to the bit. A directory that exists is kept, and gets a
        manifest when all other files are complete.

        Args:
            save_directory: directory to create or write into.
            is_main_process: False to write nothing.
            max_shard_size: largest size of a shard, in bytes or as `5GB`.
            **options: other options of transformers, none of which is supported.

        Raises:
            CheckpointError: if the directory holds dense weights, or cannot be written.
            ConfigError: for an option that is not supported.
        """
        for name, value in options.items():
            if value not in (None, False) and name not in _WITHOUT_EFFECT:
                raise ConfigError(f"save_pretrained of a packed model does not support {name}: leave it out.")
        if not is_main_process:
            return
        target = Path(save_directory)
        _check_target(target)
        with temporary_directory(target) as folder:
            (folder / "files").mkdir()
            (folder / "packed").mkdir()
            tensors = list(self._tensors())
            headers = {name: renew_header(self.headers[name], entries) for name, entries in tensors}
            self._write_files(folder / "files", headers)
            write_pack(
                folder / "packed",
                _read(headers, dict(tensors)),
                headers=headers,
                files={path.name: path for path in sorted((folder / "files").iterdir())},
                compress=self.compress,
                shard_bytes=_parse_size(max_shard_size),
                dense_in_memory=self.dense_in_memory,
            )
            _publish(folder / "packed", target)

    def _tensors(self) -> Iterator[tuple[str, list[TensorToWrite]]]:
        """Yield the name of every weight file with its tensors, in their order in the checkpoint."""
        state, prefix = _named_tensors(self.model), f"{getattr(self.model, 'base_model_prefix', '')}."
        # The experts of a layer are written one after the other, and would be unpacked for each of them.
        unpack_experts = lru_cache(maxsize=_CACHED_EXPERTS)(PackedExperts.to_dense)
        own = {name: _record(name, tensor, unpack_experts) for name, tensor in state.items()}
        converted = record_checkpoint(self.model, own)
        left_out = list(getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ())
        saved = set[str]()
        for file, header in self.headers.items():
            tensors = []
            for entry in parse_header(header):
                names = (entry.name, prefix + entry.name, entry.name.removeprefix(prefix))
                tensor = converted.get(entry.name, next((own[name] for name in names if name in own), None))
                if tensor is not None:
                    saved |= set(tensor.sources)
                    tensors.append(TensorToWrite(entry.name, tensor.dtype, tuple(tensor.shape), tensor.compute))
                elif not any(re.search(pattern, entry.name) for pattern in left_out):
                    raise CheckpointError(
                        f"{type(self.model).__name__} has no tensor {entry.name}, which transformers left out or "
                        "converted to others when it loaded the model: copy the packed directory instead."
                    )
            yield file, tensors
        same = {_identity(state[name]) for name in saved}
        if more := [name for name, tensor in state.items() if name not in saved and _identity(tensor) not in same]:
            raise CheckpointError(
                f"The model has {len(more)} tensors that its packed directory lacked, the first is {more[0]}: remove "
                "them, since save_pretrained of a packed model writes the tensors of that directory."
            )

    def _write_files(self, folder: Path, headers: dict[str, str]) -> None:
        """Write the files that are no weights, as they would be in a dense checkpoint."""
        config = copy.deepcopy(self.model.config)
        remove_packing(config)
        config.dtype = str(self.model.dtype).removeprefix("torch.")
        config.architectures = [type(self.model).__name__]
        config.to_json_file(folder / CONFIG_NAME)
        if self.model.can_generate():
            self.model.generation_config.save_pretrained(folder)
        if list(headers) != [SINGLE_NAME]:
            entries = {file: parse_header(header) for file, header in headers.items()}
            index = {
                "metadata": {"total_size": sum(entry.nbytes for each in entries.values() for entry in each)},
                "weight_map": {entry.name: file for file, each in entries.items() for entry in each},
            }
            (folder / INDEX_NAME).write_text(to_json(index, indent=2, sort_keys=True) + "\n")


def _named_tensors(model: nn.Module) -> dict[str, _Stored]:
    """Return all tensors of the state of a model by name; for a packed weight, what holds it."""
    state: dict[str, _Stored] = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, PackedExperts):
            state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}.layers.")}
            state[name] = module
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear) and layer.is_packed and f"{name}.mask" in state:
            for part in ("mask", "values", "offsets"):
                del state[f"{name}.{part}"]
            state[f"{name}.weight"] = layer
    return state


def _record(name: str, tensor: _Stored, unpack_experts: Callable[[PackedExperts], Tensor]) -> RecordedTensor:
    if isinstance(tensor, PackedLinear):
        return RecordedTensor.stored(name, list(tensor.weight.shape), tensor.values.dtype, partial(_unpack, tensor))
    if isinstance(tensor, PackedExperts):
        return RecordedTensor.stored(name, list(tensor.shape), tensor.dtype, partial(unpack_experts, tensor))
    return RecordedTensor.stored(name, list(tensor.shape), tensor.dtype, lambda: tensor)


def _unpack(layer: PackedLinear) -> Tensor:
    dense = layer.to_dense()
    return dense.t().contiguous() if layer.inputs_first else dense


def _identity(tensor: _Stored) -> object:
    """Return what tied tensors have in common."""
    return id(tensor) if isinstance(tensor, nn.Module) else (tensor.data_ptr(), tensor.shape)


def _read(
    headers: dict[str, str], tensors: dict[str, list[TensorToWrite]]
) -> Iterator[tuple[str, HeaderEntry, Tensor]]:
    for file, header in headers.items():
        for entry, tensor in zip(parse_header(header), tensors[file], strict=True):
            yield file, entry, tensor.read().detach().cpu()


def _check_target(directory: Path) -> None:
    """Refuse a directory that other weights would be loaded from.

    Raises:
        CheckpointError: naming their file.
    """
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"Output '{directory}' is a file: give the name of a directory.")
    for name in (SINGLE_NAME, INDEX_NAME, "pytorch_model.bin", PICKLE_INDEX_NAME):
        if (directory / name).exists():
            raise CheckpointError(f"Output directory '{directory}' holds dense weights ({name}): give a new name.")


def _publish(folder: Path, directory: Path) -> None:
    """Move the files of a packed directory into another one, whose own packed files are removed; the manifest last.

    Raises:
        CheckpointError: when they cannot be moved.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / MANIFEST_NAME).unlink(missing_ok=True)
        for path in directory.iterdir():
            if _SHARD.fullmatch(path.name):
                path.unlink()
        if (directory / "README.md").exists():
            (folder / "README.md").unlink()
        for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST_NAME):
            path.replace(directory / path.name)
    except OSError as error:
        raise CheckpointError(f"Output directory '{directory}' cannot be written: {error.strerror or error}.") from None


def _parse_size(size: int | str) -> int:
    """Return a number of bytes, given as such or with a decimal unit.

    Raises:
        ConfigError: when it is neither.
    """
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"(\d+)([KMGT]B)", size.upper())
    if match is None:
        raise ConfigError(f"max_shard_size is '{size}': give bytes, or a number with a unit such as 5GB.")
    return int(match[1]) * _UNITS[match[2]]
