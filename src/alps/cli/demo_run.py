"""The demo: fetch a real model, prune it with several methods, and compare perplexities.

Calibration and evaluation texts are disjoint parts of the language reference that CPython ships. Sizes are chosen for
two CPU cores; real use needs text of the model's domain, and more of it.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from alps.checkpoints.atomic_io import check_target
from alps.core.progress import Progress
from alps.data.loaded_model import load
from alps.data.text_sources import load_text
from alps.evaluation.api import evaluate
from alps.models.demo_model import DEMO_MODEL_NAME, fetch_demo_model
from alps.pruning.config import PruneConfig
from alps.pruning.context import RunContext
from alps.pruning.run import prune_model
from alps.pruning.write import write
from alps.reporting.records import EvaluationRecord
from alps.reporting.run_report import RunReport

_LOG = logging.getLogger("alps")

SPARSITY = 0.7
TEXT = "python-docs"
# File that marks the output of a demo; the next demo replaces only such a directory.
MARKER = ".alps-demo"
# Windows and tokens in each, for calibration and for evaluation.
CALIBRATION = (32, 256)
EVALUATION = (16, 512)


@dataclass(frozen=True)
class DemoRow:
    """Row of the demo's table; `report` is None for the dense model."""

    method: str
    evaluation: EvaluationRecord
    report: RunReport | None
    seconds: float


def demo(out: Path, quick: bool, device: str, progress: Progress) -> tuple[list[DemoRow], RunReport]:
    """Prune the demo model to 70 % and write ALPS's result to `out`.

    Args:
        out: directory to write; the result of an earlier demo in it is replaced, other content is refused.
        quick: run ALPS only, without the methods it is compared with.
        device: as for `alps prune`.
        progress: receives every layer and batch.

    Returns:
        The rows of the table, dense first and ALPS last, and the report of ALPS.
    """
    check_target(out, replaceable=MARKER)
    fetch_demo_model()
    limit, seqlen = EVALUATION
    start = time.perf_counter()
    _LOG.info(f"Measuring the dense model on {TEXT} ({limit} windows of {seqlen} tokens) ...")
    dense = evaluate(load(DEMO_MODEL_NAME), [TEXT], seqlen=seqlen, windows=limit, device=device, progress=progress)[0]
    rows = [DemoRow("dense", dense, None, time.perf_counter() - start)]
    text = load_text(TEXT, "calibration")
    for method in ("alps",) if quick else ("magnitude", "wanda", "sparsegpt", "alps"):
        start = time.perf_counter()
        _LOG.info(f"Pruning to {SPARSITY:.0%} with {method} ...")
        settings = PruneConfig(
            model=DEMO_MODEL_NAME,
            sparsity=SPARSITY,
            method=method,
            calibration=TEXT,
            samples=CALIBRATION[0],
            seqlen=CALIBRATION[1],
            device=device,
        )
        loaded = load(DEMO_MODEL_NAME)
        windows = loaded.calibration(text, *CALIBRATION, settings.seed)
        recipe, context = settings.resolve(), RunContext(device=settings.pick_device(), progress=progress)
        report = prune_model(loaded, windows, recipe, context, seed=settings.seed)
        seconds = time.perf_counter() - start
        pruned = evaluate(loaded, [TEXT], seqlen=seqlen, windows=limit, device=device, progress=progress)[0]
        report.dense_evaluations = [dense.model_copy(update={"model": f"{DEMO_MODEL_NAME}, dense"})]
        report.evaluations = [pruned.model_copy(update={"model": f"{DEMO_MODEL_NAME}, {method} {recipe.pattern}"})]
        rows.append(DemoRow(method, pruned, report, seconds))
    return rows, write(loaded, report, out, config=settings, replaceable=MARKER)
