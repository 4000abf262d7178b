"""Find properties of the inputs that explain the ratio of ALPS's error to SparseGPT's, both refitted.

legend  H    damped Gram                                              (in, in)
        R    H scaled to unit diagonal                                (in, in)
        VIF  (R^{-1})_jj = 1 / (1 - R_j^2): how many times harder to replace an input is when the others may not
             help; 1 when no other input tells anything about it      (in,)
Condition is that of R; spread is the largest mean square of an input over the median one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alps.core.statistics import InputStats, relative_error
from alps.solvers import Alps, SparseGPT
from alps.solvers.hessian import scaled
from alps.solvers.patterns import Unstructured
from layers import Problem, exact_weights, layer_problems, markdown, support
from paper.recipe import Dependence

_HEADS = ["", "out x in", "tokens / input", "VIF", "condition", "spread", "ALPS", "SparseGPT", "ratio"]


def dependence(recipe: Dependence, problems: dict[str, Problem]) -> str:
    """The ratio at every site, with its own and with random weights; at the first site, by what it may depend on."""
    ours = {key: recipe.paper.figure(key, recipe.sparsity) for key in ("alps", "sparsegpt")}
    first = next(iter(problems))
    sites = {name: solved(problem, recipe.sparsity) for name, problem in problems.items()}
    random = {name: solved(_random(problem), recipe.sparsity).ratio for name, problem in problems.items()}
    changed = {f"{count} windows": solved(_windows(recipe, first, count), recipe.sparsity) for count in recipe.windows}
    for width in recipe.widths:
        changed[f"first {width} inputs"] = solved(narrowed(problems[first], width), recipe.sparsity)
    for damping in recipe.dampings:
        changed[f"damping {damping:g}"] = solved(problems[first], recipe.sparsity, damping=damping)
    for block in recipe.blocks:
        changed[f"block of {block}"] = solved(problems[first], recipe.sparsity, block=block)
    made = {name: solved(made_up(gram), recipe.sparsity) for name, gram in grams(recipe.inputs).items()}
    parts = [
        f"### ALPS / SparseGPT at {recipe.sparsity:g}, optimal weights on both supports",
        markdown(
            [*_HEADS, "random weights"], [[*one.cells(name), f"{random[name]:.3f}"] for name, one in sites.items()]
        ),
        _correlations(list(sites.values())),
        f"#### {first}: by calibration windows, by inputs, by damping, by SparseGPT's block of columns",
        markdown(_HEADS, [one.cells(name) for name, one in changed.items()]),
        f"#### Random weights on made-up inputs: {recipe.inputs} of equal size",
        markdown(_HEADS, [one.cells(name) for name, one in made.items()]),
    ]
    if ours["alps"] is not None and ours["sparsegpt"] is not None:
        parts.append(f"Paper: {ours['alps'] / ours['sparsegpt']:.3f} ({recipe.paper.source}).")
    return "\n\n".join(part for part in parts if part)


def _correlations(rows: Sequence[Row]) -> str:
    """Rank correlation of each property of the inputs with the ratios; empty for a single site."""
    if len(rows) < 2:
        return ""
    properties = {"VIF": [one.vif for one in rows], "condition": [one.condition for one in rows]}
    properties["spread"] = [one.spread for one in rows]
    ratios = [one.ratio for one in rows]
    found = ", ".join(f"{name} {spearman(values, ratios):.2f}" for name, values in properties.items())
    return f"Rank correlation with the ratio over {len(rows)} sites: {found}."


@dataclass(frozen=True)
class Row:
    """One problem: its sizes, what its inputs are like, and both errors."""

    size: tuple[int, int]
    tokens: float
    vif: float
    condition: float
    spread: float
    alps: float
    sparsegpt: float

    @property
    def ratio(self) -> float:
        return self.alps / self.sparsegpt

    def cells(self, name: str) -> list[str]:
        """In the order of the heads."""
        inputs = [f"{self.tokens:.1f}", f"{self.vif:.2f}", f"{self.condition:.0f}", f"{self.spread:.1f}"]
        errors = [f"{self.alps:.3e}", f"{self.sparsegpt:.3e}", f"{self.ratio:.3f}"]
        return [name, f"{self.size[0]} x {self.size[1]}", *inputs, *errors]


def solved(problem: Problem, sparsity: float, damping: float = 0.01, block: int = 128) -> Row:
    """Both methods on one problem."""
    weight, stats = problem
    errors = []
    for method in (Alps(damping=damping), SparseGPT(damping=damping, block=block)):
        mask = support(method, problem, Unstructured(sparsity))
        errors.append(relative_error(exact_weights(problem, mask, damping), *problem))
    levels = torch.linalg.eigvalsh(scaled(stats, damping).matrix.double())
    return Row(
        size=(weight.shape[0], weight.shape[1]),
        tokens=stats.tokens / weight.shape[1],
        vif=inflation(stats, damping),
        condition=float(levels[-1] / levels[0]),
        spread=float(stats.square.max() / stats.square.median()),
        alps=errors[0],
        sparsegpt=errors[1],
    )


def inflation(stats: InputStats, damping: float = 0.01) -> float:
    """The median VIF of the inputs, with the damping."""
    return float(torch.linalg.inv(scaled(stats, damping).matrix.double()).diagonal().median())


def _random(problem: Problem) -> Problem:
    """Normal weights in place of the site's."""
    weight, stats = problem
    return _normal(*weight.shape), stats


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


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Correlation of ranks; equal values take their ranks in the order in which they stand."""
    ranks = torch.tensor([list(first), list(second)], dtype=torch.float64).argsort(stable=True).argsort()
    return float(torch.corrcoef(ranks.double())[0, 1])
