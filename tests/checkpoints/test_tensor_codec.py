"""The parts of one tensor: which are packed, under which names, and back to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alps.checkpoints.manifest import TensorRecord
from alps.checkpoints.tensor_codec import decode_matrix, decode_tensor, encode_tensor, should_pack
from helpers.packing import pruned


def _record(tensor: Tensor, kept: int | None) -> TensorRecord:
    stored = "dense" if kept is None else "packed"
    sizes = {"itemsize": tensor.element_size(), "bytes": tensor.nbytes, "stored_bytes": 0}
    return TensorRecord("f", "F32", list(tensor.shape), **sizes, stored=stored, kept=kept, shard="s", sha256="")


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (pruned(torch.ones(8, 64), 0.7), True),
        (pruned(torch.ones(4, 8, 64), 0.7).half(), True),
        (pruned(torch.ones(8, 64), 0.02), False),
        (pruned(torch.ones(512), 0.7), False),
        (torch.zeros(8, 64, dtype=torch.int32), False),
        (torch.zeros(0, 64), False),
        (torch.zeros(8, 64, dtype=torch.complex64), False),
    ],
    ids=["sparse", "fused experts", "dense", "vector", "integers", "empty", "complex"],
)
def test_sparse_matrices_are_packed(tensor: Tensor, expected: bool) -> None:
    assert should_pack("w", tensor, {"w"}) == expected
    assert not should_pack("w", tensor, {"w", "w.offsets"}), "a part would have the name of another tensor"


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_tensor_comes_back_from_its_parts(packed: bool, compressed: bool) -> None:
    tensor = pruned(torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(2)), 0.6).bfloat16()
    parts = encode_tensor("w", tensor, packed, compressed)
    names = {
        (False, False): {"w"},
        (False, True): {"w.values.0.zst", "w.values.1.zst"},
        (True, False): {"w.mask", "w.values", "w.offsets"},
        (True, True): {"w.mask.zst", "w.values.0.zst", "w.values.1.zst"},
    }
    assert set(parts) == names[packed, compressed]
    record = _record(tensor, 2 * 8 * 40 - 384 if packed else None)
    decoded = decode_tensor("w", record, compressed, parts.__getitem__)
    assert torch.equal(decoded.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    if packed:
        matrix = decode_matrix("w", record, compressed, parts.__getitem__)
        assert matrix.mask.shape == (16, 2) and matrix.columns == 40 and len(matrix.offsets) == 17


def test_a_mask_of_another_shape_is_refused() -> None:
    tensor = pruned(torch.ones(8, 40), 0.6)
    parts = encode_tensor("w", tensor, True, False)
    with pytest.raises(ValueError, match="its mask has another shape than stated"):
        decode_tensor("w", _record(torch.ones(4, 80), 128), False, parts.__getitem__)
