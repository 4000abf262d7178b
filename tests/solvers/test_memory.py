"""What a solve holds at its peak: tensors counted as they come and go, in matrices of the site and of its Hessian."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alps.core.statistics import InputStats
from alps.solvers import Alps, hessian
from alps.solvers import topk as selection
from alps.solvers.admm import AdmmSettings
from alps.solvers.patterns import Pattern, SemiStructured, Unstructured
from helpers.problems import correlated_inputs, normal

Precision = Literal["float32", "bfloat16"]


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that operations returned and that are still alive; not what an operation holds inside.

    Attributes:
        now: alive at the moment.
        peak: the most that were.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: set[int] = set()
        for tensor in held:
            self._hold(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(answer):
            if isinstance(leaf, Tensor):
                self._hold(leaf)
        return answer

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def test_the_count_is_of_what_is_alive() -> None:
    with LiveBytes() as live:
        a = torch.empty(1000)
        b = a.view(10, 100)
        del a  # the view keeps it
        c = b + 1
        c.mul_(2)
        del b, c
        assert live.now == 0
        d = torch.ones(500)
    assert live.peak == 8000 and live.now == 2000
    del d
    assert live.now == 0


def peak_of(
    out_size: int,
    in_size: int,
    precision: Precision,
    pattern: Pattern,
    monkeypatch: pytest.MonkeyPatch,
    traced: bool = False,
) -> tuple[int, int]:
    """Most bytes alive in a `prepare` and a `solve`, and those of the weight and the statistics among them.

    What does not grow with a site is shrunk as the site is: the cache of inverses (256 MB) and the pieces of a
    selection (1 MB).
    """
    monkeypatch.setattr(hessian, "_CACHE_BYTES", 0)
    monkeypatch.setattr(selection, "_CPU_CHUNK", 2**12)
    weight, stats = normal(1, out_size, in_size), InputStats.of(correlated_inputs(2, 2 * in_size, in_size))
    assert stats.upper is not None
    # Every penalty takes an inverse anew, and every step has the same peak: a few of both are enough.
    method = Alps(precision=precision, trace_errors=traced, admm=AdmmSettings(max_iterations=24))
    with LiveBytes([weight, stats.upper, stats.total, stats.square]) as live:
        inputs = live.now
        solution = method.solve(weight, method.prepare(stats), pattern)
    assert solution.info.refit_steps > 0
    return live.peak, inputs


def limit(out_size: int, in_size: int) -> int:
    """Seven float32 matrices of the site, and three of its Hessian."""
    return 4 * (7 * out_size * in_size + 3 * in_size**2)


@pytest.mark.parametrize("pattern", [Unstructured(0.7), SemiStructured(2, 4)], ids=str)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("out_size", "in_size"), [(96, 1024), (160, 560), (300, 700), (448, 448), (1024, 256)])
def test_a_solve_stays_within_its_matrices(
    out_size: int, in_size: int, precision: Precision, pattern: Pattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    peak, inputs = peak_of(out_size, in_size, precision, pattern, monkeypatch)
    assert peak - inputs <= limit(out_size, in_size)
    # With the weight and the Gram, which the caller holds, it is that as well, to two per cent, unless the Hessian is
    # ten times as large as the site: an inverse has half a matrix of workspace.
    if in_size < 4 * out_size:
        assert peak <= 1.02 * limit(out_size, in_size)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("out_size", "in_size"), [(160, 560), (448, 448), (1024, 256)])
def test_noting_errors_stays_within_them_too(
    out_size: int, in_size: int, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    peak, inputs = peak_of(out_size, in_size, precision, Unstructured(0.7), monkeypatch, traced=True)
    assert peak - inputs <= limit(out_size, in_size)
