"""Packed layers against cuBLAS on one GPU: what `python benchmarks/inference.py layer --device cuda` prints.

Every contestant has copies of its matrix that together are larger than the cache of the GPU, and calls them one after
the other, as a model does. Times are taken twice by events on the GPU: of a CUDA graph that holds all calls, which is
what the kernels take, and of the calls made from Python, where the launch of a short kernel can take longer than the
kernel. Contestants have their turns in every round; figures are medians. What a contestant answers is checked first.
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
class Contestant:
    """Something that multiplies, on one matrix after the other.

    Attributes:
        calls: one for every copy of its matrix.
        nbytes: of one copy.
        replay: all calls as one graph.
        graphs, plain: seconds of a call, by the graph and from Python, one of each a round.
    """

    name: str
    calls: list[Call]
    nbytes: int
    replay: Call = print
    graphs: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The median of a call in the graph."""
        return statistics.median(self.graphs)


class Clock:
    """Seconds of work on a device; a CPU, for tests, has neither events nor graphs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, work: Call) -> float:
        """From the start of what is put on the stream to its end."""
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
        """The work as a CUDA graph, after two runs on the stream on which it is recorded."""
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
    """A row for every contestant, at every shape and number of tokens."""
    found = []
    clock = Clock(device)
    for shape in options.shapes.split(","):
        out, columns = map(int, shape.split("x"))
        for tokens in map(int, options.tokens.split(",")):
            with torch.inference_mode():
                among = _contestants(out, columns, tokens, options, device)
                for one in among:
                    one.replay = clock.graph(lambda one=one: [call() for call in one.calls])  # type: ignore[misc]
                for _ in range(options.rounds):
                    for one in among:
                        one.graphs.append(clock.seconds(one.replay) / len(one.calls))
                        together = clock.seconds(lambda one=one: [call() for call in one.calls])  # type: ignore[misc]
                        one.plain.append(together / len(one.calls))
            found += [_cells(shape, tokens, one, among) for one in among if not one.name.startswith("unpack")]
    return found


def _contestants(
    out: int, columns: int, tokens: int, options: argparse.Namespace, device: torch.device
) -> list[Contestant]:
    x = torch.randn(tokens, columns, device=device).bfloat16()
    stream = torch.ones(options.cycle_mib * 2**18, device=device)
    found = [Contestant("stream", [stream.sum], stream.nbytes)]

    def add(name: str, nbytes: int, make: Callable[[], Call], weight: Tensor | None) -> None:
        calls = [make() for _ in range(max(-(-options.cycle_mib * 2**20 // nbytes), 1))]
        if weight is not None:
            wanted = x.float() @ weight.float().T
            error = float((calls[0]().float() - wanted).norm() / wanted.norm())
            assert error < 0.01, f"{name} is wrong by {error:.1%}"
        found.append(Contestant(name, calls, nbytes))

    def dense() -> Call:
        copy = full.clone()
        return lambda: F.linear(x, copy)

    full = torch.randn(out, columns, device=device).bfloat16()
    add("cuBLAS bfloat16" if device.type == "cuda" else "dense bfloat16", full.nbytes, dense, full)
    for pattern in [*map(float, options.sparsities.split(",")), None]:
        there = _two_of_four(out, columns, device) if pattern is None else _random(out, columns, pattern, device)
        weight = torch.where(there, full, 0)
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
                warnings.simplefilter("ignore")  # that it is a prototype

                def semi(layer: Callable[[], PackedLinear] = layer) -> Call:
                    made = SemiStructuredLinear(layer())
                    return lambda: made(x)

                add("torch 2:4", full.nbytes * 9 // 16, semi, weight)
    return found


def _random(out: int, columns: int, sparsity: float, device: torch.device) -> Tensor:
    return torch.rand(out, columns, device=device) >= sparsity


def _two_of_four(out: int, columns: int, device: torch.device) -> Tensor:
    """Two of every four columns at random; what is left over is kept."""
    there = torch.ones(out, columns, dtype=torch.bool, device=device)
    fours = columns // 4
    order = torch.rand(out, fours, 4, device=device).argsort(-1)
    there[:, : 4 * fours] = (order < 2).view(out, 4 * fours)
    return there


def _cells(shape: str, tokens: int, one: Contestant, among: list[Contestant]) -> list[str]:
    by_name = {other.name: other for other in among}
    rate, stream = one.nbytes / one.seconds, among[0].nbytes / among[0].seconds
    unpacking = by_name.get(one.name.replace("packed", "unpack")) if one.name.startswith("packed") else None
    share = "" if unpacking is None else f"{unpacking.seconds / one.seconds:.0%}"
    times = "" if one is among[0] else f"{among[1].seconds / one.seconds:.2f}"
    cells = [shape, str(tokens), one.name, f"{1e3 * one.seconds:.4f}", f"{1e3 * statistics.median(one.plain):.4f}"]
    return [*cells, times, f"{one.nbytes / 1e6:.1f}", f"{rate / 1e9:.0f}", f"{rate / stream:.2f}", share]
