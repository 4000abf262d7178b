"""Compare packed layers with cuBLAS on one GPU, for `python benchmarks/inference.py layer --device cuda`.

Every candidate has copies of its matrix that together are larger than the cache of the GPU, and calls them in turn as a
model does. Times are measured by events on the GPU in two ways. A CUDA graph of all calls gives the time of the
kernels. Calls from Python include launches, which can take longer than a short kernel. Candidates take turns in every
round; figures are medians. The output of every candidate is checked first.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alps.checkpoints.bitmask_codec import pack
from alps.inference.packed_linear import PackedLinear
from alps.inference.semi_structured import SemiStructuredLinear, is_2_4_compatible

HEAD = ["shape", "tokens", "", "ms", "ms by Python", "times dense", "MB", "GB/s", "of stream", "unpacking"]
Call = Callable[[], Any]


@dataclass
class Candidate:
    """One way to multiply, with several copies of its matrix.

    Attributes:
        name: label in the table.
        calls: one call for every copy of the matrix.
        nbytes: bytes of one copy.
        replay: function that runs all calls as one graph.
        graphs: seconds per call in the graph, one for every round.
        plain: seconds per call from Python, one for every round.
    """

    name: str
    calls: list[Call]
    nbytes: int
    replay: Call = print
    graphs: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The median time of a call in the graph."""
        return statistics.median(self.graphs)


class Clock:
    """Timer for work on a device; on a CPU, for tests, without events and graphs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, work: Call) -> float:
        """Return the seconds from start to end of work on the stream."""
        if self.device.type != "cuda":
            begin = time.perf_counter()
            work()
            return time.perf_counter() - begin
        event: Any = torch.cuda.Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def graph(self, work: Call) -> Call:
        """Record work as a CUDA graph, after two runs on the recording stream."""
        if self.device.type != "cuda":
            return work
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
            work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay


def rows(options: argparse.Namespace, device: torch.device) -> list[list[str]]:
    """Return a row for every candidate, at every shape and number of tokens."""
    result = []
    clock = Clock(device)
    for shape in options.shapes.split(","):
        out, columns = map(int, shape.split("x"))
        for tokens in map(int, options.tokens.split(",")):
            with torch.inference_mode():
                candidates = _candidates(out, columns, tokens, options, device)
                for candidate in candidates:
                    candidate.replay = clock.graph(lambda candidate=candidate: [call() for call in candidate.calls])  # type: ignore[misc]
                for _ in range(options.rounds):
                    for candidate in candidates:
                        candidate.graphs.append(clock.seconds(candidate.replay) / len(candidate.calls))
                        together = clock.seconds(lambda candidate=candidate: [call() for call in candidate.calls])  # type: ignore[misc]
                        candidate.plain.append(together / len(candidate.calls))
            result += [
                _cells(shape, tokens, candidate, candidates)
                for candidate in candidates
                if not candidate.name.startswith("unpack")
            ]
    return result


def _candidates(
    out: int, columns: int, tokens: int, options: argparse.Namespace, device: torch.device
) -> list[Candidate]:
    x = torch.randn(tokens, columns, device=device).bfloat16()
    stream = torch.ones(options.cycle_mib * 2**18, device=device)
    result = [Candidate("stream", [stream.sum], stream.nbytes)]

    def add(name: str, nbytes: int, make: Callable[[], Call], weight: Tensor | None) -> None:
        calls = [make() for _ in range(max(-(-options.cycle_mib * 2**20 // nbytes), 1))]
        if weight is not None:
            expected = x.float() @ weight.float().T
            error = float((calls[0]().float() - expected).norm() / expected.norm())
            assert error < 0.01, f"{name} is wrong by {error:.1%}"
        result.append(Candidate(name, calls, nbytes))

    def dense() -> Call:
        copy = full.clone()
        return lambda: F.linear(x, copy)

    full = torch.randn(out, columns, device=device).bfloat16()
    add("cuBLAS bfloat16" if device.type == "cuda" else "dense bfloat16", full.nbytes, dense, full)
    for pattern in [*map(float, options.sparsities.split(",")), None]:
        is_kept = _two_of_four(out, columns, device) if pattern is None else _random(out, columns, pattern, device)
        weight = torch.where(is_kept, full, 0)
        name, packed = "2:4" if pattern is None else f"{pattern:.0%}", pack(weight.cpu())

        def layer(packed: Any = packed) -> PackedLinear:
            made = PackedLinear(packed)
            for own, buffer in list(made.named_buffers()):
                setattr(made, own, buffer.to(device, copy=True))
            made.check()
            return made

        def product(layer: Callable[[], PackedLinear] = layer) -> Call:
            made = layer()
            return lambda: made(x)

        first = layer()
        bound = first._current_binding()
        nbytes = packed.nbytes + getattr(getattr(bound.matrix, "starts", None), "nbytes", 0)
        add(f"packed {name}", nbytes, product, weight)
        if tokens > bound.max_packed_batch:
            add(f"unpack {name}", nbytes, lambda layer=layer: layer().to_dense, None)  # type: ignore[misc]
        if pattern is None and device.type == "cuda" and is_2_4_compatible(first):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of its prototype

                def semi(layer: Callable[[], PackedLinear] = layer) -> Call:
                    made = SemiStructuredLinear(layer())
                    return lambda: made(x)

                add("torch 2:4", full.nbytes * 9 // 16, semi, weight)
    return result


def _random(out: int, columns: int, sparsity: float, device: torch.device) -> Tensor:
    return torch.rand(out, columns, device=device) >= sparsity


def _two_of_four(out: int, columns: int, device: torch.device) -> Tensor:
    """Return a random 2:4 mask; columns after the last whole group are kept."""
    is_kept = torch.ones(out, columns, dtype=torch.bool, device=device)
    fours = columns // 4
    order = torch.rand(out, fours, 4, device=device).argsort(-1)
    is_kept[:, : 4 * fours] = (order < 2).view(out, 4 * fours)
    return is_kept


def _cells(shape: str, tokens: int, candidate: Candidate, candidates: list[Candidate]) -> list[str]:
    by_name = {other.name: other for other in candidates}
    rate, stream = candidate.nbytes / candidate.seconds, candidates[0].nbytes / candidates[0].seconds
    unpacking = by_name.get(candidate.name.replace("packed", "unpack")) if candidate.name.startswith("packed") else None
    share = "" if unpacking is None else f"{unpacking.seconds / candidate.seconds:.0%}"
    times = "" if candidate is candidates[0] else f"{candidates[1].seconds / candidate.seconds:.2f}"
    cells = [
        shape,
        str(tokens),
        candidate.name,
        f"{1e3 * candidate.seconds:.4f}",
        f"{1e3 * statistics.median(candidate.plain):.4f}",
    ]
    return [*cells, times, f"{candidate.nbytes / 1e6:.1f}", f"{rate / 1e9:.0f}", f"{rate / stream:.2f}", share]
