"""Every pruning method by name, with and without a refit, and the problems and patterns of the tests of all methods."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from alps.core.statistics import InputStats
from alps.solvers import METHODS, Method, get_method
from alps.solvers.base import Solution
from alps.solvers.patterns import Pattern, SemiStructured, Unstructured
from helpers.problems import PROBLEMS, Problem

METHOD_NAMES = [name + suffix for name in METHODS for suffix in ("", "+refit")]
PATTERNS: list[Pattern] = [
    Unstructured(0.5),
    Unstructured(0.7),
    Unstructured(0.999),
    SemiStructured(2, 4),
    SemiStructured(1, 4),
    SemiStructured(4, 8),
    SemiStructured(3, 5),
]


@cache
def cached_problem(name: str) -> Problem:
    """Return a problem of `PROBLEMS`, made once."""
    return PROBLEMS[name]()


def make_method(name: str) -> Method:
    """Create a method from its name in `METHOD_NAMES`."""
    base, _, suffix = name.partition("+")
    return get_method(base, refit=suffix == "refit")


def solve(name: str, weight: Tensor, stats: InputStats, pattern: Pattern) -> Solution:
    """Prune a weight by the method of that name."""
    method = make_method(name)
    return method.solve(weight, method.prepare(stats), pattern)


def bits(values: Tensor) -> Tensor:
    """Return the bits of float32 values as int32, in which +0.0 and -0.0 differ."""
    return values.view(torch.int32)
