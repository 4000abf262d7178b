"""lm-eval's model in memory for several processes, each of which scores every N-th item.

Imported only if lm-eval is installed. lm-eval asks a model for its rank, and for the collectives below.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn

from alps.core.distributed import ProcessGroup
from alps.models.auto_class import text_config
from alps.models.finite_logits import check_logits
from alps.models.positions import check_tokens, position_limit


class DistributedModel(HFLM):  # type: ignore[misc]
    """Model in lm-eval's interface, as one rank of `group`."""

    def __init__(self, group: ProcessGroup, model: nn.Module, tokenizer: Any, batch_size: int, name: str) -> None:
        limit = position_limit(text_config(model))
        super().__init__(model, tokenizer=tokenizer, batch_size=batch_size, max_length=limit)
        self._subject = f"Model '{name}'"
        self._group, self._rank, self._world_size = group, group.rank, group.size

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the logits of token ids (batch, tokens), and refuse NaN and infinity.

        Raises:
            ConfigError: for tokens that the model does not have.
            NotFinite: naming the beginning of the first such item, and the block.
        """
        check_tokens(self.model, inps, "An item")
        logits: Tensor = super()._model_call(inps, *args, **kwargs)
        check_logits(logits, self.model, inps, subject=self._subject, where=lambda row: self._describe(inps[row]))
        return logits

    def _describe(self, ids: Tensor) -> str:
        text = " ".join(self.tok_decode(ids.tolist()).split())
        return f"the item that begins with {text[:40]!r}"

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Gather one number of every rank, by rank."""
        return torch.tensor(self._group.all_gather_object(tensor.item()))

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Gather the objects of all ranks, by rank, on rank `dst`; the other ranks get None."""
        objects = self._group.all_gather_object(obj)
        return objects if self._group.rank == dst else None

    def barrier(self) -> None:
        """Block until every rank has called this."""
        self._group.barrier()
