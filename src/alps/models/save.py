"""Writing of a pruned model as a Hugging Face directory that keeps what pruning does not change.

All files other than weights are written before the first block is pruned, so that nothing fails when the work is done.
"""

from __future__ import annotations

import copy
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alps.checkpoints.atomic_io import check_space, fresh_directory, temporary_directory
from alps.checkpoints.journal import Journal
from alps.checkpoints.safetensors_io import write_tensors
from alps.checkpoints.side_files import copy_side_files
from alps.checkpoints.weight_files import INDEX_NAME, SINGLE_NAME
from alps.core.errors import AlpsError, CheckpointError, ConfigError, first_line
from alps.models.auto_class import processor_files
from alps.models.blocks import Block
from alps.models.config_json import add_older_fields, declare_dtype, declare_own_head, declare_size
from alps.models.lazy_weights import LazyWeights
from alps.models.load import quiet
from alps.models.weight_layout import Layout, lay_out_weights

_LOG = logging.getLogger("alps")

# Directory in that of the journal.
STAGING_NAME = "files"
# Letters of both cases, digits, accents, other scripts and spaces, which classes of tokenizers treat in their own ways.
_SAMPLE = "It's 12 o'clock:  naïve CAFÉ, 東京 \U0001f600\n\tx = y_1;"


class DirectoryWriter(Protocol):
    """Writer of a model's directory, for the checks before a run."""

    def write_side_files(self, folder: Path) -> None:
        """Write everything but weights."""

    def weight_bytes(self) -> int:
        """Return the bytes of all weight files, without their headers."""


@dataclass(frozen=True)
class CheckpointWriter:
    """Writer of a model's directory.

    Attributes:
        model: to write.
        tokenizer: written with a model that has no source; None for none.
        source: directory of the checkpoint that the model was loaded from, whose files are kept; None for a model of a
            GGUF file, or one in memory, whose files transformers writes.
        store: access to weights that are still in their files; None for a model that is in memory.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase | None
    source: Path | None = None
    store: LazyWeights | None = None

    def write_side_files(self, folder: Path) -> None:
        """Write everything but weights: configuration, generation settings, tokenizer, index, and all other files.

        Raises:
            ConfigError: when transformers refuses to save the configuration or another part.
            CheckpointError: when a file of the source cannot be read.
        """
        layout = self._layout()
        if self.source is None:
            self._save_by_transformers(folder)
        else:
            copy_side_files(self.source, folder)
            declare_dtype(folder / "config.json", _declarable_dtype(self.model))
            declare_own_head(folder / "config.json", self.model.config)
            if layout is None:
                # transformers saves the configuration together with the weights.
                with tempfile.TemporaryDirectory(dir=folder) as trial:
                    _save("configuration", _config_to_save(self.model).save_pretrained, Path(trial))
        if layout is not None:
            self._write_index(layout, folder)

    def weight_bytes(self) -> int:
        """Return the bytes of all weight files, without their headers."""
        layout = self._layout()
        if layout is None:
            return sum(tensor.numel() * tensor.dtype.itemsize for tensor in self.model.parameters())
        return sum(tensor.nbytes for tensors in layout.values() for tensor in tensors)

    def write_weights(
        self,
        folder: Path,
        blocks: Sequence[Block] = (),
        journal: Journal | None = None,
        *,
        first: int = 0,
        step: int = 1,
    ) -> None:
        """Write the weight files; those of a lazy model take pruned blocks from the journal, all else from the source.

        Args:
            folder: to write to.
            blocks: all blocks of a lazy model.
            journal: holds every block of a lazy model.
            first: number of the first file to write.
            step: write every `step`-th file only; other ranks write the others.

        Raises:
            CheckpointError: when a file cannot be read or written.
        """
        changed = {}
        if journal is not None:
            changed = {f"{b.name}.{name}": tensor for b in blocks for name, tensor in journal.tensors(b.index).items()}
        layout = self._layout() if self.store is None else None
        if self.store is not None:
            for file in list(self.store.files)[first::step]:
                write_tensors(folder / file.name, self.store.updated_file(file, changed), file)
        elif layout is not None:
            for file in list(layout)[first::step]:
                write_tensors(folder / file.name, layout[file], file)
        else:
            self._save_weights_by_transformers(folder)

    def _layout(self) -> Layout | None:
        if self.store is not None:
            return {file: self.store.updated_file(file, {}) for file in self.store.files}
        return None if self.source is None else lay_out_weights(self.model, self.source)

    def _write_index(self, layout: Layout, folder: Path) -> None:
        assert self.source is not None
        if (self.source / SINGLE_NAME).is_file():
            return
        text = (self.source / INDEX_NAME).read_bytes().decode()
        stored = sum(8 + len(file.header.encode()) for file in layout)
        before = sum(file.path.stat().st_size for file in layout) - stored
        now = sum(tensor.nbytes for tensors in layout.values() for tensor in tensors)
        (folder / INDEX_NAME).write_bytes((text if now == before else declare_size(text, now)).encode())

    def _save_by_transformers(self, folder: Path) -> None:
        model = self.model
        config = _config_to_save(model)
        _save("configuration", config.save_pretrained, folder)
        if getattr(model, "generation_config", None) is not None and model.can_generate():
            _save("generation settings", model.generation_config.save_pretrained, folder)
        if self.tokenizer is not None:
            _save("tokenizer", self.tokenizer.save_pretrained, folder)
        for path in processor_files(model, str(getattr(model, "name_or_path", ""))):
            shutil.copyfile(path, folder / path.name)
        add_older_fields(folder, config)
        if self.tokenizer is not None:
            _compare_tokenizer(self.tokenizer, folder)

    def _save_weights_by_transformers(self, folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as inner, quiet():
            self.model.save_pretrained(inner)
            for path in Path(inner).iterdir():
                # The code of a class that the user registered is saved with the weights, and named in its config.
                if not (folder / path.name).exists() or getattr(self.model, "_auto_class", None) is not None:
                    path.replace(folder / path.name)


@contextmanager
def staged_side_files(
    writer: DirectoryWriter, out: Path, journal_folder: Path | None = None, journal_bytes: int = 0
) -> Iterator[Path]:
    """Context of a temporary directory that holds all files but weights, ready to be moved to `out`.

    The space for the weights is checked as well, so that a run fails before its work and not after it.

    Args:
        writer: of the model.
        out: directory that will be written.
        journal_folder: of the run's journal, which then contains the directory; None for a directory next to `out`.
        journal_bytes: that the journal will take until `out` is complete.

    Raises:
        ConfigError, CheckpointError: when a file cannot be saved or read, or the disk is too full.
    """
    staging = temporary_directory(out) if journal_folder is None else fresh_directory(journal_folder / STAGING_NAME)
    with staging as folder:
        try:
            writer.write_side_files(folder)
        except OSError as error:
            raise CheckpointError(f"'{out}' cannot be written: {error.strerror or error}.") from None
        check_space(out, writer.weight_bytes() + journal_bytes)
        yield folder


def block_bytes(blocks: Sequence[Block]) -> int:
    """Return the bytes of the tensors of some blocks."""
    return sum(t.numel() * t.dtype.itemsize for block in blocks for t in block.module.state_dict().values())


def _compare_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Warn of a tokenizer that gives other ids once it was saved; some classes rebuild its parts when they load it."""
    try:
        with quiet():
            loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        difference = loaded(_SAMPLE).input_ids != tokenizer(_SAMPLE).input_ids
    except Exception:  # a class of the user's own may need anything
        difference = True
    if difference:
        _LOG.warning(
            "The tokenizer gives other token ids, or none, when it is loaded from the files that transformers saves: "
            "copy its own files to the output."
        )


def _config_to_save(model: nn.Module) -> Any:
    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if isinstance(dtype := getattr(model, "dtype", None), torch.dtype):
        config.dtype = dtype
    return config


def _declarable_dtype(model: Any) -> torch.dtype:
    """Return the dtype of a model's weights, where single modules may be kept in another."""
    dtype = getattr(model.config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else next(iter(model.parameters())).dtype


def _save(part: str, save: Callable[[Path], Any], folder: Path) -> None:
    """Save a part by transformers, whose checks raise errors of many kinds."""
    try:
        with quiet():
            save(folder)
    except (AlpsError, OSError):
        raise
    except Exception as error:
        raise ConfigError(
            f"The model's {part} cannot be saved ({first_line(error)}), so that nothing is pruned: correct it first."
        ) from error
