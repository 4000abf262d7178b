"""What a run will do, hold and take, before it is begun: from the skeleton, and from seconds of measurement here.

Forwards and Grams grow with the tokens and the blocks; a solve grows as m n^2 + n^3 (m outputs, n inputs). Matching
takes a forward and a backward pass, three forwards, for each token. All of it is an estimate.
"""

from __future__ import annotations

import time
from collections import Counter

from torch import Tensor

from alps.calibration.dense_reference import select_within_budget
from alps.core.statistics import InputSums
from alps.core.text_format import format_duration, format_size
from alps.data.calibration import LoadedModel
from alps.models.blocks import Block
from alps.pruning.pipeline import BlockPruner
from alps.pruning.row_weights import ROW_WEIGHT_TOKENS
from alps.pruning.sparsity_allocation import PLAN_TOKENS, PROBE_TOKENS, PROBE_WINDOWS, check_fit
from alps.pruning.time_estimate import Measured, cost, measure
from alps.reporting.records import Record

# Float32 matrices that a solver holds at once: of the size of the Gram, and of the size of the weight.
_GRAMS, _WEIGHTS = 4, 6
_DENSE_LINES = 20


class Kind(Record):
    """Sites of one name and shape (out, in), and how many there are."""

    name: str
    shape: tuple[int, int]
    count: int


class Forecast(Record):
    """A run that was not begun.

    Attributes:
        architecture, method, pattern, device: what is pruned, how, and where.
        blocks, sites, entries: how many, and the weights of all sites.
        kinds: sites by name and shape.
        dense: parameters with two or more dimensions that stay dense, with the reason.
        streamed: whether weights stay on the disk until their block's turn.
        memory: bytes by what holds them; what comes about together adds up to the peak.
        seconds: by phase, estimated; empty where the method reads no inputs.
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


def forecast(loaded: LoadedModel, walk: BlockPruner, samples: int, seqlen: int) -> Forecast:
    """What `walk` would do to a model with so many windows of so many tokens; nothing is changed.

    Raises:
        ConfigError: when the pattern does not fit, or the windows are longer than the model takes.
        UnsupportedModel: when the model has no decoder blocks, or they cannot be walked.
    """
    begun = time.perf_counter()
    ruled = walk.rules.applied(loaded.model, every := loaded.blocks())
    blocks = ruled.blocks
    check_fit(blocks, walk.pattern, ruled.patterns)
    loaded.check_length(seqlen)
    sites = [site for block in blocks for site in block.sites]
    kinds = Counter((site.kind, site.shape) for site in sites)
    measured = measure(loaded, walk, blocks, seqlen) if walk.reads_inputs else None
    return Forecast(
        architecture=type(loaded.model).__name__,
        method=walk.method.name,
        pattern=str(walk.pattern),
        device=str(walk.device),
        blocks=len(blocks),
        sites=len(sites),
        entries=sum(site.entries for site in sites),
        kinds=[Kind(name=name, shape=shape, count=count) for (name, shape), count in kinds.items()],
        dense=[(d.name, d.reason) for d in ruled.dense(loaded.model, every, {site.name for site in sites})],
        streamed=loaded.store is not None,
        memory=_memory(loaded, walk, blocks, samples * seqlen, measured),
        seconds={} if measured is None else _seconds(walk, blocks, samples * seqlen, measured),
        measured=time.perf_counter() - begun,
    )


def _seconds(walk: BlockPruner, blocks: list[Block], tokens: int, measured: Measured) -> dict[str, float]:
    count = len(blocks)
    one_pass = measured.forward * tokens * count
    # What the dense model makes of a block comes with its inputs, where a target needs them.
    beside = one_pass if walk.matching is not None and not walk.target else 0.0
    found = {
        "forward": (measured.observe + measured.advance) * tokens * count + beside,
        "gram": measured.gram * tokens * count,
        "solve": measured.solve / measured.cost * sum(cost(s.shape) for block in blocks for s in block.sites),
    }
    if walk.matching is not None:
        # Forward and backward for every epoch, a look at the held-back windows now and then; the dense block beside.
        twice = 1 if walk.matching.target < 1 else 0
        found["match"] = one_pass * ((3 + twice) * walk.matching.epochs + 0.5 * (1 + twice))
    if walk.channels != "equal":
        found["channels"] = measured.forward * 3 * min(tokens, ROW_WEIGHT_TOKENS) * count
    if walk.budget != "uniform":
        found["budget"] = (measured.gram + 2 * measured.forward) * min(tokens, PLAN_TOKENS) * count
    if walk.budget == "sensitivity":
        # Every site is cut once, and what that does is carried through the blocks behind it.
        probes = sum(len(block.sites) * (count - block.index) for block in blocks)
        found["budget"] += measured.forward * min(tokens, PROBE_WINDOWS * PROBE_TOKENS) * probes
    return found


def _memory(
    loaded: LoadedModel, walk: BlockPruner, blocks: list[Block], tokens: int, measured: Measured | None
) -> dict[str, int]:
    parameters = list(loaded.model.parameters())
    inside = {id(p) for block in blocks for p in block.module.parameters()}
    largest = max(sum(_bytes(p) for p in block.module.parameters()) for block in blocks)
    walks_dense = walk.target > 0 or walk.matching is not None
    site = max((site for block in blocks for site in block.sites), key=lambda site: site.entries)
    found = {
        "block": largest * (2 if walks_dense else 1),
        "solver": 4 * (_WEIGHTS * site.entries + (_GRAMS * site.shape[1] ** 2 if measured is not None else 0)),
        "outside the blocks": sum(_bytes(p) for p in parameters if id(p) not in inside),
    }
    if loaded.store is None:
        found["whole model"] = sum(_bytes(p) for p in parameters)
    if measured is not None:
        size = next(p for p in parameters if id(p) in inside).dtype.itemsize
        width = _width(loaded.blocks())
        states = tokens * width * size * (2 if walks_dense else 1)
        limit, kept = walk.activation_bytes, [tokens * sum(measured.inputs) * size] if walk.target > 0 else []
        settled = [tokens * features * size for features in measured.settled]
        found["statistics"] = sum(InputSums.nbytes(n, walk.needs) for n in measured.inputs)
        found["activations"] = states if limit is None else min(states, limit)
        found["inputs of the dense block"] = sum(kept[index] for index in select_within_budget(kept, limit))
        found["settled parts"] = sum(settled[index] for index in select_within_budget(settled, limit))
    return found


def _width(blocks: list[Block]) -> int:
    """Features of the hidden states: what the first site of a block reads."""
    return blocks[0].sites[0].shape[1]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize


def peak(memory: dict[str, int], streamed: bool) -> int:
    """The largest sum of what is held at one time, without the program itself."""
    always = memory.get("activations", 0) + memory.get("whole model", 0)
    together = ("block", "solver", "statistics", "inputs of the dense block", "settled parts")
    at_work = sum(memory.get(name, 0) for name in together)
    return always + (max(at_work, memory["outside the blocks"]) if streamed else at_work)


def forecast_summary(found: Forecast) -> str:
    """What a run would prune, hold and take, in a few lines."""
    kinds = ", ".join(f"{kind.count} {kind.name} {kind.shape[0]}x{kind.shape[1]}" for kind in found.kinds)
    lines = [
        f"{found.architecture}: {found.sites} linear layers with {found.entries:,} weights in {found.blocks} blocks, "
        f"{found.method} {found.pattern} on {found.device}.",
        f"Pruned (outputs x inputs): {kinds}.",
        "Left dense: " + (", ".join(f"{name} ({why})" for name, why in found.dense[:_DENSE_LINES]) or "nothing") + ".",
        "Weights: "
        + ("read from their files block by block." if found.streamed else "the whole model is held in memory."),
        f"Memory: about {format_size(peak(found.memory, found.streamed))} besides the program itself ("
        + ", ".join(f"{name} {format_size(size)}" for name, size in found.memory.items() if size)
        + ").",
    ]
    if found.seconds:
        phases = ", ".join(f"{phase} {format_duration(seconds)}" for phase, seconds in found.seconds.items())
        total = format_duration(sum(found.seconds.values()))
        lines.append(f"Time: about {total} ({phases}), from {found.measured:.0f} s of measurement.")
    lines.append("Nothing was pruned or written.")
    return "\n".join(lines)
