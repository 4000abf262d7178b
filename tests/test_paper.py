"""The paper's experiments: recipes that load, figures against plain float64 arithmetic, the paper's own beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from alps.core.errors import ConfigError
from alps.core.statistics import InputStats, relative_error
from alps.core.yaml_io import read_yaml
from alps.evaluation.compare_config import load_compare_config
from alps.reporting.compare_results import Result
from alps.reporting.records import Estimate, EvaluationRecord, TaskRecord
from alps.solvers import Alps, get_method
from alps.solvers.hessian import absolute_damping
from alps.solvers.patterns import Unstructured
from layers import Problem, exact_weights, support
from paper.dependence import grams, inflation, made_up, narrowed, solved, spearman
from paper.penalties import courses
from paper.published import PUBLISHED, Figures, beside_the_paper
from paper.recipe import load_recipe
from paper.tables import refits, supports

FOLDER = Path(__file__).parent.parent / "benchmarks" / "paper"
LAYERS = ("layer-supports", "layer-refit", "layer-ratio", "rho-ablation")
WHOLE = ("perplexity", "zeroshot")


def inputs(columns: int = 24, tokens: int = 400) -> Tensor:
    """Correlated inputs whose features differ in size, (tokens, columns), float32."""
    generator = torch.Generator().manual_seed(7)
    mixed = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return mixed * torch.linspace(0.2, 3, columns)


def problem(rows: int = 10) -> Problem:
    X = inputs()
    return torch.randn(rows, X.shape[1], generator=torch.Generator().manual_seed(8)), InputStats.of(X)


def plain_error(pruned: Tensor, weight: Tensor) -> float:
    X = inputs().double()
    return float((X @ (pruned - weight).double().T).square().sum() / (X @ weight.double().T).square().sum())


def test_every_recipe_is_read_by_somebody() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*LAYERS, *WHOLE, "published"}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_recipes_load_and_are_refused_where_wrong(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(FOLDER / f"{name}.yaml", {"samples": 3, "model": None})
    assert (recipe.samples, recipe.model) == (3, "smollm2-135m")
    values = read_yaml(FOLDER / f"{name}.yaml")
    path = tmp_path / "wrong.yaml"
    for change, complaint in (
        ({"sparsities": [0.5]}, "unknown"),
        ({"table": "none"}, "none"),
        ({"samples": "3"}, "samples"),
        ({"sites": []}, "sites"),
    ):
        path.write_text(yaml.safe_dump({**values, **change}))
        with pytest.raises(ConfigError, match=complaint):
            load_recipe(path, {})


def test_a_column_shorter_than_its_keys_is_refused(tmp_path: Path) -> None:
    values = read_yaml(FOLDER / "layer-supports.yaml")
    values["paper"]["columns"]["alps"].pop()
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match="column alps has 4 figures for 5 keys"):
        load_recipe(tmp_path / "short.yaml", {})


@pytest.mark.parametrize("name", WHOLE)
def test_comparisons_ask_for_the_grid_of_the_paper(name: str) -> None:
    asked = load_compare_config(FOLDER / f"{name}.yaml", {})
    runs = asked.runs()
    assert len(runs) == 5 * 8 * 5 and {one.config.calibration for one in runs} == {"c4"}
    assert {one.pattern for one in runs} == {"0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "2:4", "4:8"}
    assert {(one.config.samples, one.config.seqlen) for one in runs} == {(128, 2048)}
    here = load_compare_config(FOLDER / f"{name}.yaml", {"model": "smollm2-135m", "seeds": 1, "samples": 64})
    assert len(here.runs()) == 40 and here.model == "smollm2-135m"


def test_models_named_in_the_recipe_are_those_with_figures() -> None:
    figures = Figures.model_validate(read_yaml(PUBLISHED))
    assert len(figures.models) == 8
    comment = (FOLDER / "perplexity.yaml").read_text()
    for name, patterns in figures.models.items():
        assert name in comment and set(patterns) == {"0.7", "2:4", "4:8"}
        for methods in patterns.values():
            assert list(methods) == ["magnitude", "wanda", "sparsegpt", "dsnot", "alps"]
            # What the paper says of its tables; a figure in the wrong row would break it.
            first = [row[0] or 0 for row in methods.values()]
            assert first.index(min(first)) == 4, (name, methods)


def test_optimal_weights_are_those_of_least_squares() -> None:
    """Rows by lstsq on the inputs themselves, the damping as further rows that draw towards the dense weight."""
    weight, stats = problem()
    mask = support(get_method("wanda"), (weight, stats), Unstructured(0.6))
    found = exact_weights((weight, stats), mask, damping=0.05)
    root = absolute_damping(stats, 0.05) ** 0.5
    A = torch.cat([inputs().double(), root * torch.eye(weight.shape[1], dtype=torch.float64)])
    for row, kept in enumerate(mask):
        b = (A @ weight[row].double())[:, None]
        expected = torch.linalg.lstsq(A[:, kept], b).solution.squeeze(1)
        torch.testing.assert_close(found[row, kept].double(), expected, rtol=1e-3, atol=1e-4)
        assert not bool(found[row, ~kept].any())


def splitting(weight: Tensor, stats: InputStats, kept: int, rho: float, steps: int) -> list[tuple[float, float, float]]:
    """Errors of D and of W pruned, and s over all entries, after every step of the splitting, in plain float64."""
    X = inputs().double()
    H = X.T @ X + absolute_damping(stats, 0.01) * torch.eye(X.shape[1], dtype=torch.float64)
    E = H.diagonal().rsqrt()
    H, W0 = E[:, None] * H * E, weight.double() / E

    def largest(Z: Tensor) -> Tensor:
        D = torch.zeros_like(Z).flatten()
        keep = Z.abs().flatten().argsort(descending=True)[:kept]
        D[keep] = Z.flatten()[keep]
        return D.view_as(Z)

    D, V, course = largest(W0), torch.zeros_like(W0), []
    for _ in range(steps):
        W = torch.linalg.solve(H + rho * torch.eye(len(H), dtype=torch.float64), (W0 @ H - V + rho * D).T).T
        old, D = D, largest(W + V / rho)
        V = V + rho * (W - D)
        error, pruned_error = (plain_error((one * E).float(), weight) for one in (D, largest(W)))
        course.append((error, pruned_error, float(((D != 0) ^ (old != 0)).sum()) / D.numel()))
    return course


@pytest.mark.parametrize("rho", [0.3, 3.0])
def test_fixed_penalties_are_followed_step_by_step(rho: float) -> None:
    weight, stats = problem()
    asked = [1, 3, 5, 12]
    found = courses((weight, stats), Unstructured(0.7), asked, [rho])[1]
    kept = weight.numel() - Unstructured(0.7).pruned_count(weight.numel())
    expected = splitting(weight, stats, kept, rho, 12)
    assert found.name == f"rho {rho:g}" and found.end == "max_iterations after 12 iterations, 0 restarts"
    for iteration, look in zip(asked, found.looks, strict=True):
        error, pruned_error, change = expected[iteration - 1]
        assert look.error == pytest.approx(error, rel=1e-3) and look.change == pytest.approx(change)
        assert look.pruned_error == pytest.approx(pruned_error, rel=1e-3)
    assert found.optimal <= found.looks[-1].error


def test_the_schedule_is_that_of_alps_and_rests_where_it_ends() -> None:
    weight, stats = problem()
    pattern = Unstructured(0.7)
    found = courses((weight, stats), pattern, [5, 290, 299], [])[0]
    method = Alps(refit_steps=0)
    solution = method.solve(weight, method.prepare(stats), pattern)
    assert solution.info.iterations < 290 and f"after {solution.info.iterations} iterations" in found.end
    error = relative_error(solution.weight, weight, stats)
    assert found.looks[1] == found.looks[2] and found.looks[2].change is None
    assert found.looks[2].error == pytest.approx(error, rel=1e-6)
    assert found.optimal == pytest.approx(plain_error(exact_weights((weight, stats), solution.mask), weight), rel=1e-4)
    fifth = Alps(refit_steps=0, admm=type(method.admm)(max_iterations=5)).solve(weight, method.prepare(stats), pattern)
    assert found.looks[0].error == pytest.approx(relative_error(fifth.weight, weight, stats), rel=1e-6)


def cells(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def recipe(name: str, **changes: Any) -> Any:
    return load_recipe(FOLDER / f"{name}.yaml", changes)


def test_supports_stand_beside_the_paper_and_its_claims_are_judged() -> None:
    weight, stats = problem(30)
    text = supports(recipe("layer-supports", sparsity=[0.7, 0.75]), (weight, stats))
    rows = cells(text)
    assert [row[:2] for row in rows] == [["0.7", "measured"], ["0.7", "paper"], ["0.75", "measured"]]
    assert rows[1][2:] == ["4.38e-02", "4.65e-02", "4.58e-02", "3.60e-02", "2.78e-02", "0.772"]
    mask = support(get_method("wanda"), (weight, stats), Unstructured(0.7))
    expected = plain_error(exact_weights((weight, stats), mask), weight)
    assert float(rows[0][3]) == pytest.approx(expected, rel=6e-3)
    ratios = [float(rows[i][7]) for i in (0, 2)]
    assert ratios[0] == pytest.approx(float(rows[0][6]) / float(rows[0][5]), rel=1e-2)
    falls = "yes" if ratios[1] < ratios[0] else "no"
    assert f"than at the first: measured {falls} ({rows[0][7]}, {rows[2][7]}), paper no (0.772)" in text
    order = sorted(range(2, 7), key=lambda i: float(rows[2][i]))
    names = ["", "", "magnitude", "wanda", "dsnot", "sparsegpt", "alps"]
    assert f"measured {', '.join(names[i] for i in order)}; paper alps, sparsegpt, magnitude" in text


def test_refits_are_between_no_refit_and_the_optimum() -> None:
    weight, stats = problem(30)
    rows = cells(refits(recipe("layer-refit", sparsity=[0.6]), (weight, stats)))
    assert [row[1] for row in rows] == [
        "magnitude, measured",
        "magnitude, paper",
        "sparsegpt, measured",
        "alps, measured",
    ]
    assert rows[1][2:] == ["6.01e-02", "2.43e-02", "0.79", "2.25e-02", "95", "1.080", "120.3"]
    for row, name in ((rows[0], "magnitude"), (rows[2], "sparsegpt")):
        method = get_method(name)
        solution = method.solve(weight, method.prepare(stats), Unstructured(0.6))
        optimal = plain_error(exact_weights((weight, stats), solution.mask), weight)
        assert float(row[2]) == pytest.approx(plain_error(solution.weight, weight), rel=6e-3)
        assert float(row[5]) == pytest.approx(optimal, rel=6e-3)
    assert all(float(row[2]) >= float(row[3]) >= float(row[5]) * 0.99 for row in rows)


def test_inflation_is_what_regressions_leave() -> None:
    X = inputs()
    stats = InputStats.of(X)
    n = X.shape[1]
    A = torch.cat([X.double(), absolute_damping(stats, 0.01) ** 0.5 * torch.eye(n, dtype=torch.float64)])
    factors = []
    for j in range(n):
        others = [i for i in range(n) if i != j]
        rest = A[:, [j]] - A[:, others] @ torch.linalg.lstsq(A[:, others], A[:, [j]]).solution
        factors.append(float(A[:, j].square().sum() / rest.square().sum()))
    assert inflation(stats) == pytest.approx(float(torch.tensor(factors).median()), rel=1e-3)


def test_made_up_inputs_have_the_inflation_of_the_book() -> None:
    """1 without correlations, (1 + r^2) / (1 - r^2) inside a chain of neighbours, in any order."""
    found = {name: inflation(made_up(gram)[1], damping=1e-9) for name, gram in grams(40).items()}
    assert found["independent"] == pytest.approx(1)
    for r in (0.5, 0.7, 0.9):
        for name in (f"neighbours {r:g}", f"neighbours {r:g}, shuffled"):
            assert found[name] == pytest.approx((1 + r * r) / (1 - r * r), rel=1e-4)
    # 1 / (1 - R^2), where n - 1 others explain c^2 (n - 1) / (1 + (n - 2) c) of an input.
    assert found["half of each common to all"] == pytest.approx(1 / (1 - 0.25 * 39 / 20), rel=1e-4)


def test_a_row_holds_what_the_inputs_are_like() -> None:
    weight, stats = problem(30)
    found = solved((weight, stats), 0.7)
    X = inputs().double()
    H = X.T @ X + absolute_damping(stats, 0.01) * torch.eye(X.shape[1], dtype=torch.float64)
    R = H / torch.outer(H.diagonal().sqrt(), H.diagonal().sqrt())
    assert found.condition == pytest.approx(float(torch.linalg.cond(R)), rel=1e-3)
    sizes = sorted(X.square().mean(dim=0).tolist())
    assert found.spread == pytest.approx(sizes[-1] / sizes[11], rel=1e-4)
    assert found.size == (30, 24) and found.tokens == pytest.approx(400 / 24)
    mask = support(get_method("sparsegpt"), (weight, stats), Unstructured(0.7))
    assert found.sparsegpt == pytest.approx(plain_error(exact_weights((weight, stats), mask), weight), rel=1e-4)
    assert found.ratio == found.alps / found.sparsegpt


def test_fewer_inputs_are_the_first_ones() -> None:
    X = inputs()
    weight, stats = narrowed((torch.randn(3, X.shape[1]), InputStats.of(X)), 9)
    assert weight.shape == (3, 9) and stats.tokens == len(X)
    torch.testing.assert_close(stats.gram(), X[:, :9].T @ X[:, :9], rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(stats.square, X[:, :9].square().sum(dim=0))


def test_spearman() -> None:
    assert spearman([1.0, 2.0, 9.0], [0.3, 0.2, 0.1]) == pytest.approx(-1)
    assert spearman([1.0, 2.0, 9.0, 10.0], [1.0, 3.0, 2.0, 4.0]) == pytest.approx(0.8)
    assert spearman([5.0, 1.0, 3.0], [2.0, 0.0, 1.0]) == pytest.approx(1)


def result(model: str, method: str, seed: int, perplexities: dict[str, float], accuracy: float | None = None) -> Result:
    shared = {"model": model, "windows": 1, "seqlen": 8, "predicted_tokens": 7, "loss": 1.0}
    evaluations = [EvaluationRecord(text=name, perplexity=one, **shared) for name, one in perplexities.items()]  # type: ignore[arg-type]
    tasks = []
    if accuracy is not None:
        metrics = {"acc": Estimate(value=accuracy, stderr=None)}
        tasks.append(TaskRecord(model=model, task="piqa", metrics=metrics, items=5, num_fewshot=0, lm_eval="0.4.12"))
    return Result(
        model=model,
        model_sha256=None,
        architecture="OPT",
        dtype="float32",
        device="cpu",
        method=method,
        pattern="0.7",
        seed=seed,
        evaluations=list(evaluations),
        tasks=tasks,
    )


def test_whole_models_stand_beside_the_paper() -> None:
    name = "facebook/opt-13b"
    runs = [result(name, "alps", seed, {"wikitext2:t.txt": 16.0 + seed, "own": 3.0}, 0.7) for seed in (0, 1)]
    runs.append(result(name, "sparsegpt", 0, {"wikitext2:t.txt": 20.0, "own": 4.0}, 0.5))
    text = beside_the_paper(runs)
    rows = cells(text[text.index("## Beside the paper: 0.7") :])
    assert rows == [
        ["alps, measured", "16.50", "70.00"],
        ["alps, paper", "16.71", "71.73"],
        ["sparsegpt, measured", "20.00", "50.00"],
        ["sparsegpt, paper", "19.29", "69.16"],
        ["ALPS / SparseGPT, measured", "0.825", "1.400"],
        ["ALPS / SparseGPT, paper", "0.866", "1.037"],
    ]
    assert "## Perplexity on own" in text


def test_a_model_that_the_paper_has_not_is_told() -> None:
    text = beside_the_paper([result("smollm2-135m", "alps", 0, {"wikitext2": 9.0})])
    assert "it has nothing for smollm2-135m" in text and "## Beside" not in text
