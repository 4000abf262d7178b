"""Prune by a method that alps does not have: RIA, relative importance and activations.

Zhang, Bai, Lin, Zhao, Hou, Cannistraci: Plug-and-Play: An Efficient Post-training Pruning Method for Large Language
Models, ICLR 2024, arXiv 2402.01456. The score of an entry, with a = 0.5, compared over the whole matrix:

    (|W_ij| / sum of |W| in row i + |W_ij| / sum of |W| in column j) * ||X_j||^a

Compare it with Wanda and magnitude pruning, in a minute or two of one CPU thread:

    python examples/own_method.py smollm2-135m
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from torch import Tensor

import alps
from alps.solvers import InputStats, Method, Needs, Pattern, Solution, SolveInfo, keep_largest


@dataclass(frozen=True)
class Ria(Method):
    """Keep the entries with the largest relative importance, weighted by their inputs; kept weights are unchanged."""

    power: float = 0.5

    @property
    def name(self) -> str:
        return "ria"

    @property
    def needs(self) -> Needs:
        return Needs.MOMENTS

    def prepare(self, stats: InputStats) -> Tensor:
        return stats.norms() ** self.power

    def prune_matrix(self, weight: Tensor, state: Tensor, pattern: Pattern) -> Solution:
        size = weight.abs()
        # A row or a column of zeros scores 0, not NaN.
        rows, columns = (size.sum(dim=d, keepdim=True).clamp_min(1e-30) for d in (1, 0))
        mask = keep_largest((size / rows + size / columns) * state, pattern)
        return Solution(weight, mask, SolveInfo())


def main() -> None:
    """Prune the model in memory by each method, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory, a GGUF file, a hub name, or smollm2-135m")
    parser.add_argument("--sparsity", type=float, default=0.5, help="share of the weights to remove")
    parser.add_argument("--text", default="python-docs", help="text for both; python-docs has a part for each")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows, and windows to measure on")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens per window")
    arguments = parser.parse_args()

    for method in (Ria(), alps.Wanda(), alps.Magnitude()):
        loaded = alps.load(arguments.model)
        report = alps.prune(
            loaded.model,
            tokenizer=loaded.tokenizer,
            method=method,
            sparsity=arguments.sparsity,
            calibration=arguments.text,
            samples=arguments.samples,
            seqlen=arguments.seqlen,
        )
        (record,) = alps.evaluate(loaded, arguments.text, seqlen=arguments.seqlen, windows=arguments.samples)
        print(f"{method.name}: mean relative error {report.mean_error:.4f}, perplexity {record.perplexity:.2f}")


if __name__ == "__main__":
    main()
