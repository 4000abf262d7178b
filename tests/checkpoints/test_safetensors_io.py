"""Files of tensors: those of the library, read in parts or mapped, and whole or not at all."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alps.checkpoints.safetensors_io import DTYPES, TensorToWrite, check_finite, is_finite, list_tensors, write_tensors
from alps.checkpoints.weight_files import read_weight_file
from alps.core.errors import CheckpointError


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3)), min_size=0, max_size=5
    )
)
def test_files_hold_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, wanted: list[tuple[str, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("shards") / "one.safetensors"
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"t{n}": torch.randint(0, 2, shape, generator=generator).to(DTYPES[word])
        for n, (word, shape) in enumerate(wanted)
    }
    write_tensors(path, [TensorToWrite(n, t.dtype, tuple(t.shape), lambda t=t: t) for n, t in tensors.items()])  # type: ignore[misc]
    from safetensors.torch import load_file

    result = load_file(path)
    ours = {item.name: item for item in list_tensors(read_weight_file(path))}
    assert result.keys() == tensors.keys() == ours.keys()
    for name, tensor in tensors.items():
        assert result[name].dtype == tensor.dtype and torch.equal(result[name], tensor)
        assert torch.equal(ours[name].read(), tensor)
        mapped = ours[name].memory_map()
        assert mapped.dtype == tensor.dtype and torch.equal(mapped, tensor)
        if tensor.ndim == 2 and len(tensor) > 1:
            assert torch.equal(
                ours[name].contiguous_slice(tensor.shape[1], (len(tensor) - 1, tensor.shape[1])).read(), tensor[1:]
            )


def test_a_file_that_shrank_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    write_tensors(path, [TensorToWrite("w", torch.float32, (100,), lambda: torch.ones(100))])
    (stored,) = list_tensors(read_weight_file(path))
    path.write_bytes(path.read_bytes()[:-8])
    for read in (stored.read, stored.memory_map):
        with pytest.raises(CheckpointError, match="ends inside w"):
            read()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_mapped_tensor_takes_no_memory_until_it_is_touched_and_writes_nothing(tmp_path: Path) -> None:
    path, size = tmp_path / "one.safetensors", 2**24
    write_tensors(path, [TensorToWrite("w", torch.float32, (size,), lambda: torch.ones(size))])
    content = hashlib.sha256(path.read_bytes()).digest()
    before = _private_bytes()
    (stored,) = list_tensors(read_weight_file(path))
    mapped = stored.memory_map()
    assert float(mapped.sum()) == size and _private_bytes() - before < stored.nbytes / 4
    mapped[: size // 2] = 2.0
    assert _private_bytes() - before > stored.nbytes / 4
    assert float(stored.memory_map().sum()) == size and hashlib.sha256(path.read_bytes()).digest() == content


def _private_bytes() -> int:
    """Memory of this process that no file stands behind."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    def stop() -> torch.Tensor:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"cannot be written: No space left on device"):
        write_tensors(tmp_path / "one.safetensors", [TensorToWrite("w", torch.float32, (1,), stop)])
    assert list(tmp_path.iterdir()) == []


_HALVES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [*_HALVES, torch.float64])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_entry_is_found_at_every_place(bad: float, dtype: torch.dtype) -> None:
    for size in (1, 7, 33, 130):
        for place in range(size):
            tensor = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
            assert is_finite(tensor)
            tensor[place] = bad
            assert not is_finite(tensor), (size, place)


def test_extremes_empty_tensors_and_integers_are_finite() -> None:
    for dtype in _HALVES:
        ends = torch.finfo(dtype)
        assert is_finite(torch.tensor([[ends.max, ends.min, ends.tiny, 0.0]], dtype=dtype).T)
    assert is_finite(torch.empty(0, 3)) and is_finite(torch.tensor([2**62]))


def test_what_a_cast_would_make_infinite_is_told_apart() -> None:
    tensor = torch.tensor([1.0, 65519.0])  # the last one that float16 rounds down
    assert is_finite(tensor, torch.float16) and not is_finite(tensor + 1, torch.float16)
    with pytest.raises(CheckpointError, match="Tensor b of 'x' overflows float16: use --dtype bfloat16"):
        check_finite([("a", tensor), ("b", tensor + 1)], "x", torch.float16)
    with pytest.raises(CheckpointError, match="Tensor c of 'x' holds NaN"):
        check_finite([("a", tensor), ("c", tensor / 0 * 0)], "x", torch.float16)
