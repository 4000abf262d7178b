"""Proof that a change of the source changes no number: hashes of weight files and figures of reports, before and after.

    python benchmarks/bit_identity.py record before.json --model MODEL --text TEXT.jsonl
    python benchmarks/bit_identity.py check before.json --model MODEL --text TEXT.jsonl

MODEL is a small LLaMA with a tokenizer of at most 512 tokens, such as stories260K; it lends the tokenizer to tiny
random models of other architectures. `record` does every case of the table below and keeps the sha256 of every weight
file and every figure of every report. `check` does them anew and prints one line for each difference; its exit code is
1 if there is any. Bits depend on processor, number of threads and versions of libraries: compare on one machine.
"""

from __future__ import annotations

import os

# Read when torch and transformers are imported.
os.environ.update(
    OMP_WAIT_POLICY="passive", OMP_DYNAMIC="false", MKL_DYNAMIC="false", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1"
)

import argparse
import contextlib
import hashlib
import io
import json
import logging
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import torch
import yaml
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionConfig,
    GPT2Config,
    Idefics3Config,
    LlamaConfig,
    LlavaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen3MoeConfig,
)
from transformers.utils import logging as transformers_logging

import alps
from alps.cli.main import app
from alps.core.provenance import provenance

# --- The table -------------------------------------------------------------------------------------------------------
# A case is a list of command lines, run in a folder of its own. The first word says how:
#   alps      the command line, in this process
#   torchrun  the same in two processes
#   kill:N    the same in a process that is killed once N finished blocks lie in a journal
#   api:NAME  `alps.prune` on a model in memory, with the arguments of API below
# $model, $text, $small and $shape are filled in, and so are names of MODELS and of SETTINGS, made when they are needed.

SHAPE = "--samples 8 --seqlen 64"
SMALL = f"--calibration $text {SHAPE}"

METHODS = {
    "alps": "--method alps",
    "alps-high": "--method alps --effort high",
    "magnitude": "--method magnitude",
    "wanda": "--method wanda",
    "wanda-refit": "--method wanda --refit",
    "sparsegpt": "--method sparsegpt",
    "dsnot": "--method dsnot",
    "dsnot-sparsegpt": "--method dsnot-sparsegpt",
}
PATTERNS = {"0.7": "--sparsity 0.7", "2:4": "--pattern 2:4"}
# One option each, of `alps prune` at 0.7 with ALPS.
OPTIONS = {
    "preset-fast": "--preset fast",
    "preset-best": "--preset best",
    "order-sequential": "--true-sequential",
    "order-sequential-wanda": "--true-sequential --method wanda",
    "target-dense": "--dense-target 1",
    "target-share": "--dense-target 0.4",
    "channels-block": "--row-weights block-output",
    "budget-owl": "--allocation owl",
    "budget-error": "--allocation error",
    "budget-loss": "--allocation sensitivity",
    "match": "--reconstruct-epochs 1",
    "match-target": "--reconstruct-epochs 2 --reconstruct-target 0 --true-sequential",
    "keep-dense": "--keep-dense 'model.layers.0.*,*.down_proj'",
    "overrides": "--config $overrides",
    "offload": "--offload --activation-memory 0",
    "offload-best": "--offload --activation-memory 0 --preset best",
    "no-errors": "--no-measure-error --method wanda",
    "bfloat16": "--dtype bfloat16 --true-sequential --dense-target 0.4",
}
CALIBRATIONS = {"calibration-mix": "$text:0.5,self:0.5", "calibration-self": "self"}
ARCHITECTURES = {
    "gpt2": ("--preset fast", "--pattern 2:4 --method sparsegpt"),
    "opt": ("--preset fast", "--pattern 2:4 --method sparsegpt"),
    "mixtral": ("--preset best", "--pattern 2:4 --method wanda"),
    "qwen3_moe": ("--preset fast", "--pattern 2:4 --method sparsegpt"),
    "llava": ("--preset fast", "--pattern 2:4 --method sparsegpt"),
    "idefics3": ("--preset best", "--pattern 2:4 --method wanda"),
}

CASES: dict[str, list[str]] = {
    **{
        f"{method}-{pattern}": [f"alps prune $model out {which} {how} $small"]
        for method, how in METHODS.items()
        for pattern, which in PATTERNS.items()
    },
    **{name: [f"alps prune $model out --sparsity 0.7 {option} $small"] for name, option in OPTIONS.items()},
    "preset-best-2:4": ["alps prune $model out --pattern 2:4 --preset best $small"],
    "budget-error-wanda": ["alps prune $model out --sparsity 0.7 --allocation error --method wanda $small"],
    "respect-zeros": [
        "alps prune $model first --sparsity 0.3 --method magnitude $small",
        "alps prune first out --sparsity 0.7 --keep-zeros $small",
        "alps prune first wanda --pattern 2:4 --keep-zeros --method wanda $small",
    ],
    **{
        name: [f"alps prune $model out --sparsity 0.7 --calibration {text} $shape"]
        for name, text in CALIBRATIONS.items()
    },
    **{
        f"model-{kind}": [
            f"alps prune ${kind} first --sparsity 0.7 {first} $small",
            f"alps prune ${kind} second {second} $small",
            "alps inspect second --json",
        ]
        for kind, (first, second) in ARCHITECTURES.items()
    },
    "two-processes": ["torchrun prune $model out --sparsity 0.7 $small"],
    "two-processes-best": ["torchrun prune $model out --sparsity 0.7 --preset best $small"],
    "match-command": [
        "alps prune $model pruned --sparsity 0.7 --method wanda $small",
        "alps reconstruct $model pruned out --epochs 2 $small",
        "alps reconstruct $model pruned mixed --epochs 1 --target 0.5 --lr 1e-3 $small",
    ],
    "recover-command": [
        "alps prune $model pruned --sparsity 0.7 --method wanda $small",
        "alps distill $model pruned out --steps 4 --batch-tokens 128 $small",
    ],
    "pack": [
        "alps prune $model pruned --sparsity 0.7 --method wanda $small",
        "alps pack pruned packed",
        "alps unpack packed unpacked",
        "alps pack pruned compressed --compress",
        "alps unpack compressed again",
        "alps eval packed --text $text --seqlen 64 --windows 4",
    ],
    "pack-2:4": [
        "alps prune $model pruned --pattern 2:4 --method wanda $small",
        "alps pack pruned packed",
        "alps unpack packed unpacked",
    ],
    "killed": [
        "alps prune $model whole --sparsity 0.7 $small",
        "kill:1 prune $model out --sparsity 0.7 $small",
        "alps prune $model out --sparsity 0.7 $small",
    ],
    "killed-best": [
        "alps prune $model whole --sparsity 0.7 --preset best $small",
        "kill:2 prune $model out --sparsity 0.7 --preset best $small",
        "alps prune $model out --sparsity 0.7 --preset best $small --resume",
    ],
    "compare": [
        "alps compare $model out --methods sparsegpt,wanda+refit --sparsity 0.7 --pattern 2:4 $small "
        "--text $text --eval-seqlen 64 --windows 4"
    ],
    "eval": [
        "alps prune $model out --sparsity 0.5 --method wanda $small",
        "alps eval out --text $text --seqlen 64 --windows 8",
        "alps eval out --text $text --seqlen 64 --windows 8 --reference $model",
    ],
    "inspect": ["alps prune $model out --pattern 2:4 --method wanda $small", "alps inspect out --json"],
    "api": ["api:plain out"],
    "api-steps": ["api:steps out"],
}

# Directories of a case whose weight files must be the same.
SAME = {
    "pack": [("pruned", "unpacked"), ("pruned", "again")],
    "pack-2:4": [("pruned", "unpacked")],
    "killed": [("whole", "out")],
    "killed-best": [("whole", "out")],
}

# Arguments of `alps.prune` after the model; token ids and tokenizer are given beside them.
API: dict[str, dict[str, Any]] = {
    "plain": {"sparsity": 0.7},
    "steps": {
        "sparsity": 0.7,
        "true_sequential": True,
        "dense_target": 0.4,
        "reconstruct_epochs": 1,
        "reconstruct_target": 0.0,
        "allocation": "sensitivity",
        "row_weights": "block-output",
        "keep_dense": "*.layers.0.*",
        "overrides": {"*.down_proj": 0.6},
        "keep_zeros": True,
    },
}

# YAML files for --config.
SETTINGS: dict[str, dict[str, Any]] = {
    "overrides": {"overrides": {"model.layers.1.*": 0.5, "*.v_proj": "2:4"}, "keep_dense": ["model.layers.0.*"]}
}

# Files whose presence under OUT.partial says that so many blocks are finished.
FINISHED = "*.partial/block-*.json"

# Parts of the paths of figures, joined by slashes, that have got another name since the file was recorded; None for
# what is gone. Such as {"sites": "layers", "exchanges": None}.
RENAMED_KEYS: dict[str, str | None] = {
    "sites": "layers",
    "matches": "reconstructions",
    "match_runs": "reconstruction_runs",
    "recovery": "distillations",
    "found_zeros": "zeros_before",
    "added": "pooled_tokens",
    "rate": "lr",
    "exchanges": None,
    "exchange_rounds": None,
    "settings/match": "settings/reconstruct_epochs",
    "settings/match_target": "settings/reconstruct_target",
}
# Parts that are new since: their figures are not compared.
NEW_KEYS: tuple[str, ...] = ("settings/dense_target",)

# Parts of paths below which nothing is a result: times, peaks of memory, dates, versions. Of packed.json also hashes of
# whole files: report.json, copied along, holds times, and safetensors writes the metadata of a file in any order.
NO_RESULTS = (
    *("seconds", "minutes", "peak_host_bytes", "peak_device_bytes", "finished", "versions", "version"),
    *("schema_version", "packed.json/files", "packed.json/shards", "packed.json/sha256"),
)
# Files of the model that are only copied, with the numbers of a vocabulary in them.
COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
# ---------------------------------------------------------------------------------------------------------------------

_VOCABULARY = 520
_IMAGE = 515
_SIZES: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def _gpt2() -> Any:
    return GPT2Config(
        vocab_size=_VOCABULARY, n_positions=128, n_embd=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2
    )


def _opt() -> Any:
    shape = {key: value for key, value in _SIZES.items() if key not in ("intermediate_size", "num_key_value_heads")}
    return OPTConfig(**shape, ffn_dim=48, word_embed_proj_dim=16)


def _mixtral() -> Any:
    return MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2)


def _qwen3_moe() -> Any:
    return Qwen3MoeConfig(**_SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)


def _llava() -> Any:
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**_TOWER, projection_dim=32),
        text_config=LlamaConfig(**_SIZES),
        image_token_index=_IMAGE,
    )


def _idefics3() -> Any:
    return Idefics3Config(
        vision_config=_TOWER, text_config=LlamaConfig(**_SIZES), image_token_id=_IMAGE, scale_factor=2
    )


# Configuration, and the class that makes a model of it.
MODELS: dict[str, tuple[Callable[[], Any], Any]] = {
    "gpt2": (_gpt2, AutoModelForCausalLM),
    "opt": (_opt, AutoModelForCausalLM),
    "mixtral": (_mixtral, AutoModelForCausalLM),
    "qwen3_moe": (_qwen3_moe, AutoModelForCausalLM),
    "llava": (_llava, AutoModelForImageTextToText),
    "idefics3": (_idefics3, AutoModelForImageTextToText),
}


class CaseFailed(Exception):
    """A case could not be done; the words say why."""


@dataclass(frozen=True)
class Found:
    """Files and figures of one case.

    Attributes:
        files: hash of every weight file, by its path.
        figures: numbers and hashes in JSON files and in JSON on stdout, by file and path inside.
    """

    files: dict[str, str]
    figures: dict[str, Any]


class Bench:
    """Everything that the cases share: model, text, and what is made of them when it is first needed."""

    def __init__(self, model: Path, text: Path, folder: Path) -> None:
        self.model, self._folder = model.resolve(), folder
        self._words = {"model": str(self.model), "text": str(text.resolve()), "shape": SHAPE}

    def found(self, name: str) -> Found:
        """Do one case.

        Raises:
            CaseFailed: when a command of it fails, or when directories differ that must be the same.
        """
        with tempfile.TemporaryDirectory(dir=self._folder) as place, contextlib.chdir(place):
            files: dict[str, str] = {}
            figures: dict[str, Any] = {}
            for number, line in enumerate(CASES[name], 1):
                said = self._run(self._filled(line), files)
                with contextlib.suppress(ValueError):
                    figures |= dict(flat(json.loads(said), f"stdout {number}"))
            here = Path()
            files |= {str(path): weights_sha256(path) for path in sorted(here.rglob("*.safetensors"))}
            for one, other in SAME.get(name, ()):
                if weights_below(files, one) != weights_below(files, other):
                    raise CaseFailed(f"the weights in '{one}' and '{other}' differ")
            return Found(files, figures | dict(figures_of(here)))

    def _filled(self, line: str) -> list[str]:
        template = Template(line.replace("$small", SMALL).replace("$shape", SHAPE))
        for word in template.get_identifiers():
            if word not in self._words:
                self._words[word] = str(self._made(word))
        return shlex.split(template.substitute({word: shlex.quote(value) for word, value in self._words.items()}))

    def _made(self, word: str) -> Path:
        if word in SETTINGS:
            path = self._folder / f"{word}.yaml"
            path.write_text(yaml.safe_dump(SETTINGS[word]))
            return path
        folder = self._folder / word
        AutoTokenizer.from_pretrained(self.model).save_pretrained(folder)
        random_model(word).save_pretrained(folder)
        return folder

    def _run(self, arguments: list[str], files: dict[str, str]) -> str:
        """Run one command; what it says on stdout. Hashes of weights in memory are added to `files`."""
        how, *rest = arguments
        kind, _, which = how.partition(":")
        if kind == "kill":
            kill(rest, int(which))
            return ""
        if kind == "torchrun":
            launch = "-m torch.distributed.run --standalone --nproc-per-node 2 -m alps"
            done = subprocess.run(
                [sys.executable, *launch.split(), *rest],
                capture_output=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            if done.returncode:
                raise CaseFailed(f"{shlex.join(arguments)}: {reason_in(done.stderr)}")
            return done.stdout
        with captured() as (out, errors):
            try:
                torch.manual_seed(0)
                if kind == "api":
                    self._call(which, Path(rest[0]), files)
                else:
                    app(rest, standalone_mode=False)
            except (Exception, SystemExit) as error:
                reason = f"{type(error).__name__}: {error}" if str(error) else reason_in(errors.getvalue())
                raise CaseFailed(f"{shlex.join(arguments)}: {reason}") from error
        return out.getvalue()

    def _call(self, which: str, out: Path, files: dict[str, str]) -> None:
        """Prune a model in memory, on random tokens."""
        model: Any = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        ids = torch.randint(3, model.config.vocab_size, (8, 64), generator=torch.Generator().manual_seed(3))
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        alps.prune(model, **API[which], calibration=ids, tokenizer=tokenizer, out=out)
        content = hashlib.sha256()
        for name, parameter in model.named_parameters():
            content.update(name.encode() + parameter.detach().numpy().tobytes())
        files["model in memory"] = content.hexdigest()


def random_model(kind: str) -> Any:
    """A random model of a kind of `MODELS`; equal calls give equal weights."""
    configuration, maker = MODELS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20240607)
        model: nn.Module = maker.from_config(configuration())
        with torch.no_grad():
            # Fresh weights are too small for a block to matter, and norms and biases do nothing.
            for name, parameter in model.named_parameters():
                scale = 0.2 if parameter.ndim > 1 else 0.1
                shift = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
                parameter.copy_(shift + scale * torch.randn_like(parameter))
    return model.eval()


def kill(arguments: list[str], blocks: int) -> None:
    """Start a command and kill it once so many blocks are finished.

    Raises:
        CaseFailed: when it ends before.
    """
    with tempfile.TemporaryFile("w+") as words:
        running = subprocess.Popen([sys.executable, "-m", "alps", *arguments], stdout=words, stderr=words)
        while len(list(Path().glob(FINISHED))) < blocks and running.poll() is None:
            time.sleep(0.002)
        running.send_signal(signal.SIGKILL)
        if running.wait() != -signal.SIGKILL:
            words.seek(0)
            reason = reason_in(words.read()) if running.returncode else "came through before it was killed"
            raise CaseFailed(f"{shlex.join(arguments)}: {reason}")


@contextlib.contextmanager
def captured() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """Capture what is printed inside the context, on stdout and on stderr."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        yield out, errors


def reason_in(words: str) -> str:
    """The line that names an error, else the last that says anything."""
    lines = [line.strip() for line in words.splitlines() if line.strip()] or ["no reason was given"]
    return next((line for line in lines if "Error: " in line), lines[-1])


def sha256(path: Path) -> str:
    """Hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weights_sha256(path: Path) -> str:
    """Hash of a safetensors file; the entries of its header count in alphabetical order, the metadata's have none."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return hashlib.sha256(json.dumps(header, sort_keys=True).encode() + file.read()).hexdigest()


def weights_below(files: Mapping[str, str], folder: str) -> dict[str, str]:
    """Hashes of the weight files of a directory, by name.

    Raises:
        CaseFailed: when there are none.
    """
    found = {path.removeprefix(f"{folder}/"): value for path, value in files.items() if path.startswith(f"{folder}/")}
    if not found:
        raise CaseFailed(f"'{folder}' holds no weights")
    return found


def figures_of(folder: Path) -> Iterator[tuple[str, Any]]:
    """Figures of all JSON files below a folder, by file and path inside."""
    for path in sorted(folder.rglob("*.json*")):
        if path.name in COPIED or path.suffix not in (".json", ".jsonl"):
            continue
        words = path.read_text()
        content = list(map(json.loads, words.splitlines())) if path.suffix == ".jsonl" else json.loads(words)
        yield from flat(content, str(path))


def flat(content: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Numbers and hashes inside a JSON value, by their paths with slashes."""
    if isinstance(content, dict):
        for key, value in content.items():
            if not has_part(below := f"{path}/{key}", NO_RESULTS):
                yield from flat(value, below)
    elif isinstance(content, list):
        for index, value in enumerate(content):
            yield from flat(value, f"{path}/{index}")
    elif (isinstance(content, int | float) and not isinstance(content, bool)) or (
        isinstance(content, str) and path.endswith("sha256")
    ):
        yield path, content


def has_part(path: str, parts: Iterable[str]) -> bool:
    """True if one of the parts is in a path, between slashes."""
    return any(f"/{part}/" in f"/{path}/" for part in parts)


def renamed(path: str) -> str | None:
    """The path that a figure has now; None where it is gone."""
    for old, new in RENAMED_KEYS.items():
        if has_part(path, [old]):
            if new is None:
                return None
            path = f"/{path}/".replace(f"/{old}/", f"/{new}/").strip("/")
    return path


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """One line for every path that is missing, new, or has another value; 1 and 1.0 are not the same."""
    expected = {path: value for old, value in before.items() if (path := renamed(old)) is not None}
    for path, value in expected.items():
        if path not in now:
            yield f"{path}: was {value}, is missing"
        elif json.dumps(now[path]) != json.dumps(value):
            yield f"{path}: was {value}, is {now[path]}"
    for path in sorted(now.keys() - expected.keys()):
        if not has_part(path, NEW_KEYS):
            yield f"{path}: is new, {now[path]}"


def record(options: argparse.Namespace, bench: Bench) -> int:
    """Do all cases and write what they left."""
    use_threads(options.threads)
    cases, failed = {}, []
    for name in options.only or CASES:
        try:
            found = done(bench, name)
            cases[name] = {"files": found.files, "figures": found.figures}
        except CaseFailed as error:
            failed.append(f"{name}: {error}")
    if failed:
        print("\n".join(failed))
        return 1
    content = {"inputs": inputs(options), "threads": options.threads, "versions": provenance(), "cases": cases}
    options.file.write_text(json.dumps(content, indent=0))
    files, figures = (sum(len(case[kind]) for case in cases.values()) for kind in ("files", "figures"))
    print(f"{files} files and {figures} figures of {len(cases)} cases are recorded")
    return 0


def check(options: argparse.Namespace, bench: Bench) -> int:
    """Do all cases anew and print what differs."""
    content = json.loads(options.file.read_text())
    if content["inputs"] != inputs(options):
        print(f"'{options.file}' was recorded with another model or text")
        return 1
    use_threads(content["threads"])
    for name, version in provenance().items():
        if content["versions"].get(name) != version and name not in ("alps", "commit"):
            print(f"{name} was {content['versions'].get(name)} and is {version}", file=sys.stderr)
    cases, files, figures, wrong = content["cases"], 0, 0, 0
    for name in options.only or {**CASES, **cases}:
        lines: list[str] = []
        if name not in cases or name not in CASES:
            lines.append("is not recorded" if name in CASES else "is no case any more")
        else:
            try:
                found = done(bench, name)
                lines += differences(cases[name]["files"], found.files)
                lines += differences(cases[name]["figures"], found.figures)
                files, figures = files + len(found.files), figures + len(found.figures)
            except CaseFailed as error:
                lines.append(str(error))
        wrong += len(lines)
        for line in lines:
            print(f"{name}: {line}", flush=True)
    print(f"{wrong} differences" if wrong else f"{files} files and {figures} figures are identical")
    return 1 if wrong else 0


def use_threads(count: int) -> None:
    """Compute on so many threads, here and in processes that are started."""
    torch.set_num_threads(count)
    os.environ["OMP_NUM_THREADS"] = str(count)


def done(bench: Bench, name: str) -> Found:
    """Do one case, and tell on stderr how long it took."""
    start, remark = time.perf_counter(), ""
    try:
        return bench.found(name)
    except CaseFailed as error:
        remark = f"  {error}"
        raise
    finally:
        print(f"{name:24} {time.perf_counter() - start:6.1f} s{remark}", file=sys.stderr, flush=True)


def inputs(options: argparse.Namespace) -> dict[str, str]:
    """Hashes of the model and the text that a recording belongs to."""
    weights = hashlib.sha256("".join(map(sha256, sorted(options.model.glob("*.safetensors")))).encode())
    return {"model": weights.hexdigest(), "text": sha256(options.text)}


def main() -> None:
    """Record, or check."""
    options = _options()
    # The page of figures takes longer than the run that it shows: without matplotlib none is drawn.
    sys.modules["matplotlib"] = None  # type: ignore[assignment]
    # Processes that are started run the same source, wherever they are.
    os.environ["PYTHONPATH"] = str(Path(alps.__file__).resolve().parents[1])
    print(f"alps of {os.environ['PYTHONPATH']}", file=sys.stderr)
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.model, options.text, Path(folder).resolve())
        sys.exit({"record": record, "check": check}[options.action](options, bench))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "check"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="calibration, and a text to measure on")
    parser.add_argument("--threads", type=int, default=2, help="of record; check takes as many")
    parser.add_argument("--only", nargs="+", choices=list(CASES), metavar="CASE", help="some cases of the table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
