"""Train a pruned model by a plain loop of torch, with every zero kept.

PRUNED is a directory that `alps prune` wrote, TEXT a plain text file. Half a minute of one CPU thread:

    python examples/train_with_zeros.py pruned my-text.txt tuned
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

import alps


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pruned", type=Path, help="directory of the pruned model")
    parser.add_argument("text", type=Path, help="text file to train on")
    parser.add_argument("out", type=Path, help="directory to create")
    parser.add_argument("--steps", type=int, default=8, help="steps of the optimiser")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens per step")
    parser.add_argument("--lr", type=float, default=1e-4, help="step size of AdamW")
    parser.add_argument("--heldout", default="python-docs", help="text to measure on")
    return parser.parse_args()


def main() -> None:
    """Train, check the zeros, measure before and after, and save."""
    arguments = parse_arguments()
    loaded = alps.load(arguments.pruned, dtype="float32")
    model = loaded.model

    def perplexity() -> float:
        return alps.evaluate(loaded, arguments.heldout, seqlen=arguments.seqlen, windows=8)[0].perplexity

    ids = loaded.tokenizer(arguments.text.read_text(), return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // arguments.seqlen * arguments.seqlen].reshape(-1, arguments.seqlen)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    print(f"perplexity {perplexity():.2f} before")

    model.requires_grad_(True).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=arguments.lr)
    with alps.keep_zeros(model) as kept:
        print(kept)
        for step in range(arguments.steps):
            batch = windows[order[step % len(order)]][None]
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            print(f"step {step + 1}: loss {loss.item():.3f}")
    model.eval()

    print(f"perplexity {perplexity():.2f} after")
    model.save_pretrained(arguments.out)
    loaded.tokenizer.save_pretrained(arguments.out)
    print(f"{alps.inspect(arguments.out).sparsity:.2%} zeros in {arguments.out}")


if __name__ == "__main__":
    main()
