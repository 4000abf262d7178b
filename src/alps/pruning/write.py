"""Write the directory of a pruned model: weights, tokenizer, report, page, model card, settings."""

from __future__ import annotations

import time
from pathlib import Path

from alps.checkpoints.atomic_io import move_files, new_directory
from alps.checkpoints.journal import Journal
from alps.checkpoints.safetensors_io import check_result
from alps.core.distributed import SINGLE_PROCESS, ProcessGroup
from alps.data.loaded_model import LoadedModel
from alps.pruning.config import SETTINGS_NAME, PruneConfig
from alps.reporting.card_metadata import CARD_NAME, read_source_card
from alps.reporting.model_card import model_card
from alps.reporting.publish import publish_run
from alps.reporting.run_report import REPORT_NAME, RunReport


def write(
    loaded: LoadedModel,
    report: RunReport,
    out: Path,
    *,
    config: PruneConfig | None = None,
    replaceable: str | None = None,
    journal: Journal | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
    side_files: Path | None = None,
) -> RunReport:
    """Write a pruned model to `out`, which appears whole or not at all.

    Args:
        loaded: the pruned model.
        report: of its run.
        out: directory to create.
        config: settings of the run, written as `alps.yaml`.
        replaceable: name of a marker file; a directory that holds it is replaced, and the new one holds it as well.
        journal: holds the pruned blocks of a model that is not in memory.
        group: ranks that each write some of the weight files; the main rank writes all other files.
        side_files: directory with the files other than weights, which are moved; None to write them now.

    Returns:
        The report as written, with the time of the writing.
    """
    start, writer = time.perf_counter(), loaded.writer
    if not group.is_main:
        folder = Path(group.broadcast_from_main(str))
        if loaded.store is not None and journal is not None:
            writer.write_weights(folder, loaded.blocks(), journal, first=group.rank, step=group.size)
        group.barrier()
        return report
    with new_directory(out, replaceable) as folder:
        group.broadcast_from_main(lambda: str(folder.absolute()))
        if side_files is None:
            writer.write_side_files(folder)
        else:
            move_files(side_files, folder)
        if loaded.store is None:
            check_result(loaded.model, str(out))
            writer.write_weights(folder)
        else:
            assert journal is not None
            writer.write_weights(folder, loaded.blocks(), journal, first=group.rank, step=group.size)
        group.barrier()
        report = report.with_seconds("save", time.perf_counter() - start)
        (folder / REPORT_NAME).write_text(report.to_json())
        page = publish_run(folder, report, out)
        source = read_source_card(loaded.directory, loaded.name)
        (folder / CARD_NAME).write_text(model_card(report, page, source=source), encoding="utf-8")
        if replaceable is not None:
            (folder / replaceable).touch()
        if config is not None:
            (folder / SETTINGS_NAME).write_text(config.to_yaml())
    return report
