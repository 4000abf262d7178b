"""report.html of a directory: made from the JSON that is there, or left out in words where it cannot be drawn."""

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
# The demo's name for the dense rows among a report's evaluations.
_DENSE_ROW = ", dense"


def rebuild_page(folder: Path) -> Path:
    """Make the page of a comparison or a pruned checkpoint anew; returns where it is.

    Raises:
        ConfigError: where a package is missing.
        CheckpointError: where there is no results.jsonl and no report.json, or what is there cannot be read.
    """
    if missing := _missing():
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
    folder: Path,
    results: Sequence[Result],
    notes: Sequence[str] = (),
    final: Path | None = None,
) -> bool:
    """Write the page of some results, or log a warning that says why there is none.

    What was computed may have taken hours: it is never lost to its figures, whatever goes wrong with them.

    Args:
        folder: where the page goes.
        results, notes: see `alps.reporting.html_report.report_page`.
        final: what the folder will be called, if it is still being filled.

    Returns:
        Whether it was written.
    """
    if missing := _missing():
        again = f"{_INSTALL}, then alps report {final or folder}"
        _LOG.warning(f"{PAGE_NAME} is left out, because {missing} is not installed: {again}.")
        return False
    try:
        _write(folder, results, notes)
    except Exception as error:
        _LOG.warning(f"{PAGE_NAME} is left out, because it could not be drawn ({type(error).__name__}: {error}).")
        return False
    return True


def publish_run(folder: Path, report: RunReport, final: Path) -> bool:
    """The same for one run's report, beside a checkpoint."""
    results, notes = run_results(report)
    return publish(folder, results, notes, final)


def run_results(report: RunReport) -> tuple[list[Result], list[str]]:
    """A run's report as results, and what has to be said before any of their figures."""
    rows = report.evaluations
    own = [row for row in rows if not row.model.endswith(_DENSE_ROW)]
    pruned = Result.from_report(report, evaluations=own)
    dense = [row for row in rows if row.model.endswith(_DENSE_ROW)]
    notes = []
    if report.reconstruction_runs:
        notes.append("The blocks have been matched to the dense model's since: the errors below are those before.")
    if report.distillations:
        last = report.distillations[-1]
        notes.append(
            f"Recovered by distillation since, not one-shot: {last.steps} steps, KL to the dense model on held-back "
            f"windows {last.kl_before:.4f} before, {last.kl_after:.4f} after. The figures below are those of the "
            "one-shot run before."
        )
    if not dense:
        return [pruned], notes
    same = {name: getattr(pruned, name) for name in ("model", "model_sha256", "architecture", "dtype", "device")}
    first = Result(**same, method=DENSE, pattern="", seed=None, evaluations=dense, versions=pruned.versions)
    return [first, pruned], notes


def _missing() -> str:
    names = {"matplotlib": "matplotlib", "Jinja2": "jinja2"}
    return " and ".join(name for name, module in names.items() if importlib.util.find_spec(module) is None)


def _write(folder: Path, results: Sequence[Result], notes: Sequence[str]) -> None:
    from alps.reporting.html_report import report_page

    write_text(folder / PAGE_NAME, report_page(results, notes))
