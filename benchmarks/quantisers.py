"""Quantise a pruned or shrunk model with other packages: zeros kept, bytes, perplexity.

    pip install torchao bitsandbytes hqq
    python benchmarks/quantisers.py pruned --methods bfloat16,torchao-int8 --text wikitext2:test.txt

Only the linear layers of the blocks are quantised. A zero is kept when the layer maps the unit vector of its input to
exactly 0 there. Bytes are those of a saved state dictionary. A method whose package is missing or fails gets a row that
says so.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import alps
from alps.core.errors import first_line
from alps.core.provenance import provenance
from alps.models.blocks import find_blocks
from layers import ended_in_words, markdown

_PACKAGES = ("torchao", "bitsandbytes", "hqq")


def _load(folder: Path, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **more).eval()


def _torchao_int8(folder: Path) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model := _load(folder), Int8WeightOnlyConfig(), filter_fn=_is_layer)
    return model


def _torchao_int4(folder: Path) -> Any:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    quantize_(model := _load(folder), PrototypeInt4WeightOnlyConfig(group_size=32), filter_fn=_is_layer)
    return model


def _bitsandbytes(folder: Path) -> Any:
    from transformers import BitsAndBytesConfig

    return _load(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu")


def _hqq(folder: Path) -> Any:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = _load(folder)
    config = BaseQuantizeConfig(nbits=4, group_size=64)
    for name, module in list(model.named_modules()):
        if _is_layer(module, name):
            parent, _, last = name.rpartition(".")
            layer = HQQLinear(module, config, compute_dtype=torch.bfloat16, device="cpu")
            setattr(model.get_submodule(parent), last, layer)
    return model


METHODS: dict[str, Callable[[Path], Any]] = {
    "bfloat16": _load,
    "torchao-int8": _torchao_int8,
    "torchao-int4": _torchao_int4,
    "bitsandbytes-int8": _bitsandbytes,
    "hqq-int4": _hqq,
}


def _is_layer(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and ".layers." in f".{name}"


def zero_masks(folder: Path) -> dict[str, Tensor]:
    """Return the zeros (out, in) of every layer by its name."""
    blocks = find_blocks(_load(folder))
    return {site.name: site.read() == 0 for block in blocks for site in block.sites}


def kept_zeros(model: Any, masks: dict[str, Tensor]) -> int:
    """Count the zeros that the layers of a quantised model still have."""
    kept = 0
    with torch.no_grad():
        for name, mask in masks.items():
            weight = model.get_submodule(name)(torch.eye(mask.shape[1], dtype=torch.bfloat16)).T
            kept += int(((weight == 0) & mask).sum())
    return kept


def saved_bytes(model: Any) -> int:
    """Return the bytes of the state dictionary in a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pt"
        torch.save(model.state_dict(), path)
        return path.stat().st_size


def measure_in_process(name: str, folder: Path, masks: dict[str, Tensor], options: argparse.Namespace) -> list[str]:
    """Return the cells of a method's row, measured in a process of its own, since some packages crash theirs."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(measure, name, folder, masks, options).result()
        except (Exception, SystemExit) as error:
            return [name, f"failed: {type(error).__name__}: {first_line(error)}", "", ""]


def measure(name: str, folder: Path, masks: dict[str, Tensor], options: argparse.Namespace) -> list[str]:
    """Return the cells of a method's row."""
    model = METHODS[name](folder)
    kept, size = kept_zeros(model, masks), saved_bytes(model)
    loaded = alps.LoadedModel(str(folder), model, alps.load(folder).tokenizer)
    record = alps.evaluate(loaded, options.text, seqlen=options.seqlen, windows=options.windows, device="cpu")[0]
    return [name, f"{kept:,}", f"{size / 1e6:.1f}", f"{record.perplexity:.2f}"]


def main() -> None:
    """Print one table per model."""
    options = _options()
    facts = provenance()
    print(
        f"{facts['machine']}; torch {facts['torch']}, transformers {facts['transformers']}, {_versions()}; "
        f"commit {facts['commit']}; {options.windows} x {options.seqlen} tokens of {Path(options.text).name}"
    )
    for folder in options.models:
        masks = zero_masks(folder)
        zeros, entries = (
            sum(count) for count in zip(*((int(m.sum()), m.numel()) for m in masks.values()), strict=True)
        )
        rows = []
        for name in options.methods.split(","):
            rows.append(measure_in_process(name, folder, masks, options))
            print(rows[-1], flush=True)
        print(f"\n{folder.name}: {int(zeros):,} zeros of {entries:,} weights\n")
        print(markdown(["method", "zeros kept", "MB", "perplexity"], rows), flush=True)


def _versions() -> str:
    words = []
    for package in _PACKAGES:
        try:
            words.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(words)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="directories of pruned or shrunk models of type llama")
    parser.add_argument("--methods", default=",".join(METHODS), help="separated by commas")
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    return parser.parse_args()


if __name__ == "__main__":
    ended_in_words(main, ImportError)
