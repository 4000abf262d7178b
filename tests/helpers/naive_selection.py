"""Selection of the largest scores by plain loops, for the methods that prune by a score."""

from __future__ import annotations

import torch
from torch import Tensor

from alps.solvers.patterns import Pattern, SemiStructured, Unstructured

PATTERNS: list[Pattern] = [
    Unstructured(0.5),
    Unstructured(0.7),
    Unstructured(0.93),
    SemiStructured(2, 4),
    SemiStructured(1, 4),
    SemiStructured(3, 5),
]
SQUARE = [
    "gaussian",
    "correlated",
    "dead_inputs",
    "zero_inputs",
    "huge_range",
    "rounded_weight",
    "equal_weights",
]


def best_of(scores: list[float], positions: list[int], kept: int) -> set[int]:
    """Return the `kept` positions with the largest scores; among equal scores the first."""
    return set(sorted(positions, key=lambda i: (-scores[i], i))[:kept])


def best_in_groups(scores: list[float], pattern: SemiStructured) -> set[int]:
    """Return the positions that an N:M pattern keeps."""
    chosen: set[int] = set()
    for start in range(0, len(scores), pattern.group):
        chosen |= best_of(scores, list(range(start, start + pattern.group)), pattern.keep)
    return chosen


def as_mask(chosen: set[int], like: Tensor) -> Tensor:
    """Turn positions in the flat tensor into a boolean mask of its shape."""
    flat = [i in chosen for i in range(like.numel())]
    return torch.tensor(flat).reshape(like.shape)
