"""A mixture of experts made of a dense LLaMA: the MLP of every block is split into experts behind a linear router.

Channels that are active on the same tokens form an expert, all of one size (as in MoEfication, arXiv 2110.01786). The
router is fitted by least squares to the logarithms of the norms of the experts' outputs. Expert outputs are scaled for
the renormalised weights of k experts, and then refitted to the dense MLP. The result is a Mixtral of transformers. It
is a stand-in for trained mixtures: its experts were never trained apart from each other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.expert_records import record_tokens, run_in_batches
from alps.calibration.expert_refit import refit_experts
from alps.calibration.masked_router import find_mixture
from alps.models.blocks import find_blocks

_CPU = torch.device("cpu")
_ROUNDS = 10


def split(model: Any, windows: Tensor, *, experts: int, top_k: int, sharpness: float, seed: int) -> Any:
    """Return a Mixtral whose experts are parts of the MLPs of a LLaMA.

    Args:
        model: a LLaMA in float32 whose MLP width is a multiple of `experts`.
        windows: token ids (windows, tokens) for clusters, routers and refit.
        experts: number of experts of every block.
        top_k: experts of a token.
        sharpness: standard deviation of the router's logits over experts.
        seed: of the clusters.
    """
    mixture_model = _empty_mixtral(model, experts, top_k)
    blocks = find_blocks(mixture_model)
    inputs = capture_block_inputs(mixture_model, blocks, windows, max(4096 // windows.shape[1], 1))
    for block, dense in zip(blocks, model.model.layers, strict=True):
        mixture = find_mixture(block)
        assert mixture is not None
        tokens = record_tokens(mixture, block, inputs, device=_CPU, tokens=inputs.tokens)
        with torch.no_grad():
            _fill(block.module.mlp, dense.mlp, tokens.hidden, sharpness, seed)
        tokens = replace(tokens, target=run_in_batches(dense.mlp, tokens.hidden))
        refit = refit_experts(mixture, tokens, range(experts))
        print(f"{block.name}: {refit.error_before:.4f}, refitted {refit.error_after:.4f}", flush=True)
        inputs.advance(block.index, block.module, _CPU)
    return mixture_model


def _empty_mixtral(model: Any, experts: int, top_k: int) -> Any:
    """Return a Mixtral with everything but the MLPs of a LLaMA."""
    config = model.config
    same = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads rms_norm_eps hidden_act "
        "max_position_embeddings tie_word_embeddings bos_token_id eos_token_id rope_parameters"
    )
    mixtral = MixtralForCausalLM(
        MixtralConfig(
            **{name: getattr(config, name) for name in same.split()},
            intermediate_size=config.intermediate_size // experts,
            num_local_experts=experts,
            num_experts_per_tok=top_k,
            sliding_window=None,
        )
    )
    state = {name: tensor for name, tensor in model.state_dict().items() if ".mlp." not in name}
    missing = mixtral.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and all(".mlp." in name for name in missing.missing_keys)
    # Grouped products need widths that are multiples of 16 bytes.
    mixtral.set_experts_implementation("eager")
    return mixtral.eval()


def _fill(target: Any, mlp: Any, hidden: Tensor, sharpness: float, seed: int) -> None:
    """Write the experts and the router of one block."""
    experts = target.experts
    features = mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)
    clusters = balanced_clusters(features.abs(), experts.num_experts, seed)
    norms = []
    for expert, channels in enumerate(clusters):
        down = mlp.down_proj.weight[:, channels]
        experts.gate_up_proj[expert] = torch.cat([mlp.gate_proj.weight[channels], mlp.up_proj.weight[channels]])
        experts.down_proj[expert] = down * target.top_k
        norms.append((features[:, channels] @ down.T).norm(dim=1))
    # Logarithms: a token with massive activations would otherwise get one expert alone, at k times its scale.
    logits = torch.stack(norms, dim=1).clamp(min=1e-6).log()
    logits = logits - logits.mean(dim=1, keepdim=True)
    gram = hidden.T @ hidden
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    target.gate.weight.copy_(sharpness / logits.std() * torch.linalg.solve(gram, hidden.T @ logits).T)


def balanced_clusters(activity: Tensor, count: int, seed: int) -> list[Tensor]:
    """Cluster channels of activity (tokens, channels) by the correlation of their activities, all clusters of one size.

    K-means in which the closest pairs of channel and centre are joined first.
    """
    points = nn.functional.normalize((activity - activity.mean(dim=0)).T, dim=1)
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))
    centres, size = points[order[:count]], len(points) // count
    clusters: list[list[int]] = []
    for _ in range(_ROUNDS):
        clusters = [[] for _ in range(count)]
        free = set(range(len(points)))
        for pair in (points @ centres.T).flatten().argsort(descending=True).tolist():
            channel, cluster = divmod(pair, count)
            if channel in free and len(clusters[cluster]) < size:
                clusters[cluster].append(channel)
                free.remove(channel)
        centres = torch.stack([nn.functional.normalize(points[members].mean(dim=0), dim=0) for members in clusters])
    return [torch.tensor(sorted(members)) for members in clusters]
