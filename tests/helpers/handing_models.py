"""Tiny models whose blocks read more than their hidden states: values of the tokens, or of earlier blocks."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

# What blocks read beside their hidden states; the tests of the replay run over all of them.
MODELS = ("tokens", "per layer", "flat", "container", "output", "first hidden", "streams", "nested")
# Ways of reading that cannot be replayed, each with the sentence's end.
REFUSED = {
    "attribute": "block 0 gives other hidden states for equal arguments, so it reads something else",
    "computed": "argument handed of block 1 differs when the block is replayed",
    "batch": "argument extra of block 0: it depends on the tokens of several windows at once",
    "writes": "block 0 writes into its argument number 1",
}


class _Block(nn.Module):
    def __init__(self, kind: str, strength: float) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.kind, self.strength = kind, strength
        self.note: Tensor | None = None

    def forward(self, x: Tensor, extra: Any = None, *, handed: Any = None) -> Any:
        states: Tensor = torch.tanh(self.linear(x))
        if self.kind == "container":
            if "keys" in handed:
                states = states + self.strength * handed["keys"][0]
            else:
                handed["keys"] = (states.cumsum(dim=1), None)
            return states
        if self.kind == "writes":
            extra.mul_(0.5)
        if isinstance(extra, dict):
            extra = extra["ids"][0]
        if extra is not None:
            extra = extra.float().reshape(-1, x.shape[-2], 1) if extra.numel() == states[..., 0].numel() else extra
            states = states + self.strength * extra
        if self.note is not None:
            states = states + self.strength * self.note[..., None].mean()
        if torch.is_tensor(handed):
            states = states + self.strength * handed
        return (states, states.cumsum(dim=1)) if self.kind in ("output", "computed") else states


class HandingModel(nn.Module):
    """Three blocks, a head, and values that belong to the tokens of a window or to earlier blocks."""

    def __init__(self, kind: str, strength: float = 0.3) -> None:
        """Build a model with fixed weights.

        Args:
            kind: one of `MODELS`, or a key of `REFUSED`.
            strength: of the values that blocks read beside their hidden states.
        """
        super().__init__()
        self.kind = kind
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            self.embed = nn.Embedding(64, 8)
            self.layers = nn.ModuleList([_Block(kind, strength) for _ in range(3)])
            self.head = nn.Linear(8, 64)

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding, as models of transformers do."""
        return self.embed

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Return the logits (windows, tokens, 64) of token ids (windows, tokens)."""
        hidden: Tensor = self.embed(input_ids)
        if self.kind == "streams":
            hidden = torch.stack([hidden, -hidden, 2 * hidden, hidden])
        handed: Any = UserDict() if self.kind == "container" else None
        ids, first = input_ids / 64, hidden
        for index, layer in enumerate(self.layers):
            if self.kind == "attribute":
                layer.note = ids
            if self.kind == "computed" and handed is not None:
                handed = handed.abs() * 2
            extra = {
                "tokens": ids[..., None],
                "per layer": torch.stack([ids, ids * ids, 1 - ids], dim=-1)[..., index, None],
                "flat": ids.flatten(),
                "batch": ids.mean() if len(ids) > 1 else ids[0].mean(),
                "nested": {"ids": (ids[..., None], "a flag")},
                "writes": ids[..., None].clone(),
            }.get(self.kind)
            output = layer(hidden, extra, handed=handed)
            hidden = output if torch.is_tensor(output) else output[0]
            if not torch.is_tensor(output):
                handed = output[1]
            if self.kind == "first hidden":
                handed = hidden if index == 0 else handed
        assert first is not None
        return SimpleNamespace(logits=self.head(hidden.mean(dim=0) if self.kind == "streams" else hidden))
