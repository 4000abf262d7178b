"""Compare ALPS with another implementation of it and with SparseGPT, on layers of a real model.

The inputs of all layers of some blocks are collected from the dense model. The methods solve each problem in turn, so
that a slow moment of the machine affects all of them. The other implementation is fmchisel 0.1.2 (PyPI), which is not a
dependency; without it its column is left out:

    pip install --no-deps --target build/fmchisel fmchisel==0.1.2
    python benchmarks/solver.py --calibration c4.jsonl --fmchisel build/fmchisel
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from alps.core.device import exact_float32
from alps.core.provenance import provenance
from alps.core.statistics import InputStats, relative_error
from alps.solvers import Alps, Method, get_method
from alps.solvers.patterns import Pattern, SemiStructured, parse_pattern
from layers import calibration_options, captured, markdown

Solver = Callable[[list[Tensor], InputStats, Pattern], list[Tensor]]


@dataclass
class Column:
    """Seconds and relative errors of one method by kind of layer, in the order of the problems."""

    solve: Solver
    seconds: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, list[float]] = field(default_factory=dict)

    def total(self) -> float:
        """Return the seconds over all problems."""
        return sum(map(sum, self.seconds.values()))

    def mean_error(self) -> float:
        """Return the mean relative error over all problems."""
        return statistics.mean(e for errors in self.errors.values() for e in errors)


def main() -> None:
    """Solve every problem with every method and print one table."""
    options = _options()
    columns = {name: Column(_ours(name)) for name in options.methods.split(",")}
    if options.fmchisel:
        columns["fmchisel"] = Column(_theirs(_fmchisel(Path(options.fmchisel))))
    pattern = parse_pattern(options.pattern)
    tokens, blocks = 0, set(map(int, options.blocks.split(",")))
    with exact_float32():
        for shared in captured(options, lambda block: block.index in blocks):
            stats = shared.sums.into_stats()
            tokens = stats.tokens
            kinds = [site.kind for site in shared.sites]
            weights = [site.read().float().clone() for site in shared.sites]
            for column in columns.values():
                _run(column, kinds, weights, stats, pattern)
    facts = provenance()
    print(
        f"{options.model}, blocks {options.blocks}, {pattern}, {tokens} tokens of {options.calibration}, seed "
        f"{options.seed}, {facts['machine']}, torch {facts['torch']}, commit {facts['commit']}\n"
    )
    print(table(columns))


def _run(column: Column, kinds: list[str], weights: list[Tensor], stats: InputStats, pattern: Pattern) -> None:
    start = time.perf_counter()
    answers = column.solve(weights, stats, pattern)
    seconds = time.perf_counter() - start
    entries = sum(weight.numel() for weight in weights)
    for kind, weight, answer in zip(kinds, weights, answers, strict=True):
        kept = weight.numel() - pattern.pruned_count(weight.numel())
        assert int((answer != 0).sum()) <= kept, (kind, "keeps too many weights")
        # Layers of one input are solved and timed together; the time is divided by their sizes.
        column.seconds.setdefault(kind, []).append(seconds * weight.numel() / entries)
        column.errors.setdefault(kind, []).append(relative_error(answer, weight, stats))


def _ours(name: str) -> Solver:
    # A name may have an effort, as in alps:high; alps:float32 uses no products of low precision.
    base, _, effort = name.partition(":")
    method: Method = (
        Alps(precision="float32") if name == "alps:float32" else get_method(base, effort=effort or "normal")
    )

    def solve(weights: list[Tensor], stats: InputStats, pattern: Pattern) -> list[Tensor]:
        state = method.prepare(stats)
        return [method.solve(weight, state, pattern).weight for weight in weights]

    return solve


def _theirs(module: ModuleType) -> Solver:
    def solve(weights: list[Tensor], stats: InputStats, pattern: Pattern) -> list[Tensor]:
        keep, group = (pattern.keep, pattern.group) if isinstance(pattern, SemiStructured) else (0, 0)
        answers = []
        for weight in weights:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight.data = weight
            with torch.no_grad():
                answer: Any = module.sparsify_weight(layer, {layer: stats.gram()}, pattern.sparsity, keep, group)
            answers.append(answer[1])
        return answers

    return solve


def _fmchisel(folder: Path) -> ModuleType:
    """Load the one file of fmchisel that is needed, with a replacement for a constant of llm-compressor."""
    parts = ["llmcompressor", "modifiers", "obcq", "sgpt_sparsify"]
    for i in range(len(parts)):
        sys.modules.setdefault(".".join(parts[: i + 1]), ModuleType(parts[i]))
    sys.modules[".".join(parts)].__dict__["SGPT_PRECISION"] = torch.float32
    path = folder / "fmchisel" / "pruning" / "alps" / "utils" / "alps_sparsify.py"
    spec = importlib.util.spec_from_file_location("alps_sparsify", path)
    if spec is None or spec.loader is None or not path.exists():
        raise SystemExit(f"{path} does not exist: see the first lines of this script")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table(columns: dict[str, Column]) -> str:
    """Format seconds by kind and in total, their ratio to the first method, and the mean relative error."""
    first = next(iter(columns.values()))
    kinds = list(first.seconds)
    heads = ["", *(f"{kind} s" for kind in kinds), "total s", "of the first", "mean error", "of the first"]
    rows = []
    for name, column in columns.items():
        cells = [f"{sum(column.seconds[kind]):.2f}" for kind in kinds]
        cells += [f"{column.total():.2f}", f"{column.total() / first.total():.2f}"]
        cells += [f"{column.mean_error():.6f}", f"{column.mean_error() / first.mean_error():.4f}"]
        rows.append([name, *cells])
    return markdown(heads, rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    calibration_options(parser)
    parser.add_argument("--blocks", default="0,5,15,25,29")
    parser.add_argument("--pattern", default="0.7")
    parser.add_argument("--methods", default="alps,alps:float32,alps:high,sparsegpt")
    parser.add_argument("--fmchisel", default="", help="folder into which fmchisel 0.1.2 was installed")
    return parser.parse_args()


if __name__ == "__main__":
    main()
