"""What the ratio of ALPS's error to SparseGPT's, optimal weights on both supports, depends on.

legend  H    damped Gram                                              (in, in)
        R    H scaled to unit diagonal                                (in, in)
        VIF  (R^{-1})_jj = 1 / (1 - R_j^2): how many times harder to replace an input is when the others may not
             help; 1 when no other input tells anything about it      (in,)
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from alps.solvers import Alps, SparseGPT
from alps.solvers.hessian import scaled
from alps.solvers.objective import relative_error
from alps.solvers.pattern import Unstructured
from alps.stats import InputStats
from layers import Problem, exact_weights, layer_problems, markdown, support
from paper.recipe import Dependence

_HEADS = ["", "out x in", "tokens / input", "VIF", "ALPS", "SparseGPT", "ratio"]


def dependence(recipe: Dependence, problems: dict[str, Problem]) -> str:
    """The ratio at every site, with its own and with random weights; at the first site, by what it may depend on."""
    ours = {key: recipe.paper.figure(key, recipe.sparsity) for key in ("alps", "sparsegpt")}
    first = next(iter(problems))
    sites = {name: (*_row(problem, recipe.sparsity), _random(problem, recipe)) for name, problem in problems.items()}
    rank = spearman([row[3] for row in sites.values()], [row[6] for row in sites.values()])
    more = {f"{count} windows": _windows(recipe, first, count) for count in recipe.windows}
    narrow = {f"first {width} inputs": narrowed(problems[first], width) for width in recipe.widths}
    varied = {f"damping {one:g}": _row(problems[first], recipe.sparsity, damping=one) for one in recipe.dampings}
    varied |= {f"block of {one}": _row(problems[first], recipe.sparsity, block=one) for one in recipe.blocks}
    made = {name: made_up(gram) for name, gram in grams(recipe.inputs).items()}
    parts = [
        f"### ALPS / SparseGPT at {recipe.sparsity:g}, optimal weights on both supports",
        markdown([*_HEADS, "random weights"], [_line(name, row) for name, row in sites.items()]),
        "" if rank is None else f"Rank correlation of VIF and ratio over {len(sites)} sites: {rank:.2f}.",
        f"#### {first}: by calibration windows, by inputs, by damping, by SparseGPT's block of columns",
        markdown(_HEADS, [_line(name, _row(problem, recipe.sparsity)) for name, problem in (more | narrow).items()]),
        markdown(_HEADS, [_line(name, row) for name, row in varied.items()]),
        f"#### Random weights on made-up inputs: {recipe.inputs} of equal size",
        markdown(_HEADS, [_line(name, _row(problem, recipe.sparsity)) for name, problem in made.items()]),
    ]
    if ours["alps"] is not None and ours["sparsegpt"] is not None:
        parts.append(f"Paper: {ours['alps'] / ours['sparsegpt']:.3f} ({recipe.paper.source}).")
    return "\n\n".join(part for part in parts if part)


Row = tuple[int, int, float, float, float, float, float]


def _row(problem: Problem, sparsity: float, damping: float = 0.01, block: int = 128) -> Row:
    weight, stats = problem
    rows, columns = weight.shape
    errors = []
    for method in (Alps(damping=damping), SparseGPT(damping=damping, block=block)):
        mask = support(method, problem, Unstructured(sparsity))
        errors.append(relative_error(exact_weights(problem, mask, damping), *problem))
    ratio = errors[0] / errors[1]
    return rows, columns, stats.tokens / columns, inflation(stats, damping), errors[0], errors[1], ratio


def _line(name: str, row: Sequence[float]) -> list[str]:
    rows, columns, tokens, vif, alps, sparsegpt, *ratios = row
    cells = [name, f"{rows} x {columns}", f"{tokens:.1f}", f"{vif:.2f}", f"{alps:.3e}", f"{sparsegpt:.3e}"]
    return [*cells, *(f"{ratio:.3f}" for ratio in ratios)]


def inflation(stats: InputStats, damping: float = 0.01) -> float:
    """The median VIF of the inputs, with the damping."""
    return float(torch.linalg.inv(scaled(stats, damping).matrix.double()).diagonal().median())


def _random(problem: Problem, recipe: Dependence) -> float:
    """The ratio with normal weights in place of the site's."""
    weight, stats = problem
    return _row((_normal(*weight.shape), stats), recipe.sparsity)[-1]


def _normal(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def _windows(recipe: Dependence, site: str, count: int) -> Problem:
    return layer_problems(argparse.Namespace(**{**recipe.model_dump(), "samples": count}), [site])[site]


def narrowed(problem: Problem, width: int) -> Problem:
    """The problem of the first `width` inputs alone."""
    weight, stats = problem
    total, square, gram = stats.total[:width], stats.square[:width], stats.gram()[:width, :width]
    return weight[:, :width].clone(), InputStats(stats.tokens, total, square, gram)


def made_up(gram: Tensor) -> Problem:
    """Normal weights, a third as many outputs as inputs, on inputs with that Gram a token."""
    count = len(gram)
    tokens = 64 * count
    return _normal(count // 3, count), InputStats(tokens, torch.zeros(count), gram.diagonal() * tokens, gram * tokens)


def grams(count: int) -> dict[str, Tensor]:
    """Correlations of made-up inputs, (count, count): none, with a common part, and with neighbours."""
    places = torch.arange(count)
    apart = (places[:, None] - places).abs().float()
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    found = {"independent": torch.eye(count)}
    found["half of each common to all"] = torch.full((count, count), 0.5).fill_diagonal_(1.0)
    for share in (0.5, 0.7, 0.9):
        found[f"neighbours {share:g}"] = share**apart
        found[f"neighbours {share:g}, shuffled"] = (share**apart)[shuffled][:, shuffled]
    return found


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Correlation of ranks; None for fewer than two values. No value may occur twice."""
    if len(first) < 2:
        return None
    ranks = torch.tensor([[sorted(values).index(value) for value in values] for values in (first, second)])
    return float(torch.corrcoef(ranks.double())[0, 1])
