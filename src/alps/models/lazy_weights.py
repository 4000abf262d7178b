"""Weights that stay on disk: a model on the meta device, whose blocks are loaded when they are needed."""

from __future__ import annotations

import ctypes
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from alps.checkpoints.safetensors_io import TensorOnDisk, TensorToWrite, check_finite
from alps.checkpoints.weight_files import WeightFile
from alps.models.blocks import Block
from alps.models.fingerprint import forward_settings
from alps.models.key_mapping import KeyMapping

_META = torch.device("meta")
# Samples of a weight file that its hash reads.
_SAMPLES, _SAMPLE_BYTES = 64, 2**16


@dataclass(frozen=True)
class _Slot:
    """Parameter of the model.

    Attributes:
        names: of the parameter inside the model; several when weights are tied.
        owners: modules that hold it, each with the attribute's name, in the same order.
        mapping: its tensors in the checkpoint.
        dtype: in memory.
    """

    names: tuple[str, ...]
    owners: tuple[tuple[nn.Module, str], ...]
    mapping: KeyMapping
    dtype: torch.dtype


class LazyWeights:
    """Weights of a model on the meta device, in the files of its checkpoint.

    Attributes:
        model: its parameters are on the meta device except while they are fetched.
        directory: of the checkpoint.
        files: weight files of the checkpoint, and the tensors in each.
    """

    def __init__(
        self,
        model: nn.Module,
        directory: Path,
        files: Mapping[WeightFile, list[TensorOnDisk]],
        mappings: Mapping[str, KeyMapping],
    ) -> None:
        """Connect a model to its files; no values are read.

        Args:
            model: on the meta device.
            directory: of the checkpoint.
            files: weight files of the checkpoint, and the tensors in each.
            mappings: by the names of the model's parameters.
        """
        self.model, self.directory, self.files = model, directory, files
        self._stored = {tensor.name: tensor for tensors in files.values() for tensor in tensors}
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        self._slots = {
            name: _Slot(
                tuple(names[id(parameter)]),
                tuple(_owner(model, alias) for alias in names[id(parameter)]),
                mappings[name],
                parameter.dtype,
            )
            for name, parameter in model.named_parameters()
        }
        self._block_names: set[str] = set()

    def attach_to(self, blocks: list[Block]) -> list[Block]:
        """Return the blocks with this object as their store."""
        prefixes = tuple(f"{block.name}." for block in blocks)
        self._block_names = {
            name for name, slot in self._slots.items() if all(alias.startswith(prefixes) for alias in slot.names)
        }
        return [Block(block.index, block.name, block.module, block.sites, self) for block in blocks]

    def fetch(self, block: Block, device: torch.device) -> None:
        """Read the dense weights of a block to a device."""
        for name in self._names_in(block):
            self._fill(name, device)

    def release(self, block: Block) -> None:
        """Free the weights of a block; changes to them are lost."""
        for name in self._names_in(block):
            self._empty(name)
        _trim_heap()

    def check_finite(self, first: int = 0, step: int = 1) -> None:
        """Read every tensor of the model once, and refuse values that are NaN or infinite, now or in its dtype.

        Args:
            first: number of the first tensor to read.
            step: read every `step`-th tensor only; other ranks read the others.

        Raises:
            CheckpointError: naming the tensor.
        """
        for slot in list(self._slots.values())[first::step]:
            for part in dict.fromkeys(part for row in slot.mapping.parts for part in row):
                stored = self._stored[part]
                check_finite([(part, stored.read())], str(stored.path), slot.dtype)

    def identity(self) -> str:
        """Return a sha256 over what the forward reads of the configuration, and over every weight file.

        Of a file it covers the header and 64 samples of 64 KiB.

        Reading whole files would take minutes. Checkpoints with other weights differ in nearly every byte, so that the
        samples suffice.
        """
        dtypes = sorted({str(slot.dtype) for slot in self._slots.values()})
        digest = hashlib.sha256(f"{forward_settings(self.model)} {dtypes}".encode())
        for file in self.files:
            size = file.path.stat().st_size
            digest.update(f"{file.name} {size} {file.header}".encode())
            with file.path.open("rb", buffering=0) as opened:
                for sample in range(_SAMPLES):
                    opened.seek(max(size - _SAMPLE_BYTES, 0) * sample // (_SAMPLES - 1))
                    digest.update(opened.read(_SAMPLE_BYTES))
        return digest.hexdigest()

    @contextmanager
    def non_block_weights(self) -> Iterator[None]:
        """Context in which the parameters outside the blocks are on the CPU; memory-mapped when they need no cast."""
        names = [name for name in self._slots if name not in self._block_names]
        try:
            for name in names:
                self._fill(name, torch.device("cpu"), TensorOnDisk.memory_map)
            yield
        finally:
            for name in names:
                self._empty(name)

    def updated_file(self, file: WeightFile, changed: Mapping[str, TensorOnDisk]) -> list[TensorToWrite]:
        """Return the tensors of one file of the checkpoint, some with other values.

        Args:
            file: of `files`.
            changed: new values by the names of the model's parameters.
        """
        sources = {
            part: (self._slots[name].mapping, tensor)
            for name, tensor in changed.items()
            if name in self._slots
            for row in self._slots[name].mapping.parts
            for part in row
        }
        dtypes = {part: slot.dtype for slot in self._slots.values() for row in slot.mapping.parts for part in row}
        return [
            self._pending(tensor, dtypes.get(tensor.name, tensor.dtype), sources.get(tensor.name))
            for tensor in self.files[file]
        ]

    @staticmethod
    def _pending(
        tensor: TensorOnDisk, dtype: torch.dtype, source: tuple[KeyMapping, TensorOnDisk] | None
    ) -> TensorToWrite:
        def read() -> Tensor:
            if source is None:
                return tensor.read().to(dtype)
            mapping, changed = source
            return mapping.slice_for(tensor.name, changed).read().to(dtype)

        return TensorToWrite(tensor.name, dtype, tensor.shape, read)

    def _names_in(self, block: Block) -> list[str]:
        """Return the parameters of a block, each by its first name, which may be in another block."""
        prefix = f"{block.name}."
        return [name for name, slot in self._slots.items() if any(alias.startswith(prefix) for alias in slot.names)]

    def _fill(
        self, name: str, device: torch.device, read: Callable[[TensorOnDisk], Tensor] = TensorOnDisk.read
    ) -> None:
        slot = self._slots[name]
        tensor = slot.mapping.load(lambda part: read(self._stored[part])).to(device, slot.dtype)
        self._set(slot, nn.Parameter(tensor))

    def _empty(self, name: str) -> None:
        slot = self._slots[name]
        module, attribute = slot.owners[0]
        shape = module.get_parameter(attribute).shape
        self._set(slot, nn.Parameter(torch.empty(shape, dtype=slot.dtype, device=_META)))

    @staticmethod
    def _set(slot: _Slot, parameter: nn.Parameter) -> None:
        for module, attribute in slot.owners:
            module.register_parameter(attribute, parameter)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds a parameter, and the attribute's name."""
    owner, _, attribute = name.rpartition(".")
    return model.get_submodule(owner), attribute


def _trim_heap() -> None:
    """Return freed memory to the system; otherwise glibc keeps it in fragments, more of them after every block."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
