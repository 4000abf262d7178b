"""Small checkpoint directories for tests of the packed format, and changes of what was packed from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def contents(folder: Path) -> dict[str, bytes]:
    """Read all files below a folder by their relative paths."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def pruned(weight: Tensor, sparsity: float, seed: int = 0) -> Tensor:
    """Set exactly round(sparsity n) weights of a copy to +0.0, at random."""
    weight = weight.clone()
    where = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(seed))
    weight.view(-1)[where[: round(sparsity * weight.numel())]] = 0
    return weight


def small(folder: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    """Write a directory of a few tensors."""
    folder.mkdir(parents=True)
    tensors = tensors or {"a": pruned(torch.randn(8, 64), 0.7), "b": torch.randn(8, 64), "c": torch.ones(3)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "none"}')
    return folder


def flip(path: Path, position: int) -> None:
    """Change one bit of the byte at a position."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def resigned(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and give it the hash that fits, so that what is behind it has to be noticed."""
    fields = json.loads((folder / "packed.json").read_text())
    change(fields)
    for name in fields.get("shards", {}):
        data = (folder / name).read_bytes()
        fields["shards"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    text = json.dumps({**fields, "sha256": "0" * 64})
    (folder / "packed.json").write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest(), 1))


def make_first_version(folder: Path) -> None:
    """Turn a packed directory into what the first version of the format had for the same checkpoint."""

    def change(fields: dict[str, Any]) -> None:
        fields["version"] = 1
        fields["files"]["config.json"] = fields["files"].pop("config.original.json")

    (folder / "config.original.json").replace(folder / "config.json")
    (folder / "alps.safetensors").unlink()
    (folder / "alps_packed.py").unlink()
    for path in folder.glob("packed*.safetensors"):
        save_file(load_file(path), path, {"format": "alps-packed", "version": "1"})
    resigned(folder, change)
