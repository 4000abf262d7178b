"""Tensors of safetensors files, read into memory of their own: a mapped file would stay in memory beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# In safetensors' words.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class Shard:
    """A safetensors file.

    Raises:
        ValueError, KeyError: when it has no header of that format.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self._start = 8 + length
            header: dict[str, Any] = json.loads(file.read(length))
        self._records = {name: record for name, record in header.items() if name != "__metadata__"}

    def read(self, name: str) -> Tensor:
        """A tensor by its name.

        Raises:
            ValueError, KeyError: when there is none of that name, or of another size than stated.
        """
        record = self._records[name]
        begin, end = record["data_offsets"]
        data = torch.empty(end - begin, dtype=torch.uint8)
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._start + begin)
            view, done = memoryview(data.numpy()), 0  # type: ignore[arg-type]
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise ValueError(f"{self._path.name} ends too early")
                done += count
        return typed(data, record["dtype"], record["shape"])


def typed(data: Tensor, dtype: str, shape: list[int]) -> Tensor:
    """The bytes of a contiguous tensor as one of another dtype and shape.

    Raises:
        ValueError: for a dtype that is not known here.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is not known")
    return data.reshape(-1).view(torch.uint8).view(DTYPES[dtype]).view(shape)
