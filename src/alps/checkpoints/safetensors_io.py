"""Reading and writing of safetensors files with one tensor in memory at a time, and checks of tensors for NaN."""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from alps.checkpoints.atomic_io import umask
from alps.checkpoints.weight_files import WeightFile, parse_header
from alps.core.errors import CheckpointError
from alps.core.json_text import to_json
from alps.core.text_format import dtype_name

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
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorOnDisk:
    """Tensor in a file: its bytes begin at `offset`."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def contiguous_slice(self, start: int, shape: tuple[int, ...]) -> TensorOnDisk:
        """Return a contiguous part of the tensor, `start` elements after its beginning, as a tensor of that shape."""
        size = self.dtype.itemsize
        return replace(self, shape=shape, offset=self.offset + start * size, nbytes=torch.Size(shape).numel() * size)

    def read(self) -> Tensor:
        """Read the tensor into new memory.

        Raises:
            CheckpointError: when the file has become unreadable or too short.
        """
        tensor = torch.empty(self.shape, dtype=self.dtype)
        if not self.nbytes:
            return tensor
        view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
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
        return tensor

    def memory_map(self) -> Tensor:
        """Return the tensor as mapped memory, read when it is accessed and shared by the processes of a host.

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
    """Tensor of a file to be written: the entry in its header, and a function that returns its values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def list_tensors(file: WeightFile) -> list[TensorOnDisk]:
    """Return the tensors of a safetensors file in the order of their bytes.

    Raises:
        CheckpointError: for a dtype that is not in `DTYPES`.
    """
    offset, tensors = 8 + len(file.header.encode()), []
    for entry in parse_header(file.header):
        if entry.dtype not in DTYPES:
            raise CheckpointError(f"'{file.path}' holds {entry.name} as {entry.dtype}, which is not supported.")
        tensors.append(TensorOnDisk(entry.name, file.path, DTYPES[entry.dtype], entry.shape, offset, entry.nbytes))
        offset += entry.nbytes
    return tensors


def renew_header(header: str, tensors: list[TensorToWrite]) -> str:
    """Return the header of a file with other tensors than before: the same one if names, dtypes and shapes are equal.

    Args:
        header: of the file before, whose metadata is kept.
        tensors: in the order of their bytes.
    """
    new = [(tensor.name, _DTYPE_NAMES[tensor.dtype], tensor.shape) for tensor in tensors]
    if new == [(entry.name, entry.dtype, entry.shape) for entry in parse_header(header)]:
        return header
    return _make_header(tensors, json.loads(header).get("__metadata__")).decode()


def write_tensors(path: Path, tensors: Iterable[TensorToWrite], source: WeightFile | None = None) -> None:
    """Write a safetensors file that appears whole or not at all; each tensor is read just before it is written.

    Args:
        path: of the file.
        tensors: in the order of their bytes.
        source: file that the new one replaces, whose metadata is kept; its header is copied if it remains right.

    Raises:
        CheckpointError: when it cannot be written (a full disk, say).
    """
    tensors = list(tensors)
    header = _make_header(tensors) if source is None else renew_header(source.header, tensors).encode()
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for pending in tensors:
                tensor = pending.read()
                assert tensor.dtype == pending.dtype and tuple(tensor.shape) == pending.shape, pending.name
                if pending.nbytes:
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


def _make_header(tensors: list[TensorToWrite], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the JSON header of a safetensors file, padded with spaces to a multiple of 8 bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"} if metadata is None else metadata}
    position = 0
    for tensor in tensors:
        end = position + tensor.nbytes
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = to_json(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def is_finite(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Check that no entry is NaN or infinite, now or after a cast; allocates no memory of the tensor's size.

    Args:
        tensor: of any dtype and shape.
        dtype: to cast to; None for the tensor's own.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # A NaN anywhere makes both extremes NaN.
    extremes = torch.stack(torch.aminmax(tensor.detach()))
    return bool(torch.isfinite(extremes.to(dtype or tensor.dtype)).all())


def check_finite(tensors: Iterable[tuple[str, Tensor]], source: str, dtype: torch.dtype | None = None) -> None:
    """Refuse tensors with NaN or infinite entries.

    Args:
        tensors: names and tensors, read one after the other.
        source: checkpoint or file that they come from, for the message.
        dtype: that they will be cast to; None for no cast.

    Raises:
        CheckpointError: naming the first such tensor.
    """
    for name, tensor in tensors:
        if is_finite(tensor, dtype):
            continue
        if dtype is not None and is_finite(tensor):
            raise CheckpointError(
                f"Tensor {name} of '{source}' overflows {dtype_name(dtype)}: use --dtype bfloat16 or float32."
            )
        raise CheckpointError(
            f"Tensor {name} of '{source}' holds NaN or infinite values: fetch the checkpoint again, or repair it."
        )


def check_result(module: nn.Module, destination: str) -> None:
    """Check that all parameters of a result are finite, before it is written.

    Args:
        module: the result; parameters on the meta device are skipped.
        destination: where it will be written, for the message.

    Raises:
        CheckpointError: naming the first parameter that is not finite.
    """
    for name, parameter in module.named_parameters():
        if parameter.device.type != "meta" and not is_finite(parameter):
            raise CheckpointError(
                f"Tensor {name} for '{destination}' has become NaN or infinite and is not written: "
                "run with --dtype float32."
            )
