"""Quantizer of transformers for packed directories, so that `from_pretrained` keeps their layers packed.

transformers calls a quantizer for every `quant_method` that it knows. This one hides the model's tensors from its
loader, which would look for dense ones, and puts the packed model in their place afterwards.

`import alps` has this module imported when `transformers.quantizers.auto` is, and the module registers the quantizer.
It imports only parts of transformers that come before the models.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from alps.checkpoints.manifest import MANIFEST_NAME, read_manifest
from alps.checkpoints.packed_config import MARKER_NAME
from alps.checkpoints.quantization import PACKED_METHOD
from alps.core.errors import CheckpointError, ConfigError

# Attributes of a model that hold its tensors, or say how they were made of those of the checkpoint.
_OF_MODEL = ("_modules", "_parameters", "_buffers", "config", "all_tied_weights_keys", "_weight_conversions")
_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a packed directory; everything else is in its manifest."""

    def __init__(self, quant_method: str = PACKED_METHOD) -> None:
        self.quant_method = quant_method

    def to_diff_dict(self) -> dict[str, Any]:
        """Return all fields; older releases ask for this method and do not have it."""
        fields: dict[str, Any] = self.to_dict()
        return fields


class ConfigLoader:
    """Stand-in for a configuration class in packed directories that are loaded with `trust_remote_code=True`.

    It returns the configuration of transformers' own class. What counts is that alps is imported.
    """

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: the class of the configuration is known to transformers."""

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> Any:
        """Load the configuration as `AutoConfig` does without code of the checkpoint."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(name, **{**options, "trust_remote_code": False})


class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loading of packed directories by transformers.

    The methods of two names are the same hook of older and newer releases: the first call that gets the configuration.
    """

    requires_calibration = True  # a model is packed by `alps pack`, and not while it is loaded
    _directory: Path
    _hidden: RemovableHandle
    _device: Any = None

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuse a device map that names several devices.

        Raises:
            ConfigError: naming them.
        """
        if isinstance(device_map, dict) and len(devices := {str(device) for device in device_map.values()}) > 1:
            raise ConfigError(
                f"A packed model runs on one device, and device_map names {', '.join(sorted(devices))}: name one."
            )

    def update_device_map(self, device_map: Any) -> Any:
        """Return a map of the whole model to one device.

        For a map that transformers would choose, that is the first accelerator, or the CPU without one.
        """
        if isinstance(device_map, str) and device_map in _AUTOMATIC:
            device_map = {"": torch.accelerator.current_accelerator() or torch.device("cpu")}
        if not device_map:
            return None
        self._device = next(iter(device_map.values()))
        return {"": self._device}

    def update_tp_plan(self, config: Any) -> Any:
        """Name the file of weights to open; without this, transformers finds none."""
        config.transformers_weights = MARKER_NAME
        return config

    def update_attn_implementation(self, config: Any) -> Any:
        """Name the file of weights to open; without this, transformers finds none."""
        return self.update_tp_plan(config)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, use_kernels: bool = False, **_: Any
    ) -> None:
        """Hide all tensors from the loader, which would miss them in the file of weights and draw them at random."""
        if use_kernels:
            raise ConfigError("A packed model has kernels of its own: leave out use_kernels.")
        if not checkpoint_files:
            raise CheckpointError("A packed model is loaded from its directory: give that to from_pretrained.")
        self._directory = Path(checkpoint_files[0]).parent
        for tensor in (*model.parameters(), *model.buffers()):
            tensor._is_hf_initialized = True
        for _name, buffer in model.named_non_persistent_buffers():
            buffer._is_hf_initialized = False
        self._hidden = model.register_state_dict_post_hook(_hide_tensors)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Give the model the parts of the packed one."""
        from alps.inference.load import build_packed
        from alps.inference.save import save_packed
        from alps.models.configuration import remove_packing

        self._hidden.remove()
        directory = _fetch_pack(self._directory, str(model.config.name_or_path))
        manifest, config = read_manifest(directory), copy.deepcopy(model.config)
        remove_packing(config)
        packed: Any = build_packed(directory, manifest, config, kind=type(model), dtype=model.dtype)
        if self._device is not None:
            packed.to(self._device)
        packed.config.quantization_config = self.quantization_config
        for attribute in _OF_MODEL:
            setattr(model, attribute, getattr(packed, attribute))
        save_packed(model, manifest)
        return model.requires_grad_(False).eval()

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Return True: `save_pretrained` writes the packed directory again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """False: packed weights are no parameters."""
        return False

    def _dequantize(self, *_: Any, **__: Any) -> Any:
        raise ConfigError("A packed model is not unpacked in memory: load what `alps unpack` makes of its directory.")


def _hide_tensors(model: Any, state_dict: dict[str, Any], _prefix: str, _metadata: Any) -> None:
    """Remove all tensors from a state but tied ones, which the loader must find missing to tie them."""
    for name in state_dict.keys() - model.all_tied_weights_keys.keys():
        del state_dict[name]


def _fetch_pack(directory: Path, name: str) -> Path:
    """Fetch the files of a packed hub model of which transformers has fetched those that it knows.

    Args:
        directory: of those files: the packed directory itself, or a snapshot in the cache of the hub's client.
        name: path or hub name of the model.

    Returns:
        The directory.
    """
    if Path(name).exists() or "snapshots" not in directory.parts:
        return directory
    from transformers.utils import cached_file

    at = len(directory.parts) - 1 - directory.parts[::-1].index("snapshots")
    cache, (revision, *subfolder) = Path(*directory.parts[: at - 1]), directory.parts[at + 1 :]
    options: dict[str, Any] = {"cache_dir": cache, "revision": revision, "subfolder": "/".join(subfolder)}
    cached_file(name, MANIFEST_NAME, **options)
    for shard in read_manifest(directory).shards:
        cached_file(name, shard, **options)
    return directory


# Unless alps was imported a second time, by a program that reloads modules.
if PACKED_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(PACKED_METHOD)(PackedConfig)
    register_quantizer(PACKED_METHOD)(PackedQuantizer)
