"""Layout of a family's blocks: the tensors that hold units which structured pruning removes, and how they lie there.

A *unit* is what is removed: an MLP channel, a query head, a KV head, an expert, or a channel of an expert. A *run* is a
part of a tensor's axis with all units of one kind in a row, each of the same number of rows or columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Unit = Literal["channel", "head", "kv_head", "expert", "expert_channel", "shared_channel"]


@dataclass(frozen=True)
class Cut:
    """Axis of a tensor of a block from which units are removed.

    Attributes:
        tensor: name inside the block.
        axis: number of the axis.
        runs: units of each run, in order.
        interleaved: True when the first units of all runs come first, then the second ones, as in GPT-OSS.
    """

    tensor: str
    axis: int
    runs: tuple[Unit, ...]
    interleaved: bool = False


@dataclass(frozen=True)
class Mlp:
    """Dense MLP of a block.

    Attributes:
        inner: names of the linear maps whose outputs are channels.
        outer: name of the map whose inputs are channels.
        field: of the configuration, the number of channels; None when no field says it.
        is_fused: True when the one inner map computes gates, then values.
        inputs_first: True when weights have the shape (in, out).
    """

    inner: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    outer: str = "mlp.down_proj"
    field: str | None = "intermediate_size"
    is_fused: bool = False
    inputs_first: bool = False


@dataclass(frozen=True)
class Attention:
    """Attention of a block with one run of rows for every kind of head.

    Attributes:
        inner: names of the maps that compute heads, with their runs.
        outer: name of the map whose inputs are query heads.
        per_head: names of tensors with one entry, or one row, for each head.
        head_dim: field of the configuration with the size of a head; None when other fields say it.
    """

    inner: tuple[tuple[str, tuple[Unit, ...]], ...] = (
        ("self_attn.q_proj", ("head",)),
        ("self_attn.k_proj", ("kv_head",)),
        ("self_attn.v_proj", ("kv_head",)),
    )
    outer: str = "self_attn.o_proj"
    per_head: tuple[tuple[str, Unit], ...] = ()
    head_dim: str | None = "head_dim"


@dataclass(frozen=True)
class Experts:
    """Mixture of experts whose weights are fused into tensors (experts, ...), and its router.

    Attributes:
        count: field of the configuration with the number of experts.
        width: field with the channels of an expert.
        per_token: field with the number of experts that a token is sent to.
        mixture: name of the module that holds router and experts.
        router: name of the router inside the mixture.
        corrections: names, inside the router, of tensors with one entry for each expert along the last axis, which are
            added to its scores.
        inputs_first: True when the matrix of an expert has the shape (in, out).
        interleaved: True when gates and values alternate.
        shared: name, inside the mixture, of the MLP of shared experts.
        shared_follows: True when the width of that MLP is a multiple of that of an expert.
        group_minimum: experts that have to stay in each group of a grouped router.
    """

    count: str = "num_experts"
    width: str = "moe_intermediate_size"
    per_token: str = "num_experts_per_tok"
    mixture: str = "mlp"
    router: str = "gate"
    corrections: tuple[str, ...] = ()
    inputs_first: bool = False
    interleaved: bool = False
    shared: str | None = None
    shared_follows: bool = False
    group_minimum: int = 1

    @property
    def shared_mlp(self) -> Mlp | None:
        """MLP of the shared experts."""
        if self.shared is None:
            return None
        name = f"{self.mixture}.{self.shared}"
        return Mlp((f"{name}.gate_proj", f"{name}.up_proj"), f"{name}.down_proj")


@dataclass(frozen=True)
class Family:
    """Family of models: all units that can be removed from the models of one `model_type`.

    Attributes:
        model_type: of the configuration.
        mlp: the dense MLP of blocks that have one.
        attention: where heads lie; None when they cannot be removed.
        experts: the mixture of blocks that have one; None when experts cannot be removed.
        heads: which numbers of heads the configuration can say: `free` for any, `divisor` for divisors of the hidden
            size.
        as_mistral: True when the model can be saved as Mistral, whose numbers of heads are free.
        no_width: reason why MLP channels cannot be removed, as the end of a sentence.
        no_heads: reason why heads cannot be removed, as the end of a sentence.
        no_experts: reason why experts cannot be removed, as the end of a sentence.
        adds_mlp: True when the MLP's output is added to the residual stream without a norm.
        depth: field with the number of blocks.
        unloadable: units without which llama.cpp does not load a model that it loads whole.
    """

    model_type: str
    mlp: Mlp | None = Mlp()
    attention: Attention | None = Attention()
    experts: Experts | None = None
    heads: Literal["free", "divisor"] = "free"
    as_mistral: bool = False
    no_width: str = ""
    no_heads: str = ""
    no_experts: str = ""
    adds_mlp: bool = True
    depth: str = "num_hidden_layers"
    unloadable: tuple[Unit, ...] = ()


def cuts_of(family: Family) -> list[Cut]:
    """List the axes that can be cut in the blocks of a family; a block may lack some of the tensors.

    Of one tensor, the axis of experts comes before that of their channels.
    """
    return [*_mlp_cuts(family.mlp), *_attention_cuts(family.attention), *_expert_cuts(family.experts)]


def _mlp_cuts(mlp: Mlp | None, unit: Unit = "channel") -> list[Cut]:
    if mlp is None:
        return []
    runs = (unit, unit) if mlp.is_fused else (unit,)
    rows, columns = (1, 0) if mlp.inputs_first else (0, 1)
    inner = [cut for name in mlp.inner for cut in (Cut(f"{name}.weight", rows, runs), Cut(f"{name}.bias", 0, runs))]
    return [*inner, Cut(f"{mlp.outer}.weight", columns, (unit,))]


def _attention_cuts(attention: Attention | None) -> list[Cut]:
    if attention is None:
        return []
    inner = [Cut(f"{name}.{part}", 0, runs) for name, runs in attention.inner for part in ("weight", "bias")]
    norms = [Cut(name, 0, (unit,)) for name, unit in attention.per_head]
    return [*inner, *norms, Cut(f"{attention.outer}.weight", 1, ("head",))]


def _expert_cuts(experts: Experts | None) -> list[Cut]:
    if experts is None:
        return []
    router, module = (f"{experts.mixture}.{part}" for part in (experts.router, "experts"))
    fused = [f"{module}.{name}{part}" for part in ("", "_bias") for name in ("gate_up_proj", "down_proj")]
    rows, columns = (2, 1) if experts.inputs_first else (1, 2)
    gates: tuple[Unit, ...] = ("expert_channel", "expert_channel")
    return [
        *(Cut(f"{router}.{name}", 0, ("expert",)) for name in ("weight", "bias")),
        *(Cut(f"{router}.{name}", -1, ("expert",)) for name in experts.corrections),
        *(Cut(name, 0, ("expert",)) for name in fused),
        Cut(fused[0], rows, gates, experts.interleaved),
        Cut(fused[1], columns, ("expert_channel",)),
        Cut(fused[2], 1, gates, experts.interleaved),
        *(_mlp_cuts(experts.shared_mlp, "shared_channel") if experts.shared_follows else ()),
    ]
