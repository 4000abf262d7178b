"""What a fault is laid into: a copy of a small real model, a text, and the command line, all in one folder."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file

from alps.cli import main as cli

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind it at all. " * 100
PICKLES = "pytorch_model.bin"


@dataclass
class Scene:
    """A folder with `model`, `text.txt`, and room for `out`.

    Attributes:
        folder: where everything lies.
        source: the model that is copied.
        during: holds for the time of the command.
    """

    folder: Path
    source: Path
    during: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)

    def __post_init__(self) -> None:
        self.model.mkdir()
        for file in self.source.iterdir():
            shutil.copyfile(file, self.model / file.name)
        self.text.write_text(TEXT)

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def text(self) -> Path:
        return self.folder / "text.txt"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def weights(self) -> Path:
        return self.model / "model.safetensors"

    def write(self, name: str, content: bytes | str) -> Path:
        """A file of the folder."""
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def header(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Rewrite the header of the weights."""
        data = self.weights.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        self.weights.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        """Rewrite the weights."""
        found = load_file(self.weights)
        change(found)
        save_file(found, self.weights, {"format": "pt"})

    def settings(self, name: str, **changes: Any) -> None:
        """Rewrite a JSON file of the model."""
        path = self.model / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def index(self, **changes: str) -> None:
        """Name the weights as a shard of an index, but for some tensors that lie elsewhere."""
        shard = "model-00001-of-00001.safetensors"
        names = dict.fromkeys(load_file(self.weights), shard)
        self.weights.rename(self.model / shard)
        (self.model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**names, **changes}}))

    def contents(self) -> dict[str, int]:
        """Every file and folder with its size, hidden ones too."""
        return {str(path.relative_to(self.folder)): path.stat().st_size for path in self.folder.rglob("*")}


@dataclass(frozen=True)
class Outcome:
    """How a command ended, what it printed, and what has changed on the disk."""

    code: int
    printed: str
    told: str
    changed: bool

    @property
    def sentence(self) -> str:
        """The last line on stderr."""
        return (self.told.strip().splitlines() or [""])[-1]


def arguments(scene: Scene, command: str, *more: object) -> list[str]:
    """The words after `alps`, with defaults that make a run of a second; of `more` the last occurrence wins."""
    small = ["--calibration", scene.text, "--samples", 4, "--seqlen", 64]
    words: dict[str, list[object]] = {
        "prune": [scene.model, scene.out, "--sparsity", 0.5, *small],
        "eval": [scene.model, "--text", scene.text, "--seqlen", 64],
        "inspect": [scene.model],
        "pack": [scene.model, scene.out],
        "unpack": [scene.folder / "packed", scene.out],
        "distill": [scene.source, scene.model, scene.out, "--steps", 2, *small],
        "reconstruct": [scene.source, scene.model, scene.out, *small],
        "compare": [scene.model, scene.out, "--sparsity", 0.5, "--methods", "magnitude", *small],
    }
    return [command, *map(str, [*words[command], *more])]


def attempt(scene: Scene, words: list[str]) -> Outcome:
    """Run the command line in this process."""
    printed, told, before = io.StringIO(), io.StringIO(), scene.contents()
    with (
        patch.object(sys, "argv", ["alps", *words]),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(told),
        scene.during(),
        _signals_kept(),
    ):
        try:
            cli.run()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    return Outcome(code, printed.getvalue(), told.getvalue(), scene.contents() != before)


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
