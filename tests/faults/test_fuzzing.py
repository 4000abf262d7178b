"""Mutated headers, manifests, JSON lines, results and YAML files: errors of this program, or valid results.

The default suite takes 150 of each; `-m slow` 10,000. Examples come from fixed seeds.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from alps.checkpoints.layout import check_json_files, check_layout, check_weight_layout
from alps.checkpoints.manifest import read_manifest
from alps.checkpoints.pack import pack_directory
from alps.checkpoints.safetensors_io import list_tensors
from alps.checkpoints.weight_files import find_weight_files, parse_header
from alps.core.errors import AlpsError
from alps.data.text_sources import load_text
from alps.evaluation.compare_config import load_compare_config
from alps.evaluation.local_tasks import read_documents
from alps.models.gguf_metadata import read_gguf_metadata
from alps.models.tokenizer_check import check_own_class
from alps.pruning.config import load_prune_config
from alps.reporting.compare_results import Result, read_results
from alps.reporting.run_report import RunReport

# No example may take longer: a hang is a failure as well as a traceback.
_SECONDS = 5.0
_SMALL, _FULL = 150, 10_000
_TENSORS = {"a.weight": torch.ones(3, 4), "b": torch.zeros(2, dtype=torch.bfloat16), "c": torch.ones(())}
_TEXTS = '{"text": "Once upon a time."}\n{"text": "caf\\u00e9", "more": [1, 2.5, null]}\n\n{"text": ""}\n'
_ARRAY = '[{"text": "Once upon a time.", "n": 1},\n {"text": "caf\\u00e9"}, {"text": ""}]'
_CSV = 'n,text\n1,"Once, upon\na ""time"""\n2,caf\u00e9\n'
_ITEMS = '{"question": "is it", "passage": "It is.", "answer": true}\n{"question": "q", "passage": "p", "label": 0}\n'
_MMLU = 'Why,a,b,c,d,A\n"How, then",a,b,"""c""",d,D\n'
_GZIP = gzip.compress(_TEXTS.encode(), mtime=0)
_PRUNE = (
    "model: a/b\nsparsity: 0.7\nmethod: alps\noptions:\n  damping: 0.02\n  admm: {rho: 0.3, growth: [[0.1, 1.3]]}\n"
)
_PRUNE += "samples: 16\nseqlen: 128\nseed: 3\ndense_target: 0.4\noffload: true\ncalibration: 'c4:1,self:2'\n"
_COMPARE = "model: a/b\nmethods: [wanda+refit, alps+dense_target=0.4, best]\nsparsity: [0.5, 0.7]\n"
_COMPARE += "pattern: ['2:4']\nseeds: 2\ntexts: [wikitext2]\nprompts: [Once]\nwindows: null\nlimit: 3\ntasks: [piqa]\n"
_QUANTIZED = json.dumps(
    {
        "weight_map": {"a": "x.safetensors"},
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "dense",
            "config_groups": {},
            "sparsity_config": {"format": "dense"},
        },
    }
)
_RESULT = Result(
    model="m",
    model_sha256="0" * 64,
    architecture="L",
    dtype="float32",
    device="cpu",
    method="alps",
    pattern="2:4",
    seed=0,
    seconds={"solve": 1.5},
).model_dump_json()

# Nine levels of nine references each: nine to the ninth values when they are written out.
_BOMB = "x0: &x0 [1]\n" + "".join(f"x{n}: &x{n} [{','.join([f'*x{n - 1}'] * 9)}]\n" for n in range(1, 10))
_BOMB += "options: {growth: *x9}\nsparsity: *x9\n"

# What parsers stumble over: depth, size, halves of surrogates, numbers beyond any type, tags and anchors of YAML.
_BITS = [
    *(b"\x00", b"\xff", b"\xed\xa0\x80", b'"\\ud800"', b"\\u0000", b"NaN", b"-Infinity", b"1e999", b"null", b"true"),
    *(b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"-1", b"18446744073709551616", b"0.5", b'""', b"{}", b"[]", b'"x"'),
    *(
        b"!!int ''",
        b"!!bool x",
        b"!!timestamp x",
        b"!!float x",
        b"!!python/object/apply:os.system [true]",
        b"!!set {a}",
    ),
    *(
        b"&a [*a]",
        b"*b",
        b"? {a: b}",
        b"<<: 3\n",
        b"=",
        b"1:30:00",
        b"2001-01-01",
        b"!!binary x",
        b"---\n",
        b"\t",
        b"%",
    ),
    *(b"\n" + _BOMB.encode(), b"&a [x,x,x]\nb: &b [*a,*a,*a]\noptions: {z: [*b,*b,*b]}\n", b": ", b"\n", b"\x85"),
    *(b"data_offsets", b"__metadata__", b'"shape": [9223372036854775807, 4]', b'"dtype": "F8_E4M3"', b"../x", b"text"),
]


def mutated(seed: bytes, numbers: random.Random) -> bytes:
    """A few cuts, changed bytes, repetitions and strange insertions, at random places."""
    data = bytearray(seed)
    for _ in range(numbers.choice((1, 1, 2, 3, 6))):
        start = numbers.randrange(len(data) + 1)
        end = min(start + numbers.choice((0, 1, 1, 4, 20)), len(data))
        kind = numbers.randrange(5)
        if kind == 0:
            data[start:end] = b""
        elif kind == 1:
            data[start:end] = numbers.choice(_BITS)
        elif kind == 2 and start < len(data):
            data[start] ^= 1 << numbers.randrange(8)
        elif kind == 3:
            data[start:start] = data[numbers.randrange(len(data) + 1) :][:40]
        else:
            del data[numbers.randrange(len(data) + 1) :]
    return bytes(data)


def _parts(seed: bytes) -> st.SearchStrategy[bytes]:
    return st.integers(min_value=0, max_value=2**64).map(lambda n: mutated(seed, random.Random(n)))


class Target:
    """Something that reads a file: the seed that is mutated, and the call."""

    def __init__(self, seed: str | bytes, read: Callable[[Path, bytes], Any]) -> None:
        self.seed = seed.encode() if isinstance(seed, str) else seed
        self.read = read


def _file(name: str, read: Callable[[Path], Any]) -> Callable[[Path, bytes], Any]:
    def call(folder: Path, data: bytes) -> Any:
        (folder / name).write_bytes(data)
        return read(folder / name)

    return call


def _header(folder: Path, data: bytes) -> Any:
    """With a length that fits, so that what is inside the header counts."""
    (folder / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data + bytes(54))
    with contextlib.suppress(AlpsError):
        return [list_tensors(file) for file in find_weight_files(folder)]
    with contextlib.suppress(ValueError):
        parse_header(data.decode())
    return None


def _manifest(folder: Path, data: bytes) -> Any:
    """With a hash that fits, where there is room for one."""
    place = data.find(b"0" * 64)
    if place >= 0:
        data = data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode(), 1)
    (folder / "packed.json").write_bytes(data)
    return read_manifest(folder)


def _settings(path: Path) -> Any:
    found = load_prune_config(path, {})
    assert load_prune_config(path, {}) == found or "nan" in str(found)
    found.build_pattern(), found.build_method(), found.reconstruction(), found.to_yaml(), found.fingerprint_fields()
    return found


def _comparison(path: Path) -> Any:
    found = load_compare_config(path, {})
    if found.seeds * len(found.methods) * len(found.sparsity) < 1000:
        found.runs()
    return found.to_yaml()


def _mmlu(folder: Path, data: bytes) -> Any:
    (folder / "mmlu").mkdir(exist_ok=True)
    (folder / "mmlu" / "us_law_test.csv").write_bytes(data)
    return read_documents("mmlu", folder)


def _gguf(path: Path) -> bytes:
    writer = GGUFWriter(path, "llama")
    writer.add_float32("llama.rope.freq_base", 10_000.0)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_tensor("rope_freqs.weight", torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def _side_file(folder: Path, data: bytes) -> Any:
    """Each of the files that say what a directory holds, with the same content."""
    for name in ("model.safetensors.index.json", "adapter_config.json", "model_index.json", "tokenizer.json"):
        (folder / "config.json").write_text("{}")
        (folder / name).write_bytes(data)
        try:
            check_weight_layout(folder)
            check_layout(folder)
            check_json_files(folder)
        finally:
            (folder / name).unlink()


def _index(folder: Path, data: bytes) -> Any:
    (folder / "model.safetensors.index.json").write_bytes(data)
    return find_weight_files(folder)


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    folder = tmp_path_factory.mktemp("seeds")
    (folder / "in").mkdir()
    save_file(_TENSORS, folder / "in" / "model.safetensors")
    raw = (folder / "in" / "model.safetensors").read_bytes()
    pack_directory(folder / "in", folder / "packed")
    gguf = _gguf(folder / "m.gguf")
    manifest = json.loads((folder / "packed" / "packed.json").read_text())
    return {
        "header": Target(raw[8 : 8 + int.from_bytes(raw[:8], "little")], _header),
        "safetensors": Target(raw, _file("model.safetensors", lambda path: find_weight_files(path.parent))),
        "index": Target('{"metadata": {}, "weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}', _index),
        "config": Target(_QUANTIZED, _file("config.json", lambda path: find_weight_files(path.parent))),
        "side files": Target(_QUANTIZED, _side_file),
        "manifest": Target(json.dumps({**manifest, "sha256": "0" * 64}), _manifest),
        "JSON lines": Target(_TEXTS, _file("t.jsonl", lambda path: load_text(str(path), "calibration"))),
        "JSON array": Target(_ARRAY, _file("t.txt", lambda path: load_text(str(path), "calibration"))),
        "CSV": Target(_CSV, _file("t.csv", lambda path: load_text(str(path), "calibration"))),
        "gzip": Target(_GZIP, _file("t.gz", lambda path: load_text(str(path), "calibration"))),
        "UTF-16": Target(_TEXTS.encode("utf-16"), _file("t", lambda path: load_text(str(path), "calibration"))),
        "task items": Target(_ITEMS, _file("boolq.jsonl", lambda path: read_documents("boolq", path.parent))),
        "MMLU": Target(_MMLU, _mmlu),
        "tokenizer": Target(
            '{"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.Own", null]}}',
            _file("tokenizer_config.json", lambda path: check_own_class(str(path.parent), "m")),
        ),
        "GGUF": Target(gguf, _file("m.gguf", read_gguf_metadata)),
        "text": Target(_TEXTS, _file("t.txt", lambda path: load_text(str(path), "calibration"))),
        "prune": Target(_PRUNE, _file("p.yaml", _settings)),
        "compare": Target(_COMPARE, _file("c.yaml", _comparison)),
        "results": Target(f"{_RESULT}\n{_RESULT}\n", _file("results.jsonl", read_results)),
        "report": Target(
            '{"summary": {}, "model": "m", "layers": []}', _file("report.json", lambda p: RunReport.read(p.parent))
        ),
    }


_NAMES = ["header", "safetensors", "index", "config", "side files", "manifest", "JSON lines"]
_NAMES += [
    "JSON array",
    "CSV",
    "gzip",
    "UTF-16",
    "task items",
    "MMLU",
    "tokenizer",
    "GGUF",
    "text",
    "prune",
    "compare",
    "results",
    "report",
]


def _fuzz(target: Target, folder: Path, examples: int) -> tuple[int, int]:
    """Count the inputs that were refused and those that were valid."""
    counts = [0, 0]

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(_parts(target.seed))
    def run(data: bytes) -> None:
        start = time.process_time()
        try:
            target.read(folder, data)
            counts[1] += 1
        except AlpsError as error:
            assert len(str(error)) < 10_000  # no more than the input has
            counts[0] += 1
        assert time.process_time() - start < _SECONDS

    run()
    return counts[0], counts[1]


@pytest.mark.parametrize("name", _NAMES)
def test_mutated_inputs_are_refused_in_a_sentence_or_read(
    name: str, targets: dict[str, Target], tmp_path: Path
) -> None:
    assert list(targets) == _NAMES
    refused, valid = _fuzz(targets[name], tmp_path, _SMALL)
    assert refused + valid >= _SMALL and (refused or name == "header")


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", _NAMES)
def test_ten_thousand_of_each(name: str, targets: dict[str, Target], tmp_path: Path) -> None:
    refused, valid = _fuzz(targets[name], tmp_path, _FULL)
    assert refused + valid >= _FULL
