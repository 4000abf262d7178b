"""Synthetic results of `alps compare`, of any size, equal at every call."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from alps.reporting.compare_results import DENSE, Continuation, LayerResult, Result, SupportCheck
from alps.reporting.records import (
    CalibrationPart,
    CalibrationRecord,
    ComparisonRecord,
    Estimate,
    EvaluationRecord,
    TaskRecord,
)

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ENTRIES = 100_000


def comparison(
    methods: Sequence[str] = ("wanda", "alps", "best"),
    patterns: Sequence[str] = ("0.5", "0.6", "0.7", "0.8", "2:4", "4:8"),
    seeds: int = 2,
    blocks: int = 4,
    prompts: Sequence[str] = ("Once upon a time",),
    texts: Sequence[str] = ("wikitext2", "c4.jsonl"),
    tasks: Sequence[str] = ("piqa",),
    **more: Any,
) -> list[Result]:
    """Return results of the dense model, then of every method at every pattern with every seed.

    Methods that begin with `alps` have traces; `best` has an allocation that is not uniform.
    """
    draw = random.Random(3)
    base: dict[str, Any] = {
        "model": "owner/small",
        "model_sha256": "ab12" * 16,
        "architecture": "LlamaForCausalLM",
        "dtype": "bfloat16",
        "device": "cuda:0",
        "versions": {
            "alps": "0.1.0",
            "torch": "2.13.0",
            "machine": "Some CPU, 2 cores, 1 threads",
            "commit": "1a2b3c4",
        },
        **more,
    }
    records = [
        EvaluationRecord(
            model="m", text=t, windows=40, seqlen=1024, predicted_tokens=40920, loss=3.2, perplexity=24.53 + 7 * i,
            sha256=f"{i}c" * 32,
        )
        for i, t in enumerate(texts)
    ]  # fmt: skip
    continuations = [Continuation(prompt=prompt, text=f" {prompt.lower()} there was") for prompt in prompts]
    results = [
        Result(
            **base, method=DENSE, pattern="", seed=None, evaluations=records, tasks=_tasks(tasks, 0.7),
            continuations=continuations,
        )
    ]  # fmt: skip
    for seed in range(seeds):
        for pattern in patterns:
            for place, method in enumerate(methods):
                share = _share(pattern)
                worse = 1 + 2 ** (10 * share - 3) * (1 + len(methods) - place) * draw.uniform(0.9, 1.1) / 4
                results.append(
                    Result(
                        **base,
                        method=method,
                        pattern=pattern,
                        seed=seed,
                        settings={
                            "method": method,
                            "seed": seed,
                            "allocation": "sensitivity" if method == "best" else "uniform",
                        },
                        calibration=_calibration(seed),
                        sparsity=share,
                        mean_error=0.01 * worse,
                        mean_magnitude_error=0.04 * worse,
                        layers=_sites(method, share, blocks, worse, draw),
                        evaluations=[_compared(record, worse) for record in records],
                        tasks=_tasks(tasks, 0.7 - share / 5),
                        continuations=[c.model_copy(update={"text": f"{c.text} {method}"}) for c in continuations],
                        seconds={"load": 2.0, "forward": 9.5, "gram": 4.0, "solve": 20.0, "admm": 14.5, "total": 36.0},
                        peak_host_bytes=3 * 2**30 + place * 2**28,
                        peak_device_bytes=5 * 2**30,
                        finished=f"2026-01-0{1 + seed}T12:00:00+00:00",
                    )
                )
    return results


def _share(pattern: str) -> float:
    keep, colon, group = pattern.partition(":")
    return 1 - int(keep) / int(group) if colon else float(pattern)


def _calibration(seed: int) -> CalibrationRecord:
    parts = [CalibrationPart(source="c4.jsonl", windows=64)]
    return CalibrationRecord(
        source="c4.jsonl", windows=64, seqlen=512, tokens=32768, seed=seed, sha256=f"{seed}d" * 32, parts=parts
    )


def _compared(record: EvaluationRecord, worse: float) -> ComparisonRecord:
    perplexity = record.perplexity * worse
    figures: dict[str, Any] = {"reference_perplexity": record.perplexity, "ratio": worse, "kl": worse / 4}
    return ComparisonRecord(
        **{**record.model_dump(), "perplexity": perplexity}, reference="m", agreement=0.9 / worse, **figures
    )


def _tasks(names: Sequence[str], value: float) -> list[TaskRecord]:
    metrics = {"acc": Estimate(value=value, stderr=0.02)}
    return [
        TaskRecord(model="m", task=name, metrics=metrics, items=500, num_fewshot=0, lm_eval="0.4.13") for name in names
    ]


def _sites(method: str, share: float, blocks: int, worse: float, draw: random.Random) -> list[LayerResult]:
    sites = []
    for block in range(blocks):
        for kind in KINDS:
            zeros = share if method != "best" else min(share + draw.uniform(-0.1, 0.1), 0.99)
            error = 0.01 * worse * draw.lognormvariate(0, 0.8) * (1 + block / blocks)
            sites.append(
                LayerResult(
                    name=f"model.layers.{block}.{'mlp' if len(kind) > 6 else 'self_attn'}.{kind}",
                    block=block,
                    kind=kind,
                    entries=_ENTRIES,
                    zeros=round(zeros * _ENTRIES),
                    error=error,
                    magnitude_error=4 * error,
                )
            )
    if method.startswith("alps"):
        by_error = sorted(sites, key=lambda site: site.error or 0.0)
        for place in (0, len(sites) // 2, len(sites) - 1):
            by_error[place].trace = _trace(restarts=place == 0, error=by_error[place].error or 0.0)
    return sites


def _trace(restarts: bool, error: float) -> list[SupportCheck]:
    """Return checks every three iterations with a growing penalty, which is reset once with `restarts`."""
    checks = []
    rho, change, gap = 0.1, 9000, 0.5
    for number in range(1, 31):
        if restarts and number == 3:
            rho, change, gap = 0.02, 9000, 0.6
        last = number == 30
        checks.append(
            SupportCheck(
                iteration=3 * number, rho=rho, support_change=0 if last else change, gap=gap,
                error=error * (1 + 0.5 * gap),
            )
        )  # fmt: skip
        rho, change, gap = 1.2 * rho, max(int(change * 0.72), 1), gap * 0.82
    return checks


def measured_result(
    method: str, pattern: str = "0.5", seed: int | None = 0, perplexity: float = 10.0, **more: Any
) -> Result:
    """Return one result with a perplexity, and a divergence where it is not of the dense model."""
    record: dict[str, Any] = {"model": "m", "text": "t", "windows": 1, "seqlen": 9, "predicted_tokens": 8, "loss": 1.0}
    evaluation: EvaluationRecord = EvaluationRecord(**record, perplexity=perplexity)
    if method != "dense":
        far: dict[str, Any] = {
            "reference": "d",
            "reference_perplexity": 9.0,
            "ratio": perplexity / 9,
            "kl": perplexity / 100,
        }
        evaluation = ComparisonRecord(**record, perplexity=perplexity, agreement=0.5, **far)
    base = {"model": "m", "model_sha256": "ab" * 32, "architecture": "A", "dtype": "float32", "device": "cpu"}
    return Result(**{**base, "method": method, "pattern": pattern, "seed": seed, "evaluations": [evaluation], **more})
