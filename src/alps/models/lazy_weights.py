"""A model whose weights stay on the disk: a skeleton without memory, and blocks that are fetched for their turn."""

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

from alps.checkpoints.safetensors_io import TensorOnDisk, TensorToWrite
from alps.checkpoints.weight_files import WeightFile
from alps.models.blocks import Block
from alps.models.finite_check import check_finite
from alps.models.key_mapping import KeyMapping

_META = torch.device("meta")
_SAMPLES, _SAMPLE_BYTES = 64, 2**16


@dataclass(frozen=True)
class _Slot:
    """One tensor of the skeleton: every place that holds it (several, where weights are tied), and where it lies."""

    places: tuple[tuple[nn.Module, str], ...]
    origin: KeyMapping
    dtype: torch.dtype


class LazyWeights:
    """The weights of a skeleton.

    Attributes:
        model: the skeleton; its parameters are on the meta device but while they are fetched.
        directory: of the checkpoint.
        files: the files of the checkpoint, and the tensors in them.
    """

    def __init__(
        self,
        model: nn.Module,
        directory: Path,
        files: Mapping[WeightFile, list[TensorOnDisk]],
        origins: Mapping[str, KeyMapping],
    ) -> None:
        self.model, self.directory, self.files = model, directory, files
        self._stored = {one.name: one for tensors in files.values() for one in tensors}
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            owner, _, attribute = name.rpartition(".")
            places.setdefault(id(parameter), []).append((model.get_submodule(owner), attribute))
        self._slots = {
            name: _Slot(tuple(places[id(parameter)]), origins[name], parameter.dtype)
            for name, parameter in model.named_parameters()
        }
        self._inside: set[str] = set()

    def adopt(self, blocks: list[Block]) -> list[Block]:
        """The same blocks, which fetch their weights from here."""
        prefixes = tuple(f"{block.name}." for block in blocks)
        self._inside = {name for name in self._slots if name.startswith(prefixes)}
        return [Block(block.index, block.name, block.module, block.sites, self) for block in blocks]

    def fetch(self, block: Block, device: torch.device) -> None:
        """Read the dense weights of a block."""
        for name in self._of(block):
            self._fill(name, device)

    def release(self, block: Block) -> None:
        """Let them go."""
        for name in self._of(block):
            self._empty(name)
        _give_back()

    def check_finite(self, first: int = 0, step: int = 1) -> None:
        """Read every tensor of the model once, and refuse NaN, infinity, and what becomes infinite in its dtype.

        Args:
            first, step: look at every `step`-th tensor from the `first` on alone; other processes look at the others.

        Raises:
            CheckpointError: naming the tensor.
        """
        for slot in list(self._slots.values())[first::step]:
            for part in dict.fromkeys(part for row in slot.origin.parts for part in row):
                stored = self._stored[part]
                check_finite([(part, stored.read())], str(stored.path), slot.dtype)

    def identity(self) -> str:
        """Sha256 over the configuration, and over the headers and 64 samples of 64 KiB of every file of weights.

        Other weights differ in nearly every one of their bytes, and reading all of them would take minutes.
        """
        digest = hashlib.sha256((self.directory / "config.json").read_bytes())
        for file in self.files:
            size = file.path.stat().st_size
            digest.update(f"{file.name} {size} {file.header}".encode())
            with file.path.open("rb", buffering=0) as opened:
                for place in range(_SAMPLES):
                    opened.seek(max(size - _SAMPLE_BYTES, 0) * place // (_SAMPLES - 1))
                    digest.update(opened.read(_SAMPLE_BYTES))
        return digest.hexdigest()

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Have all that lies outside the blocks at hand for the time of the body; uncast it stays in the files."""
        names = [name for name in self._slots if name not in self._inside]
        try:
            for name in names:
                self._fill(name, torch.device("cpu"), TensorOnDisk.memory_map)
            yield
        finally:
            for name in names:
                self._empty(name)

    def rewritten(self, file: WeightFile, changed: Mapping[str, TensorOnDisk]) -> list[TensorToWrite]:
        """The tensors of one of the checkpoint's files, with other values for some.

        Args:
            file: of `files`.
            changed: tensors by their names in the model; they lie in files of their own.
        """
        made = {
            part: (self._slots[name].origin, stored)
            for name, stored in changed.items()
            if name in self._slots
            for row in self._slots[name].origin.parts
            for part in row
        }
        dtypes = {part: slot.dtype for slot in self._slots.values() for row in slot.origin.parts for part in row}
        return [self._pending(one, dtypes.get(one.name, one.dtype), made.get(one.name)) for one in self.files[file]]

    @staticmethod
    def _pending(one: TensorOnDisk, dtype: torch.dtype, made: tuple[KeyMapping, TensorOnDisk] | None) -> TensorToWrite:
        def read() -> Tensor:
            if made is None:
                return one.read().to(dtype)
            origin, stored = made
            return origin.section(stored, one.name).read().to(dtype)

        return TensorToWrite(one.name, dtype, one.shape, read)

    def _of(self, block: Block) -> list[str]:
        return [name for name in self._slots if name.startswith(f"{block.name}.")]

    def _fill(
        self, name: str, device: torch.device, read: Callable[[TensorOnDisk], Tensor] = TensorOnDisk.read
    ) -> None:
        slot = self._slots[name]
        tensor = slot.origin.join(lambda part: read(self._stored[part])).to(device, slot.dtype)
        self._put(slot, nn.Parameter(tensor))

    def _empty(self, name: str) -> None:
        slot = self._slots[name]
        module, attribute = slot.places[0]
        shape = module.get_parameter(attribute).shape
        self._put(slot, nn.Parameter(torch.empty(shape, dtype=slot.dtype, device=_META)))

    @staticmethod
    def _put(slot: _Slot, parameter: nn.Parameter) -> None:
        for module, attribute in slot.places:
            module.register_parameter(attribute, parameter)


def _give_back() -> None:
    """Return freed memory to the system: glibc keeps it in pieces otherwise, more of them at every block."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
