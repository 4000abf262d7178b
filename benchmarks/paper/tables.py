"""Tables 1, 4 and 5 of the paper: what is measured here, and the paper's figures in the rows below."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from alps.solvers import Alps, Method, Refitted, get_method
from alps.solvers.objective import relative_error
from alps.solvers.pattern import Unstructured
from layers import Problem, exact_weights, markdown, support
from paper.penalties import Course, courses
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
    """What the paper says of its table, each for both."""
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
    return [*cells, f"{pcg / exact:.3f}", f"{exact_seconds / pcg_seconds:.2g}"]


def penalties(recipe: Penalties, problem: Problem) -> str:
    """Two tables a sparsity: errors of the sparse iterate, and changes of its support, after some iterations."""
    parts = []
    for sparsity in recipe.sparsity:
        found = courses(problem, Unstructured(sparsity), recipe.iterations, recipe.fixed)
        beside = sparsity == recipe.paper_sparsity
        heads = ["after iteration", "", *map(str, recipe.iterations)]
        errors = [[*map(_scientific, course.errors), _scientific(course.optimal)] for course in found]
        changes = [list(map(_share, course.changes)) for course in found]
        parts += [
            f"**{sparsity:g}: relative error of the sparse iterate; last, with optimal weights on the last support**",
            _beside([*heads, "optimal weights"], found, errors, recipe.errors if beside else None, _scientific),
            f"**{sparsity:g}: entries that came into the support or left it in that iteration, of all kept**",
            _beside(heads, found, changes, recipe.changes if beside else None, _share),
            "\n".join(f"- {course.name}: {course.end}." for course in found),
        ]
    return "\n\n".join(parts)


def _beside(
    heads: Sequence[str],
    found: Sequence[Course],
    cells: Sequence[list[str]],
    paper: Published | None,
    form: Callable[[float | None], str],
) -> str:
    rows = []
    for course, measured in zip(found, cells, strict=True):
        rows.append([course.name, "measured", *measured])
        if paper is not None and course.name in paper.columns:
            theirs = [form(paper.figure(course.name, float(key))) for key in heads[2 : 2 + len(course.errors)]]
            rows.append([course.name, "paper", *theirs, *[""] * (len(measured) - len(theirs))])
    return markdown(heads, rows) + (f"\n\nPaper: {paper.source}." if paper is not None else "")


def _scientific(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.2e}"


def _share(figure: float | None) -> str:
    """A share in per cent; a loop that has ended has none."""
    return "ended" if figure is None else f"{100 * figure:.1f} %"
