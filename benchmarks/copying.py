"""Measure copying: losses in nats of tokens that repeat a pair of the text, and of others, one row per checkpoint.

A token is copied when the pair of it and the token before it stood in its window before. `again` is a passage of 64
tokens of the first text that has just been read, against `once`, the first time: what is left of it is what the heads
that copy have lost. Perplexity alone does not show it, since few tokens are copied. Example:

    python benchmarks/copying.py smollm2-135m pruned --text wikitext2:validation.txt --text held-back.jsonl
"""

from __future__ import annotations

import argparse
from itertools import pairwise

import torch
from torch import Tensor, nn

from alps.core.device import pick_device
from alps.core.half_precision import half_matmul_in_float32
from alps.data.loaded_model import load
from alps.evaluation.perplexity import window_losses

_PASSAGE = 64


def main() -> None:
    """Print the table."""
    options = _options()
    device = pick_device(options.device)
    labels = [f"{name}: {part}" for name in options.text for part in ("all", "copied", "other")]
    print(f"| checkpoint | {' | '.join([*labels, 'once', 'again'])} |")
    print("|---|" + "---:|" * (len(labels) + 2))
    for name in options.models:
        loaded = load(name, options.dtype)
        model = loaded.model.to(device).eval()
        drawn = [loaded.evaluation(text, options.seqlen, options.windows).ids for text in options.text]
        found = [loss for ids in drawn for loss in split_losses(losses(model, ids, device), copied(ids))]
        found += passages(model, drawn[0], device)
        print(f"| {name} | {' | '.join(f'{loss:.3f}' for loss in found)} |", flush=True)


def copied(ids: Tensor) -> Tensor:
    """Mark the tokens of windows (windows, tokens), without the first, that complete a pair seen before; bool."""
    found = torch.zeros(len(ids), ids.shape[1] - 1, dtype=torch.bool)
    for row, window in zip(found, ids.tolist(), strict=True):
        seen: set[tuple[int, int]] = set()
        for place, pair in enumerate(pairwise(window)):
            row[place] = pair in seen
            seen.add(pair)
    return found


def split_losses(values: Tensor, mask: Tensor) -> list[float]:
    """Means over all values, those in the mask, and the others; NaN where there are none."""
    return [float(values.mean()), float(values[mask].mean()), float(values[~mask].mean())]


def passages(model: nn.Module, ids: Tensor, device: torch.device) -> list[float]:
    """Mean loss of the first passage of every window, and of its tokens where it is read a second time."""
    passage = ids[:, :_PASSAGE]
    both = losses(model, torch.cat([passage, passage], dim=1), device)
    length = passage.shape[1]
    return [float(both[:, : length - 1].mean()), float(both[:, length:].mean())]


def losses(model: nn.Module, ids: Tensor, device: torch.device) -> Tensor:
    """Losses of all tokens but the first of windows (windows, tokens), float64, on the CPU."""
    with torch.inference_mode(), half_matmul_in_float32(device, model):
        return torch.cat([window_losses(model, one[None].to(device)).double().cpu() for one in ids])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="checkpoints")
    parser.add_argument("--text", action="append", required=True, help="as for alps eval; may be repeated")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    main()
