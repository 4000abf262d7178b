"""Estimate what a run will prune, hold in memory and take, from the model's shapes and some seconds of measurement.

Forwards and Gram matrices grow with the tokens and the blocks; a solve grows as m n^2 + n^3 (m outputs, n inputs). A
reconstruction takes a forward and a backward pass, as long as three forwards, for each token.
"""

from __future__ import annotations

import math
import time
from collections import Counter

from torch import Tensor

from alps.calibration.dense_reference import select_within_budget
from alps.core.statistics import InputSums
from alps.core.text_format import format_duration, format_size
from alps.data.loaded_model import LoadedModel
from alps.models.blocks import Block
from alps.pruning.context import RunContext
from alps.pruning.recipe import PruneRecipe
from alps.pruning.row_weights import ROW_WEIGHT_TOKENS
from alps.pruning.sparsity_allocation import ALLOCATION_TOKENS, PROBE_TOKENS, PROBE_WINDOWS, check_fit
from alps.pruning.time_estimate import BlockTimes, measure_block, solve_size
from alps.reporting.records import Record

# Float32 matrices that a solver holds at once: of the size of the Gram, and of the size of the weight.
_GRAMS, _WEIGHTS = 4, 6
_DENSE_LINES = 20


class Kind(Record):
    """Number of layers of one name and shape (out, in)."""

    name: str
    shape: tuple[int, int]
    count: int


class Forecast(Record):
    """Estimates for a run.

    Attributes:
        architecture, method, pattern, device: of the run.
        blocks, sites, entries: number of blocks, of layers, and of the weights of all layers.
        kinds: layers by name and shape.
        dense: parameters with two or more dimensions that stay dense, with the reason.
        streamed: True if weights stay on disk until their block is pruned.
        memory: bytes by use; uses at the same time add up to the peak.
        seconds: by phase; empty where the method reads no inputs.
        measured: seconds that the measurement took.
    """

    architecture: str
    method: str
    pattern: str
    device: str
    blocks: int
    sites: int
    entries: int
    kinds: list[Kind]
    dense: list[tuple[str, str]]
    streamed: bool
    memory: dict[str, int]
    seconds: dict[str, float]
    measured: float


def forecast(loaded: LoadedModel, recipe: PruneRecipe, context: RunContext, *, samples: int, seqlen: int) -> Forecast:
    """Estimate a run on a model; the model stays unchanged.

    Args:
        loaded: model to prune.
        recipe: method, pattern and options.
        context: device and memory limits.
        samples: calibration windows.
        seqlen: tokens in each window.

    Raises:
        ConfigError: when the pattern does not fit, or the windows are longer than the model takes.
        UnsupportedModel: when the model has no decoder blocks, or they cannot be walked.
    """
    start = time.perf_counter()
    all_blocks = loaded.blocks()
    applied = recipe.rules.apply(loaded.model, all_blocks)
    blocks = applied.blocks
    check_fit(blocks, recipe.pattern, applied.patterns)
    loaded.check_length(seqlen)
    sites = [site for block in blocks for site in block.sites]
    kinds = Counter((site.kind, site.shape) for site in sites)
    times = measure_block(loaded, blocks, recipe, context, seqlen=seqlen) if recipe.reads_inputs else None
    dense = applied.dense(loaded.model, all_blocks, {site.name for site in sites})
    return Forecast(
        architecture=type(loaded.model).__name__,
        method=recipe.method.name,
        pattern=str(recipe.pattern),
        device=str(context.device),
        blocks=len(blocks),
        sites=len(sites),
        entries=sum(site.entries for site in sites),
        kinds=[Kind(name=name, shape=shape, count=count) for (name, shape), count in kinds.items()],
        dense=[(record.name, record.reason) for record in dense],
        streamed=loaded.store is not None,
        memory=_memory(loaded, blocks, recipe, context, samples * seqlen, times),
        seconds={} if times is None else _seconds(blocks, recipe, samples * seqlen, times),
        measured=time.perf_counter() - start,
    )


def _seconds(blocks: list[Block], recipe: PruneRecipe, tokens: int, times: BlockTimes) -> dict[str, float]:
    count = len(blocks)
    one_pass = times.forward * tokens * count
    reconstruction, dense_share = recipe.reconstruction, _dense_share(recipe, tokens)
    dense_pass = one_pass * dense_share if reconstruction is not None else 0.0
    if recipe.dense_target and reconstruction is not None:
        # With a dense target the observed window had a forward of the dense block as well.
        dense_pass -= one_pass
    sizes = sum(solve_size(site.shape) for block in blocks for site in block.sites)
    seconds = {
        "forward": (times.observe + times.advance) * tokens * count + dense_pass,
        "gram": times.gram * tokens * count,
        "solve": times.solve / times.cost * sizes,
    }
    if reconstruction is not None:
        # Every epoch takes a forward and a backward, and checks on the held-back windows. The dense block runs once.
        trained = min(reconstruction.epochs * dense_share, (reconstruction.max_tokens or math.inf) / tokens)
        dense = min(trained, dense_share) if reconstruction.target < 1 else 0
        seconds["reconstruct"] = one_pass * (3 * trained + 0.5 * dense_share + dense)
    if recipe.row_weights != "equal":
        seconds["row_weights"] = times.forward * 3 * min(tokens, ROW_WEIGHT_TOKENS) * count
    if recipe.allocation != "uniform":
        seconds["allocation"] = (times.gram + 2 * times.forward) * min(tokens, ALLOCATION_TOKENS) * count
    if recipe.allocation == "sensitivity":
        # The pruned layers of a block are carried through the blocks after it, and pruned one by one in it.
        probes = sum(count - block.index + len(block.sites) + 3 for block in blocks)
        seconds["allocation"] += times.forward * min(tokens, PROBE_WINDOWS * PROBE_TOKENS) * probes
    return seconds


def _dense_share(recipe: PruneRecipe, tokens: int) -> float:
    """Return the share of the calibration tokens for which the dense model's activations are computed."""
    if recipe.reconstruction is None or recipe.reconstruction.max_distinct_tokens is None:
        return 1.0
    return min(recipe.reconstruction.max_distinct_tokens / tokens, 1.0)


def _memory(
    loaded: LoadedModel,
    blocks: list[Block],
    recipe: PruneRecipe,
    context: RunContext,
    tokens: int,
    times: BlockTimes | None,
) -> dict[str, int]:
    parameters = list(loaded.model.parameters())
    inside = {id(p) for block in blocks for p in block.module.parameters()}
    largest = max(sum(_bytes(p) for p in block.module.parameters()) for block in blocks)
    models = 2 if recipe.uses_dense_reference else 1
    site = max((site for block in blocks for site in block.sites), key=lambda site: site.entries)
    memory = {
        "block": largest * models,
        "solver": 4 * (_WEIGHTS * site.entries + (_GRAMS * site.shape[1] ** 2 if times is not None else 0)),
        "outside the blocks": sum(_bytes(p) for p in parameters if id(p) not in inside),
    }
    if loaded.store is None:
        memory["whole model"] = sum(_bytes(p) for p in parameters)
    if times is not None:
        size = next(p for p in parameters if id(p) in inside).dtype.itemsize
        dense_tokens = round(tokens * _dense_share(recipe, tokens))
        streams = tokens + (dense_tokens if recipe.uses_dense_reference else 0)
        states = streams * _width(loaded.blocks()) * size
        limit = context.activation_bytes
        dense = [dense_tokens * sum(times.inputs) * size] if recipe.dense_target > 0 else []
        cached = [tokens * features * size for features in times.cached]
        memory["statistics"] = sum(InputSums.nbytes(n, recipe.needs) for n in times.inputs)
        memory["activations"] = states if limit is None else min(states, limit)
        memory["inputs of the dense block"] = sum(dense[index] for index in select_within_budget(dense, limit))
        memory["cached outputs"] = sum(cached[index] for index in select_within_budget(cached, limit))
    return memory


def _width(blocks: list[Block]) -> int:
    """Return the features of the hidden states, which the first site of a block reads."""
    return next(site.shape[1] for block in blocks for site in block.sites)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize


def peak(memory: dict[str, int], streamed: bool) -> int:
    """Return the largest sum of memory at one time, in bytes, without the program itself."""
    always = memory.get("activations", 0) + memory.get("whole model", 0)
    together = ("block", "solver", "statistics", "inputs of the dense block", "cached outputs")
    at_work = sum(memory.get(name, 0) for name in together)
    return always + (max(at_work, memory["outside the blocks"]) if streamed else at_work)


def forecast_summary(estimate: Forecast) -> str:
    """Return an estimate as a few lines of text."""
    kinds = ", ".join(f"{kind.count} {kind.name} {kind.shape[0]}x{kind.shape[1]}" for kind in estimate.kinds)
    lines = [
        f"{estimate.architecture}: {estimate.sites} linear layers with {estimate.entries:,} weights in "
        f"{estimate.blocks} blocks, {estimate.method} {estimate.pattern} on {estimate.device}.",
        f"Pruned (outputs x inputs): {kinds}.",
        "Left dense: "
        + (", ".join(f"{name} ({why})" for name, why in estimate.dense[:_DENSE_LINES]) or "nothing")
        + ".",
        "Weights: "
        + ("read from their files block by block." if estimate.streamed else "the whole model is held in memory."),
        f"Memory: about {format_size(peak(estimate.memory, estimate.streamed))} besides the program itself ("
        + ", ".join(f"{name} {format_size(size)}" for name, size in estimate.memory.items() if size)
        + ").",
    ]
    if estimate.seconds:
        phases = ", ".join(f"{phase} {format_duration(seconds)}" for phase, seconds in estimate.seconds.items())
        total = format_duration(sum(estimate.seconds.values()))
        lines.append(f"Time: about {total} ({phases}), from {estimate.measured:.0f} s of measurement.")
    lines.append("Nothing was pruned or written.")
    return "\n".join(lines)
