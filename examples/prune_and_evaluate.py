"""Prune a model from Python, measure it beside the dense one, and list the layers that lost most.

With the default settings this takes some three minutes of one CPU thread, and downloads nothing but the model:

    python examples/prune_and_evaluate.py smollm2-135m pruned
"""

from __future__ import annotations

import argparse
from pathlib import Path

import alps
from alps.reporting.records import ComparisonRecord


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory, a GGUF file, a hub name, or smollm2-135m")
    parser.add_argument("out", type=Path, help="directory to create")
    parser.add_argument("--sparsity", type=float, default=0.5, help="share of the weights to remove")
    parser.add_argument("--method", default="alps", help="alps, sparsegpt, wanda, ...")
    parser.add_argument("--calibration", default="python-docs", help="text whose activations are fitted")
    parser.add_argument("--text", default="python-docs", help="text to measure on; it must not be the calibration text")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens per window")
    parser.add_argument("--windows", type=int, default=20, help="windows to measure on")
    return parser.parse_args()


def main() -> None:
    """Prune, measure, and print."""
    arguments = parse_arguments()
    report = alps.prune(
        arguments.model,
        sparsity=arguments.sparsity,
        method=arguments.method,
        calibration=arguments.calibration,
        samples=arguments.samples,
        seqlen=arguments.seqlen,
        out=arguments.out,
    )
    print(report)

    (record,) = alps.evaluate(
        arguments.out,
        arguments.text,
        reference=arguments.model,
        seqlen=arguments.seqlen,
        windows=arguments.windows,
    )
    assert isinstance(record, ComparisonRecord)  # because of the reference
    print(f"perplexity {record.perplexity:.2f}, dense {record.reference_perplexity:.2f}, KL {record.kl:.4f} nats")

    for layer in sorted(report.layers, key=lambda layer: -(layer.error or 0.0))[:3]:
        print(f"{layer.name}: error {layer.error:.4f}, by magnitude pruning {layer.magnitude_error:.4f}")


if __name__ == "__main__":
    main()
