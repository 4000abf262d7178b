"""The settings of a pruning run as objects: method, pattern and options, without names that have to be looked up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from alps.core.errors import ConfigError, check_choice
from alps.core.statistics import Needs
from alps.finetuning.reconstruction_parameters import ReconstructionParameters
from alps.pruning.layer_rules import Rules
from alps.pruning.row_weights import RowWeights
from alps.solvers.base import Method
from alps.solvers.patterns import Pattern, Unstructured

ALLOCATIONS = ("uniform", "owl", "error", "sensitivity")


@dataclass(frozen=True, kw_only=True)
class PruneRecipe:
    """Method, pattern and options of a pruning run, checked against each other.

    Attributes:
        method: solver of the layer problems.
        pattern: which weights are kept in every layer that `rules` and `allocation` do not give another pattern.
        rules: layers that stay dense, and layers with a pattern of their own.
        keep_zeros: weights that are zero in the dense model stay zero, and count towards the pattern.
        true_sequential: solve the layers of a block one after the other in the order of the forward, each on inputs
            that include the pruning of those before. Otherwise all layers of a block see its dense activations.
        dense_target: share of the dense model's outputs in what a layer reproduces, 0 to 1; see
            `alps.solvers.dense_target`.
        allocation: how the zeros are spread over the layers, one of `ALLOCATIONS`; see
            `alps.pruning.sparsity_allocation`.
        row_weights: weight of an output channel in the layer problem, see `alps.pruning.row_weights`.
        reconstruction: parameters of the block reconstruction after the solves; None leaves it out.
        measure_error: measure the relative error of every layer, also for methods that need no Gram.
    """

    method: Method
    pattern: Pattern
    rules: Rules = field(default_factory=Rules)
    keep_zeros: bool = False
    true_sequential: bool = False
    dense_target: float = 0.0
    allocation: str = "uniform"
    row_weights: RowWeights = "equal"
    reconstruction: ReconstructionParameters | None = None
    measure_error: bool = True

    def __post_init__(self) -> None:
        """Check the options against pattern and method.

        Raises:
            ConfigError: for an unknown allocation or row weight, or one for which the pattern or the method leaves no
                room.
        """
        check_choice("Allocation", self.allocation, ALLOCATIONS)
        check_choice("Row weights", self.row_weights, get_args(RowWeights))
        unstructured = isinstance(self.pattern, Unstructured)
        if self.allocation != "uniform" and not unstructured:
            raise ConfigError(
                f"Allocation '{self.allocation}' moves zeros between layers, which the pattern {self.pattern} does not "
                "allow: use uniform."
            )
        if self.row_weights != "equal" and not unstructured:
            raise ConfigError(
                f"Row weights '{self.row_weights}' move zeros between rows, which the pattern {self.pattern} does not "
                "allow: use equal."
            )
        if self.row_weights != "equal" and self.method.by_rows:
            raise ConfigError(
                f"Row weights '{self.row_weights}' move zeros between rows, and {self.method.name} prunes every row to "
                "the same sparsity: use equal."
            )

    @property
    def needs(self) -> Needs:
        """Input statistics that have to be collected for every layer."""
        if self.dense_target:
            return Needs.INPUT_SHIFT
        return Needs.GRAM if self.measure_error else self.method.needs

    @property
    def reads_inputs(self) -> bool:
        """True if the run needs calibration windows."""
        return (
            self.needs is not Needs.NOTHING
            or self.reconstruction is not None
            or self.allocation != "uniform"
            or self.row_weights != "equal"
        )

    @property
    def uses_dense_reference(self) -> bool:
        """True if the run needs the dense model's activations together with the pruned ones."""
        return self.dense_target > 0 or self.reconstruction is not None
