"""Time and compare column selections of structured pruning: one at a time, ten at a time, with exchanges, at random.

Each problem is a target (outputs, size) with a damped Gram. It is drawn at random (`--size`), or it is a layer of a
model with the inputs of the dense model (`--sites` and `--calibration`). Errors are relative: the objective divided by
that of removing everything. The last lines say how many flops a layer of another size takes, and how long at the
measured rate. Examples:

    python benchmarks/elimination.py --size 1536 --outputs 576
    python benchmarks/elimination.py --calibration c4.jsonl --sites model.layers.5.mlp.down_proj
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch

from alps.core.device import exact_float32
from alps.core.provenance import provenance
from alps.solvers.group_elimination import eliminate
from alps.solvers.group_problem import GroupProblem, Selection, objective, refit
from alps.solvers.group_swaps import improve_by_swaps
from layers import layer_problems, markdown, origin

Select = Callable[[GroupProblem, int], Selection]


def main() -> None:
    """Select columns of every problem by every method, and print one table a problem."""
    options = _options()
    with exact_float32():
        for name, problem in _problems(options):
            n = problem.groups
            keep = n - round(options.removed * n)
            print(f"{name}: {n - keep} of {n} columns removed, {len(problem.target)} outputs\n")
            print(f"{table(problem, keep)}\n")
            print(f"{extrapolation(problem, keep, 14336, 4096)}\n")
    facts = provenance()
    print(origin(options) if options.sites else f"{facts['machine']}, torch {facts['torch']}, commit {facts['commit']}")


def table(problem: GroupProblem, keep: int) -> str:
    """Format the relative error, the number of exchanges and the seconds of every selection, refit included."""
    energy = problem.target.double()
    total = float((problem.weigh_rows(energy @ problem.hessian) * energy).sum())
    rows = []
    for name, select in _SELECTIONS.items():
        start = time.perf_counter()
        selection = select(problem, keep)
        refit(problem, selection.kept)
        seconds = time.perf_counter() - start
        swaps = getattr(selection, "swaps", 0)
        rows.append([name, f"{objective(problem, selection.kept) / total:.6f}", str(swaps), f"{seconds:.2f}"])
    return markdown(["selection", "relative error", "exchanges", "seconds"], rows)


def extrapolation(problem: GroupProblem, keep: int, size: int, outputs: int) -> str:
    """Format the flops of a larger layer, the same share removed, and its seconds at the rate of this problem."""
    start = time.perf_counter()
    eliminate(problem, keep)
    seconds = time.perf_counter() - start
    share = 1 - keep / problem.groups
    here = _flops(problem.groups, len(problem.target), share)
    there = _flops(size, outputs, share)
    return (
        f"Elimination alone: {here / 1e9:.1f} Gflop at {here / seconds / 1e9:.1f} Gflop/s. "
        f"A layer of {size} columns and {outputs} outputs: "
        f"{there / 1e12:.1f} Tflop, {there / here * seconds:.0f} s at this rate."
    )


def _flops(n: int, m: int, share: float) -> float:
    """Count the inverse, W^T D W, and three products of rank one for each removal."""
    return n**3 + 2 * m * n**2 + 6 * share * n**3


def _random(problem: GroupProblem, keep: int) -> Selection:
    order = torch.randperm(problem.groups, generator=torch.Generator().manual_seed(0))
    return Selection(order[:keep].sort().values.to(problem.hessian.device), torch.nan)


def _exchanged(batch: int) -> Select:
    return lambda problem, keep: improve_by_swaps(problem, eliminate(problem, keep, batch=batch).kept)


_SELECTIONS: dict[str, Select] = {
    "at random": _random,
    "ten at a time": lambda problem, keep: eliminate(problem, keep, batch=10),
    "one at a time": eliminate,
    "ten at a time, exchanges": _exchanged(10),
    "one at a time, exchanges": _exchanged(1),
}


def drawn_problem(size: int, outputs: int, seed: int, device: str = "cpu") -> GroupProblem:
    """Draw inputs with common factors, uneven columns and uneven tokens; then damp their Gram."""
    draw = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, device=device)

    hessian = torch.zeros(size, size, dtype=torch.float64, device=device)
    factors = normal(size // 8, size) / (size // 8) ** 0.5
    scale = torch.exp(0.7 * normal(size))
    for _ in range(4):
        inputs = (normal(size, size // 8) @ factors + 0.7 * normal(size, size)) * scale * torch.exp(normal(size, 1))
        hessian += inputs.T @ inputs
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    return GroupProblem(hessian, normal(outputs, size), torch.exp(normal(outputs)))


def _problems(options: argparse.Namespace) -> Iterator[tuple[str, GroupProblem]]:
    if not options.sites:
        yield (
            "drawn",
            drawn_problem(options.size, options.outputs or options.size * 3 // 8, options.seed, options.device),
        )
        return
    for name, (weight, stats) in layer_problems(options, options.sites.split(",")).items():
        hessian = stats.gram().double()
        hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
        yield name, GroupProblem(hessian.to(options.device), weight.to(options.device))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1536, help="columns of the drawn problem")
    parser.add_argument(
        "--outputs", type=int, help="rows of the drawn problem; three eighths of its columns if left out"
    )
    parser.add_argument("--removed", type=float, default=0.25, help="fraction of the columns")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sites", help="layers of the model, separated by commas, in place of a drawn problem")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", default="python-docs")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
