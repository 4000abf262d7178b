"""Table of the units that structured pruning can remove from the models of each family.

A family is a `model_type` of transformers. Every row has been tested with the release of transformers that is pinned.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from alps.core.errors import UnsupportedModel
from alps.models.auto_class import is_composite
from alps.models.shrink_layout import Attention, Experts, Family, Mlp, Unit

_FUSED_MLP = Mlp(("mlp.gate_up_proj",), is_fused=True)
_PLAIN_MLP = Mlp(("mlp.up_proj",))
_FC_MLP = Mlp(("fc1",), "fc2", "ffn_dim")
_GPT_MLP = Mlp(("mlp.c_fc",), "mlp.c_proj", "n_inner")
_GPTJ_MLP = Mlp(("mlp.fc_in",), "mlp.fc_out", "n_inner")
_NEOX_MLP = Mlp(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h")
_PHI3 = Attention((("self_attn.qkv_proj", ("head", "kv_head", "kv_head")),))
_DENSE_OUT = replace(Attention(), outer="self_attn.dense")

_SINKS = replace(Attention(), per_head=(("self_attn.sinks", "head"),))
_MLA = Attention(
    (
        ("self_attn.q_proj", ("head",)),
        ("self_attn.q_b_proj", ("head",)),
        ("self_attn.kv_b_proj", ("kv_head",)),
    ),
    head_dim=None,
)
_LLAMA4_MLP = Mlp(("feed_forward.gate_proj", "feed_forward.up_proj"), "feed_forward.down_proj", "intermediate_size_mlp")
# Experts of models whose blocks all have them, and no other MLP.
_ALL_EXPERTS = Experts("num_local_experts", "intermediate_size", router="router")
_DEEPSEEK = Experts(
    "n_routed_experts",
    corrections=("e_score_correction_bias",),
    shared="shared_experts",
    shared_follows=True,
    group_minimum=2,
)

# llama.cpp wants as many inputs of the output projection as the hidden size has; its converter says four times the
# hidden size, whatever the width.
_HEADS: tuple[Unit, ...] = ("head",)
_CHANNELS: tuple[Unit, ...] = ("channel",)

_ONE_SIZE = "transformers derives the size of a head from their number and the hidden size"
_FULL_NORM = "its norms of queries and keys run over all heads, so heads that stay would change"


def _headless(model_type: str, mlp: Mlp, reason: str = _ONE_SIZE, **more: Any) -> Family:
    return Family(model_type, mlp, attention=None, no_heads=reason, **more)


_ROWS = (
    Family("llama", heads="divisor", as_mistral=True),
    Family("mistral"),
    Family("ministral"),
    Family("ministral3"),
    Family("qwen2", unloadable=_HEADS),
    Family("qwen3"),
    Family("gemma"),
    Family("gemma2", heads="divisor", adds_mlp=False),
    Family("gemma3_text", heads="divisor", adds_mlp=False),
    Family("phi", Mlp(("mlp.fc1",), "mlp.fc2"), _DENSE_OUT),
    Family("phi3", _FUSED_MLP, _PHI3, unloadable=_HEADS),
    Family("starcoder2", Mlp(("mlp.c_fc",), "mlp.c_proj"), unloadable=_HEADS),
    Family("olmo", unloadable=_HEADS),
    Family("granite", unloadable=_HEADS),
    Family("smollm3"),
    Family(
        "cohere",
        attention=replace(
            Attention(), per_head=(("self_attn.q_norm.weight", "head"), ("self_attn.k_norm.weight", "kv_head"))
        ),
        unloadable=_HEADS,
    ),
    Family("cohere2"),
    Family("glm", _FUSED_MLP, unloadable=_HEADS),
    Family("glm4", _FUSED_MLP, adds_mlp=False),
    Family("nemotron", _PLAIN_MLP, unloadable=_HEADS),
    Family("exaone4", adds_mlp=False),
    Family("ernie4_5"),
    Family("seed_oss"),
    Family("arcee", _PLAIN_MLP, heads="divisor"),
    Family("apertus", _PLAIN_MLP),
    Family("hunyuan_v1_dense"),
    Family("cwm", heads="divisor"),
    Family("vaultgemma", heads="divisor"),
    _headless("olmo2", Mlp(), _FULL_NORM, adds_mlp=False),
    _headless("olmo3", Mlp(), _FULL_NORM, adds_mlp=False),
    _headless("helium", Mlp(), "transformers gives its output projection as many inputs as the hidden size"),
    _headless("stablelm", Mlp()),
    _headless("persimmon", _NEOX_MLP),
    _headless("gpt_neox", _NEOX_MLP),
    _headless("falcon", replace(_NEOX_MLP, field="ffn_hidden_size"), unloadable=_CHANNELS),
    _headless("opt", _FC_MLP),
    _headless("xglm", _FC_MLP, depth="num_layers"),
    _headless("biogpt", replace(_FC_MLP, field="intermediate_size")),
    _headless("gpt2", replace(_GPT_MLP, inputs_first=True), depth="n_layer"),
    _headless("gpt_bigcode", _GPT_MLP, depth="n_layer", unloadable=_CHANNELS),
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
    Family("mixtral", None, experts=replace(_ALL_EXPERTS, router="gate")),
    Family("qwen2_moe", experts=Experts(shared="shared_expert")),
    Family("qwen3_moe", experts=Experts()),
    Family("olmoe", None, None, replace(_ALL_EXPERTS, count="num_experts", router="gate"), no_heads=_FULL_NORM),
    Family("gpt_oss", None, _SINKS, replace(_ALL_EXPERTS, inputs_first=True, interleaved=True)),
    Family("deepseek_v2", attention=_MLA, experts=replace(_DEEPSEEK, group_minimum=1), heads="divisor"),
    Family("deepseek_v3", attention=_MLA, experts=_DEEPSEEK),
    Family("phimoe", None, experts=_ALL_EXPERTS),
    Family("granitemoe", None, experts=replace(_ALL_EXPERTS, mixture="block_sparse_moe")),
    Family("glm4_moe", experts=_DEEPSEEK),
    Family(
        "llama4_text",
        _LLAMA4_MLP,
        experts=replace(
            _ALL_EXPERTS, mixture="feed_forward", inputs_first=True, shared="shared_expert", shared_follows=True
        ),
    ),
    Family(
        "ernie4_5_moe",
        experts=Experts(
            "moe_num_experts",
            per_token="moe_k",
            corrections=("moe_statics.e_score_correction_bias",),
            shared="shared_experts",
            shared_follows=True,
        ),
    ),
    Family(
        "hunyuan_v1_moe",
        None,
        experts=Experts(
            "num_experts", "intermediate_size", "moe_topk", router="gate.wg", shared="shared_mlp", shared_follows=True
        ),
    ),
    Family(
        "jetmoe",
        None,
        None,
        no_heads="its attention is a mixture of experts",
        no_experts="its attention has as many experts as its MLP",
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
            f"Structure cannot be removed from models of type '{config.model_type}', which have not been tested: use "
            "`alps prune`, or a model of a type in the table of docs/reference/shrinking.md."
        )
    return family


def adds_output(model: nn.Module) -> bool:
    """Check if the output of a model's MLP is added to the residual stream without a norm or a factor."""
    config: Any = model.config
    is_scaled = getattr(config, "residual_multiplier", 1.0) != 1.0
    return family_of(model).adds_mlp and not is_scaled and bool(getattr(config, "do_layer_norm_before", True))
