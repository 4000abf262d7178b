"""Safetensors files read and written tensor by tensor: never more than one tensor of them is in memory."""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from alps.checkpoints.atomic_io import umask
from alps.checkpoints.weight_files import WeightFile, parse_header
from alps.core.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_WORDS = {dtype: word for word, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorOnDisk:
    """A tensor that lies in a file: its bytes begin at `offset`."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def section(self, start: int, shape: tuple[int, ...]) -> TensorOnDisk:
        """A part of the tensor that lies in one piece: `start` is the number of elements before it."""
        size = self.dtype.itemsize
        return replace(self, shape=shape, offset=self.offset + start * size, nbytes=torch.Size(shape).numel() * size)

    def read(self) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            CheckpointError: when the file has become unreadable or too short.
        """
        found = torch.empty(self.shape, dtype=self.dtype)
        if not self.nbytes:
            return found
        view = memoryview(found.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset)
                done = 0
                while done < self.nbytes and (count := file.readinto(view[done:])):
                    done += count
        except OSError as error:
            raise CheckpointError(f"'{self.path}' cannot be read: {error.strerror or error}.") from None
        if done < self.nbytes:
            raise CheckpointError(f"'{self.path}' ends inside {self.name}: fetch or save the model again.")
        return found

    def mapped(self) -> Tensor:
        """The tensor, its memory that of the file: read where it is touched, once for all processes of a host.

        Writes to it stay in this process.

        Raises:
            CheckpointError: when the file has become unreadable or too short.
        """
        start = self.offset - self.offset % mmap.ALLOCATIONGRANULARITY
        try:
            with self.path.open("rb") as file:
                if self.offset + self.nbytes > os.fstat(file.fileno()).st_size or not self.nbytes:
                    return self.read()
                length = self.offset + self.nbytes - start
                memory = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=start)
        except OSError as error:
            raise CheckpointError(f"'{self.path}' cannot be read: {error.strerror or error}.") from None
        count = self.nbytes // self.dtype.itemsize
        return torch.frombuffer(memory, dtype=self.dtype, count=count, offset=self.offset - start).view(self.shape)


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor that is to be written: what the header says of it, and where its values come from in the end."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def stored_tensors(file: WeightFile) -> list[TensorOnDisk]:
    """The tensors of a safetensors file in the order of their bytes.

    Raises:
        CheckpointError: for a dtype that this program does not read.
    """
    offset, found = 8 + len(file.header.encode()), []
    for entry in parse_header(file.header):
        if entry.dtype not in DTYPES:
            raise CheckpointError(f"'{file.path}' holds {entry.name} as {entry.dtype}, which is not supported.")
        found.append(TensorOnDisk(entry.name, file.path, DTYPES[entry.dtype], entry.shape, offset, entry.nbytes))
        offset += entry.nbytes
    return found


def write_tensors(path: Path, tensors: Iterable[TensorToWrite]) -> None:
    """Write a safetensors file that appears whole or not at all; every tensor is asked for when its turn comes.

    Raises:
        CheckpointError: when it cannot be written (a full disk, say).
    """
    pending, header, position = list(tensors), dict[str, object](), 0
    header["__metadata__"] = {"format": "pt"}
    for one in pending:
        end = position + one.nbytes
        header[one.name] = {"dtype": _WORDS[one.dtype], "shape": list(one.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for one in pending:
                tensor = one.read()
                assert tensor.dtype == one.dtype and tuple(tensor.shape) == one.shape, one.name
                if one.nbytes:
                    octets = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                    file.write(memoryview(octets.numpy()))  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~umask())
        Path(temporary).replace(path)
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be written: {error.strerror or error}.") from None
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
