"""Recipes: which combinations of options are refused, and what a run reads."""

from __future__ import annotations

from typing import Any

import pytest

from alps.core.errors import ConfigError
from alps.core.statistics import Needs
from alps.finetuning.reconstruction_parameters import ReconstructionParameters
from alps.pruning.recipe import PruneRecipe
from alps.solvers import get_method
from alps.solvers.patterns import SemiStructured, Unstructured

_HALF = Unstructured(0.5)


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        ("alps", {"allocation": "sensitivty"}, r"Allocation 'sensitivty' is unknown.* Did you mean 'sensitivity'"),
        ("alps", {"row_weights": "block"}, r"Row weights 'block' is unknown"),
        (
            "alps",
            {"pattern": SemiStructured(2, 4), "allocation": "error"},
            "zeros between layers, which the pattern 2:4",
        ),
        (
            "alps",
            {"pattern": SemiStructured(2, 4), "row_weights": "block-output"},
            "between rows, which the pattern 2:4",
        ),
        ("wanda", {"row_weights": "block-output"}, "wanda prunes every row to the same sparsity: use equal"),
    ],
    ids=str,
)
def test_options_without_room_are_refused(method: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        PruneRecipe(method=get_method(method), **{"pattern": _HALF, **options})


def test_plain_options_suit_every_pattern() -> None:
    recipe = PruneRecipe(method=get_method("wanda"), pattern=SemiStructured(2, 4))
    assert (recipe.allocation, recipe.row_weights, recipe.needs) == ("uniform", "equal", Needs.GRAM)


@pytest.mark.parametrize(
    ("options", "needs", "reads", "dense"),
    [
        ({"measure_error": False}, Needs.NOTHING, False, False),
        ({}, Needs.GRAM, True, False),
        ({"measure_error": False, "allocation": "owl"}, Needs.NOTHING, True, False),
        ({"measure_error": False, "row_weights": "block-output"}, Needs.NOTHING, True, False),
        ({"measure_error": False, "reconstruction": ReconstructionParameters()}, Needs.NOTHING, True, True),
        ({"measure_error": False, "dense_target": 0.1}, Needs.INPUT_SHIFT, True, True),
    ],
    ids=str,
)
def test_a_recipe_says_what_it_reads(options: dict[str, Any], needs: Needs, reads: bool, dense: bool) -> None:
    recipe = PruneRecipe(method=get_method("magnitude"), pattern=_HALF, **options)
    assert (recipe.needs, recipe.reads_inputs, recipe.uses_dense_reference) == (needs, reads, dense)
