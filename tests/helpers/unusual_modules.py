"""Modules that treat hidden states in ways that no tested architecture does, but others may."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class DoublingAttention(nn.Module):
    """Attention that doubles the output of its last layer in place: the tensor is the same, its values are not."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.inner(*args, **kwargs)
        outputs[0].mul_(2)
        return outputs


class InPlaceBlock(nn.Module):
    """Block that adds the residual to the output of its attention in place."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        inner = self.block
        states = inner.self_attn(hidden_states=inner.input_layernorm(hidden), **kwargs)[0]
        states += hidden
        out: Tensor = states + inner.mlp(inner.post_attention_layernorm(states))
        return out


class StridedMlp(nn.Module):
    """MLP whose last layer receives every second entry of a wider tensor."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Any:
        wide = self.mlp.act_fn(self.mlp.gate_proj(x)) * self.mlp.up_proj(x)
        return self.mlp.down_proj(wide.repeat_interleave(2, dim=-1)[..., ::2])


class ListedExperts(nn.Module):
    """Mixture of MLPs in a `ModuleList`, each expert of which is called on its own tokens alone; the last one on none.

    The router has no usual name.
    """

    def __init__(self, width: int, inner: int, experts: int) -> None:
        super().__init__()
        self.dispatch = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            [
                nn.ModuleDict(
                    {
                        "gate_proj": nn.Linear(width, inner, bias=False),
                        "up_proj": nn.Linear(width, inner, bias=False),
                        "down_proj": nn.Linear(inner, width, bias=False),
                    }
                )
                for _ in range(experts)
            ]
        )

    def forward(self, hidden: Tensor) -> Tensor:
        rows, output = hidden.flatten(0, -2), torch.zeros_like(hidden).flatten(0, -2)
        choice = self.dispatch(rows)[:, :-1].argmax(dim=-1)
        for number, expert in enumerate(self.experts):
            chosen = choice == number
            if chosen.any():
                x = rows[chosen]
                inner = nn.functional.silu(expert["gate_proj"](x)) * expert["up_proj"](x)  # type: ignore[index]
                output[chosen] = expert["down_proj"](inner)  # type: ignore[index]
        return output.view_as(hidden)
