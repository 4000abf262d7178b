"""Compare packed layers with dense ones and with sparse libraries on a CPU, for inference.py.

Every candidate has copies of its matrix that together are larger than the caches, and calls them in turn as a model
does.
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
from alps.core.errors import check_choice
from alps.core.text_format import dtype_name
from alps.inference import packed_linear as linear
from alps.inference.build_kernel import FOLDER, LIBRARY_NAME
from alps.inference.cpu_backend import Kernel
from alps.inference.packed_linear import PackedLinear

HEAD = ["shape", "tokens", "threads", "", "ms", "times best dense", "MB", "GB/s", "of stream"]


@dataclass
class Candidate:
    """One way to multiply, with several copies of its matrix.

    Attributes:
        name: label in the table.
        calls: one call for every copy of the matrix.
        nbytes: bytes of one copy.
        seconds: seconds of every call.
        turn: number of calls.
    """

    name: str
    calls: list[Callable[[], object]]
    nbytes: int
    seconds: list[float] = field(default_factory=list)
    turn: int = 0

    def run(self, count: int) -> None:
        """Time the next calls."""
        for _ in range(count):
            call = self.calls[self.turn % len(self.calls)]
            self.turn += 1
            start = time.perf_counter()
            call()
            self.seconds.append(time.perf_counter() - start)

    @property
    def median(self) -> float:
        """The median seconds of a call."""
        return statistics.median(self.seconds)


def use_path(path: str) -> Kernel:
    """Let packed layers use an instruction set from now on."""
    file = FOLDER / LIBRARY_NAME
    check_choice("Instruction set", path, Kernel(file).paths)
    kernel = Kernel(file, path)
    vars(linear)["find_kernel"] = lambda: kernel
    return kernel


def sparse(rows: int, columns: int, sparsity: float) -> Tensor:
    """Return a Gaussian matrix in bfloat16 with zeros at random positions."""
    is_kept = torch.rand(rows, columns) >= sparsity
    return torch.where(is_kept, torch.randn(rows, columns), 0).bfloat16()


def candidates(rows: int, columns: int, tokens: int, options: argparse.Namespace) -> list[Candidate]:
    """Return all candidates for a matrix of that shape, each with more bytes of copies than the caches hold."""
    result: list[Candidate] = []

    def add(name: str, nbytes: int, make: Callable[[], Callable[[], object]]) -> None:
        copies = max(-(-options.cycle_mib * 2**20 // nbytes), 1)
        result.append(Candidate(name, [make() for _ in range(copies)], nbytes))

    x = torch.randn(tokens, columns)
    stream = torch.ones(options.cycle_mib * 2**18)
    result.append(Candidate("stream", [lambda: stream.sum()], stream.nbytes))
    for dtype in (torch.bfloat16, torch.float32):
        weight, own = torch.randn(rows, columns).to(dtype), x.to(dtype)

        def dense(weight: Tensor = weight, own: Tensor = own) -> Callable[[], object]:
            copy = weight.clone()
            return lambda: F.linear(own, copy)

        add(f"dense {dtype_name(dtype)}", weight.nbytes, dense)
    for sparsity in map(float, options.sparsities.split(",")):
        weight = sparse(rows, columns, sparsity)
        packed = pack(weight)

        def layer(packed: Any = packed) -> Callable[[], object]:
            module, own = PackedLinear(packed), x.bfloat16()
            for name, buffer in list(module.named_buffers()):
                setattr(module, name, buffer.clone())
            module.check()  # binds the kernel to the tensors before the first call
            return lambda: module(own)

        add(f"packed bfloat16 {sparsity:.0%}", packed.nbytes, layer)
        if options.csr:
            _csr(weight.float(), x, sparsity, add)
    return result


def _csr(weight: Tensor, x: Tensor, sparsity: float, add: Callable[..., None]) -> None:
    """Add CSR products of torch, and of scipy if it is installed (always on one thread), in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that CSR support is in beta
        rows = weight.to_sparse_csr()
    parts = (rows.crow_indices().int(), rows.col_indices().int(), rows.values())
    across = x.T.contiguous()

    def by_torch() -> Callable[[], object]:
        crow, column, values = (part.clone() for part in parts)
        own = torch.sparse_csr_tensor(crow, column, values, weight.shape, check_invariants=True)
        return lambda: own @ across

    add(f"torch CSR float32 {sparsity:.0%}", sum(part.nbytes for part in parts), by_torch)
    try:
        from scipy.sparse import csr_matrix
    except ImportError:
        return

    def by_scipy() -> Callable[[], object]:
        crow, column, values = (part.clone().numpy() for part in parts)
        own, right = csr_matrix((values, column, crow), shape=tuple(weight.shape)), across.numpy()
        return lambda: own @ right

    add(f"scipy CSR float32 {sparsity:.0%}", sum(part.nbytes for part in parts), by_scipy)


def rows(options: argparse.Namespace) -> list[list[str]]:
    """Return a row for every candidate, at every shape, number of tokens and number of threads."""
    result = []
    for shape in options.shapes.split(","):
        out, columns = map(int, shape.split("x"))
        for tokens in map(int, options.tokens.split(",")):
            peers = candidates(out, columns, tokens, options)
            for threads in map(int, options.threads.split(",")):
                torch.set_num_threads(threads)
                with torch.inference_mode():
                    for candidate in peers:
                        candidate.run(1)
                        candidate.seconds.clear()
                    for _ in range(options.rounds):
                        for candidate in peers:
                            candidate.run(1 if candidate.name == "stream" else options.calls)
                result += [_cells(shape, tokens, threads, candidate, peers) for candidate in peers]
    return result


def _cells(shape: str, tokens: int, threads: int, candidate: Candidate, peers: list[Candidate]) -> list[str]:
    best = min(other.median for other in peers if other.name.startswith("dense"))
    rate, stream = candidate.nbytes / candidate.median, peers[0].nbytes / peers[0].median
    numbers = (
        ["", ""] if candidate.name == "stream" else [f"{1e3 * candidate.median:.3f}", f"{best / candidate.median:.2f}"]
    )
    cells = [shape, str(tokens), str(threads), candidate.name, *numbers]
    return [*cells, f"{candidate.nbytes / 1e6:.1f}", f"{rate / 1e9:.1f}", f"{rate / stream:.2f}"]
