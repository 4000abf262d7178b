"""Blocks and parts that do with hidden states what no decoder here does, and some other one may."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Doubled(nn.Module):
    """Attention that multiplies what its last site gave, in place: the tensor is the same, its values are not."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = self.inner(*args, **kwargs)
        found[0].mul_(2)
        return found


class Writing(nn.Module):
    """A block that adds to what its attention gave, in place."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        inner = self.block
        states = inner.self_attn(hidden_states=inner.input_layernorm(hidden), **kwargs)[0]
        states += hidden
        found: Tensor = states + inner.mlp(inner.post_attention_layernorm(states))
        return found


class Strided(nn.Module):
    """A last site that receives every second entry of something wider."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Any:
        wide = self.mlp.act_fn(self.mlp.gate_proj(x)) * self.mlp.up_proj(x)
        return self.mlp.down_proj(wide.repeat_interleave(2, dim=-1)[..., ::2])
