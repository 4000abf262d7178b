"""Smoke test of an installed wheel: files, kernel, commands, and a tiny random model pruned, packed and loaded.

    venv/bin/python tests/wheel/smoke.py

`.ci/check-wheel` runs this in the environments into which it has installed the wheel. Without torch, whatever needs
torch is left out.
"""

from __future__ import annotations

import compileall
import ctypes
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"


def run(*words: str | Path) -> str:
    """Run the installed command, and return its stdout."""
    program = Path(sysconfig.get_path("scripts")) / "alps"
    done = subprocess.run([program, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_files(package: Path) -> None:
    """Check that the package is installed, complete, and valid for this version of Python."""
    assert package.is_relative_to(sys.prefix), package
    assert (package / "py.typed").is_file() and (package / "reporting" / "report.html").is_file()
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(sys, "pycache_prefix", folder):
        assert compileall.compile_dir(package, quiet=1)


def check_kernel(package: Path) -> None:
    """Check that the kernel of the wheel can be loaded, and compiled from the sources in the wheel."""
    from alps.inference.build_kernel import LIBRARY_NAME, compile_library

    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / LIBRARY_NAME
        assert compile_library(compiled) is None
        for library in (package / "inference" / LIBRARY_NAME, compiled):
            assert ctypes.CDLL(str(library)).alps_start(None) == 1


def write_model(folder: Path) -> None:
    """Write a random LLaMA of two blocks, with a tokenizer of letters."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz .,"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(words), max_position_embeddings=128, dtype="bfloat16", **sizes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def check_run(folder: Path) -> None:
    """Prune a model to a half, pack it, and compare the packed one with the pruned one."""
    import torch

    import alps
    from alps.inference import cpu_backend

    write_model(folder / "model")
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    sizes = ["--calibration", str(text), "--samples", "8", "--seqlen", "32"]
    run("prune", folder / "model", folder / "pruned", "--sparsity", "0.5", *sizes)
    has_page = all(importlib.util.find_spec(name) is not None for name in ("matplotlib", "jinja2"))
    assert (folder / "pruned" / "report.html").exists() == has_page
    assert alps.inspect(folder / "pruned").sparsity == 0.5
    run("pack", folder / "pruned", folder / "packed")
    ids = torch.arange(3, 7)[None]
    calls = mock.Mock(side_effect=cpu_backend.Kernel.linear)
    with torch.no_grad(), mock.patch.object(cpu_backend.Kernel, "linear", lambda *given: calls(*given)):
        packed = alps.load(folder / "packed").model(input_ids=ids).logits.float()
        assert calls.call_count == 14, "the kernel multiplies every packed layer"
        pruned = alps.load(folder / "pruned").model(input_ids=ids).logits.float()
    assert float((packed - pruned).abs().max()) < 0.02 * float(pruned.abs().max())
    assert len(run("generate", folder / "packed", "--prompt", "the quick", "--tokens", "4")) > 0


def main() -> None:
    """Run all checks, and print what they were."""
    spec = importlib.util.find_spec("alps")
    assert spec is not None and spec.origin is not None
    package = Path(spec.origin).parent
    check_files(package)
    check_kernel(package)
    version = run("--version").splitlines()[0]
    assert "shrink" in run("--help") and "--sparsity" in run("prune", "--help")
    if has_torch := importlib.util.find_spec("torch") is not None:
        with tempfile.TemporaryDirectory() as folder:
            check_run(Path(folder))
    done = "prune, pack, load, generate" if has_torch else "no torch, so that no model is pruned"
    print(f"{version}, Python {sys.version.split()[0]}: files, kernel, commands; {done}")


if __name__ == "__main__":
    main()
