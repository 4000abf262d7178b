"""Table of what structured pruning can remove from the models of each family, and where it lies in their blocks.

A family is a `model_type` of transformers. A *unit* is what is removed: an MLP channel, a query head, a KV head, an
expert, or a channel of an expert. A *run* is a part of a tensor's axis with all units of one kind in a row, each of the
same number of rows or columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from alps.core.errors import UnsupportedModel
from alps.models.auto_class import is_composite

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
        inner: names of the linear maps whose outputs are channels, from the first on.
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
    """

    inner: tuple[tuple[str, tuple[Unit, ...]], ...] = (
        ("self_attn.q_proj", ("head",)),
        ("self_attn.k_proj", ("kv_head",)),
        ("self_attn.v_proj", ("kv_head",)),
    )
    outer: str = "self_attn.o_proj"
    per_head: tuple[tuple[str, Unit], ...] = ()


@dataclass(frozen=True)
class Family:
    """Family of models: all units that can be removed from the models of one `model_type`.

    Attributes:
        model_type: of the configuration.
        mlp: the dense MLP of blocks that have one.
        attention: where heads lie; None when they cannot be removed.
        heads: which numbers of heads the configuration can say: `free` for any, `divisor` for divisors of the hidden
            size.
        as_mistral: True when the model can be saved as Mistral, whose numbers of heads are free.
        no_width: reason why MLP channels cannot be removed, as the end of a sentence.
        no_heads: reason why heads cannot be removed, as the end of a sentence.
        adds_mlp: True when the MLP's output is added to the residual stream without a norm or a factor.
        depth: field with the number of blocks.
    """

    model_type: str
    mlp: Mlp | None = Mlp()
    attention: Attention | None = Attention()
    heads: Literal["free", "divisor"] = "free"
    as_mistral: bool = False
    no_width: str = ""
    no_heads: str = ""
    adds_mlp: bool = True
    depth: str = "num_hidden_layers"


_FUSED_MLP = Mlp(("mlp.gate_up_proj",), is_fused=True)
_PLAIN_MLP = Mlp(("mlp.up_proj",))
_FC_MLP = Mlp(("fc1",), "fc2", "ffn_dim")
_GPT_MLP = Mlp(("mlp.c_fc",), "mlp.c_proj", "n_inner")
_GPTJ_MLP = Mlp(("mlp.fc_in",), "mlp.fc_out", "n_inner")
_NEOX_MLP = Mlp(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h")
_PHI3 = Attention((("self_attn.qkv_proj", ("head", "kv_head", "kv_head")),))
_DENSE_OUT = replace(Attention(), outer="self_attn.dense")

_ONE_SIZE = "transformers derives the size of a head from their number and the hidden size"
_FULL_NORM = "its norms of queries and keys run over all heads, so heads that stay would change"


def _headless(model_type: str, mlp: Mlp, reason: str = _ONE_SIZE, **more: Any) -> Family:
    return Family(model_type, mlp, attention=None, no_heads=reason, **more)


_ROWS = (
    Family("llama", heads="divisor", as_mistral=True),
    Family("mistral"),
    Family("qwen2"),
    Family("qwen3"),
    Family("gemma"),
    Family("gemma2", heads="divisor", adds_mlp=False),
    Family("gemma3_text", heads="divisor", adds_mlp=False),
    Family("phi", Mlp(("mlp.fc1",), "mlp.fc2"), _DENSE_OUT),
    Family("phi3", _FUSED_MLP, _PHI3),
    Family("starcoder2", Mlp(("mlp.c_fc",), "mlp.c_proj")),
    Family("olmo"),
    Family("granite", adds_mlp=False),
    Family("smollm3"),
    Family(
        "cohere",
        attention=replace(
            Attention(), per_head=(("self_attn.q_norm.weight", "head"), ("self_attn.k_norm.weight", "kv_head"))
        ),
    ),
    Family("cohere2"),
    Family("glm", _FUSED_MLP),
    Family("glm4", _FUSED_MLP, adds_mlp=False),
    Family("nemotron", _PLAIN_MLP),
    Family("exaone4", adds_mlp=False),
    Family("ernie4_5"),
    Family("seed_oss"),
    Family("arcee", _PLAIN_MLP, heads="divisor"),
    Family("apertus", _PLAIN_MLP),
    _headless("olmo2", Mlp(), _FULL_NORM, adds_mlp=False),
    _headless("olmo3", Mlp(), _FULL_NORM, adds_mlp=False),
    _headless("helium", Mlp(), "transformers gives its output projection as many inputs as the hidden size"),
    _headless("stablelm", Mlp()),
    _headless("persimmon", _NEOX_MLP),
    _headless("gpt_neox", _NEOX_MLP),
    _headless("falcon", replace(_NEOX_MLP, field="ffn_hidden_size")),
    _headless("opt", _FC_MLP),
    _headless("xglm", _FC_MLP, depth="num_layers"),
    _headless("biogpt", replace(_FC_MLP, field="intermediate_size")),
    _headless("gpt2", replace(_GPT_MLP, inputs_first=True), depth="n_layer"),
    _headless("gpt_bigcode", _GPT_MLP, depth="n_layer"),
    _headless("gpt_neo", replace(_GPT_MLP, field="intermediate_size"), depth="num_layers"),
    _headless("gptj", _GPTJ_MLP, depth="n_layer"),
    _headless("codegen", _GPTJ_MLP, depth="n_layer"),
    _headless(
        "bloom",
        replace(_NEOX_MLP, field=None),
        no_width="its configuration has no field for the width of the MLP, which is four times the hidden size",
        depth="n_layer",
    ),
    _headless(
        "mpt",
        Mlp(("ffn.up_proj",), "ffn.down_proj", None),
        no_width="its configuration has the width of the MLP as a multiple of the hidden size",
        depth="n_layers",
    ),
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ROWS}


def family_of(model: nn.Module) -> Family:
    """Return the family of a model.

    Raises:
        UnsupportedModel: for a family that has not been tested, and for a model that reads images.
    """
    config: Any = model.config
    if is_composite(model):
        raise UnsupportedModel(
            f"{type(model).__name__} has other parts than a text model: structured pruning takes models of text alone."
        )
    if (family := FAMILIES.get(config.model_type)) is None:
        raise UnsupportedModel(
            f"Structure cannot be removed from models of type '{config.model_type}', which have not been tested: "
            f"use `alps prune`, or one of {', '.join(FAMILIES)}."
        )
    return family


def adds_output(model: nn.Module) -> bool:
    """Check if the output of a model's MLP is added to the residual stream without a norm or a factor."""
    config: Any = model.config
    return family_of(model).adds_mlp and bool(getattr(config, "do_layer_norm_before", True))


def cuts_of(family: Family) -> list[Cut]:
    """List the axes that can be cut in the blocks of a family; a block may lack some of the tensors."""
    return [*_mlp_cuts(family.mlp), *_attention_cuts(family.attention)]


def _mlp_cuts(mlp: Mlp | None) -> list[Cut]:
    if mlp is None:
        return []
    runs: tuple[Unit, ...] = ("channel", "channel") if mlp.is_fused else ("channel",)
    rows, columns = (1, 0) if mlp.inputs_first else (0, 1)
    inner = [cut for name in mlp.inner for cut in (Cut(f"{name}.weight", rows, runs), Cut(f"{name}.bias", 0, runs))]
    return [*inner, Cut(f"{mlp.outer}.weight", columns, ("channel",))]


def _attention_cuts(attention: Attention | None) -> list[Cut]:
    if attention is None:
        return []
    inner = [Cut(f"{name}.{part}", 0, runs) for name, runs in attention.inner for part in ("weight", "bias")]
    norms = [Cut(name, 0, (unit,)) for name, unit in attention.per_head]
    return [*inner, *norms, Cut(f"{attention.outer}.weight", 1, ("head",))]
