"""Perplexity, divergence from the dense model and layer errors of every method: one JSON line a run, then tables.

A method may also be a preset of ALPS (paper, fast, best), and settings of `alps prune` may follow either, each after a
plus: `alps+true_sequential+dense_target=0.4`, `best+reconstruct_epochs=0`, `wanda+refit`. A run that is already in the
results file is not done again, so that the script can be stopped and started. Example:

    python benchmarks/quality.py --calibration c4.jsonl --text wikitext2:test.txt --text c4-validation.jsonl \
        --methods alps,best,sparsegpt+dense_target=0.4 --patterns 0.7,2:4 --seeds 0,1,2 --results quality.jsonl
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from alps.core.device import pick_device
from alps.core.memory import reset_peak_memory
from alps.core.progress import ConsoleProgress
from alps.data.loaded_model import LoadedModel, load
from alps.data.mixture import load_calibration
from alps.evaluation.api import evaluate
from alps.evaluation.compare_config import method_settings
from alps.pruning.config import PruneConfig, load_prune_config
from alps.pruning.job import make_context
from alps.pruning.run import prune_model
from alps.pruning.write import write
from alps.reporting.records import ComparisonRecord

Run = dict[str, Any]


def main() -> None:
    """Do what is missing, then print the tables of everything in the results file."""
    options = _options()
    path = Path(options.results)
    dense: LoadedModel | None = None
    for pattern in options.patterns.split(","):
        for seed in map(int, options.seeds.split(",")):
            for method in options.methods.split(","):
                key = {"method": method, "pattern": pattern, "seed": seed}
                if not any(key.items() <= row.items() for row in _read(path)):
                    dense = dense or load(options.model)
                    row = {**key, **measure(options, method, pattern, seed, dense)}
                    with path.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    print(tables(_read(path)))


def measure(options: argparse.Namespace, method: str, pattern: str, seed: int, dense: LoadedModel) -> Run:
    """One run: load, prune (unless dense), evaluate; what it was measured on travels with the figures."""
    progress = ConsoleProgress(Console(stderr=True), every_seconds=60)
    loaded, reference = (dense, None) if method == "dense" else (load(options.model), dense)
    row: Run = {"model": options.model, "seqlen": options.seqlen, "samples": options.samples}
    if method != "dense":
        row |= _pruned(options, loaded, method, pattern, seed, progress)
    start = time.perf_counter()
    found = evaluate(
        loaded,
        options.text,
        reference=reference,
        seqlen=options.eval_seqlen,
        windows=options.windows,
        device=options.device,
        progress=progress,
    )
    row["perplexity"] = {record.text: record.perplexity for record in found}
    row["kl"] = {record.text: record.kl for record in found if isinstance(record, ComparisonRecord)}
    row["agreement"] = {record.text: record.agreement for record in found if isinstance(record, ComparisonRecord)}
    row["predicted_tokens"] = {record.text: record.predicted_tokens for record in found}
    row["evaluation_seconds"] = time.perf_counter() - start
    return row


def _pruned(
    options: argparse.Namespace, loaded: LoadedModel, method: str, pattern: str, seed: int, progress: ConsoleProgress
) -> Run:
    asked, device = _asked(options, method, pattern), pick_device(options.device)
    source = load_calibration(asked.calibration, options.samples)
    windows = loaded.calibration(source, options.samples, options.seqlen, seed, device, progress)
    # A peak is the process's: without this, every run would report that of the largest before it.
    reset_peak_memory(device)
    start = time.process_time()
    report = prune_model(loaded, windows, asked.resolve(), make_context(asked, progress), seed=seed)
    cpu_seconds = time.process_time() - start
    if options.save:
        write(loaded, report, Path(options.save) / f"{method}-{pattern}-{seed}".replace(":", "of"))
    worse = [s.name for s in report.layers if (s.error or 0) > (s.magnitude_error or 0)]
    return {
        "sparsity": report.sparsity,
        "mean_error": report.mean_error,
        "mean_magnitude_error": report.mean_magnitude_error,
        "sites_above_magnitude": len(worse),
        "layers": len(report.layers),
        "seconds": report.seconds,
        "cpu_seconds": cpu_seconds,
        "peak_host_bytes": report.peak_host_bytes,
        "calibration_sha256": report.calibration.sha256 if report.calibration else None,
        "versions": report.versions,
    }


def _asked(options: argparse.Namespace, method: str, pattern: str) -> PruneConfig:
    aim = {"pattern": pattern} if ":" in pattern else {"sparsity": float(pattern)}
    shared = {"model": options.model, "calibration": options.calibration, "device": options.device}
    return load_prune_config(None, {**shared, **aim, **method_settings(method)})


def tables(rows: list[Run]) -> str:
    """One Markdown table a pattern: mean, and spread over seeds where there are several."""
    parts = []
    for pattern in dict.fromkeys(row["pattern"] for row in rows):
        chosen = [row for row in rows if row["pattern"] == pattern]
        texts = list(chosen[0]["perplexity"])
        heads = [
            "method",
            "seeds",
            "mean error",
            "of magnitude's",
            "sites above magnitude",
            *texts,
            *(f"KL {text}" for text in texts),
            "prune s",
            "CPU s",
            "GiB",
        ]
        lines = [f"\n### {pattern}\n", f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
        for method in dict.fromkeys(row["method"] for row in chosen):
            same = [row for row in chosen if row["method"] == method]
            lines.append(f"| {method} | {len(same)} | {' | '.join(_cells(same, texts))} |")
        parts.append("\n".join(lines))
    return "\n".join(parts)


def _cells(rows: list[Run], texts: list[str]) -> list[str]:
    perplexities = [_spread([row["perplexity"][text] for row in rows], ".1f") for text in texts]
    # Lines written before divergences were measured have none.
    known = [[row["kl"][text] for row in rows if text in row.get("kl", {})] for text in texts]
    measured = [*perplexities, *(_spread(values, ".3f") if values else "" for values in known)]
    if "mean_error" not in rows[0]:
        return ["", "", "", *measured, "", "", ""]
    errors = [row["mean_error"] for row in rows]
    ratios = [row["mean_error"] / row["mean_magnitude_error"] for row in rows]
    above = "/".join(str(row["sites_above_magnitude"]) for row in rows)
    seconds = _spread([row["seconds"]["total"] for row in rows], ".0f")
    # Lines written before CPU time was taken have none.
    spent = [row["cpu_seconds"] for row in rows if "cpu_seconds" in row]
    memory = f"{max(row['peak_host_bytes'] for row in rows) / 2**30:.2f}"
    return [
        _spread(errors, ".4f"),
        _spread(ratios, ".3f"),
        above,
        *measured,
        seconds,
        _spread(spent, ".0f") if spent else "",
        memory,
    ]


def _spread(values: list[float], form: str) -> str:
    mean = f"{statistics.mean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):{form}}"


def _read(path: Path) -> list[Run]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--methods", default="dense,magnitude,wanda,sparsegpt,dsnot,alps")
    parser.add_argument("--patterns", default="0.5,0.6,0.7,0.8,2:4,4:8")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--eval-seqlen", type=int, default=1024)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--save", help="folder for the pruned checkpoints; without it they are not kept")
    parser.add_argument("--results", default="quality.jsonl")
    return parser.parse_args()


if __name__ == "__main__":
    main()
