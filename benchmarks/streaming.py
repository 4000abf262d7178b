"""Prune a checkpoint that is several times larger than the memory limit of the process.

The script writes a LLaMA with random weights shard by shard, runs `alps prune` under a limit on the address space
(RLIMIT_AS, which includes mapped files), and prints its peaks. Example:

    python benchmarks/streaming.py --tokenizer MODEL --text my-text.txt --gigabytes 12 --limit 2.4 --method wanda
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from alps.checkpoints.safetensors_io import TensorToWrite, write_tensors
from alps.checkpoints.weight_files import INDEX_NAME
from alps.models.load import quiet

_DTYPE = torch.bfloat16
_BLOCKS_IN_A_SHARD = 4


def main() -> None:
    """Write a checkpoint, prune it, and print one table."""
    options = _options()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        model, out = Path(folder) / "model", Path(folder) / "pruned"
        size = write_model(model, options)
        print(f"{size / 1e9:.2f} GB in {len(list(model.glob('*.safetensors')))} files", file=sys.stderr)
        start = time.perf_counter()
        peaks = prune(model, out, options)
        seconds = time.perf_counter() - start
        report = json.loads((out / "report.json").read_text())
        written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print("| checkpoint GB | limit GB | checkpoint / limit | address space GB | resident GB | sites | zeros | s |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    print(
        f"| {size / 1e9:.2f} | {options.limit:.2f} | {size / 1e9 / options.limit:.1f} | {peaks[0] / 1e9:.2f} | "
        f"{peaks[1] / 1e9:.2f} | {len(report['layers'])} | {report['summary']['sparsity']:.4f} | {seconds:.0f} |"
    )
    assert written == size
    print(f"\n{options.method}, {options.samples} x {options.seqlen} tokens; {report['versions']}")


def write_model(folder: Path, options: argparse.Namespace) -> int:
    """Write a checkpoint of `--gigabytes`, tensor by tensor, and return the bytes of its files."""
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    wide, hidden = options.hidden * 11 // 4, options.hidden
    block = (4 * hidden * hidden + 3 * hidden * wide) * _DTYPE.itemsize
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=max(round(options.gigabytes * 1e9 / block), 1),
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
    folder.mkdir()
    with quiet():
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    files, shards = {}, dict[int, list[str]]()
    for name in shapes:
        parts = name.split(".")
        shards.setdefault(int(parts[2]) // _BLOCKS_IN_A_SHARD if parts[1] == "layers" else -1, []).append(name)
    for number, names in enumerate(shards.values(), 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_tensors(folder / file, [_random(name, shapes[name], generator) for name in names])
        files.update(dict.fromkeys(names, file))
    index = {"metadata": {}, "weight_map": files}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> TensorToWrite:
    def read() -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=_DTYPE)
        drawn: torch.Tensor = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        return drawn.to(_DTYPE)

    return TensorToWrite(name, _DTYPE, shape, read)


def prune(model: Path, out: Path, options: argparse.Namespace) -> tuple[int, int]:
    """Run the command under the limit, and return the peaks of address space and resident size in bytes."""
    limit = int(options.limit * 1e9)
    settings = ["--sparsity", "0.5", "--method", options.method, "--calibration", options.text, "--no-measure-error"]
    sizes = ["--samples", str(options.samples), "--seqlen", str(options.seqlen)]
    command = [sys.executable, "-m", "alps", "prune", str(model), str(out), *settings, *sizes, "--device", "cpu"]
    # glibc keeps the addresses of freed memory, which count to the limit; large blocks are mapped separately instead.
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "MALLOC_MMAP_THRESHOLD_": "131072"}
    running = subprocess.Popen(
        command, env=environment, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    )
    address_space = resident = 0
    while running.poll() is None:
        time.sleep(0.02)
        try:
            status = Path(f"/proc/{running.pid}/status").read_text()
        except OSError:
            continue
        for line in status.splitlines():
            if line.startswith("VmPeak:"):
                address_space = max(address_space, int(line.split()[1]) * 1024)
            if line.startswith("VmHWM:"):
                resident = max(resident, int(line.split()[1]) * 1024)
    if running.returncode:
        shutil.rmtree(model, ignore_errors=True)
        sys.exit(running.returncode)
    return address_space, resident


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokenizer", required=True, help="model with the tokenizer to use; a small vocabulary is best"
    )
    parser.add_argument("--text", required=True)
    parser.add_argument("--folder", help="folder for temporary files of twice the size; default: that of the system")
    parser.add_argument("--gigabytes", type=float, default=12.0)
    parser.add_argument("--limit", type=float, default=2.4, help="GB of address space")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
