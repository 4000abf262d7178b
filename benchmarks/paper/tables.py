"""Tables 1, 4 and 5 of the paper: what is measured here, and the paper's figures in the rows below."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from alps.core.statistics import relative_error
from alps.solvers import Alps, Method, Refitted, get_method
from alps.solvers.patterns import Unstructured
from layers import Problem, exact_weights, markdown, support
from paper.penalties import courses
from paper.recipe import Penalties, Published, Refits, Supports


def supports(recipe: Supports, problem: Problem) -> str:
    """Relative error of every method's support with optimal weights on it, and ALPS's over SparseGPT's."""
    rows, ours, theirs = [], dict[float, dict[str, float]](), dict[float, dict[str, float]]()
    for sparsity in recipe.sparsity:
        ours[sparsity] = {name: _support_error(get_method(name), problem, sparsity) for name in recipe.methods}
        rows.append([f"{sparsity:g}", "measured", *_errors(ours[sparsity], recipe.methods)])
        found = {name: recipe.paper.figure(name, sparsity) for name in recipe.methods}
        if known := {name: figure for name, figure in found.items() if figure is not None}:
            theirs[sparsity] = known
            rows.append([f"{sparsity:g}", "paper", *_errors(known, recipe.methods)])
    table = markdown(["sparsity", "", *recipe.methods, "ALPS / SparseGPT"], rows)
    return f"{table}\n\nPaper: {recipe.paper.source}.\n{_trends(ours, theirs)}"


def _support_error(method: Method, problem: Problem, sparsity: float) -> float:
    mask = support(method, problem, Unstructured(sparsity))
    return relative_error(exact_weights(problem, mask), *problem)


def _errors(errors: dict[str, float], methods: Sequence[str]) -> list[str]:
    cells = [_scientific(errors.get(name)) for name in methods]
    ratio = _ratio(errors)
    return [*cells, "" if ratio is None else f"{ratio:.3f}"]


def _ratio(errors: dict[str, float]) -> float | None:
    return errors["alps"] / errors["sparsegpt"] if {"alps", "sparsegpt"} <= set(errors) else None


def _trends(ours: dict[float, dict[str, float]], theirs: dict[float, dict[str, float]]) -> str:
    """Figures of the paper's table, each for both methods."""
    lines = [
        f"- ALPS's support is the best at every sparsity: measured {_both(ours, _best)}, paper {_both(theirs, _best)}.",
        f"- ALPS / SparseGPT is lower at the last sparsity than at the first: measured {_both(ours, _slope)}, "
        f"paper {_both(theirs, _slope)}.",
        f"- From best to worst at the last sparsity: measured {_both(ours, _order)}; paper {_both(theirs, _order)}.",
    ]
    return "\n".join(lines)


Errors = dict[float, dict[str, float]]


def _both(errors: Errors, say: Callable[[Errors], str]) -> str:
    return say(errors) if errors else "nothing"


def _best(errors: Errors) -> str:
    return "yes" if all(min(one, key=lambda name: one[name]) == "alps" for one in errors.values()) else "no"


def _slope(errors: Errors) -> str:
    ratios = [ratio for ratio in map(_ratio, errors.values()) if ratio is not None]
    if not ratios:
        return "nothing"
    return f"{'yes' if ratios[-1] < ratios[0] else 'no'} ({', '.join(f'{ratio:.3f}' for ratio in ratios)})"


def _order(errors: Errors) -> str:
    last = errors[max(errors)]
    return ", ".join(sorted(last, key=lambda name: last[name]))


def refits(recipe: Refits, problem: Problem) -> str:
    """Errors and seconds without a refit, after a few PCG steps, and after exact solves."""
    heads = ["sparsity", "support", "no refit", f"PCG, {recipe.steps} steps", "s", "exact solve", "s"]
    heads += ["PCG / exact", "times as fast"]
    rows = []
    for sparsity in recipe.sparsity:
        for name in recipe.methods:
            rows.append([f"{sparsity:g}", f"{name}, measured", *_refit_cells(_refit(recipe, name, problem, sparsity))])
            names = ("plain", "pcg", "pcg_seconds", "exact", "exact_seconds")
            figures = [recipe.paper.figure(column, sparsity) for column in names]
            known = [figure for figure in figures if figure is not None]
            if name == "magnitude" and len(known) == len(names):
                rows.append([f"{sparsity:g}", f"{name}, paper", *_refit_cells(known)])
    return f"{markdown(heads, rows)}\n\nPaper: {recipe.paper.source}."


def _refit(recipe: Refits, name: str, problem: Problem, sparsity: float) -> list[float]:
    """Error without a refit, error and seconds of PCG, error and seconds of exact solves."""
    weight, stats = problem
    plain: Method = replace(Alps(), refit_steps=0) if name == "alps" else get_method(name)
    method = Refitted(plain, max_steps=recipe.steps, tolerance=0.0)
    refined = method.solve(weight, method.prepare(stats), Unstructured(sparsity))
    before = refined.info.error_before_refit
    assert before is not None
    start = time.perf_counter()
    exact = exact_weights(problem, refined.mask)
    seconds = time.perf_counter() - start
    errors = relative_error(refined.weight, *problem), relative_error(exact, *problem)
    return [before, errors[0], refined.info.seconds["refit"], errors[1], seconds]


def _refit_cells(figures: Sequence[float]) -> list[str]:
    before, pcg, pcg_seconds, exact, exact_seconds = figures
    cells = [f"{before:.2e}", f"{pcg:.2e}", f"{pcg_seconds:.3g}", f"{exact:.2e}", f"{exact_seconds:.3g}"]
    return [*cells, f"{pcg / exact:.3f}", f"{exact_seconds / pcg_seconds:.1f}"]


def penalties(recipe: Penalties, problem: Problem) -> str:
    """Errors of both iterates, and changes of the support, after some iterations: three tables a sparsity."""
    parts = []
    for sparsity in recipe.sparsity:
        found = courses(problem, Unstructured(sparsity), recipe.iterations, recipe.fixed)
        errors, changes = (recipe.errors, recipe.changes) if sparsity == recipe.paper_sparsity else (None, None)
        heads = ["after iteration", "", *map(str, recipe.iterations)]
        parts += [
            f"**{sparsity:g}: relative error of D, and of optimal weights on its last support**",
            _beside(
                [*heads, "optimal weights"],
                {one.name: [*(look.error for look in one.looks), one.optimal] for one in found},
                errors,
                _scientific,
            ),
            f"**{sparsity:g}: relative error of W, all but its largest entries set to zero**",
            _beside(heads, {one.name: [look.pruned_error for look in one.looks] for one in found}, errors, _scientific),
            f"**{sparsity:g}: entries that came into D's support or left it in that iteration, of all weights**",
            _beside(heads, {one.name: [look.change for look in one.looks] for one in found}, changes, _share),
            "\n".join(f"- {one.name}: {one.end}." for one in found),
        ]
    return "\n\n".join(parts)


def _beside(
    heads: Sequence[str],
    measured: Mapping[str, Sequence[float | None]],
    paper: Published | None,
    form: Callable[[float | None], str],
) -> str:
    """A row a course, by name; the paper's figures below each, for heads that are iterations."""
    rows = []
    for name, figures in measured.items():
        rows.append([name, "measured", *map(form, figures)])
        if paper is not None and name in paper.columns:
            theirs = [paper.figure(name, float(head)) if head.isdigit() else None for head in heads[2:]]
            rows.append([name, "paper", *("" if one is None else form(one) for one in theirs)])
    return markdown(heads, rows) + (f"\n\nPaper: {paper.source}." if paper is not None else "")


def _scientific(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.2e}"


def _share(figure: float | None) -> str:
    """A share in per cent; a loop that has ended has none."""
    return "ended" if figure is None else f"{100 * figure:.1f} %"
