"""Comparison of methods, patterns and seeds: each prunes a copy of the same dense model, measured in the same way.

The dense model stays in memory, and so does the copy, which gets the dense weights again before every run. Each
finished run is written to results.jsonl immediately, so that an interruption costs one run.
"""

from __future__ import annotations

import copy
import logging
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from alps.checkpoints.atomic_io import locked_directory, write_text
from alps.core.device import pick_device
from alps.core.errors import CheckpointError, NotFinite, SolveFailed
from alps.core.memory import reset_peak_memory
from alps.core.progress import Progress
from alps.core.provenance import provenance
from alps.core.text_format import dtype_name, format_duration
from alps.data.loaded_model import LoadedModel, load
from alps.data.mixture import CalibrationMix, load_calibration
from alps.data.windows import Windows
from alps.evaluation.cached_reference import CachedReferenceModel
from alps.evaluation.compare_config import COMPARISON_NAME, CompareConfig, ComparisonRun
from alps.evaluation.kl_divergence import measure_divergence
from alps.evaluation.perplexity import measure_perplexity
from alps.evaluation.sample_outputs import continue_prompts, prompt_ids
from alps.evaluation.tasks import TaskSet, find_tasks, score_tasks
from alps.models.demo_model import DEMO_MODEL_NAME
from alps.models.fingerprint import model_sha256
from alps.models.load import check_checkpoint, parse_dtype
from alps.pruning.config import PruneConfig
from alps.pruning.job import make_context
from alps.pruning.run import prune_model
from alps.pruning.sparsity_allocation import check_fit
from alps.reporting.compare_results import DENSE, RESULTS_NAME, Continuation, Result, read_results, write_results
from alps.reporting.markdown_tables import TABLE_NAME, summary
from alps.reporting.publish import publish
from alps.reporting.records import EvaluationRecord, TaskRecord

_LOG = logging.getLogger("alps")

_BATCH_SIZE = 8


def run_comparison(config: CompareConfig, out: Path, progress: Progress) -> list[Result]:
    """Do the missing runs of a comparison in `out`, and return all results, those of the dense model first.

    Args:
        config: methods, patterns, seeds and measurements.
        out: directory for results.jsonl, a table, the settings and finally a page of figures. An unfinished comparison
            in it is continued.
        progress: receives the steps of every run.

    Raises:
        ConfigError, UnsupportedModel, CheckpointError: nothing was run.
        SolveFailed: some runs failed, the first of them named; all others are done.
    """
    runs = config.runs()
    parse_dtype(config.dtype)
    pick_device(config.device)
    if config.model != DEMO_MODEL_NAME:
        check_checkpoint(config.model)
    task_data = None if config.task_data is None else Path(config.task_data)
    tasks = find_tasks(config.tasks, task_data, config.limit) if config.tasks else None
    calibrated = [run.config for run in runs if run.config.resolve().reads_inputs]
    sources = {key: load_calibration(*key) for key in dict.fromkeys((c.calibration, c.samples) for c in calibrated)}
    with locked_directory(out, COMPARISON_NAME):
        config.check_continues(out)
        results = read_results(out / RESULTS_NAME)
        bench = _Bench(config, load(config.model, config.dtype), tasks, sources, progress)
        bench.dense.check_causal()
        blocks = bench.dense.blocks()
        for run in runs:
            rules = run.config.rules().apply(bench.dense.model, blocks)
            check_fit(rules.blocks, run.config.build_pattern(), rules.patterns)
        bench.check_calibrations(calibrated)
        bench.check_same(results, out)
        write_text(out / COMPARISON_NAME, config.to_yaml())
        return _do_missing(bench, runs, results, out)


def _do_missing(bench: _Bench, runs: list[ComparisonRun], results: list[Result], out: Path) -> list[Result]:
    failed: list[str] = []
    if not any(result.method == DENSE for result in results):
        _LOG.info(f"Measuring the dense model {bench.config.model} ...")
        results = _save(out, [bench.measure_dense(), *results])
    finished = {result.key for result in results}
    missing = [run for run in runs if run.key not in finished]
    durations: list[float] = []
    for number, run in enumerate(missing, 1):
        left = ""
        if durations:
            seconds = sum(durations) / len(durations) * (len(missing) - number + 1)
            left = f", about {format_duration(seconds)} left"
        _LOG.info(f"Run {number} of {len(missing)}: {run.title}{left} ...")
        start = time.perf_counter()
        try:
            results = _save(out, [*results, bench.do_run(run)])
        except (SolveFailed, NotFinite) as error:
            failed.append(f"{run.title}: {error}")
            _LOG.warning(f"Failed, and the other runs continue: {failed[-1]}")
        except KeyboardInterrupt as interrupt:
            raise type(interrupt)(
                f"Interrupted: {number - 1} runs are kept in '{out}', and the same command does the others."
            ) from None
        durations.append(time.perf_counter() - start)
    publish(out, results)
    if failed:
        raise SolveFailed(f"{len(failed)} of {len(missing)} runs failed, first {failed[0]}")
    return results


def _save(out: Path, results: list[Result]) -> list[Result]:
    write_results(out / RESULTS_NAME, results)
    write_text(out / TABLE_NAME, summary(results))
    return results


@dataclass
class _Bench:
    """State that all runs share: the dense model, a copy to prune, texts, tasks and calibration windows."""

    config: CompareConfig
    dense: LoadedModel
    tasks: TaskSet | None
    sources: dict[tuple[str, int], CalibrationMix]
    progress: Progress
    _windows: dict[tuple[str, int, int, int, bool], Windows] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.config
        self.device = pick_device(config.device)
        self.sha256 = model_sha256(self.dense.model)
        self.texts = [
            self.dense.evaluation(text, config.eval_seqlen, config.windows, bos=config.bos) for text in config.texts
        ]
        prompt_ids(self.dense, config.prompts, config.prompt_tokens)
        self.copy = LoadedModel(self.dense.name, copy.deepcopy(self.dense.model), self.dense.tokenizer)
        # Every run is compared with the dense model on the same windows.
        self.reference = CachedReferenceModel(self.dense.model)

    def windows(self, config: PruneConfig) -> Windows:
        """Return the calibration windows of a run, drawn once; `self` is sampled from the dense model."""
        sizes = (config.samples, config.seqlen, config.seed)
        key = (config.calibration, *sizes, config.bos)
        if key not in self._windows:
            source = self.sources[config.calibration, config.samples]
            self._windows[key] = self.dense.calibration(source, *sizes, self.device, self.progress, bos=config.bos)
        return self._windows[key]

    def check_calibrations(self, configs: list[PruneConfig]) -> None:
        """Draw the windows of the first seed from every text, so that a text that is too short fails before any run."""
        for config in configs:
            parts = self.sources[config.calibration, config.samples].sources
            if config.seed == 0 and all(part.text is not None for part in parts):
                self.windows(config)

    def check_same(self, results: list[Result], out: Path) -> None:
        """Reject a comparison whose model or text has changed since the results were measured.

        Raises:
            CheckpointError: naming what has changed.
        """
        for result in results:
            changed = "model" if result.model_sha256 != self.sha256 else None
            for record, text in zip(result.evaluations, self.texts, strict=False):
                changed = changed or (f"text '{text.source}'" if record.sha256 != text.sha256 else None)
            used = result.calibration
            if used is not None and (result.settings["calibration"], used.windows) in self.sources:
                windows = self.windows(PruneConfig.model_validate(result.settings))
                changed = changed or (f"calibration '{used.source}'" if used.sha256 != windows.sha256 else None)
            if changed:
                raise CheckpointError(
                    f"'{out}' holds results with another {changed} under the same name: give another OUT."
                )

    def measure_dense(self) -> Result:
        """Measure the dense model in the same way as the pruned ones."""
        model = self.dense
        reset_peak_memory(self.device)
        return Result(
            model=self.config.model,
            model_sha256=self.sha256,
            architecture=type(model.model).__name__,
            dtype=dtype_name(next(model.model.parameters()).dtype),
            device=str(self.device),
            method=DENSE,
            pattern="",
            seed=None,
            evaluations=[
                measure_perplexity(self.reference, text, name=model.name, device=self.device, progress=self.progress)
                for text in self.texts
            ],
            tasks=self._scores(model),
            continuations=self._continuations(model),
            versions=provenance(),
            finished=_now(),
        )

    def do_run(self, run: ComparisonRun) -> Result:
        """Prune the copy and measure it."""
        self.copy.model.load_state_dict(self.dense.model.state_dict())
        recipe, context = run.config.resolve(), make_context(run.config, self.progress)
        windows = self.windows(run.config) if recipe.reads_inputs else None
        reset_peak_memory(self.device)
        report = prune_model(self.copy, windows, recipe, context, seed=run.seed)
        names = (f"{self.dense.name}, {run.method} {run.pattern}", self.dense.name)
        models = (self.copy.model, self.reference)
        evaluations: list[EvaluationRecord] = [
            measure_divergence(*models, text, names=names, device=self.device, progress=self.progress)
            for text in self.texts
        ]
        return Result.from_report(
            report,
            run.method,
            model_sha256=self.sha256,
            pattern=run.pattern,
            seed=run.seed,
            settings=run.config.model_dump(mode="json"),
            evaluations=evaluations,
            tasks=self._scores(self.copy),
            continuations=self._continuations(self.copy),
            finished=_now(),
        )

    def _scores(self, model: LoadedModel) -> list[TaskRecord]:
        return [] if self.tasks is None else score_tasks(model, self.tasks, self.device, batch_size=_BATCH_SIZE)

    def _continuations(self, model: LoadedModel) -> list[Continuation]:
        pairs = continue_prompts(model, self.config.prompts, self.config.prompt_tokens, self.device)
        return [Continuation(prompt=prompt, text=text) for prompt, text in pairs]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
