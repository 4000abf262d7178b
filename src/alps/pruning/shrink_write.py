"""Write the directory of a smaller model: weights, tokenizer, report, model card, settings."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from alps.checkpoints.atomic_io import move_files, new_directory
from alps.checkpoints.side_files import copy_side_files
from alps.core.errors import CheckpointError
from alps.data.loaded_model import LoadedModel
from alps.models.config_json import declare_dtype, declare_own_head
from alps.models.save import CheckpointWriter
from alps.models.shrink_config import edit_config_text
from alps.models.shrunk_weights import ShrunkModel
from alps.models.structure import Structure, Target
from alps.pruning.config import SETTINGS_NAME
from alps.pruning.shrink_config import ShrinkConfig
from alps.pruning.shrink_context import ShrinkJournal
from alps.reporting.card_metadata import CARD_NAME, read_source_card
from alps.reporting.shrink_card import shrink_card
from alps.reporting.shrink_report import SHRINK_REPORT_NAME, ShrinkReport

_CONFIG = "config.json"


@dataclass(frozen=True)
class ShrunkWriter:
    """Writer of a smaller model's directory.

    Attributes:
        loaded: the dense model, whose files other than weights are kept.
        small: the smaller model.
        structure: of the dense model.
        target: complete numbers of units that stay.
    """

    loaded: LoadedModel
    small: ShrunkModel
    structure: Structure
    target: Target

    def write_side_files(self, folder: Path) -> None:
        """Write everything but weights; of config.json only the fields that change are replaced.

        Raises:
            ConfigError: when transformers refuses to save the configuration or another part.
            CheckpointError: when a file of the source cannot be read.
        """
        loaded = self.loaded
        if loaded.directory is None:
            CheckpointWriter(self.small.model, loaded.tokenizer).write_side_files(folder)
            return
        copy_side_files(loaded.directory, folder)
        path = folder / _CONFIG
        declare_dtype(path, next(loaded.model.parameters()).dtype)
        declare_own_head(path, loaded.model.config)
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            raise CheckpointError(f"'{_CONFIG}' is not UTF-8 text: save the configuration again.") from None
        path.write_bytes(edit_config_text(text, loaded.model, self.structure, self.target).encode())

    def weight_bytes(self) -> int:
        """Return the bytes of all weight files, without their headers."""
        return self.small.nbytes


def write_shrunk(
    writer: ShrunkWriter,
    report: ShrinkReport,
    out: Path,
    *,
    config: ShrinkConfig | None,
    journal: ShrinkJournal,
    side_files: Path | None,
) -> ShrinkReport:
    """Write a smaller model to `out`, which appears whole or not at all; ranks other than the main one wait.

    Args:
        writer: of the model.
        report: of the run.
        out: directory to create.
        config: settings of the run, written as `alps.yaml`; None if they do not describe it completely.
        journal: holds the blocks.
        side_files: directory with the files other than weights, which are moved; None on other ranks.

    Returns:
        The report as written, with the time of the writing.
    """
    if side_files is None:
        journal.group.barrier()
        return report
    start, loaded = time.perf_counter(), writer.loaded
    with new_directory(out) as folder:
        stored = [journal.journal.tensors(position) for position in range(len(writer.small.blocks))]
        writer.small.save(folder, loaded.model, loaded.blocks(), stored)
        move_files(side_files, folder)
        seconds = time.perf_counter() - start
        times = {**report.seconds, "save": seconds, "total": report.seconds["total"] + seconds}
        report = report.model_copy(update={"seconds": times})
        (folder / SHRINK_REPORT_NAME).write_text(report.to_json())
        source = read_source_card(loaded.directory, loaded.name)
        card = shrink_card(report, has_settings=config is not None, source=source)
        (folder / CARD_NAME).write_text(card, encoding="utf-8")
        if config is not None:
            (folder / SETTINGS_NAME).write_text(config.to_yaml())
    journal.group.barrier()
    return report
