"""Which precisions a device multiplies fast: a question of its instructions, so that equal machines answer alike."""

from __future__ import annotations

import torch


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 matrices are computed by instructions of their own, at twice float32's rate or more.

    CPUs: AVX-512 BF16 or AMX. Elsewhere torch multiplies bfloat16 too, but slower than float32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    # Private names of torch, which other versions may lack: then the answer is the safe one.
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask is not None and bool(ask()) for ask in asked)


def has_fast_float16(device: torch.device) -> bool:
    """The same for float16. CPUs: what torch's library of kernels has for it (AVX-512 FP16, AMX)."""
    if device.type != "cpu":
        return device.type == "cuda"
    ask = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)
    return ask is not None and bool(ask())
