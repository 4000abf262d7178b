"""What `alps recover` does: two checkpoints in, the recovered one out, with a report that keeps the two jobs apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from alps.card import model_card
from alps.checkpoints.directory import check_target, new_directory
from alps.data.text import load_text
from alps.errors import ConfigError
from alps.inspection import USUAL_PATTERNS, group_violations
from alps.loaded import Loaded, load
from alps.models.blocks import dense_parameters, find_blocks
from alps.models.load import check_model_path, parse_dtype
from alps.models.packaged import NAME as PACKAGED
from alps.models.save import save_model
from alps.models.sites import Site
from alps.progress import Watcher
from alps.recover import RecoverSettings, recover
from alps.report import REPORT_NAME, DenseRecord, LayerRecord, RunReport
from alps.runtime import peak_device_bytes, peak_host_bytes, pick_device, provenance


def recover_settings(given: dict[str, Any]) -> RecoverSettings:
    """Settings from the values that are not None.

    Raises:
        ConfigError: for a value of the wrong kind or range, or an unknown name.
    """
    try:
        return RecoverSettings.model_validate({key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"Setting '{key}' is wrong: {first['msg'].lower()}, not {first['input']!r}.") from None


def recover_directory(
    dense: str, pruned: str, out: Path, settings: RecoverSettings, watcher: Watcher, tell: Callable[[str], None]
) -> RunReport:
    """Check everything that can be checked, then load both models, recover the pruned one and write it to `out`.

    Returns:
        The report of the pruned directory with the recovery added, as written.

    Raises:
        ConfigError, UnsupportedModel, CheckpointError: one sentence each; nothing is written then.
    """
    settings.schedule()
    parse_dtype(settings.dtype)
    pick_device(settings.device)
    for name in (dense, pruned):
        if name != PACKAGED:
            check_model_path(name)
    check_target(out)
    earlier = RunReport.read(Path(pruned))
    text = load_text(settings.calibration, "calibration")
    teacher, student = load(dense, settings.dtype, tell), load(pruned, settings.dtype, tell)
    record = recover(teacher, student, settings, watcher, text)
    report = earlier or describe(student, dense, record.device)
    report.recovery.append(record)
    # The times of the one-shot run stay its own: saving is not added to them.
    with new_directory(out) as folder:
        save_model(student.model, student.tokenizer, folder)
        (folder / REPORT_NAME).write_text(report.to_json())
        (folder / "README.md").write_text(model_card(report))
    return report


def describe(pruned: Loaded, dense: str, device: str) -> RunReport:
    """The report of a model that something else has pruned: the counts that its weights show, and nothing more."""
    sites = [(block.index, site) for block in find_blocks(pruned.model) for site in block.sites]
    records = [
        LayerRecord(
            name=site.name,
            block=index,
            kind=site.kind,
            shape=site.shape,
            entries=site.module.weight.numel(),
            zeros=int((site.read() == 0).sum()),
            error=None,
            magnitude_error=None,
            solve={"notes": []},
        )
        for index, site in sites
    ]
    left = dense_parameters(pruned.model, {site.parameter_name for _, site in sites})
    report = RunReport(
        model=dense,
        architecture=type(pruned.model).__name__,
        method="unknown",
        pattern="",
        dtype=str(sites[0][1].dtype).removeprefix("torch."),
        device=device,
        calibration=None,
        sites=records,
        dense=[DenseRecord(name=row.name, shape=row.shape, reason=row.reason) for row in left],
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=peak_device_bytes(pick_device(device)),
        versions=provenance(),
    )
    return report.model_copy(update={"pattern": _pattern([site for _, site in sites], report.sparsity)})


def _pattern(sites: list[Site], sparsity: float) -> str:
    """The first of the usual N:M that holds in every group, else the share of zeros."""
    for pattern in USUAL_PATTERNS:
        if all(group_violations(site.read(), pattern)[1] == 0 for site in sites):
            return str(pattern)
    return f"{100 * sparsity:.4g}%"
