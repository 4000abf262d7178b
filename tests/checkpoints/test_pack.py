"""Packed directories: what is packed and how, and a checkpoint that comes back to the byte."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from alps.checkpoints.bitmask_codec import BIT_DTYPES
from alps.checkpoints.manifest import Manifest
from alps.checkpoints.pack import pack_directory
from alps.checkpoints.unpack import unpack_directory
from alps.core.errors import CheckpointError
from helpers.packing import contents, make_first_version, pruned, small

DOCS = Path(__file__).parent.parent.parent / "docs" / "reference"


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_model: Callable[..., Any]) -> Path:
    """A LLaMA in bfloat16 of which all linear layers are at 70 %, in three shards, with a card and other files."""
    model = tiny_model("llama", torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.data = pruned(parameter.data, 0.7)
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "README.md").write_text(
        "---\nlibrary_name: transformers\ntags: [pruned]\n---\n\n# The model\n\nIts card.\n"
    )
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").write_text("not to be copied")
    return folder


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "compressed"])
def test_a_checkpoint_comes_back_to_the_byte(checkpoint: Path, tmp_path: Path, compress: bool) -> None:
    before = contents(checkpoint)
    assert len([name for name in before if name.endswith(".safetensors")]) >= 3
    manifest = pack_directory(checkpoint, tmp_path / "packed", compress)
    assert contents(checkpoint) == before

    # All 21 linear layers and nothing else; sizes in closed form: (out, in, words of a row).
    stored = {name for name, record in manifest.tensors.items() if record.stored == "packed"}
    assert stored == {name for name in manifest.tensors if "proj" in name} and len(stored) == 21
    if not compress:
        shapes = [(32, 32, 1)] * 2 + [(16, 32, 1)] * 2 + [(44, 32, 1)] * 2 + [(32, 44, 2)]
        each = [
            4 * out * words + 2 * (out * wide - round(0.7 * out * wide)) + 4 * (out + 1) for out, wide, words in shapes
        ]
        assert sum(manifest.tensors[name].stored_bytes for name in stored) == 3 * sum(each)

    names = {path.name for path in (tmp_path / "packed").iterdir()}
    assert {"packed.json", "packed.safetensors", "config.json", "README.md", "README.original.md"} <= names
    assert not {name for name in names if name.startswith("model") or name == ".cache"}
    assert {"config.original.json", "alps.safetensors", "alps_packed.py"} <= names

    unpack_directory(tmp_path / "packed", tmp_path / "back")
    del before[".cache/lock"]
    assert contents(tmp_path / "back") == before
    model, same = (AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (checkpoint, tmp_path / "back"))
    for (name, weight), other in zip(model.state_dict().items(), same.state_dict().values(), strict=True):
        assert torch.equal(weight.view(torch.int16), other.view(torch.int16)), name


def test_the_card_says_how_to_load_the_pack(checkpoint: Path, tmp_path: Path) -> None:
    pack_directory(checkpoint, tmp_path / "packed")
    card = (tmp_path / "packed" / "README.md").read_text()
    front, notice, below = re.split(r"^---\n\n|^# The model", card, flags=re.MULTILINE)
    assert front == "---\ntags: [pruned]\n"
    assert "reads only with alps" in notice and "> import alps\n> from transformers import AutoModel" in notice
    assert "> alps unpack THIS-DIRECTORY NEW-DIRECTORY" in notice
    assert below == "\n\nIts card.\n"
    # For people: whoever edits it can unpack all the same, and gets the original.
    (tmp_path / "packed" / "README.md").write_text("mine")
    unpack_directory(tmp_path / "packed", tmp_path / "back")
    assert (tmp_path / "back" / "README.md").read_bytes() == (checkpoint / "README.md").read_bytes()


def test_packing_twice_gives_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        pack_directory(checkpoint, tmp_path / name, shard_bytes=20_000)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_directory_of_the_first_version_is_unpacked(checkpoint: Path, tmp_path: Path) -> None:
    before = contents(checkpoint)
    del before[".cache/lock"]
    pack_directory(checkpoint, tmp_path / "packed")
    make_first_version(tmp_path / "packed")
    manifest = unpack_directory(tmp_path / "packed", tmp_path / "back")
    assert contents(tmp_path / "back") == before and "config.json" in manifest.files


def test_names_that_are_taken_are_given_way_to(tmp_path: Path) -> None:
    source = small(tmp_path / "in")
    (source / "README.md").write_text("one")
    (source / "README.original.md").write_text("two")
    (source / "config.original.json").write_text("{}")
    (source / "alps_packed.py").write_text("mine")
    pack_directory(source, tmp_path / "packed")
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["model_type"] == "none"
    assert "import" in (tmp_path / "packed" / "alps_packed.py").read_text()
    unpack_directory(tmp_path / "packed", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


@settings(max_examples=8)
@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=4), min_size=1, max_size=4),
    dtype=st.sampled_from([*DTYPES, torch.int32, torch.uint8]),
    sparsity=st.sampled_from([0.0, 0.05, 0.7, 1.0]),
    compress=st.booleans(),
)
def test_tensors_of_any_kind_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[list[int]],
    dtype: torch.dtype,
    sparsity: float,
    compress: bool,
) -> None:
    folder, generator = tmp_path_factory.mktemp("any"), torch.Generator().manual_seed(sum(map(len, shapes)))
    tensors = {}
    for i, shape in enumerate(shapes):
        count = torch.Size(shape[:3]).numel()
        octets = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
        bits = octets.view(BIT_DTYPES[dtype.itemsize])
        bits[torch.rand(count, generator=generator) < sparsity] = 0
        tensors[f"t{i}"] = bits.view(dtype).reshape(shape[:3])
    source = small(folder / "in", tensors)
    pack_directory(source, folder / "packed", compress, shard_bytes=2000)
    unpack_directory(folder / "packed", folder / "back")
    assert contents(folder / "back") == contents(source)


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "compressed"])
def test_fused_experts_are_packed_and_a_dense_matrix_is_not(tmp_path: Path, compress: bool) -> None:
    tensors = {
        "experts": pruned(torch.randn(4, 24, 64), 0.7).half(),
        "dense": torch.randn(64, 64),
        "nearly": pruned(torch.randn(64, 64), 0.05),
        "x": pruned(torch.randn(8, 64), 0.9),
        "x.mask": pruned(torch.randn(8, 64), 0.9),
    }
    source = small(tmp_path / "in", tensors)
    manifest = pack_directory(source, tmp_path / "packed", compress)
    stored = {name: record.stored for name, record in manifest.tensors.items()}
    assert stored == {"experts": "packed", "dense": "dense", "nearly": "dense", "x": "dense", "x.mask": "packed"}
    assert manifest.tensors["experts"].kept == 4 * 24 * 64 - round(0.7 * 4 * 24 * 64)
    if not compress:
        parts = load_file(tmp_path / "packed" / "packed.safetensors")
        # Expert 2 alone, from its rows of the offsets.
        begin, end = parts["experts.offsets"][[2 * 24, 3 * 24]].tolist()
        assert torch.equal(parts["experts.values"][begin:end], tensors["experts"][2][tensors["experts"][2] != 0])
        assert parts["experts.mask"].shape == (4, 24, 2)
    unpack_directory(tmp_path / "packed", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)


def test_a_header_in_another_order_with_more_metadata_comes_back(tmp_path: Path) -> None:
    # As no version of the library writes it: names against the alphabet, spaces, foreign metadata.
    source = small(tmp_path / "in")
    data = b"".join(bytes(n) for n in (8 * [0], 4 * [1], 6 * [2]))
    entries = {
        "z": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "__metadata__": {"made by": "hand ü"},
        "a": {"dtype": "U8", "shape": [2, 2], "data_offsets": [8, 12]},
        "m": {"dtype": "BF16", "shape": [3, 1], "data_offsets": [12, 18]},
    }
    header = (json.dumps(entries, indent=2, ensure_ascii=False) + "   ").encode()
    (source / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    pack_directory(source, tmp_path / "packed")
    unpack_directory(tmp_path / "packed", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)


def test_shards_keep_to_their_size_and_hold_all_parts_of_a_tensor(tmp_path: Path) -> None:
    source = small(tmp_path / "in", {f"t{i}": pruned(torch.randn(8, 64), 0.7) for i in range(9)})
    manifest = pack_directory(source, tmp_path / "packed", shard_bytes=2 * 730)
    assert [record.stored_bytes for record in manifest.tensors.values()] == [64 + 4 * (512 - 358) + 36] * 9  # 716
    assert list(manifest.shards) == [f"packed-{n:05}-of-00005.safetensors" for n in range(1, 6)]
    for shard in manifest.shards:
        own = {name for name, record in manifest.tensors.items() if record.shard == shard}
        expected = {f"{name}.{part}" for name in own for part in ("mask", "values", "offsets")}
        assert set(load_file(tmp_path / "packed" / shard)) == expected
    unpack_directory(tmp_path / "packed", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)


def test_links_as_in_a_hub_cache_are_followed(checkpoint: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in checkpoint.iterdir():
        if path.is_file():
            (linked / path.name).symlink_to(path)
    pack_directory(linked, tmp_path / "packed")
    assert not any(path.is_symlink() for path in (tmp_path / "packed").rglob("*"))
    unpack_directory(tmp_path / "packed", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(linked)
    (linked / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="dangling' is a symbolic link to no file"):
        pack_directory(linked, tmp_path / "again")


def test_the_reader_of_the_documentation_reads_a_pack(checkpoint: Path, tmp_path: Path) -> None:
    text = (DOCS / "format.md").read_text()
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    scope: dict[str, Any] = {}
    exec(snippet, scope)
    assert not [line for line in snippet.splitlines() if "alps" in line and "import" in line]
    pack_directory(checkpoint, tmp_path / "packed", shard_bytes=20_000)
    result = scope["read"](tmp_path / "packed")
    expected = {name: w for path in checkpoint.glob("*.safetensors") for name, w in load_file(path).items()}
    assert result.keys() == expected.keys()
    for name, weight in expected.items():
        assert result[name].shape == weight.shape and result[name].dtype == "<u2"
        assert result[name].tobytes() == weight.view(torch.uint8).numpy().tobytes(), name


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _cut(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])


def _quantized(folder: Path) -> None:
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')


def _index(text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "one.safetensors")
        shutil.copy(folder / "one.safetensors", folder / "two.safetensors")
        (folder / "model.safetensors.index.json").write_text(text)

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_no_weights, "holds neither model.safetensors nor model.safetensors.index.json: save"),
        (_cut, r"model.safetensors' cannot be read \(.*\): fetch or save the model again"),
        (_quantized, r"are quantized \(fp8\): use the unquantized checkpoint"),
        (_index('{"weight_map": {"a": "three.safetensors"}}'), "three.safetensors' is missing, though the index"),
        (_index('{"weight_map": {"a": "../one.safetensors"}}'), "names no files of its own directory"),
        (_index('{"weight_map": 3}'), "is no index of weight files"),
        (
            _index('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}'),
            "Tensor a is in both one.safetensors and two.safetensors",
        ),
    ],
)
def test_what_cannot_be_packed_is_refused(tmp_path: Path, change: Callable[[Path], None], complaint: str) -> None:
    source = small(tmp_path / "in")
    change(source)
    with pytest.raises(CheckpointError, match=complaint):
        pack_directory(source, tmp_path / "packed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_places_are_checked_on_both_ways(tmp_path: Path) -> None:
    source = small(tmp_path / "in")
    manifest = pack_directory(source, tmp_path / "packed")
    assert isinstance(manifest, Manifest)
    with pytest.raises(CheckpointError, match=r"holds packed\.json, so it is packed already"):
        pack_directory(tmp_path / "packed", tmp_path / "again")
    with pytest.raises(CheckpointError, match="is not a directory"):
        pack_directory(tmp_path / "nowhere", tmp_path / "again")
    for call in (pack_directory, unpack_directory):
        origin = source if call is pack_directory else tmp_path / "packed"
        with pytest.raises(CheckpointError, match="is not empty"):
            call(origin, tmp_path / "packed")


def test_without_zstandard_compression_is_refused_and_the_rest_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = small(tmp_path / "in")
    pack_directory(source, tmp_path / "compressed", compress=True)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    message = "need zstandard: pip install zstandard"
    with pytest.raises(CheckpointError, match=message):
        pack_directory(source, tmp_path / "no", compress=True)
    with pytest.raises(CheckpointError, match=message):
        unpack_directory(tmp_path / "compressed", tmp_path / "no")
    pack_directory(source, tmp_path / "packed")
    unpack_directory(tmp_path / "packed", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source) and not (tmp_path / "no").exists()


_KILLED = """
import sys, time
from pathlib import Path
from alps.checkpoints import pack as packed
def stop(*arguments):
    print("writing", flush=True)
    time.sleep(60)
packed._write_readme = stop
packed.pack_directory(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_kill_leaves_no_pack(tmp_path: Path) -> None:
    source, out = small(tmp_path / "in"), tmp_path / "packed"
    command = [sys.executable, "-c", _KILLED, str(source), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
    (partial,) = tmp_path.glob(".packed.partial-*")
    assert (partial / "packed.safetensors").is_file() and not out.exists()  # it was in the middle of its work
    pack_directory(source, out)  # and the next run is not hindered
    unpack_directory(out, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)
