"""SparseGPT: prune column by column, and correct the columns to the right by optimal brain surgery.

legend  W  weight, corrected during the sweep                  (out, in)
        U  upper Cholesky factor of H^{-1}, U^T U = H^{-1}     (in, in)
        Q  error of a column divided by its U_jj               (out, block)
Frantar, Alistarh: SparseGPT, ICML 2023, arXiv 2301.00774: Algorithm 1 (sweep), Section 3.2 (adaptive mask, one
selection of W_ij^2 / U_jj^2 per block of columns), Section 3.3 (N:M inside the sweep). H = X^T X + 0.01 mean(diag) I.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alps.core.errors import ConfigError
from alps.core.statistics import InputStats, Needs
from alps.solvers.base import Method, Solution, SolveInfo
from alps.solvers.hessian import InverseFactor, inverse_factor
from alps.solvers.patterns import MaskedPattern, Pattern, SemiStructured, Unstructured, keep_largest
from alps.solvers.topk import redistribute, topk_mask


@dataclass(frozen=True)
class SparseGPT(Method):
    """SparseGPT with the defaults of its paper.

    Attributes:
        damping: ridge on the Gram, as a fraction of its mean diagonal.
        block: columns per mask selection and per lazy update; rounded down to whole groups for N:M.

    Raises:
        ConfigError: if `block` is less than 1.
    """

    damping: float = 0.01
    block: int = 128

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ConfigError("SparseGPT's block size must be at least 1 column.")

    @property
    def name(self) -> str:
        return "sparsegpt"

    @property
    def needs(self) -> Needs:
        return Needs.GRAM

    def prepare(self, stats: InputStats) -> InverseFactor:
        return inverse_factor(stats, self.damping)

    def prune_matrix(self, weight: Tensor, state: InverseFactor, pattern: Pattern) -> Solution:
        info = SolveInfo(damping=state.damping, notes=list(state.notes))
        W, U = weight.clone(), state.upper
        mask = torch.empty_like(W, dtype=torch.bool)
        with info.timed("sweep"):
            blocks = self._blocks(W.shape[1], pattern)
            for (start, stop), kept in zip(blocks, _kept_counts(W, blocks, pattern), strict=True):
                Q = _sweep_block(
                    W[:, start:stop],
                    U[start:stop, start:stop],
                    mask=mask[:, start:stop],
                    kept=kept,
                    pattern=pattern.part(slice(None), slice(start, stop)),
                )
                W[:, stop:].addmm_(Q, U[start:stop, stop:], alpha=-1)
        return Solution(W, mask, info)

    def _blocks(self, columns: int, pattern: Pattern) -> list[tuple[int, int]]:
        """Return first and last + 1 of the columns of every block."""
        width = self.block
        if isinstance(pattern.base, SemiStructured):
            width = max(width // pattern.base.group, 1) * pattern.base.group
        return [(start, min(start + width, columns)) for start in range(0, columns, width)]


def _kept_counts(W: Tensor, blocks: list[tuple[int, int]], pattern: Pattern) -> list[int]:
    """Return the number of entries to keep in every block of columns; their sum is exactly that of the matrix."""
    rows, columns = W.shape
    total = pattern.base.pruned_count(rows * columns)
    kept = [rows * (stop - start) - total * stop // columns + total * start // columns for start, stop in blocks]
    if isinstance(pattern, MaskedPattern):
        room = torch.stack([pattern.allowed[:, start:stop].sum() for start, stop in blocks])
        return [int(count) for count in redistribute(torch.tensor(kept), room.cpu())]
    return kept


def _sweep_block(W: Tensor, U: Tensor, *, mask: Tensor, kept: int, pattern: Pattern) -> Tensor:
    """Prune the columns of a block from left to right.

    Args:
        W: weights of the block, shape (out, block); a view, corrected in place.
        U: diagonal block of the factor, shape (block, block).
        mask: receives the mask of the block, shape (out, block).
        kept: number of entries to keep in the block; only read for an unstructured pattern.
        pattern: pattern on the columns of the block.

    Returns:
        The scaled errors Q (out, block), from which the caller corrects all later columns at once.
    """
    base, all_rows = pattern.base, slice(None)
    Q = torch.empty_like(W)
    diagonal = U.diagonal()
    if isinstance(base, Unstructured):
        scores = pattern.mask_scores(W.square() / diagonal.square())
        mask.copy_(topk_mask(scores.reshape(-1), kept).reshape(scores.shape))
    for j in range(W.shape[1]):
        if isinstance(base, SemiStructured) and j % base.group == 0:
            group = slice(j, j + base.group)
            scores = W[:, group].square() / diagonal[group].square()
            mask[:, group] = keep_largest(scores, pattern.part(all_rows, group))
        pruned = torch.where(mask[:, j], W[:, j], 0.0)
        torch.div(W[:, j] - pruned, diagonal[j], out=Q[:, j])
        W[:, j] = pruned
        W[:, j + 1 :].addr_(Q[:, j], U[j, j + 1 :], alpha=-1)
    return Q
