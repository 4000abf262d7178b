"""Writing of a pruned model as an ordinary Hugging Face directory."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from alps.checkpoints.atomic_io import write_text
from alps.checkpoints.journal import Journal
from alps.checkpoints.safetensors_io import write_tensors
from alps.checkpoints.weight_files import INDEX_NAME
from alps.core.json_text import to_json
from alps.models.auto_class import processor_files
from alps.models.blocks import Block
from alps.models.lazy_weights import LazyWeights
from alps.models.load import quiet


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Save weights, configuration, generation settings, tokenizer, chat template and processor of a model in memory."""
    with quiet():
        model.save_pretrained(folder)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    _copy_processor(model, str(getattr(model, "name_or_path", "")), folder)


def write_weight_files(
    store: LazyWeights, blocks: Sequence[Block], journal: Journal, folder: Path, *, first: int = 0, step: int = 1
) -> None:
    """Write weight files of a lazy model: pruned blocks from the journal, everything else from the checkpoint.

    Args:
        store: the dense weights.
        blocks: all blocks of the model.
        journal: holds every block.
        folder: to write to.
        first: number of the first file to write.
        step: write every `step`-th file only; other ranks write the others.

    Raises:
        CheckpointError: when a file cannot be read or written.
    """
    changed = {f"{b.name}.{name}": tensor for b in blocks for name, tensor in journal.tensors(b.index).items()}
    for file in list(store.files)[first::step]:
        write_tensors(folder / file.name, store.updated_file(file, changed))


def save_without_weights(store: LazyWeights, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Save everything of a lazy model except its weight files.

    These are the index, the configuration, the generation settings, the tokenizer, and the processor.
    """
    files = {file: store.updated_file(file, {}) for file in store.files}
    if len(files) > 1:
        weight_map = {tensor.name: file.name for file, tensors in files.items() for tensor in tensors}
        total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / INDEX_NAME, to_json(index, indent=2) + "\n")
    config, model = copy.deepcopy(store.model.config), store.model
    config.architectures = [type(model).__name__]  # type: ignore[union-attr]
    with quiet():
        config.save_pretrained(folder)  # type: ignore[operator, union-attr]
        if getattr(model, "generation_config", None) is not None and model.can_generate():  # type: ignore[operator]
            model.generation_config.save_pretrained(folder)  # type: ignore[operator, union-attr]
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    _copy_processor(model, str(store.directory), folder)


def _copy_processor(model: nn.Module, source: str, folder: Path) -> None:
    for path in processor_files(model, source):
        shutil.copyfile(path, folder / path.name)
