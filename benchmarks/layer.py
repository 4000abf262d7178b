"""One layer problem, as in the first tables of the ALPS paper: supports with optimal weights, and the refit.

The inputs of one site are collected from the dense model. Table A: relative error of every method's support with
the exactly optimal weights on it (float64, row by row). Table B: every method as published, then refitted by 10
and by many PCG steps, then exactly, with the time of each. Example:

    python benchmarks/layer.py --calibration c4.jsonl --site model.layers.0.self_attn.k_proj
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch
from torch import Tensor

from alps.runtime import exact_float32, provenance
from alps.solvers import METHODS, Alps, Method, Refitted, get_method
from alps.solvers.hessian import damped
from alps.solvers.objective import relative_error
from alps.solvers.pattern import parse_pattern
from alps.stats import InputStats
from layers import calibration_options, captured

_SUPPORTS = ("magnitude", "wanda", "dsnot", "dsnot-sparsegpt", "sparsegpt", "alps")


def main() -> None:
    """Collect the layer problem once, then print both tables."""
    options = _options()
    with exact_float32():
        weight, stats = layer_problem(options)
        facts = provenance()
        print(
            f"{options.model} {options.site} {tuple(weight.shape)}, {stats.tokens} tokens of {options.calibration}, "
            f"seed {options.seed}, {facts['machine']}, commit {facts['commit']}\n"
        )
        patterns = options.patterns.split(",")
        print(supports_table(weight, stats, patterns))
        print(refit_table(weight, stats, patterns))


def layer_problem(options: argparse.Namespace) -> tuple[Tensor, InputStats]:
    """The dense weight (out, in) in float32 of one site, and the statistics of its inputs in the dense model."""
    for shared in captured(options, lambda block: any(site.name == options.site for site in block.sites)):
        for site in shared.sites:
            if site.name == options.site:
                return site.read().float().clone(), shared.stats
    raise SystemExit(f"no site {options.site}: try one such as model.layers.0.self_attn.k_proj")


def exact_weights(weight: Tensor, mask: Tensor, stats: InputStats) -> Tensor:
    """The optimal weights on a support: one float64 solve of H_SS x = (W H)_S for every row."""
    hessian, _ = damped(stats, 0.01)
    H = hessian.double()
    C = weight.double() @ H
    result = torch.zeros_like(C)
    for row, support in enumerate(mask):
        kept = support.nonzero().squeeze(1)
        result[row, kept] = torch.linalg.solve(H[kept][:, kept], C[row, kept])
    return result.float()


def supports_table(weight: Tensor, stats: InputStats, patterns: list[str]) -> str:
    """Relative error of each method's support with optimal weights."""
    lines = ["### A. Optimal weights on each method's support: relative error", ""]
    lines += [
        f"| pattern | {' | '.join(_SUPPORTS)} | ALPS / SparseGPT |",
        "|---|" + "---:|" * (len(_SUPPORTS) + 1),
    ]
    for pattern in patterns:
        errors = {}
        for name in _SUPPORTS:
            mask = _solve(METHODS[name](), weight, stats, pattern)[1]
            errors[name] = relative_error(exact_weights(weight, mask, stats), weight, stats)
        ratio = errors["alps"] / errors["sparsegpt"]
        lines.append(f"| {pattern} | {' | '.join(f'{e:.3e}' for e in errors.values())} | {ratio:.3f} |")
    return "\n".join(lines) + "\n"


def refit_table(weight: Tensor, stats: InputStats, patterns: list[str]) -> str:
    """Error and seconds: as published, after 10 PCG steps, after PCG to a tolerance, after an exact solve."""
    lines = ["### B. No refit, PCG, exact: relative error (seconds of the refit alone)", ""]
    lines += [
        "| pattern | support | no refit | PCG, 10 steps | PCG, to 1e-4 | exact solve |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for pattern in patterns:
        for name in ("magnitude", "sparsegpt", "alps"):
            plain: Method = replace(Alps(), refit_steps=0) if name == "alps" else get_method(name)
            pruned, mask, _ = _solve(plain, weight, stats, pattern)
            cells = [f"{relative_error(pruned, weight, stats):.3e}"]
            for steps, tolerance in ((10, 0.0), (1000, 1e-4)):
                refined, _, seconds = _solve(
                    Refitted(plain, max_steps=steps, tolerance=tolerance), weight, stats, pattern
                )
                cells.append(f"{relative_error(refined, weight, stats):.3e} ({seconds:.2f})")
            start = time.perf_counter()
            exact = exact_weights(weight, mask, stats)
            cells.append(f"{relative_error(exact, weight, stats):.3e} ({time.perf_counter() - start:.1f})")
            lines.append(f"| {pattern} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _solve(method: Method, weight: Tensor, stats: InputStats, pattern: str) -> tuple[Tensor, Tensor, float]:
    """Weight, mask, and the seconds of the refit (0 without one)."""
    solution = method.solve(weight, method.prepare(stats), parse_pattern(pattern))
    return solution.weight, solution.mask, solution.info.seconds.get("refit", 0.0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    calibration_options(parser)
    parser.add_argument("--site", default="model.layers.0.self_attn.k_proj")
    parser.add_argument("--patterns", default="0.5,0.6,0.7,0.8,0.9,2:4")
    return parser.parse_args()


if __name__ == "__main__":
    main()
