"""Compare packed layers and models with dense ones in one run: time, bytes per second, memory.

    python benchmarks/inference.py layer --threads 1,2
    python benchmarks/inference.py layer --tokens 1,16,128 --no-csr --path avx512bf16
    python benchmarks/inference.py layer --device cuda
    python benchmarks/inference.py build built
    python benchmarks/inference.py model --dense built/dense --packed built/packed-50,built/packed-70,built/packed-80

`layer` multiplies with matrices that together are larger than the caches, one after the other, as a model does. All
candidates take turns in every round, so that a slow moment of the machine affects all of them; figures are medians.
cpu_layers.py and gpu_layers.py make the tables. `--path` lets packed layers use an older instruction set;
ONEDNN_MAX_CPU_ISA in the environment does this for torch's dense layers.
`build` writes a LLaMA of random weights, by default 1.1 billion, dense and packed at several sparsities.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import alps
import cpu_layers
import gpu_layers
from alps.checkpoints.pack import pack_directory
from alps.core.device import pick_device
from alps.core.errors import ConfigError
from alps.core.memory import peak_host_bytes
from alps.core.provenance import provenance
from alps.inference.cpu_backend import describe, find_kernel
from alps.inference.triton_backend import describe_gpu, find_gpu_kernel
from generation import generate
from layers import ended_in_words, markdown


def build(options: argparse.Namespace) -> None:
    """Write a LLaMA of random weights, dense, and packed at every sparsity."""
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    model: Any = LlamaForCausalLM(config).bfloat16()
    out = Path(options.out)
    model.save_pretrained(out / "dense")
    dense = {name: p.data.clone() for name, p in model.named_parameters() if "proj" in name}
    for sparsity in map(float, options.sparsities.split(",")):
        for name, parameter in model.named_parameters():
            if name in dense:
                is_kept = torch.rand(parameter.shape) >= sparsity
                parameter.data = torch.where(is_kept, dense[name], 0)
        percent = f"{100 * sparsity:g}"
        model.save_pretrained(out / f"dense-{percent}")
        pack_directory(out / f"dense-{percent}", out / f"packed-{percent}")


def model_rows(options: argparse.Namespace) -> list[list[str]]:
    """Return a row for every directory and number of threads; all models are in memory, and take turns."""
    folders = [options.dense, *options.packed.split(",")]
    memory = {folder: _measure_memory(folder, options) for folder in folders}
    models = {folder: alps.load(folder).model.requires_grad_(False) for folder in folders}
    rows = []
    for threads in map(int, options.threads.split(",")):
        torch.set_num_threads(threads)
        result: dict[str, list[tuple[float, float]]] = {folder: [] for folder in folders}
        for round_ in range(options.rounds + 1):
            for folder, model in models.items():
                measured = generate(model, options.prompt, options.tokens)
                result[folder] += [measured] * (round_ > 0)
        rates = {folder: statistics.median(rate for _, rate in pairs) for folder, pairs in result.items()}
        for folder in folders:
            first = statistics.median(seconds for seconds, _ in result[folder])
            speed = [f"{rates[folder]:.2f}", f"{rates[folder] / rates[options.dense]:.2f}", f"{first:.3f}"]
            rows.append([folder, str(threads), *speed, *(f"{size / 1e9:.3f}" for size in memory[folder])])
    return rows


def _measure_memory(folder: str, options: argparse.Namespace) -> tuple[int, int, int]:
    """Measure in a new process the bytes of weights, the resident bytes after generating, and the peak."""
    sizes = (str(options.prompt), str(options.tokens))
    done = subprocess.run([sys.executable, __file__, "memory", folder, *sizes], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    weights, resident, peak = json.loads(done.stdout.splitlines()[-1])
    return weights, resident, peak


def memory(options: argparse.Namespace) -> None:
    """Print the memory of one model, for `_measure_memory`."""
    model = alps.load(options.folder).model.requires_grad_(False)
    generate(model, options.prompt, options.tokens)
    lines = Path("/proc/self/status").read_text().splitlines()
    resident = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
    # The system updates the peak later than the current value.
    print(json.dumps([model.get_memory_footprint(), resident, max(peak_host_bytes(), resident)]))


def main() -> None:
    """Print one table."""
    options = _options()
    torch.manual_seed(0)
    if options.what == "build":
        return build(options)
    if options.what == "memory":
        return memory(options)
    facts = provenance()
    if options.what == "layer" and options.device != "cpu":
        return gpu_table(options, facts)
    kernel = cpu_layers.use_path(options.path) if options.what == "layer" and options.path else find_kernel()
    print(f"{facts['machine']}, {describe(kernel)}, torch {facts['torch']}, commit {facts['commit']}\n")
    if options.what == "layer":
        print(markdown(cpu_layers.HEAD, cpu_layers.rows(options)))
    else:
        head = ["model", "threads", "tokens/s", "times dense", "first s", "weights GB", "resident GB", "peak GB"]
        print(markdown(head, model_rows(options)))
    return None


def gpu_table(options: argparse.Namespace, facts: dict[str, Any]) -> None:
    """Print the table of layers on a GPU."""
    device = pick_device(options.device)
    if device.type != "cuda":
        raise ConfigError(
            f"Device '{options.device}' is not a GPU of this machine: leave --device out for the table of the CPU."
        )
    with torch.cuda.device(device):
        what = describe_gpu(find_gpu_kernel(device))
        print(f"{torch.cuda.get_device_name(device)}, {what}, torch {facts['torch']}, commit {facts['commit']}\n")
        print(markdown(gpu_layers.HEAD, gpu_layers.rows(options, device)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    layer, building, model, memory_parser = (what.add_parser(name) for name in ("layer", "build", "model", "memory"))
    layer.add_argument("--device", default="cpu", help="cpu, or cuda:N for the table of a GPU")
    layer.add_argument("--shapes", help="out x in; 4096x4096,11008x4096,4096x11008, on a GPU 8192x8192,28672x8192")
    layer.add_argument("--tokens", help="vectors per product; 1, on a GPU 1,4,16,2048")
    layer.add_argument("--calls", type=int, default=4, help="calls of each candidate per round")
    layer.add_argument("--cycle-mib", type=int, default=256, help="MiB of all matrices of each candidate")
    layer.add_argument("--no-csr", dest="csr", action="store_false")
    layer.add_argument("--path", help="instruction set of packed layers on the CPU; default: the fastest")
    for command in (layer, building):
        command.add_argument("--sparsities", default="0.5,0.7,0.8,0.9")
    for command in (layer, model):
        command.add_argument("--threads", default="1,2")
        command.add_argument("--rounds", type=int, default=11)
    building.add_argument("out")
    sizes = {"vocabulary": 32000, "hidden": 2048, "intermediate": 5632, "layers": 22, "heads": 32, "kv-heads": 4}
    for name, size in sizes.items():
        building.add_argument(f"--{name}", type=int, default=size)
    model.add_argument("--dense", required=True)
    model.add_argument("--packed", required=True, help="packed directories, separated by commas")
    model.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    model.add_argument("--tokens", type=int, default=32, help="tokens to generate")
    memory_parser.add_argument("folder")
    memory_parser.add_argument("prompt", type=int)
    memory_parser.add_argument("tokens", type=int)
    options = parser.parse_args()
    if options.what == "layer":
        on_gpu = options.device != "cpu"
        options.shapes = options.shapes or ("8192x8192,28672x8192" if on_gpu else "4096x4096,11008x4096,4096x11008")
        options.tokens = options.tokens or ("1,4,16,2048" if on_gpu else "1")
    return options


if __name__ == "__main__":
    ended_in_words(main)
