"""Cache of a frozen model's final hidden states per batch, so that repeated evaluation runs only the LM head."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from alps.calibration.lm_head import LMHead
from alps.core.errors import UnsupportedModel
from alps.models.blocks import find_blocks


class CachedReferenceModel(nn.Module):
    """Causal language model with constant weights that keeps the last block's output of every batch.

    A repeated batch costs only what follows the blocks (the last norm and the output head), and gives bit-identical
    logits. The first batch tests that; where it does not hold, every batch is a complete forward. Outputs (tokens,
    features) are kept on the CPU in the model's dtype.
    """

    def __init__(self, model: nn.Module) -> None:
        """Wrap a model without copying it.

        Raises:
            UnsupportedModel: when its blocks cannot be found.
        """
        super().__init__()
        self.model = model
        # Callers restore the mode of this wrapper afterwards, and with it that of the model.
        self.training = model.training
        self._blocks = find_blocks(model)
        self._head = LMHead(model, self._blocks)
        self._outputs: dict[tuple[torch.Size, bytes], Tensor] = {}
        self._is_exact: bool | None = None  # the head gives bit-identical logits; None before the first batch

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        """Return an object with `logits` (batch, tokens, vocabulary), without gradients."""
        assert not use_cache and not self.model.training
        key = (input_ids.shape, input_ids.cpu().numpy().tobytes())
        with torch.no_grad():
            if key in self._outputs:
                return SimpleNamespace(logits=self._head(self._outputs[key], input_ids))
            logits, outputs = self._run_model(input_ids)
            if self._is_exact is None:
                self._is_exact = self._is_head_exact(input_ids, outputs, logits)
            if self._is_exact and len(outputs) == 1:
                self._outputs[key] = self._head.hidden_of(outputs[0], input_ids).cpu()
        return SimpleNamespace(logits=logits)

    def _is_head_exact(self, ids: Tensor, outputs: Sequence[Any], logits: Tensor) -> bool:
        """Check if the head gives bit-identical logits for the last block's output, which it has if called once."""
        if len(outputs) != 1:
            return False
        try:
            return torch.equal(self._head(self._head.hidden_of(outputs[0], ids), ids), logits)
        except UnsupportedModel:  # whose blocks cannot be run one by one: it runs whole every time
            return False

    def _run_model(self, ids: Tensor) -> tuple[Tensor, list[Any]]:
        """Run the model's own forward; return its logits, and the output of every call of the last block."""
        outputs: list[Any] = []

        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            outputs.append(output)

        handle = self._blocks[-1].module.register_forward_hook(hook)
        try:
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        finally:
            handle.remove()
        return logits, outputs
