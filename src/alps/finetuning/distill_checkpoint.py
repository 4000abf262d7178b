"""What `alps recover` does: two checkpoints in, the recovered one out, with a report that keeps the two jobs apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from alps.core.progress import Progress
from alps.data.calibration import load
from alps.data.text_sources import load_text
from alps.finetuning.checkpoint_pair import check_request, describe, read_settings, write_changed
from alps.finetuning.distillation import DistillConfig, distill
from alps.reporting.run_report import RunReport


def load_distill_config(given: dict[str, Any]) -> DistillConfig:
    """Settings from the values that are not None.

    Raises:
        ConfigError: for a value of the wrong kind or range, or an unknown name.
    """
    return read_settings(DistillConfig, given)


def distill_directory(
    dense: str, pruned: str, out: Path, settings: DistillConfig, progress: Progress, tell: Callable[[str], None]
) -> RunReport:
    """Check everything that can be checked, then load both models, recover the pruned one and write it to `out`.

    Returns:
        The report of the pruned directory with the recovery added, as written.

    Raises:
        ConfigError, UnsupportedModel, CheckpointError: one sentence each; nothing is written then.
    """
    settings.schedule()
    earlier = check_request(dense, pruned, out, settings.device, settings.dtype)
    text = load_text(settings.calibration, "calibration")
    teacher, student = load(dense, settings.dtype, tell), load(pruned, settings.dtype, tell)
    record = distill(teacher, student, settings, progress, text)
    report = earlier or describe(student, dense, record.device)
    report.recovery.append(record)
    write_changed(student, report, out, tell)
    return report
