"""Compare methods on one layer, as in the first tables of the ALPS paper: supports with optimal weights, and the refit.

The inputs of the layer are collected from the dense model. Table A has the relative error of every method's support
with exactly optimal weights (float64, row by row). Table B has every method as published, then with a refit of 10 and
of many PCG steps, then with an exact solve, with the time of each. Example:

    python benchmarks/layer.py --calibration c4.jsonl --site model.layers.0.self_attn.k_proj
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

from torch import Tensor

from alps.core.device import exact_float32
from alps.core.statistics import relative_error
from alps.solvers import METHODS, Alps, Method, Refitted, get_method
from alps.solvers.patterns import parse_pattern
from layers import Problem, calibration_options, exact_weights, layer_problems, origin, support

_SUPPORTS = ("magnitude", "wanda", "dsnot", "dsnot-sparsegpt", "sparsegpt", "alps")


def main() -> None:
    """Collect the layer problem once, then print both tables."""
    options = _options()
    with exact_float32():
        problem = layer_problems(options, [options.site])[options.site]
        print(f"{options.site} {tuple(problem[0].shape)}, {origin(options)}\n")
        patterns = options.patterns.split(",")
        print(supports_table(problem, patterns))
        print(refit_table(problem, patterns))


def supports_table(problem: Problem, patterns: list[str]) -> str:
    """Format the relative errors of optimal weights on each support."""
    lines = ["### A. Optimal weights on each method's support: relative error", ""]
    lines += [
        f"| pattern | {' | '.join(_SUPPORTS)} | ALPS / SparseGPT |",
        "|---|" + "---:|" * (len(_SUPPORTS) + 1),
    ]
    for pattern in patterns:
        errors = {}
        for name in _SUPPORTS:
            mask = support(METHODS[name](), problem, parse_pattern(pattern))
            errors[name] = relative_error(exact_weights(problem, mask), *problem)
        ratio = errors["alps"] / errors["sparsegpt"]
        lines.append(f"| {pattern} | {' | '.join(f'{e:.3e}' for e in errors.values())} | {ratio:.3f} |")
    return "\n".join(lines) + "\n"


def refit_table(problem: Problem, patterns: list[str]) -> str:
    """Format errors and seconds as published, after PCG, and after an exact solve."""
    lines = ["### B. No refit, PCG, exact: relative error (seconds of the refit alone)", ""]
    lines += [
        "| pattern | support | no refit | PCG, 10 steps | PCG, to 1e-4 | exact solve |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for pattern in patterns:
        for name in ("magnitude", "sparsegpt", "alps"):
            plain: Method = replace(Alps(), refit_steps=0) if name == "alps" else get_method(name)
            pruned, mask, _ = _solve(plain, problem, pattern)
            cells = [f"{relative_error(pruned, *problem):.3e}"]
            for steps, tolerance in ((10, 0.0), (1000, 1e-4)):
                refined, _, seconds = _solve(Refitted(plain, max_steps=steps, tolerance=tolerance), problem, pattern)
                cells.append(f"{relative_error(refined, *problem):.3e} ({seconds:.2f})")
            start = time.perf_counter()
            exact = exact_weights(problem, mask)
            cells.append(f"{relative_error(exact, *problem):.3e} ({time.perf_counter() - start:.1f})")
            lines.append(f"| {pattern} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _solve(method: Method, problem: Problem, pattern: str) -> tuple[Tensor, Tensor, float]:
    """Return weight, mask, and the seconds of the refit (0 without one)."""
    weight, stats = problem
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
