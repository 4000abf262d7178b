r"""Fine-tune a pruned model with and without its zeros kept: zeros and perplexity before and after.

    pip install peft
    python benchmarks/finetuning.py pruned --train wikitext2:train.txt --text wikitext2:test.txt --windows 12 \
        --seqlen 512 --steps 40 --out tuned

Every row trains the same windows in the same order with `transformers.Trainer`, in float32 with bfloat16 products
(autocast), the whole model or LoRA adapters of PEFT on all linear layers of the blocks. `zeros` are those of the linear
layers of the blocks. LoRA has two figures of perplexity: before and after the merge.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, set_seed

import alps
from alps.core.provenance import provenance
from alps.data.text_sources import load_text
from alps.finetuning.checkpoint_pair import count_zeros
from layers import ended_in_words, markdown

_LAYERS = r".*\.layers\.\d+\..*_proj"


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        name: shown in the table.
        lora: train adapters, and merge them; else all weights.
        keep: when zeros are kept: `never`, from `before` the adapters are added, or from `after` that.
    """

    name: str
    lora: bool
    keep: str


WAYS = (
    Way("all weights", False, "never"),
    Way("all weights, keep_zeros", False, "before"),
    Way("LoRA", True, "never"),
    Way("LoRA, zeros set again after the merge", True, "before"),
    Way("LoRA under the mask", True, "after"),
)


def train(way: Way, windows: Any, options: argparse.Namespace) -> tuple[Any, list[str]]:
    """Train the model in one way; return it with the cells of its row."""
    loaded = alps.load(options.model, dtype="float32")
    model, handle = loaded.model, None
    if way.keep == "before":
        handle = alps.keep_zeros(model)
    if way.lora:
        import peft

        set_seed(options.seed)
        settings = peft.LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=_LAYERS)
        model = peft.get_peft_model(model, settings)
    if way.keep == "after":
        handle = alps.keep_zeros(model)
    start = time.perf_counter()
    run_trainer(model, windows, options.lora_lr if way.lora else options.lr, options)
    seconds = time.perf_counter() - start
    before_merge = evaluate(model, loaded, options) if way.lora else []
    if way.lora:
        model = model.merge_and_unload()
    if handle is not None:
        handle.remove()
    values = evaluate(model, loaded, options)
    shown = [f"{a} / {b}" for a, b in zip(before_merge, values, strict=True)] if way.lora else values
    return model, [way.name, f"{count_zeros(model):,}", *shown, f"{seconds:.0f}"]


def run_trainer(model: Any, windows: Any, lr: float, options: argparse.Namespace) -> None:
    """Train as a user of transformers does."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=lr,
            lr_scheduler_type="cosine",
            warmup_steps=max(options.steps // 10, 1),
            weight_decay=0.01,
            bf16=True,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            seed=options.seed,
        )
        data = [{"input_ids": row, "labels": row} for row in windows]
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        # Else the model would go on computing in bfloat16.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)


def evaluate(model: Any, loaded: alps.LoadedModel, options: argparse.Namespace) -> list[str]:
    """Return the perplexity on every text, in float32."""
    given = alps.LoadedModel(loaded.name, model, loaded.tokenizer)
    rows = alps.evaluate(given, options.text, seqlen=options.seqlen, windows=options.windows, device="cpu")
    return [f"{row.perplexity:.2f}" for row in rows]


def table(options: argparse.Namespace, report: Callable[[str], None]) -> str:
    """Train in every way, and return the table."""
    loaded = alps.load(options.model, dtype="float32")
    text = load_text(options.train, "calibration")
    windows = loaded.calibration(text, options.steps * options.batch, options.seqlen, options.seed).ids
    rows = [["pruned", f"{count_zeros(loaded.model):,}", *evaluate(loaded.model, loaded, options), ""]]
    report(str(rows[0]))
    for way in WAYS:
        model, row = train(way, windows, options)
        rows.append(row)
        report(str(row))
        if options.out is not None:
            model.to(torch.bfloat16).save_pretrained(options.out / way.name.replace(" ", "-").replace(",", ""))
    return markdown(["trained", "zeros", *(Path(name).name for name in options.text), "s"], rows)


def main() -> None:
    """Print one table."""
    options = _options()
    printed = table(options, lambda line: print(line, flush=True))
    facts = provenance()
    versions = f"torch {facts['torch']}, transformers {facts['transformers']}, peft {version('peft')}"
    print(
        f"{facts['machine']}; {versions}, commit {facts['commit']}; {options.steps} steps of {options.batch} x "
        f"{options.seqlen} tokens of {Path(options.train).name}, seed {options.seed}, learning rate {options.lr:g}, of "
        f"LoRA (rank {options.rank}) {options.lora_lr:g}; {options.windows} x {options.seqlen} tokens of each text\n\n"
        f"{printed}"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="pruned directory")
    parser.add_argument("--train", required=True, help="text to train on")
    parser.add_argument("--text", action="append", default=[], help="text to evaluate on")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--lora-lr", type=float, default=5e-4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the trained models; none are kept without it")
    return parser.parse_args()


if __name__ == "__main__":
    ended_in_words(main, ImportError)
