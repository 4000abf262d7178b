"""Tables of large models on H100s: seconds by phase, bytes over links, memory of a GPU, and what would change them."""

from __future__ import annotations

from dataclasses import fields, replace

from alps.core.statistics import InputSums, Needs
from cost_model import Changes, Model, Run
from layers import markdown
from machines import Card
from simulator import assignment, simulate

# config.json of meta-llama/Meta-Llama-3-8B, Meta-Llama-3-70B and Llama-3.1-405B.
MODELS = {
    "LLaMA-3-8B": Model(4096, 14336, 32, 8, 32, 128256),
    "LLaMA-3-70B": Model(8192, 28672, 64, 8, 80, 128256),
    "LLaMA-3.1-405B": Model(16384, 53248, 128, 8, 126, 128256),
}
PHASES = (
    "start",
    "fetch",
    "forward",
    "gram",
    "prepare",
    "inverses",
    "solve",
    "measure_error",
    "communication",
    "journal",
)
# Each with those before it.
VARIANTS = {
    "as it is": Changes(),
    "errors by rows, files aside": Changes(aside=True),
}


def assumptions() -> str:
    """The constants of the card, in one line."""
    figures = ", ".join(f"{f.name} {f.default:.3g}" for f in fields(Card) if f.name != "run")
    return f"Assumed of every GPU: {figures}."


def plan_table(run: Run, sizes: list[int]) -> str:
    """Minutes and seconds by phase, averaged over the processes, which wait for each other in `waiting`."""
    heads = ["GPUs", "min", "efficiency", *(f"{phase} s" for phase in PHASES), "waiting s", "TB sent", "split"]
    rows, first = [], 0.0
    for size in (size for size in sizes if size <= run.windows):
        one = replace(run, size=size)
        cells, wall = _cells(one)
        first = first or wall * size
        rows.append([str(size), f"{wall / 60:.1f}", f"{first / (size * wall):.2f}", *cells, _split(one)])
    return markdown(heads, rows)


def variants_table(run: Run) -> str:
    """Row of the plan for one number of processes, as the program is and as it could be."""
    heads = ["", "min", *(f"{phase} s" for phase in PHASES), "waiting s", "TB sent"]
    rows = []
    for name, changes in VARIANTS.items():
        cells, wall = _cells(replace(run, changes=changes))
        rows.append([name, f"{wall / 60:.1f}", *cells])
    return markdown(heads, rows)


def _cells(run: Run) -> tuple[list[str], float]:
    clocks = simulate(run, Card(run))
    waited = {phase: sum(seconds) / run.size for phase, seconds in clocks.waited.items()}
    spent = {phase: sum(seconds) / run.size - waited.get(phase, 0.0) for phase, seconds in clocks.spent.items()}
    cells = [f"{spent.get(phase, 0.0):.1f}" for phase in PHASES]
    return [*cells, f"{sum(waited.values()):.1f}", f"{sum(clocks.nbytes.values()) / 1e12:.2f}"], max(clocks.now)


def _split(run: Run) -> str:
    names = ("q/k/v", "o", "gate/up", "down")
    return " ".join(name for name, owner in zip(names, assignment(run), strict=True) if owner is None) or "none"


def memory(run: Run) -> dict[str, float]:
    """Bytes on the GPU of the process that holds most, by what holds them; together they are the peak.

    A solve holds at most seven matrices of its rows and three of its Hessian beside its inputs (a test of the solver);
    of a split site every process has the dense and the pruned weight whole, besides.
    """
    model, solver = run.model, 0.0
    for sites, owner in zip(run.model.inputs, assignment(run), strict=True):
        m, n = max(sites)[0], sites[0][1]
        rows, whole = (m, 1) if owner is not None else (-(-m // run.size), 2)
        solver = max(solver, 4.0 * (7 * rows * n + whole * m * n + 3 * n * n))
    return {
        "block": float(model.weights * run.itemsize),
        "activations": float(run.share(0) * run.seqlen * model.hidden * run.itemsize),
        "statistics": float(sum(InputSums.nbytes(sites[0][1], Needs.GRAM) for sites in model.inputs)),
        "solver": solver,
    }


def memory_table(run: Run, sizes: list[int]) -> str:
    """GiB of the fullest GPU by what holds them, and whether it has so many."""
    rows = []
    for size in (size for size in sizes if size <= run.windows):
        found = memory(replace(run, size=size))
        whole = sum(found.values())
        cells = [f"{nbytes / 2**30:.1f}" for nbytes in found.values()]
        rows.append([str(size), *cells, f"{whole / 2**30:.1f}", "yes" if whole < Card.capacity else "no"])
    return markdown(["GPUs", "block GiB", "activations", "statistics", "solver", "all", "fits"], rows)
