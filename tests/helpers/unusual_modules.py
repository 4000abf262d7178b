"""Modules that treat hidden states in ways that no tested architecture does, but others may."""

from __future__ import annotations

from typing import Any

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
