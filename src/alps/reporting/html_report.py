"""Page report.html: a single file that shows the results of a comparison or a run.

The page has no script and makes no request; its content security policy forbids both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import jinja2

from alps.models.load import looks_local
from alps.reporting.compare_results import Result
from alps.reporting.html_charts import cost_section, perplexity_section
from alps.reporting.html_convergence import convergence_section
from alps.reporting.html_heatmaps import error_section, sparsity_section
from alps.reporting.markdown_tables import tables
from alps.reporting.records import EvaluationRecord
from alps.reporting.run_report import STRUCTURED
from alps.reporting.run_selection import Runs
from alps.reporting.svg import Section, format_number, page_style

_HASH_DIGITS = 12
# Settings that identify the run rather than the method.
_RUN_SETTINGS = ("model", "sparsity", "pattern", "seed", "device", "dtype", "preset")


def report_page(results: Sequence[Result], notes: Sequence[str] = ()) -> str:
    """Render the page of some results.

    Args:
        results: of one comparison, or of one run; at least one.
        notes: sentences that a reader needs before any figure.

    Returns:
        A complete HTML document. Equal results give equal bytes.
    """
    assert results
    runs = Runs(results)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((files("alps.reporting") / "report.html").read_text(encoding="utf-8"))
    return template.render(
        title=model_name(results[0].model),
        subtitle=_subtitle(runs),
        lead=_lead(runs),
        notes=notes,
        facts=_facts(runs),
        dense=_dense(runs),
        sections=_sections(runs),
        tables=tables(results),
        differences=_differences(runs),
        continuations=_continuations(runs),
    )


def model_name(model: str) -> str:
    """Return a hub name unchanged, and of a path only the last part, which hides the user's folders."""
    return Path(model).name if looks_local(model) else model


def _sections(runs: Runs) -> list[Section]:
    if not runs.pruned:
        return []
    with page_style():
        sections = [
            perplexity_section(runs),
            error_section(runs),
            sparsity_section(runs),
            convergence_section(runs),
            cost_section(runs),
        ]
    return [section for section in sections if section is not None]


def _subtitle(runs: Runs) -> str:
    if len(runs.pruned) == 1:
        if runs.pruned[0].method == STRUCTURED:
            return f"Shrunk by {STRUCTURED}"
        return f"Pruned to {runs.pruned[0].pattern} with {runs.pruned[0].method}"
    counts = [(len(runs.methods), "method"), (len(runs.patterns), "pattern"), (len(runs.seeds), "seed")]
    words = ", ".join(f"{count} {word}{'' if count == 1 else 's'}" for count, word in counts if count)
    return f"{len(runs.pruned)} runs from the same weights: {words}" if runs.pruned else "Only the dense model"


def _lead(runs: Runs) -> str:
    """Summarise the results in a sentence: the best perplexity on the first text at the pattern shown first."""
    if not runs.pruned:
        return ""
    pattern = runs.patterns[0]
    means = [
        (sum(values) / len(values), method)
        for method in runs.methods
        if (values := runs.perplexities(method, pattern, 0))
    ]
    if not means:
        return _error_sentence(runs.first_seeds(pattern)[0])
    (best, method), *others = sorted(means)
    text = next(r for r in runs.select(method, pattern) if r.evaluations).evaluations[0].text
    comparisons = [f"next is {others[0][1]} with {format_number(others[0][0])}"] if others else []
    dense = runs.dense_perplexity(0)
    comparisons += [] if dense is None else [f"the dense model has {format_number(dense)}"]
    return (
        f"At {pattern}, {method} has perplexity {format_number(best)} on {text}" + "; ".join(["", *comparisons]) + "."
    )


def _error_sentence(result: Result) -> str:
    """Summarise a run without perplexities in a sentence."""
    error = (
        "" if result.mean_error is None else f", mean relative reconstruction error {format_number(result.mean_error)}"
    )
    magnitude = result.mean_magnitude_error
    comparison = (
        "" if magnitude is None else f"; magnitude pruning on the same inputs leaves {format_number(magnitude)}"
    )
    zeros = f"{100 * result.sparsity:.2f} % of the weights in {len(result.layers)} linear layers are zero"
    return f"{zeros}{error}{comparison}."


def _facts(runs: Runs) -> list[tuple[str, list[str]]]:
    """List the conditions of the measurements, each as a name and lines of text."""
    first, pruned = runs.results[0], runs.pruned
    facts = [("Model", [f"{model_name(first.model)}: {first.architecture}, {first.dtype}"])]
    if first.model_sha256:
        facts.append(("Weights", [f"sha256 {first.model_sha256[:_HASH_DIGITS]}"]))
    calibrations = {
        (used.source, used.windows, used.seqlen, used.tokens, used.seed, used.sha256[:_HASH_DIGITS])
        for result in pruned
        if (used := result.calibration)
    }
    facts.append(
        (
            "Calibration",
            [
                f"{source}: {windows} windows of {seqlen} tokens ({tokens:,} tokens)"
                + ("" if seed is None else f", seed {seed}")
                + f", sha256 {sha256}"
                for source, windows, seqlen, tokens, seed, sha256 in sorted(
                    calibrations, key=lambda c: (c[0], c[4] or 0)
                )
            ],
        )
    )
    texts = [
        f"{e.text}: {e.windows} windows of {e.seqlen} tokens ({e.predicted_tokens:,} predicted)"
        + (f", sha256 {e.sha256[:_HASH_DIGITS]}" if e.sha256 else "")
        for e in first.evaluations
    ]
    tasks = [f"{t.task}: {t.items or 'all'} items, {t.num_fewshot} shots, lm-eval {t.lm_eval}" for t in first.tasks]
    facts.append(("Measured on", [*texts, *tasks]))
    facts.append(("Device", [first.device]))
    commits = list(dict.fromkeys(result.versions.get("commit", "") for result in runs.results))
    facts += [(name, [value]) for name, value in first.versions.items() if name in ("machine",)]
    packages = ", ".join(f"{k} {v}" for k, v in first.versions.items() if k not in ("machine", "commit"))
    facts.append(("Versions", [packages] if packages else []))
    facts.append(("Commit", [", ".join(commit for commit in commits if commit)] if any(commits) else []))
    finished = sorted(result.finished for result in runs.results if result.finished)
    facts.append(("Finished", [finished[-1]] if finished else []))
    return [(name[:1].upper() + name[1:], lines) for name, lines in facts if lines]


def _perplexity(record: EvaluationRecord) -> str:
    return record.perplexity_text("") if math.isinf(record.perplexity) else format_number(record.perplexity)


def _dense(runs: Runs) -> list[tuple[str, str]]:
    """List the measurements of the dense model."""
    if runs.dense is None:
        return []
    rows = [(f"Perplexity on {e.text}", _perplexity(e)) for e in runs.dense.evaluations]
    for task in runs.dense.tasks:
        for name, estimate in task.metrics.items():
            scale, unit = (100.0, " %") if name.startswith("acc") else (1.0, "")
            error = "" if estimate.stderr is None else f" ± {scale * estimate.stderr:.1f}"
            rows.append((f"{task.task}, {name}", f"{scale * estimate.value:.1f}{error}{unit}"))
    return rows


def _differences(runs: Runs) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return the names of the settings in which methods differ, and the values of each method."""
    settings = {method: next(r.settings for r in runs.pruned if r.method == method) for method in runs.methods}
    names = dict.fromkeys(name for values in settings.values() for name in values if name not in _RUN_SETTINGS)
    shown = [name for name in names if len({str(values.get(name)) for values in settings.values()}) > 1]
    return shown, [(m, [str(values.get(name, "")) for name in shown]) for m, values in settings.items()]


def _continuations(runs: Runs) -> list[tuple[str, list[tuple[str, list[tuple[str, str]]]]]]:
    """Collect the continuations by pattern and prompt, each with its method, the dense model first."""
    prompts = list(dict.fromkeys(c.prompt for result in runs.results for c in result.continuations))
    by_pattern = []
    for pattern in runs.patterns if runs.pruned else [""]:
        authors = [*([runs.dense] if runs.dense else []), *(runs.first_seeds(pattern) if pattern else [])]
        by_prompt = [
            (prompt, [(r.method, c.text) for r in authors for c in r.continuations if c.prompt == prompt])
            for prompt in prompts
        ]
        if prompts:
            by_pattern.append((pattern, by_prompt))
    return by_pattern
