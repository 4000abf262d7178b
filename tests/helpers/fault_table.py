"""Table of faults of inputs and of the machine: how each is made, and the words that its message contains.

    python tests/helpers/fault_table.py MODEL > docs/how-to/reliability.md

MODEL is the directory of a small LLaMA with tied embeddings and a tokenizer. Runs every fault in turn, which takes a
minute. A test runs them, too, and compares the page with the table.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

import torch
from safetensors.torch import load_file

from alps.checkpoints.pack import pack_directory
from alps.solvers.alps import Alps
from helpers.fault_fixture import PICKLES, Outcome, Scene, arguments, run_in_scene
from helpers.fault_layouts import LAYOUT_FAULTS

_UP = "model.layers.2.mlp.up_proj.weight"
_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Fault:
    """Fault of an input or of the machine.

    Attributes:
        name: on the page.
        words: part of the message.
        create: creates the fault in a scene, and may return more arguments of the command.
        command: that runs into it.
        early: found before any work, so that nothing else is printed.
    """

    name: str
    words: str
    create: Callable[[Scene], list[object] | None]
    command: str = "prune"
    early: bool = True


def run_fault(fault: Fault, folder: Path, source: Path) -> Outcome:
    """Create a fault in an empty folder, and run the command."""
    scene = Scene(folder, source)
    more = fault.create(scene) or []
    return run_in_scene(scene, arguments(scene, fault.command, *more))


def _cut(bytes_kept: int) -> Callable[[Scene], None]:
    def create(scene: Scene) -> None:
        scene.weights.write_bytes(scene.weights.read_bytes()[:bytes_kept])

    return create


def _prefix(data: bytes) -> Callable[[Scene], None]:
    """Replace the first bytes of the weight file."""

    def create(scene: Scene) -> None:
        scene.weights.write_bytes(data + scene.weights.read_bytes()[len(data) :])

    return create


def _header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Scene], None]:
    return lambda s: s.header(lambda header: change(header) and None)


def _value(name: str, value: float) -> Callable[[Scene], None]:
    return lambda s: s.tensors(lambda tensors: tensors[name].view(-1)[5:6].fill_(value))


def _config(**changes: Any) -> Callable[[Scene], None]:
    return lambda s: s.settings("config.json", **changes)


def _architecture(kind: str, name: str) -> Callable[[Scene], None]:
    return _config(model_type=kind, architectures=[name])


def _file(name: str, content: bytes | str, *option: str) -> Callable[[Scene], list[object]]:
    """Write a file, and pass it to an option."""
    return lambda s: [*option, s.write(name, content)]


def _flags(*words: object) -> Callable[[Scene], list[object]]:
    return lambda _: list(words)


class _Evil:
    """Object whose pickle creates a file next to the model when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def _pickled(scene: Scene) -> None:
    tensors: dict[str, Any] = dict(load_file(scene.weights))
    scene.weights.unlink()
    torch.save({**tensors, "more": _Evil(scene.folder / "run")}, scene.model / PICKLES)


def _plain_pickle(scene: Scene) -> None:
    scene.weights.unlink()
    (scene.model / PICKLES).write_bytes(pickle.dumps(_Evil(scene.folder / "run")))


def _own_code(scene: Scene) -> None:
    (scene.model / "own.py").write_text(f"open({str(scene.folder / 'run')!r}, 'w')\nclass Own: pass\n")
    classes = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    scene.settings("config.json", model_type="unheard-of", auto_map=classes)


def _pickles_elsewhere(scene: Scene) -> None:
    scene.weights.unlink()
    index = {"metadata": {}, "weight_map": {_UP: "../text.txt"}}
    (scene.model / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def _own_tokenizer(scene: Scene) -> None:
    (scene.model / "own.py").write_text(f"open({str(scene.folder / 'run')!r}, 'w')\nclass Own: pass\n")
    scene.settings("tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})


def _no_weights(scene: Scene) -> None:
    scene.weights.unlink()


def _no_shard(scene: Scene) -> None:
    scene.index(**{_UP: "model-00002-of-00002.safetensors"})


def _no_such_tensor(scene: Scene) -> None:
    shutil.copy(scene.weights, scene.folder / "whole")
    scene.tensors(lambda tensors: tensors.pop(_UP))
    scene.index(**{_UP: "model-00001-of-00001.safetensors"})
    (scene.folder / "whole").unlink()


def _ids_beyond(scene: Scene) -> None:
    path = scene.model / "tokenizer.json"
    content = json.loads(path.read_text())
    added = {**content["added_tokens"][-1], "id": 700, "content": "fox"}
    path.write_text(json.dumps({**content, "added_tokens": [*content["added_tokens"], added]}))


def _damaged_pack(scene: Scene) -> None:
    pack_directory(scene.model, scene.folder / "packed")
    path = scene.folder / "packed" / "packed.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


def _no_memory(scene: Scene) -> None:
    words = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.6 GiB."
    scene.during = lambda: patch.object(Alps, "prune_matrix", side_effect=torch.OutOfMemoryError(words))


def _full_disk(scene: Scene) -> None:
    usage = shutil.disk_usage(scene.folder)._replace(free=0)
    scene.during = lambda: patch("alps.checkpoints.atomic_io.shutil.disk_usage", return_value=usage)


def _impossible_generation(scene: Scene) -> None:
    (scene.model / "generation_config.json").write_text('{"max_new_tokens": -4}')


def _dangling_link(scene: Scene) -> None:
    (scene.model / "vocab.txt").symlink_to("nowhere.txt")


def _no_host_memory(scene: Scene) -> None:
    words = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried."
    scene.during = lambda: patch("alps.pruning.first_inputs.capture_block_inputs", side_effect=RuntimeError(words))


def _float16(scene: Scene) -> list[object]:
    _value(_EMBEDDING, 1e6)(scene)
    return ["--dtype", "float16"]


_CALIBRATION = "--calibration"
_TWO_COLUMNS = '{"id": "a", "body": "Once upon"}\n{"id": "b", "body": "a time"}\n{"id": "c", "body": "there"}'
_LONG = (2**60).to_bytes(8, "little")
_BROKEN = "cannot be read"
_NAN = f"{_UP} of "
FAULTS = [
    Fault("weights cut short in their data", _BROKEN, _cut(500_000)),
    Fault("weights cut short in their header", _BROKEN, _cut(100)),
    Fault("a weights file of 5 bytes", _BROKEN, _cut(5)),
    Fault("an empty weights file", _BROKEN, _cut(0)),
    Fault("a header that claims 2^60 bytes", _BROKEN, _prefix(_LONG)),
    Fault("a header that is not JSON", _BROKEN, _prefix(b"\x08" + bytes(7) + b"nonsense")),
    Fault("tensors whose bytes overlap", _BROKEN, _header(lambda h: h[_UP].update(data_offsets=[0, 44032]))),
    Fault("a dtype that does not exist", _BROKEN, _header(lambda h: h[_UP].update(dtype="F31"))),
    Fault("a shape that its bytes do not have", _BROKEN, _header(lambda h: h[_UP].update(shape=[172, 65]))),
    Fault("a wrong shape; `alps eval`", _BROKEN, _header(lambda h: h[_UP].update(shape=[172, 65])), "eval"),
    Fault("cut weights; `alps compare`", _BROKEN, _cut(500_000), "compare"),
    Fault("cut weights; `alps pack`", _BROKEN, _cut(500_000), "pack"),
    Fault("one bit of a packed checkpoint changed", "its sha256 is another", _damaged_pack, "unpack"),
    Fault("a missing shard", "model-00002-of-00002.safetensors' is missing, though the index names it", _no_shard),
    Fault(
        "an index that names a missing tensor",
        f"names {_UP} in model-00001-of-00001.safetensors, which does not hold it",
        _no_such_tensor,
    ),
    Fault("an index that is not JSON", "is no index of weight files", lambda s: _broken_index(s, "{")),
    Fault(
        "a shard outside the directory", "names no files of its own directory", lambda s: s.index(a="../x.safetensors")
    ),
    Fault("a shard by an absolute path", "names no files of its own directory", lambda s: s.index(a="/x.safetensors")),
    Fault(
        "a shard outside; `alps eval`",
        "names no files of its own directory",
        lambda s: s.index(a="../x.safetensors"),
        "eval",
    ),
    Fault("pickled shards outside the directory", "names no files of its own directory", _pickles_elsewhere),
    Fault("a configuration without weights", "holds a config.json and no weights", _no_weights),
    Fault("a configuration that is not JSON", "is not JSON", lambda s: _model_file(s, "config.json", "{")),
    Fault("a configuration with a text for a size", "cannot be loaded", _config(hidden_size="large")),
    Fault("an unknown architecture", "cannot be loaded", _config(model_type="unheard-of")),
    Fault("an encoder-decoder", "is an encoder-decoder", _architecture("t5", "T5ForConditionalGeneration")),
    Fault(
        "an encoder-decoder; `alps pack`",
        "is an encoder-decoder",
        _architecture("whisper", "WhisperForConditionalGeneration"),
        "pack",
    ),
    Fault("an encoder", "is for masked language modelling", _architecture("bert", "BertForMaskedLM")),
    Fault(
        "a classifier",
        "prune the LlamaForCausalLM that it was made from",
        _architecture("llama", "LlamaForSequenceClassification"),
    ),
    Fault(
        "a base model; `alps eval`",
        "is a base model without an output head",
        _architecture("llama", "LlamaModel"),
        "eval",
    ),
    Fault("an image model", "is for image classification", _architecture("vit", "ViTForImageClassification")),
    Fault("quantized weights", "are quantized", _config(quantization_config={"quant_method": "fp8"})),
    Fault(
        "a missing tensor",
        f"lacks 1 tensors of LlamaForCausalLM, first {_UP}",
        lambda s: s.tensors(lambda t: t.pop(_UP)),
    ),
    Fault(
        "a tensor of another shape",
        f"has another shape of {_UP}",
        lambda s: s.tensors(lambda t: t.update({_UP: torch.ones(172, 60)})),
    ),
    Fault("NaN in a linear layer", _NAN, _value(_UP, torch.nan)),
    Fault("infinity in a linear layer", "holds NaN or infinite values", _value(_UP, -torch.inf)),
    Fault("NaN in the embedding", f"{_EMBEDDING} of ", _value(_EMBEDDING, torch.nan)),
    Fault("NaN in a norm", "model.norm.weight of ", _value("model.norm.weight", torch.nan)),
    Fault("NaN; `alps distill`", _NAN, _value(_UP, torch.nan), "distill"),
    Fault("NaN; `alps reconstruct`", _NAN, _value(_UP, torch.nan), "reconstruct"),
    Fault("NaN; `alps eval`", _NAN, _value(_UP, torch.nan), "eval"),
    Fault("NaN; `alps inspect`", _NAN, _value(_UP, torch.nan), "inspect"),
    Fault("a weight that --dtype float16 cannot hold", "overflows float16", _float16),
    Fault("a pickle that holds code besides tensors", "code in pickles is never run", _pickled),
    Fault("a pickle that is nothing but code", "cannot be loaded", _plain_pickle),
    Fault("a model that brings code of its own", "code of its own, which is never run", _own_code),
    Fault("a broken tokenizer", "tokenizer.json' is no JSON object", lambda s: _model_file(s, "tokenizer.json", "{")),
    Fault("a tokenizer with more tokens than the model", "outside the model's vocabulary of 512", _ids_beyond),
    Fault("an empty calibration file", "is empty", _file("empty.txt", " \n", _CALIBRATION)),
    Fault("a binary calibration file", "NUL bytes", _file("b.txt", b"GIF89a\0\1\2", _CALIBRATION)),
    Fault("a calibration file that is not UTF-8", "is not UTF-8 (byte 3)", _file("l.txt", b"caf\xe9 ", _CALIBRATION)),
    Fault("a folder for a calibration file", "is a folder", lambda s: [_CALIBRATION, s.model]),
    Fault("JSON lines with a bad line", "Line 2 of ", _file("b.jsonl", '{"text": "a"}\n{"text": \n', _CALIBRATION)),
    Fault("JSON lines without a text", "Line 3 of ", _file("n.jsonl", '{"text": "a"}\n\n{"body": 1}', _CALIBRATION)),
    Fault("a column of text that is not clear", "among id, body", _file("a.json", _TWO_COLUMNS, _CALIBRATION)),
    Fault("JSON lines without a first bracket", "Line 1 of ", _file("a.txt", _TWO_COLUMNS[1:], _CALIBRATION)),
    Fault("an address for every text", "single words", _file("a.csv", "n,url\n1,http://a\n", _CALIBRATION)),
    Fault("a gzip file that is cut short", "cut short", _file("a.gz", gzip.compress(b"Once" * 99)[:-9], _CALIBRATION)),
    Fault("UTF-16 without a mark", "-f UTF-16LE", _file("a.txt", "Once".encode("utf-16-le"), _CALIBRATION)),
    Fault("a zip archive for a text; `alps eval`", "is a zip archive", _file("a.txt", b"PK\3\4a", "--text"), "eval"),
    Fault("a tokenizer of own code alone", "never run: if its tokenizer.json", _own_tokenizer),
    Fault("too few tokens", "are needed: give more text", _flags("--samples", 5000)),
    Fault("a text shorter than a window", "enough for 0 windows of 64", _file("s.txt", "Once.", _CALIBRATION)),
    Fault("windows longer than the model takes", "longer than the 512", _flags("--seqlen", 1024)),
    Fault("zero samples", "'samples'", _flags("--samples", 0)),
    Fault("windows of zero tokens", "'seqlen'", _flags("--seqlen", 0)),
    Fault("a seed beyond 64 bits", "'seed'", _flags("--seed", 2**64)),
    Fault("a GPU that does not exist", "Device 'cuda:7' cannot be used here", _flags("--device", "cuda:7")),
    Fault("a device that torch cannot use", "Device 'tpu' cannot be used here", _flags("--device", "tpu")),
    Fault("a disk without room for the result", "and its disk has", _full_disk),
    Fault("a side file that links to nothing", "vocab.txt' is a symbolic link to no file", _dangling_link),
    Fault("impossible generation settings", "cannot be used (`max_new_tokens`", _impossible_generation),
    Fault("out of GPU memory in a solve", "with --offload", _no_memory, early=False),
    Fault("out of host memory", "--activation-memory", _no_host_memory, early=False),
    *(Fault(*layout) for layout in LAYOUT_FAULTS),
]


def _broken_index(scene: Scene, text: str) -> None:
    scene.index()
    _model_file(scene, "model.safetensors.index.json", text)


def _model_file(scene: Scene, name: str, text: str) -> None:
    (scene.model / name).write_text(text)


_HEAD = """# When something goes wrong

Every user error is one sentence on stderr and exit code 2: what is wrong, where, and what to do. Nothing is lost and
nothing is left behind: inputs are unchanged, `OUT` does not exist, and there is no temporary file next to it.

```text
$ alps prune smollm2-135m out --sparsity 0.7 --calibration text.txt --samples 5000 --seqlen 64
Error: Calibration text 'text.txt' has 4602 tokens, enough for 71 windows of 64; 5000 are needed: give more text, or
lower --samples or --seqlen.
```

| you see | do this |
|---|---|
| one sentence that begins with `Error:` | what its end says; the [table](#bad-inputs) has the most frequent ones |
| an interrupted run, and `OUT.partial` | repeat the command: it continues ([long runs](long-runs.md#resume)) |
| out of memory | `--offload`, `--activation-memory`, fewer `--samples` ([long runs](long-runs.md)) |
| a run that takes too long | `--dry-run` estimates; other programs take CPUs ([share a machine](shared-machine.md)) |
| perplexity far from a published one | compare only equal texts, windows, models ([evaluation](evaluation.md)) |
| NaN or infinite logits | `--dtype bfloat16` or `float32` |
| a traceback | a bug of alps: report it with the command and the versions in `report.json` |

What is promised about files, code and numbers is in [guarantees](../reference/guarantees.md).

## Bad inputs

Each row is run by a test.

| fault | message | lost |
|---|---|---|
"""
_FOOT = """
```sh
python tests/helpers/fault_table.py MODEL > docs/how-to/reliability.md
```

Kills, signals and full disks: see [interrupted runs](long-runs.md#interruptions-tested).
"""


def main() -> None:
    """Print the page."""
    torch.set_num_threads(1)
    source = Path(sys.argv[1]).resolve()
    print(_HEAD, end="")
    for fault in FAULTS:
        with tempfile.TemporaryDirectory() as folder:
            outcome = run_fault(fault, Path(folder), source)
            assert outcome.code == 2 and fault.words in outcome.sentence and not outcome.changed, (fault.name, outcome)
        sentence = outcome.sentence.removeprefix("Error: ").replace(f"{folder}/", "").replace("|", "\\|")
        print(f"| {fault.name} | {sentence} | nothing |", flush=True)
    print(_FOOT, end="")


if __name__ == "__main__":
    main()
