"""Writing of report.html from the JSON files of a directory; a page that cannot be drawn is a logged warning."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

from alps.checkpoints.atomic_io import write_text
from alps.core.errors import CheckpointError, ConfigError
from alps.reporting.compare_results import DENSE, RESULTS_NAME, Result, read_results
from alps.reporting.run_report import REPORT_NAME, RunReport

_LOG = logging.getLogger("alps")

PAGE_NAME = "report.html"
_INSTALL = 'pip install "alps-prune[report]"'


def rebuild_page(folder: Path) -> Path:
    """Draw the page of a comparison or a pruned checkpoint again; return its path.

    Raises:
        ConfigError: when a package is missing.
        CheckpointError: when there is no results.jsonl and no report.json, or the file cannot be read.
    """
    if missing := _missing_packages():
        raise ConfigError(f"{PAGE_NAME} cannot be drawn without {missing}: {_INSTALL}.")
    if (folder / RESULTS_NAME).is_file():
        results, notes = read_results(folder / RESULTS_NAME), list[str]()
        if not results:
            raise CheckpointError(f"'{folder / RESULTS_NAME}' is empty: let `alps compare` finish a run first.")
    elif (report := RunReport.read(folder)) is not None:
        results, notes = run_results(report)
    else:
        raise CheckpointError(
            f"'{folder}' has neither {RESULTS_NAME} nor {REPORT_NAME}: "
            "give a directory of `alps compare` or a checkpoint of `alps prune`."
        )
    _write(folder, results, notes)
    return folder / PAGE_NAME


def publish(
    folder: Path, results: Sequence[Result], notes: Sequence[str] = (), final_folder: Path | None = None
) -> bool:
    """Write the page of some results; if that fails for any reason, log a warning.

    The results may have taken hours, so an error in their presentation must not lose them.

    Args:
        folder: gets the page.
        results: see `alps.reporting.html_report.report_page`.
        notes: see `alps.reporting.html_report.report_page`.
        final_folder: future name of a folder that is still being filled, for the message.

    Returns:
        True if the page was written.
    """
    if missing := _missing_packages():
        command = f"{_INSTALL}, then alps report {final_folder or folder}"
        _LOG.warning(f"{PAGE_NAME} is left out, because {missing} is not installed: {command}.")
        return False
    try:
        _write(folder, results, notes)
    except Exception as error:
        _LOG.warning(f"{PAGE_NAME} is left out, because it could not be drawn ({type(error).__name__}: {error}).")
        return False
    return True


def publish_run(folder: Path, report: RunReport, final_folder: Path) -> bool:
    """Write the page of one run into the directory of its checkpoint; see `publish`."""
    results, notes = run_results(report)
    return publish(folder, results, notes, final_folder)


def run_results(report: RunReport) -> tuple[list[Result], list[str]]:
    """Convert the report of a run to results.

    Returns:
        The results, the dense model's first if it was measured, and notes that a reader needs before any figure.
    """
    pruned = Result.from_report(report)
    notes = []
    if report.reconstruction_runs:
        notes.append(
            "The blocks were reconstructed after pruning: the errors below are those before the reconstruction."
        )
    if report.distillations:
        last = report.distillations[-1]
        notes.append(
            f"Distilled after pruning, so not one-shot: {last.steps} steps, KL to the dense model on held-back "
            f"windows {last.kl_before:.4f} before, {last.kl_after:.4f} after. The figures below are those of the "
            "one-shot run."
        )
    if not report.dense_evaluations:
        return [pruned], notes
    shared = {name: getattr(pruned, name) for name in ("model", "model_sha256", "architecture", "dtype", "device")}
    dense = Result(
        **shared,
        method=DENSE,
        pattern="",
        seed=None,
        evaluations=[*report.dense_evaluations],
        versions=pruned.versions,
    )
    return [dense, pruned], notes


def _missing_packages() -> str:
    names = {"matplotlib": "matplotlib", "Jinja2": "jinja2"}
    return " and ".join(name for name, module in names.items() if importlib.util.find_spec(module) is None)


def _write(folder: Path, results: Sequence[Result], notes: Sequence[str]) -> None:
    from alps.reporting.html_report import report_page

    write_text(folder / PAGE_NAME, report_page(results, notes))
