"""Texts that a model samples itself, one JSON line each: to measure a model that has no text of its own.

They are windows as `--calibration self` has them, by another seed. Example:

    python benchmarks/sampled.py stories260K sampled.jsonl --texts 256 --tokens 256 --seed 1000
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from alps.data.loaded_model import load
from alps.data.self_generated import generate_windows


def main() -> None:
    """Sample and write."""
    options = _options()
    loaded = load(options.model)
    windows = generate_windows(
        loaded.model, loaded.tokenizer, samples=options.texts, seqlen=options.tokens, seed=options.seed
    )
    texts = loaded.tokenizer.batch_decode(windows.ids, skip_special_tokens=True)
    Path(options.out).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=1000)
    return parser.parse_args()


if __name__ == "__main__":
    main()
