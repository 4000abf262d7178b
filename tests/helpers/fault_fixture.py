"""Scene of a fault: a folder with a copy of a small real model and a text, and the command line to run on them."""

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
    """Folder with `model` and `text.txt`, in which a command creates `out`.

    Attributes:
        folder: of the scene.
        source: model that is copied.
        during: context in which the command is run.
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
        """Directory of the model."""
        return self.folder / "model"

    @property
    def text(self) -> Path:
        """File of the text."""
        return self.folder / "text.txt"

    @property
    def out(self) -> Path:
        """Output directory of the command."""
        return self.folder / "out"

    @property
    def weights(self) -> Path:
        """Weight file of the model."""
        return self.model / "model.safetensors"

    def write(self, name: str, content: bytes | str) -> Path:
        """Write a file into the folder, and return its path."""
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def header(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the header of the weight file."""
        data = self.weights.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        self.weights.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        """Change the tensors of the weight file."""
        tensors = load_file(self.weights)
        change(tensors)
        save_file(tensors, self.weights, {"format": "pt"})

    def settings(self, name: str, **changes: Any) -> None:
        """Change keys of a JSON file of the model."""
        path = self.model / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def index(self, **changes: str) -> None:
        """Make the weight file a shard of an index, in which `changes` name other files for some tensors."""
        shard = "model-00001-of-00001.safetensors"
        names = dict.fromkeys(load_file(self.weights), shard)
        self.weights.rename(self.model / shard)
        (self.model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**names, **changes}}))

    def contents(self) -> dict[str, int]:
        """Return every file and folder with its size, including hidden ones."""
        return {str(path.relative_to(self.folder)): path.lstat().st_size for path in self.folder.rglob("*")}


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of a command; `changed` is True if it left anything on the disk."""

    code: int
    stdout: str
    stderr: str
    changed: bool

    @property
    def sentence(self) -> str:
        """Last line on stderr."""
        return (self.stderr.strip().splitlines() or [""])[-1]


def arguments(scene: Scene, command: str, *more: object) -> list[str]:
    """Return the arguments of `alps`, with defaults for a run of one second; options in `more` override them."""
    small = ["--calibration", scene.text, "--samples", 4, "--seqlen", 64]
    words: dict[str, list[object]] = {
        "prune": [scene.model, scene.out, "--sparsity", 0.5, *small],
        "eval": [scene.model, "--text", scene.text, "--seqlen", 64],
        "inspect": [scene.model],
        "generate": [scene.model, "--prompt", "Once"],
        "pack": [scene.model, scene.out],
        "unpack": [scene.folder / "packed", scene.out],
        "distill": [scene.source, scene.model, scene.out, "--steps", 2, *small],
        "reconstruct": [scene.source, scene.model, scene.out, *small],
        "compare": [scene.model, scene.out, "--sparsity", 0.5, "--methods", "magnitude", *small],
    }
    return [command, *map(str, [*words[command], *more])]


def run_in_scene(scene: Scene, words: list[str]) -> Outcome:
    """Run the command line in this process."""
    stdout, stderr, before = io.StringIO(), io.StringIO(), scene.contents()
    with (
        patch.object(sys, "argv", ["alps", *words]),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        scene.during(),
        _restored_signal_handler(),
    ):
        try:
            cli.run()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    return Outcome(code, stdout.getvalue(), stderr.getvalue(), scene.contents() != before)


@contextlib.contextmanager
def _restored_signal_handler() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
