"""The layers' table on a CPU: packed ones, dense ones and libraries' sparse rows, in turns; see inference.py.

All multiply with matrices that together are larger than the caches, one after the other, as a model does.
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
class Contestant:
    """Something that multiplies, on one matrix after the other.

    Attributes:
        calls: one for every copy of its matrix.
        nbytes: of one copy.
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
        """Seconds of a call."""
        return statistics.median(self.seconds)


def use_path(path: str) -> Kernel:
    """Let packed layers multiply by that instruction set from here on."""
    file = FOLDER / LIBRARY_NAME
    check_choice("Instruction set", path, Kernel(file).paths)
    kernel = Kernel(file, path)
    vars(linear)["find_kernel"] = lambda: kernel
    return kernel


def sparse(rows: int, columns: int, sparsity: float) -> Tensor:
    """Gaussian, bfloat16, with zeros at random places."""
    there = torch.rand(rows, columns) >= sparsity
    return torch.where(there, torch.randn(rows, columns), 0).bfloat16()


def contestants(rows: int, columns: int, tokens: int, options: argparse.Namespace) -> list[Contestant]:
    """All that multiply with a matrix of that shape, each with copies of more bytes than the caches hold."""
    found: list[Contestant] = []

    def add(name: str, nbytes: int, make: Callable[[], Callable[[], object]]) -> None:
        copies = max(-(-options.cycle_mib * 2**20 // nbytes), 1)
        found.append(Contestant(name, [make() for _ in range(copies)], nbytes))

    x = torch.randn(tokens, columns)
    stream = torch.ones(options.cycle_mib * 2**18)
    found.append(Contestant("stream", [lambda: stream.sum()], stream.nbytes))
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
            module.check()  # bound to its tensors before the first call
            return lambda: module(own)

        add(f"packed bfloat16 {sparsity:.0%}", packed.nbytes, layer)
        if options.csr:
            _csr(weight.float(), x, sparsity, add)
    return found


def _csr(weight: Tensor, x: Tensor, sparsity: float, add: Callable[..., None]) -> None:
    """Torch's sparse rows, and scipy's where it is installed (on one thread, whatever torch has); both in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the support is in beta
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
    """A row for every contestant, at every shape, number of tokens and of threads."""
    found = []
    for shape in options.shapes.split(","):
        out, columns = map(int, shape.split("x"))
        for tokens in map(int, options.tokens.split(",")):
            among = contestants(out, columns, tokens, options)
            for threads in map(int, options.threads.split(",")):
                torch.set_num_threads(threads)
                with torch.inference_mode():
                    for one in among:
                        one.run(1)
                        one.seconds.clear()
                    for _ in range(options.rounds):
                        for one in among:
                            one.run(1 if one.name == "stream" else options.calls)
                found += [_cells(shape, tokens, threads, one, among) for one in among]
    return found


def _cells(shape: str, tokens: int, threads: int, one: Contestant, among: list[Contestant]) -> list[str]:
    best = min(other.median for other in among if other.name.startswith("dense"))
    rate, stream = one.nbytes / one.median, among[0].nbytes / among[0].median
    numbers = ["", ""] if one.name == "stream" else [f"{1e3 * one.median:.3f}", f"{best / one.median:.2f}"]
    cells = [shape, str(tokens), str(threads), one.name, *numbers]
    return [*cells, f"{one.nbytes / 1e6:.1f}", f"{rate / 1e9:.1f}", f"{rate / stream:.2f}"]
