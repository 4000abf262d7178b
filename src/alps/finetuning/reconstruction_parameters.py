"""Parameters of a block reconstruction, see `alps.finetuning.block_reconstruction`."""

from __future__ import annotations

from dataclasses import dataclass

# What the presets are measured with: docs/project/log/targets.md, "A share of the dense hidden states".
DEFAULT_RECONSTRUCT_TARGET = 1.0


@dataclass(frozen=True)
class ReconstructionParameters:
    """Parameters of a block reconstruction.

    Attributes:
        epochs: passes over the calibration windows.
        max_tokens: training ends after this number of tokens, whatever the epochs; None for no limit.
        max_distinct_tokens: the windows are the first ones with this number of tokens; None for all.
        target: share t of the dense model's outputs in the target; the last block's is 1 where its loss is that of the
            predictions.
        lr: largest step size of Adam.
        floor: share of the largest step size to which it falls along a cosine.
        held_back: share of the windows on which the best state is chosen, and which are not trained on.
        tokens: in a step.
        norms: tune norms and biases as well.
        checks: losses on the held-back windows in an epoch.
    """

    epochs: int = 1
    max_tokens: int | None = 98_304
    max_distinct_tokens: int | None = 32_768
    target: float = DEFAULT_RECONSTRUCT_TARGET
    lr: float = 1e-3
    floor: float = 0.1
    held_back: float = 0.0625
    tokens: int = 512
    norms: bool = True
    checks: int = 2

    def windows_per_step(self, window_tokens: int, ranks: int = 1) -> int:
        """Return the windows of a step on all ranks: those that its tokens fill, and one for every rank at least."""
        return max(self.tokens // window_tokens, ranks)
