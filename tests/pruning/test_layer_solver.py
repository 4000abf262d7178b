"""Problems of single layers: prepared once an input, solved, stored and measured; errors name the layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alps.calibration.moe_statistics import LayerInput
from alps.core.errors import SolveFailed
from alps.core.statistics import InputStats, Needs
from alps.models.blocks import Block
from alps.pruning.layer_solver import LayerSolver
from alps.reporting.run_report import LayerRecord
from alps.solvers import METHODS, Alps, get_method
from alps.solvers.base import Method, Solution, SolveInfo
from alps.solvers.patterns import Pattern, SemiStructured, Unstructured
from helpers.model_comparison import layer_weights, output_error
from helpers.runs import prune

_CPU = torch.device("cpu")


_HALF = SemiStructured(2, 4)


def test_nobody_holds_the_sums_of_a_solved_input(
    tiny_model: Callable[..., Any], ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[bool] = []
    solve = LayerSolver.solve_input

    def watched(solver: LayerSolver, block: Block, source: LayerInput, *rest: Any) -> list[LayerRecord]:
        before = source.sums.panels is not None
        records = solve(solver, block, source, *rest)
        held.append(before and source.sums.panels is None)
        return records

    monkeypatch.setattr(LayerSolver, "solve_input", watched)
    prune(tiny_model("llama"), ids, Alps(), _HALF)
    assert held == [True] * 12


def test_the_error_is_that_of_the_weights_as_stored(
    tiny_model: Callable[..., Any],
    ids: Tensor,
    site_inputs: Callable[[nn.Module, Tensor], dict[str, Tensor]],
) -> None:
    # At sparsity 0 the only error of a bfloat16 model is none at all; at 1 % it is mostly that of rounding.
    dense, model = tiny_model("llama", torch.bfloat16), tiny_model("llama", torch.bfloat16)
    results = prune(model, ids, Alps(), Unstructured(0.01))
    real = site_inputs(dense, ids)
    weights, pruned = layer_weights(dense), layer_weights(model)
    for record in results.layers[:3]:
        expected = output_error(weights[record.name], pruned[record.name], real[record.name])
        assert record.error == pytest.approx(expected, rel=1e-3)
        assert record.solve["error_after_refit"] < 0.9 * expected


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("measured", [True, False])
def test_a_weight_that_is_not_a_number_is_named(
    tiny_model: Callable[..., Any], ids: Tensor, method: str, measured: bool
) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[3, 5] = float("nan")
    dense = layer_weights(copy.deepcopy(model))
    with pytest.raises(SolveFailed) as caught:
        prune(model, ids, method, _HALF, measure_error=measured)
    sentence = str(caught.value)
    # In the forward a NaN in k reaches the inputs of o_proj first; k itself is solved before those are looked at.
    assert sentence.startswith("Layer model.layers.1.self_attn.k_proj: the dense weights hold NaN")
    assert sentence.endswith(".") and not sentence.endswith("..")
    changed = [name for name, weight in layer_weights(model).items() if not torch.equal(weight, dense[name])]
    assert len([name for name in changed if ".layers.0." in name]) == 7


@dataclass(frozen=True)
class _Explosive(Method):
    """Keeps what magnitude keeps, a million times as large: finite in float32, not in float16."""

    @property
    def name(self) -> str:
        return "explosive"

    @property
    def needs(self) -> Needs:
        return Needs.NOTHING

    def prepare(self, stats: InputStats) -> None:
        return None

    def prune_matrix(self, weight: Tensor, state: None, pattern: Pattern) -> Solution:
        plain = get_method("magnitude").solve(weight, state, pattern)
        return Solution(plain.weight * 1e6, plain.mask, SolveInfo())


def test_weights_that_overflow_the_checkpoint_name_the_site(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    with pytest.raises(SolveFailed, match=r"^Layer model\.layers\.0\.self_attn\.q_proj: .* overflow torch\.float16"):
        prune(tiny_model("llama", torch.float16), ids, _Explosive(), _HALF)
    assert prune(tiny_model("llama", torch.bfloat16), ids, _Explosive(), _HALF, measure_error=False).layers
