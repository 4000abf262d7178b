"""Configuration of a checkpoint as transformers reads it, without what would change the form of a forward's outputs."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from alps.checkpoints.quantization import check_quantization, is_dense

# Settings of a configuration that ask for tuples, or for outputs that nothing here reads.
_PLAIN_OUTPUTS = {
    "return_dict": True,
    "torchscript": False,
    "output_hidden_states": False,
    "output_attentions": False,
    "output_router_logits": False,
}


def load_config(source: str, name: str | None = None) -> Any:
    """Read the configuration of a directory or a hub model.

    Args:
        source: directory or hub name.
        name: of the checkpoint in messages; None for `source`.

    Raises:
        CheckpointError: for weights that are quantized, or compressed by a format other than ordinary tensors.
        Exception: any that transformers raises.
    """
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    settings = getattr(config, "quantization_config", None)
    if settings:
        check_quantization({"quantization_config": settings}, name or str(source))
        if is_dense(settings):
            del config.quantization_config
    reset_outputs(config)
    return config


def reset_outputs(config: Any) -> None:
    """Reset all settings of a configuration and of its parts that change the form of a forward's outputs."""
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}]
    for part in [config, *(part for part in parts if part is not None)]:
        for name, value in _PLAIN_OUTPUTS.items():
            if getattr(part, name, value) != value:
                setattr(part, name, value)
