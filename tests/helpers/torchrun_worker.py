"""Prune a tiny random model of one kind in the processes that torchrun starts, and print the results of every layer.

    torchrun --nproc-per-node 2 tests/helpers/torchrun_worker.py KIND ORDER EPOCHS

The model, its calibration tokens and the settings are the same in every process.
"""

from __future__ import annotations

import json
import sys

import torch

from alps.core.distributed import process_group
from alps.data.loaded_model import LoadedModel
from alps.data.windows import Windows
from alps.finetuning.reconstruction_parameters import ReconstructionParameters
from alps.pruning.context import RunContext
from alps.pruning.recipe import PruneRecipe
from alps.pruning.run import prune_model
from alps.solvers import get_method
from alps.solvers.patterns import Unstructured
from helpers.decoders import decoder


def main() -> None:
    """Prune and print."""
    kind, order, epochs = sys.argv[1:]
    # Batches of two windows, the last one of a single window: with two processes one of them has none of it.
    reconstruction, sequential = None, order == "sequential"
    if int(epochs):
        # In sequential order the dense model sees three of the four batches.
        limit = 6 * 12 if sequential else None
        reconstruction = ReconstructionParameters(
            epochs=int(epochs), max_distinct_tokens=limit, target=0.4, tokens=24, held_back=0.3, lr=1e-2
        )
    ids = torch.randint(2, 60, (7, 12), generator=torch.Generator().manual_seed(5))
    loaded = LoadedModel(kind, decoder(kind), None)
    with process_group() as group:
        recipe = PruneRecipe(
            method=get_method("wanda"),
            pattern=Unstructured(0.5),
            true_sequential=sequential,
            dense_target=0.3 if sequential and reconstruction else 0.0,
            reconstruction=reconstruction,
        )
        context = RunContext(device=torch.device("cpu"), group=group)
        report = prune_model(loaded, Windows(ids, "ids", len(ids)), recipe, context)
        weights = [float(parameter.double().abs().sum()) for parameter in loaded.model.parameters()]
        same = len(set(map(tuple, group.all_gather_object(weights)))) == 1
        if group.is_main:
            layers = [(s.name, s.tokens, s.pooled_tokens, s.zeros, s.error) for s in report.layers]
            reconstructions = [record.model_dump() for record in report.reconstructions]
            print(json.dumps({"layers": layers, "same": same, "weights": weights, "reconstructions": reconstructions}))


if __name__ == "__main__":
    main()
