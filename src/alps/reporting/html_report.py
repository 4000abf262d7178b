"""report.html: one file that shows a comparison or a run, made from its results and nothing else.

No script, no request: what is drawn is in the file, and its content security policy forbids the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import jinja2

from alps.models.load import looks_local
from alps.reporting import html_charts as charts
from alps.reporting import html_convergence as traces
from alps.reporting import html_heatmaps as maps
from alps.reporting.compare_results import Result
from alps.reporting.markdown_tables import tables
from alps.reporting.run_selection import Runs
from alps.reporting.svg import Section, number, styled

_HASH = 12
# Settings that name the run rather than the method.
_OF_THE_RUN = ("model", "sparsity", "pattern", "seed", "device", "dtype", "preset")


def report_page(results: Sequence[Result], notes: Sequence[str] = ()) -> str:
    """The page of some results.

    Args:
        results: of one comparison, or of one run; at least one.
        notes: sentences that have to be read before any figure.

    Returns:
        A whole HTML document. The same results give the same bytes.
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
    """A hub name as it is, of a path only its end: nobody else's folders are of interest."""
    return Path(model).name if looks_local(model) else model


def _sections(runs: Runs) -> list[Section]:
    if not runs.pruned:
        return []
    with styled():
        found = [
            charts.perplexity(runs),
            maps.errors(runs),
            maps.sparsities(runs),
            traces.traces(runs),
            charts.cost(runs),
        ]
    return [section for section in found if section is not None]


def _subtitle(runs: Runs) -> str:
    if len(runs.pruned) == 1:
        return f"Pruned to {runs.pruned[0].pattern} with {runs.pruned[0].method}"
    counts = [(len(runs.methods), "method"), (len(runs.patterns), "pattern"), (len(runs.seeds), "seed")]
    words = ", ".join(f"{count} {word}{'' if count == 1 else 's'}" for count, word in counts if count)
    return f"{len(runs.pruned)} runs from the same weights: {words}" if runs.pruned else "The dense model alone"


def _lead(runs: Runs) -> str:
    """The finding in a sentence: the best perplexity on the first text at the pattern that is shown first."""
    if not runs.pruned:
        return ""
    pattern = runs.patterns[0]
    found = [
        (sum(r.evaluations[0].perplexity for r in every) / len(every), method)
        for method in runs.methods
        if (every := [result for result in runs.select(method, pattern) if result.evaluations])
    ]
    if not found:
        only = runs.first(pattern)[0]
        error = "" if only.mean_error is None else f", mean relative reconstruction error {number(only.mean_error)}"
        than = only.mean_magnitude_error
        return (
            f"{100 * only.sparsity:.2f} % of the weights in {len(only.layers)} linear layers are zero{error}"
            f"{'' if than is None else f'; magnitude pruning on the same inputs would have left {number(than)}'}."
        )
    (best, method), *others = sorted(found)
    text = next(r for r in runs.select(method, pattern) if r.evaluations).evaluations[0].text
    known = [f"next is {others[0][1]} with {number(others[0][0])}"] if others else []
    known += [f"the dense model has {number(runs.dense.evaluations[0].perplexity)}"] if runs.dense else []
    return f"At {pattern}, {method} has perplexity {number(best)} on {text}" + "; ".join(["", *known]) + "."


def _facts(runs: Runs) -> list[tuple[str, list[str]]]:
    """Conditions under which everything was measured: a name, and lines."""
    first, pruned = runs.results[0], runs.pruned
    facts = [("Model", [f"{model_name(first.model)}: {first.architecture}, {first.dtype}"])]
    if first.model_sha256:
        facts.append(("Weights", [f"sha256 {first.model_sha256[:_HASH]}"]))
    calibrations = {
        (used.source, used.windows, used.seqlen, used.tokens, used.seed, used.sha256[:_HASH])
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
        + (f", sha256 {e.sha256[:_HASH]}" if e.sha256 else "")
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


def _dense(runs: Runs) -> list[tuple[str, str]]:
    """The dense model's figures."""
    if runs.dense is None:
        return []
    found = [(f"Perplexity on {e.text}", number(e.perplexity)) for e in runs.dense.evaluations]
    for task in runs.dense.tasks:
        for name, estimate in task.metrics.items():
            scale, unit = (100.0, " %") if name.startswith("acc") else (1.0, "")
            error = "" if estimate.stderr is None else f" ± {scale * estimate.stderr:.1f}"
            found.append((f"{task.task}, {name}", f"{scale * estimate.value:.1f}{error}{unit}"))
    return found


def _differences(runs: Runs) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Settings in which methods differ: their names, and each method's values."""
    settings = {method: next(r.settings for r in runs.pruned if r.method == method) for method in runs.methods}
    names = dict.fromkeys(name for values in settings.values() for name in values if name not in _OF_THE_RUN)
    shown = [name for name in names if len({str(values.get(name)) for values in settings.values()}) > 1]
    return shown, [(m, [str(values.get(name, "")) for name in shown]) for m, values in settings.items()]


def _continuations(runs: Runs) -> list[tuple[str, list[tuple[str, list[tuple[str, str]]]]]]:
    """By pattern, then by prompt: who went on how, the dense model first."""
    prompts = list(dict.fromkeys(c.prompt for result in runs.results for c in result.continuations))
    found = []
    for pattern in runs.patterns if runs.pruned else [""]:
        authors = [*([runs.dense] if runs.dense else []), *(runs.first(pattern) if pattern else [])]
        by_prompt = [
            (prompt, [(r.method, c.text) for r in authors for c in r.continuations if c.prompt == prompt])
            for prompt in prompts
        ]
        if prompts:
            found.append((pattern, by_prompt))
    return found
