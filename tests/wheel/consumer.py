"""A typed program that uses every public name; `.ci/check-wheel` checks it against the installed wheel."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import torch

import alps


def prune_in_memory(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Prune a model by every method, and return the error of the last one."""
    methods = [alps.SparseGPT(), alps.Wanda(), alps.Magnitude(), alps.DSnoT(), alps.Refitted(alps.Wanda())]
    for method in methods:
        alps.prune(model, pattern=alps.Unstructured(0.5), method=method, calibration=ids)
    pattern = alps.SemiStructured(keep=2, group=4)
    report = alps.prune(model, pattern=pattern, method=alps.Alps(refit_steps=3), calibration=ids)
    assert_type(report.sparsity, float)
    assert_type(report.mean_error, float | None)
    return report.mean_error or 0.0


def prune_by_name(name: str, out: Path) -> dict[str, float]:
    """Prune a model on disk by each method, and return perplexities by method."""
    perplexities = {}
    for method in alps.METHODS:
        pruned = out / method
        alps.prune(name, sparsity=0.7, method=method, calibration="text.txt", out=pruned)
        assert_type(alps.inspect(pruned).sparsity, float)
        (record,) = alps.evaluate(pruned, ["text.txt"], seqlen=512, reference=name)
        perplexities[method] = record.perplexity
        scores = alps.evaluate_tasks(pruned, ["piqa"], limit=10)
        assert_type(scores[0].task, str)
    results = alps.compare(name, out / "compared", methods=["wanda", "alps"], sparsity=[0.5], texts=["text.txt"])
    return perplexities | {result.method: result.evaluations[0].perplexity for result in results}


def tune(dense: str, pruned: Path, out: Path) -> int:
    """Reconstruct and distill a pruned checkpoint, pack and unpack it, and return the number of its layers."""
    alps.reconstruct(dense, pruned, out / "reconstructed", calibration="text.txt")
    report = alps.distill(dense, out / "reconstructed", out / "distilled", steps=10, calibration="text.txt")
    alps.pack(out / "distilled", out / "packed", compress=True)
    alps.unpack(out / "packed", out / "unpacked")
    return len(report.layers)


def train_by_hand(model: torch.nn.Module, ids: torch.Tensor) -> int:
    """Take one step of a training loop with all zeros kept, and return their number."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5)
    with alps.keep_zeros(model) as zeros:
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    assert_type(zeros, alps.KeptZeros)
    assert_type(zeros.zeros, int)
    return zeros.zeros


def shrink(name: str, out: Path) -> float:
    """Remove channels, heads and a block, and return the share of the parameters that are gone."""
    report = alps.shrink(name, out, mlp=0.25, num_heads=6, drop_blocks=[12], calibration="text.txt")
    assert_type(report.after.parameters, int)
    return report.share_removed


def load_or_explain(folder: Path) -> alps.LoadedModel | None:
    """Load what was packed, or print why it cannot be loaded."""
    try:
        loaded = alps.load(folder)
        assert_type(alps.pack_linears(loaded.model), int)
    except alps.AlpsError as error:
        print(alps.__version__, error)
        return None
    return alps.LoadedModel(loaded.name, loaded.model, loaded.tokenizer)
