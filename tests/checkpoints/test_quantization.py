"""Formats of weights in a configuration: quantized and compressed ones are refused by name, ordinary ones are not."""

from __future__ import annotations

from typing import Any

import pytest

from alps.checkpoints.quantization import check_quantization, is_dense
from alps.core.errors import CheckpointError

_COMPRESSED = "compressed-tensors"
# As llm-compressor writes it for a model that it has pruned and not quantized.
_DENSE: dict[str, Any] = {
    "config_groups": {},
    "format": "dense",
    "ignore": [],
    "kv_cache_scheme": None,
    "quant_method": _COMPRESSED,
    "quantization_status": "frozen",
    "sparsity_config": {"format": "dense", "global_sparsity": 0.5, "sparsity_structure": "2:4", "targets": []},
}


@pytest.mark.parametrize(
    "settings", [_DENSE, {**_DENSE, "sparsity_config": {}}, {"sparsity_config": {"format": "dense"}}]
)
def test_ordinary_weights_are_no_format(settings: dict[str, Any]) -> None:
    assert is_dense(settings)
    for key in ("quantization_config", "compression_config"):
        check_quantization({key: settings}, "m")
    check_quantization({"quantization_config": None}, "m")
    check_quantization([], "m")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"are quantized \(gptq, 4 bits\): use the unquantized checkpoint"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"are quantized \(bitsandbytes, 8 bits\)"),
        ({"quant_method": "fp8"}, r"are quantized \(fp8\)"),
        ({**_DENSE, "config_groups": {"group_0": {}}}, rf"are quantized \({_COMPRESSED}\)"),
        (
            {**_DENSE, "format": "pack-quantized", "config_groups": {"group_0": {}}},
            rf"are quantized \({_COMPRESSED}, pack-quantized\)",
        ),
        ({**_DENSE, "format": "marlin-24"}, rf"are compressed \({_COMPRESSED}, marlin-24\): use the uncompressed"),
        ({**_DENSE, "sparsity_config": {"format": "sparse-bitmask"}}, "are compressed .*sparse-bitmask"),
        ({**_DENSE, "kv_cache_scheme": {"num_bits": 8}}, "are quantized"),
        ({**_DENSE, "format": ["dense"]}, "are compressed"),
        ({"bits": 4}, r"are quantized \(4 bits\)"),
        ({"anything": 1}, r"are quantized \(unknown format\)"),
        ("int8", r"are quantized \(int8\)"),
    ],
)
def test_other_formats_are_named(settings: Any, words: str) -> None:
    for config in ({"quantization_config": settings}, {"text_config": {"quantization_config": settings}}):
        with pytest.raises(CheckpointError, match=words):
            check_quantization(config, "m")
