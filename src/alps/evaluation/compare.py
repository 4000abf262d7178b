"""Many runs on the same inputs: every method, pattern and seed from the same dense weights, measured alike.

The dense model stays in memory beside a copy, which gets its weights back before every run. Each finished run is a
line of results.jsonl at once, so that a kill costs one run.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from alps.checkpoints.atomic_io import locked_directory, write_text
from alps.core.device import pick_device
from alps.core.errors import CheckpointError, SolveFailed
from alps.core.memory import reset_peak_memory
from alps.core.progress import Progress
from alps.core.provenance import provenance
from alps.core.text_format import dtype_name, format_duration
from alps.data.calibration import LoadedModel, load
from alps.data.mixture import CalibrationMix, load_calibration
from alps.data.windows import Windows
from alps.evaluation.cached_reference import CachedReferenceModel
from alps.evaluation.compare_config import COMPARISON_NAME, Combination, CompareConfig
from alps.evaluation.kl_divergence import measure_divergence
from alps.evaluation.perplexity import measure_perplexity
from alps.evaluation.sample_outputs import continue_prompts
from alps.evaluation.tasks import TaskSet, find_tasks, score_tasks
from alps.models.blocks import find_blocks
from alps.models.demo_model import DEMO_MODEL_NAME
from alps.models.fingerprint import model_sha256
from alps.models.load import check_model_path, parse_dtype
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


def run_comparison(settings: CompareConfig, out: Path, progress: Progress) -> list[Result]:
    """Do what is missing of a comparison in `out`, and return all of its results, the dense model's first.

    Args:
        settings: what to compare, and on what.
        out: directory; results.jsonl, a table, the settings and in the end a page of figures appear in it. One that
            holds the same comparison is gone on with.
        watcher: told of the steps of every run.

    Raises:
        ConfigError, UnsupportedModel, CheckpointError: nothing was run.
        SolveFailed: some runs failed, the first of them named; all others are done.
    """
    combinations = settings.combinations()
    parse_dtype(settings.dtype)
    pick_device(settings.device)
    if settings.model != DEMO_MODEL_NAME:
        check_model_path(settings.model)
    tasks = find_tasks(settings.tasks, _path(settings.task_data), settings.limit) if settings.tasks else None
    read = [one.settings for one in combinations if one.settings.resolve().reads_inputs]
    sources = {spec: load_calibration(*spec) for spec in dict.fromkeys((one.calibration, one.samples) for one in read)}
    with locked_directory(out, COMPARISON_NAME):
        settings.check_continues(out)
        done = read_results(out / RESULTS_NAME)
        bench = _Bench(settings, load(settings.model, settings.dtype), tasks, sources, progress)
        blocks = find_blocks(bench.dense.model)
        for one in combinations:
            ruled = one.settings.rules().applied(bench.dense.model, blocks)
            check_fit(ruled.blocks, one.settings.build_pattern(), ruled.patterns)
        bench.check_calibrations(read)
        bench.check_same(done, out)
        write_text(out / COMPARISON_NAME, settings.to_yaml())
        return _run_missing(bench, combinations, done, out)


def _run_missing(bench: _Bench, combinations: list[Combination], done: list[Result], out: Path) -> list[Result]:
    failed: list[str] = []
    if not any(result.method == DENSE for result in done):
        _LOG.info(f"Measuring the dense model {bench.settings.model} ...")
        done = _keep(out, [bench.dense_result(), *done])
    known = {result.key for result in done}
    missing = [one for one in combinations if one.key not in known]
    spent: list[float] = []
    for number, one in enumerate(missing, 1):
        left = f", about {format_duration(sum(spent) / len(spent) * (len(missing) - number + 1))} left" if spent else ""
        _LOG.info(f"Run {number} of {len(missing)}: {one.title}{left} ...")
        start = datetime.now(UTC)
        try:
            done = _keep(out, [*done, bench.result(one)])
        except SolveFailed as error:
            failed.append(f"{one.title}: {error}")
            _LOG.warning(f"Failed, the others go on: {failed[-1]}")
        except KeyboardInterrupt as stop:
            raise type(stop)(
                f"Interrupted: {number - 1} runs are kept in '{out}', and the same command goes on with the rest."
            ) from None
        spent.append((datetime.now(UTC) - start).total_seconds())
    publish(out, done)
    if failed:
        raise SolveFailed(f"{len(failed)} of {len(missing)} runs failed, first {failed[0]}")
    return done


def _keep(out: Path, results: list[Result]) -> list[Result]:
    write_results(out / RESULTS_NAME, results)
    write_text(out / TABLE_NAME, summary(results))
    return results


@dataclass
class _Bench:
    """Everything that the runs share: the dense model, a copy to prune, texts, tasks, and calibration windows."""

    settings: CompareConfig
    dense: LoadedModel
    tasks: TaskSet | None
    sources: dict[tuple[str, int], CalibrationMix]
    progress: Progress
    drawn: dict[tuple[str, int, int, int], Windows] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wanted = self.settings
        self.device = pick_device(wanted.device)
        self.sha256 = model_sha256(self.dense.model)
        self.texts = [self.dense.evaluation(text, wanted.eval_seqlen, wanted.windows) for text in wanted.texts]
        self.copy = LoadedModel(self.dense.name, copy.deepcopy(self.dense.model), self.dense.tokenizer)
        # Every run is measured against the dense model on the same windows.
        self.reference = CachedReferenceModel(self.dense.model)

    def windows(self, wanted: PruneConfig) -> Windows:
        """Calibration windows, drawn once; where the model samples its own, it is the dense one."""
        sizes = (wanted.samples, wanted.seqlen, wanted.seed)
        key = (wanted.calibration, *sizes)
        if key not in self.drawn:
            source = self.sources[wanted.calibration, wanted.samples]
            self.drawn[key] = self.dense.calibration(source, *sizes, self.device, self.progress)
        return self.drawn[key]

    def check_calibrations(self, wanted: list[PruneConfig]) -> None:
        """Draw the windows of the first seed from every text, so that one that is too short is told before any run."""
        for one in wanted:
            parts = self.sources[one.calibration, one.samples].sources
            if one.seed == 0 and all(part.text is not None for part in parts):
                self.windows(one)

    def check_same(self, done: list[Result], out: Path) -> None:
        """Refuse to go on where the model or a text is no longer what the results were measured on.

        Raises:
            CheckpointError: names what has changed.
        """
        for result in done:
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

    def dense_result(self) -> Result:
        """The dense model, measured like all others."""
        model = self.dense
        reset_peak_memory(self.device)
        return Result(
            model=self.settings.model,
            model_sha256=self.sha256,
            architecture=type(model.model).__name__,
            dtype=dtype_name(next(model.model.parameters()).dtype),
            device=str(self.device),
            method=DENSE,
            pattern="",
            seed=None,
            evaluations=[
                measure_perplexity(self.reference, w, name=model.name, device=self.device, progress=self.progress)
                for w in self.texts
            ],
            tasks=self._scores(model),
            continuations=self._continuations(model),
            versions=provenance(),
            finished=_now(),
        )

    def result(self, one: Combination) -> Result:
        """Prune the copy as asked for, and measure it."""
        self.copy.model.load_state_dict(self.dense.model.state_dict())
        recipe, context = one.settings.resolve(), make_context(one.settings, self.progress)
        windows = self.windows(one.settings) if recipe.reads_inputs else None
        reset_peak_memory(self.device)
        report = prune_model(self.copy, windows, recipe, context, seed=one.seed)
        names = (f"{self.dense.name}, {one.method} {one.pattern}", self.dense.name)
        models = (self.copy.model, self.reference)
        found: list[EvaluationRecord] = [
            measure_divergence(*models, text, names=names, device=self.device, progress=self.progress)
            for text in self.texts
        ]
        return Result.from_report(
            report,
            one.method,
            model_sha256=self.sha256,
            pattern=one.pattern,
            seed=one.seed,
            settings=one.settings.model_dump(mode="json"),
            evaluations=found,
            tasks=self._scores(self.copy),
            continuations=self._continuations(self.copy),
            finished=_now(),
        )

    def _scores(self, model: LoadedModel) -> list[TaskRecord]:
        return [] if self.tasks is None else score_tasks(model, self.tasks, self.device, batch_size=_BATCH_SIZE)

    def _continuations(self, model: LoadedModel) -> list[Continuation]:
        pairs = continue_prompts(model, self.settings.prompts, self.settings.prompt_tokens, self.device)
        return [Continuation(prompt=prompt, text=text) for prompt, text in pairs]


def _path(folder: str | None) -> Path | None:
    return None if folder is None else Path(folder)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
