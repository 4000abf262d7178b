"""Configuration of a checkpoint as transformers reads it, without what would change the form of a forward's outputs."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from alps.checkpoints.quantization import check_quantization, is_dense, is_packed_method

# Settings of a configuration that ask for tuples, or for outputs that nothing here reads.
_PLAIN_OUTPUTS = {
    "return_dict": True,
    "torchscript": False,
    "output_hidden_states": False,
    "output_attentions": False,
    "output_router_logits": False,
}


def load_config(source: str, name: str | None = None, *, packed: bool = False) -> Any:
    """Read the configuration of a directory or a hub model.

    Args:
        source: directory or hub name.
        name: of the checkpoint in messages; None for `source`.
        packed: accept the configuration of a packed directory, and remove what refers to the format.

    Raises:
        CheckpointError: for weights that are quantized, or compressed by a format other than ordinary tensors.
        Exception: any that transformers raises.
    """
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    settings = getattr(config, "quantization_config", None)
    if packed and is_packed_method(settings):
        remove_packing(config)
    elif settings:
        check_quantization({"quantization_config": settings}, name or str(source))
        if is_dense(settings):
            del config.quantization_config
    reset_outputs(config)
    return config


def remove_packing(config: Any) -> None:
    """Remove from a configuration and its parts what refers to the packed format."""
    for part in _parts(config):
        for name in ("quantization_config", "auto_map", "transformers_weights"):
            part.__dict__.pop(name, None)


def reset_outputs(config: Any) -> None:
    """Reset all settings of a configuration and of its parts that change the form of a forward's outputs."""
    for part in _parts(config):
        for name, value in _PLAIN_OUTPUTS.items():
            if getattr(part, name, value) != value:
                setattr(part, name, value)


def _parts(config: Any) -> list[Any]:
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}]
    return [config, *(part for part in parts if part is not None)]
