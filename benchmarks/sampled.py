"""Texts that a small model samples itself, one JSON line each: to prune and to measure a model that has no text.

Tokens are drawn at temperature 1 from all of the vocabulary. Example:

    python benchmarks/sampled.py stories260K sampled-1.jsonl --texts 1024 --tokens 255 --seed 1
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

# Texts that are sampled at once.
BATCH = 64


def main() -> None:
    """Sample and write."""
    options = _options()
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    torch.manual_seed(options.seed)
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": options.tokens, "pad_token_id": 0}
    lines = []
    for first in range(0, options.texts, BATCH):
        begin = torch.full((min(BATCH, options.texts - first), 1), tokenizer.bos_token_id)
        rows = model.generate(begin, attention_mask=torch.ones_like(begin), **how)
        lines += [json.dumps({"text": tokenizer.decode(row[1:], skip_special_tokens=True)}) for row in rows]
    Path(options.out).write_text("\n".join(lines) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--texts", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=255)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
