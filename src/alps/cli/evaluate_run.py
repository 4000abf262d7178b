"""The measurements of `alps eval`: tables on stderr while they come, JSON on stdout at the end."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from alps.cli.console import console_output
from alps.cli.tables import evaluation_table, task_table
from alps.core.distributed import ProcessGroup, process_group
from alps.core.json_text import to_json
from alps.core.memory import out_of_memory_as_error
from alps.core.progress import Progress
from alps.data.loaded_model import LoadedModel, load
from alps.evaluation.api import evaluate
from alps.evaluation.evaluate_config import EvaluateConfig
from alps.evaluation.tasks import find_tasks, score_tasks
from alps.models.load import check_architecture
from alps.reporting.card_metadata import add_results, read_card
from alps.reporting.records import EvaluationRecord, TaskRecord


def measure_checkpoint(config: EvaluateConfig) -> None:
    """Check everything that can be checked, then load the models, measure, and print.

    Raises:
        ConfigError, UnsupportedModel, CheckpointError: nothing is printed then, unless a measurement fails.
    """
    config.check_needed()
    device = config.pick_device()
    for name in (config.model, config.reference):
        if name is not None:
            check_architecture(name)
    if config.card:
        read_card(Path(config.model))
    # Tasks are checked before the model is loaded.
    tasks = find_tasks(config.tasks, config.task_folder, config.limit) if "tasks" in config.model_fields_set else None
    errors, rows = Console(stderr=True), list[EvaluationRecord | TaskRecord]()
    with process_group() as group, console_output(quiet=not group.is_main) as (_, progress):
        loaded = load(config.model, config.dtype)
        if config.texts:
            records = _perplexities(config, loaded, group, progress)
            rows += records
            if group.is_main:
                errors.print(evaluation_table(records))
        if tasks is not None:
            with out_of_memory_as_error("lower --batch-size, or use --dtype bfloat16 or --device cpu"):
                device = group.device(config.device, device)
                scores = score_tasks(loaded, tasks, device, batch_size=config.batch_size, group=group)
            rows += scores
            if group.is_main:
                errors.print(task_table(scores))
    if group.is_main:
        if config.card:
            add_results(Path(config.model), rows)
        print(to_json([row.model_dump() for row in rows], indent=1))


def _perplexities(
    config: EvaluateConfig, loaded: LoadedModel, group: ProcessGroup, progress: Progress
) -> list[EvaluationRecord]:
    reference = None if config.reference is None else load(config.reference, config.dtype)
    with out_of_memory_as_error("lower --seqlen, or use --dtype bfloat16 or --device cpu"):
        return evaluate(
            loaded,
            config.texts,
            reference=reference,
            seqlen=config.seqlen,
            windows=config.windows,
            bos=config.bos,
            device=config.device,
            progress=progress,
            group=group,
        )
