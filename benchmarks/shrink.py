"""Perplexity of SmolLM2 with structure removed: selections of channels, of blocks, and the cuts that are recommended.

One JSON line a run, then a table. A run that is already in the results file is not done again, so that the script can
be stopped and started. Rows are written NAME or NAME:SETTING=VALUE,...; a name is one of `SELECTIONS`, and `dense`.

    python benchmarks/shrink.py --calibration c4.jsonl --text wikitext2:test.txt --text c4-validation.jsonl \
        --rows "dense;exact:mlp_width=1152;random:mlp_width=1152" --samples 64 --seqlen 512 --results shrink.jsonl
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.dense_reference import input_hooks
from alps.calibration.residual_statistics import ResidualSums, SplitSums
from alps.core.progress import NoProgress
from alps.data.loaded_model import load
from alps.evaluation.api import evaluate
from alps.models.blocks import Block, on_device
from alps.models.sites import Site
from alps.pruning import shrink_choice, shrink_job, shrink_pipeline
from alps.pruning.block_removal import REMOVAL_TOKENS
from alps.pruning.shrink_config import ShrinkConfig
from alps.pruning.shrink_layers import BlockStates, ChannelChoice, Cutter
from alps.reporting.records import ComparisonRecord
from alps.reporting.shrink_report import BlockRemoval, CutRecord
from alps.solvers.group_elimination import eliminate
from alps.solvers.group_problem import GroupProblem

Run = dict[str, Any]


class _Plain(Cutter):
    """Channels chosen by scores; the refit is that of alps."""

    def choose_channels(self, problem: GroupProblem, sums: ResidualSums, site: Site, keep: int) -> ChannelChoice:
        scores: Tensor = self.scores(problem, sums, site)
        return ChannelChoice(scores.argsort(descending=True, stable=True)[:keep].sort().values)

    def scores(self, problem: GroupProblem, sums: ResidualSums, site: Site) -> Tensor:
        """Return the importance of every channel."""
        raise NotImplementedError


class _Random(_Plain):
    def scores(self, problem: GroupProblem, sums: ResidualSums, site: Site) -> Tensor:  # noqa: ARG002
        return torch.rand(problem.groups, generator=torch.Generator().manual_seed(problem.groups))


class _Magnitude(_Plain):
    """Norm of the columns of the output projection, without inputs and without a refit."""

    def scores(self, problem: GroupProblem, sums: ResidualSums, site: Site) -> Tensor:  # noqa: ARG002
        norms: Tensor = site.read().double().norm(dim=0)
        return norms


class _Wanda(_Plain):
    """Sum over a column of |W| ||x||."""

    def scores(self, problem: GroupProblem, sums: ResidualSums, site: Site) -> Tensor:  # noqa: ARG002
        return site.read().double().abs().sum(dim=0) * sums.gram.diagonal().sqrt()


class _Flap(_Plain):
    """Variance of an input over the tokens times the squared norm of its column (arXiv 2312.11983)."""

    means: dict[str, Tensor] = {}  # noqa: RUF012

    def collect(self, block: Block, site: Site, states: BlockStates) -> SplitSums:
        total, tokens = torch.zeros(site.shape[1], dtype=torch.float64), 0

        def add(_: Site, x: Tensor) -> None:
            nonlocal tokens
            total.add_(x.flatten(0, -2).double().sum(dim=0))
            tokens += x.flatten(0, -2).shape[0]

        with torch.no_grad(), input_hooks([site], add):
            for batch in range(len(states.inputs.hidden)):
                states.inputs.run(block.index, block.module, batch, self.device)
        self.means[site.name] = total / tokens
        return super().collect(block, site, states)

    def scores(self, problem: GroupProblem, sums: ResidualSums, site: Site) -> Tensor:  # noqa: ARG002
        mean = self.means[site.name]
        variance = sums.gram.diagonal() / sums.tokens - mean.square()
        return variance * site.read().double().square().sum(dim=0)


class _Oscar(Cutter):
    """Ten channels at a time by prices that are not updated in between, and no swaps (arXiv 2403.12983)."""

    def choose_channels(
        self,
        problem: GroupProblem,
        sums: ResidualSums,  # noqa: ARG002
        site: Site,  # noqa: ARG002
        keep: int,
    ) -> ChannelChoice:
        return ChannelChoice(eliminate(problem, keep, batch=10).kept)


@dataclass(frozen=True)
class Selection:
    """Choice of channels and blocks, and treatment of those that stay.

    Attributes:
        cutter: class that chooses.
        weighted: weigh tokens by their size, as alps does, or equally.
        refit: fit the weights that stay.
        share: fixed share of the dense target; None for that of held-back tokens.
        blocks: how blocks are chosen: `kl`, `last` or `influence`.
    """

    cutter: type[Cutter] = Cutter
    weighted: bool = True
    refit: bool = True
    share: float | None = None
    blocks: str = "kl"


SELECTIONS = {
    "exact": Selection(),
    "random": Selection(_Random),
    "magnitude": Selection(_Magnitude, refit=False),
    "wanda": Selection(_Wanda, weighted=False, refit=False),
    "wanda+refit": Selection(_Wanda, weighted=False),
    "flap+refit": Selection(_Flap, weighted=False),
    "ten-at-a-time": Selection(_Oscar, weighted=False, share=0.0),
    "equal-tokens": Selection(weighted=False),
    "own-target": Selection(share=0.0),
    "last-blocks": Selection(blocks="last"),
    "influence": Selection(blocks="influence"),
}


def main() -> None:
    """Do what is missing, then print the table of everything in the results file."""
    options = _options()
    path = Path(options.results)
    for seed in map(int, options.seeds.split(",")):
        for row in options.rows.split(";"):
            key = {"row": row, "seed": seed, "samples": options.samples, "seqlen": options.seqlen}
            if not any(key.items() <= run.items() for run in _read(path)):
                run = {**key, **measure(options, row, seed)}
                with path.open("a") as file:
                    file.write(json.dumps(run) + "\n")
    print(table(_read(path)))


def measure(options: argparse.Namespace, row: str, seed: int) -> Run:
    """Shrink (unless dense) and evaluate one model."""
    name, _, settings = row.partition(":")
    run: Run = {"model": options.model}
    with tempfile.TemporaryDirectory() as folder:
        source: str | Path = options.model
        if name != "dense":
            source = Path(options.keep or folder) / row.replace(":", "-").replace(",", "-")
            shutil.rmtree(source, ignore_errors=True)
            run |= shrink(options, SELECTIONS[name], settings, seed, source)
        found = evaluate(
            load(str(source)), options.text, seqlen=options.eval_seqlen, windows=options.windows, reference=None
        )
    assert not any(isinstance(record, ComparisonRecord) for record in found)
    run["perplexity"] = {record.text: record.perplexity for record in found}
    run["tokens"] = {record.text: record.predicted_tokens for record in found}
    return run


def shrink(options: argparse.Namespace, selection: Selection, settings: str, seed: int, out: Path) -> Run:
    """Shrink the model by a selection, and return what the report says."""
    values: dict[str, Any] = dict(pair.split("=") for pair in settings.split(",") if pair)
    typed = {key: json.loads(value) if value[0] in "0123456789[" else value for key, value in values.items()}
    config = ShrinkConfig(
        model=options.model,
        calibration=options.calibration,
        samples=options.samples,
        seqlen=options.seqlen,
        seed=seed,
        **typed,
    )
    start = time.perf_counter()
    with _patched(selection):
        report = shrink_job.shrink_checkpoint(config, out, NoProgress())
    return {
        "parameters": report.after.parameters,
        "removed": report.share_removed,
        "removals": [removal.model_dump() for removal in report.removals],
        "error": report.blocks[-1].error,
        "seconds": time.perf_counter() - start,
        "versions": report.versions,
    }


def _patched(selection: Selection) -> Any:
    """Return a context in which `alps shrink` selects and fits as a baseline does."""
    cutter, weighted, refits, share = selection.cutter, selection.weighted, selection.refit, selection.share
    update, build, write = ResidualSums.update, cutter.build_problem, cutter.write

    def flat(self: ResidualSums, inputs: Tensor, missing: Tensor, weights: Tensor) -> None:
        update(self, inputs, missing, weights if weighted else torch.ones_like(weights))

    class Patched(cutter):  # type: ignore[valid-type,misc]
        def build_problem(self, site: Site, sums: SplitSums, group: int) -> tuple[GroupProblem, float]:
            problem, found = build(self, site, sums, group)
            if share is None and refits:
                return problem, found
            assert share in (None, 0.0)
            return replace(problem, target=site.read().double()), 0.0

        def write(self, site: Site, problem: GroupProblem, groups: Tensor, sums: ResidualSums) -> CutRecord:
            if refits:
                return write(self, site, problem, groups, sums)
            removed = problem.columns(problem.others(groups))
            site.read()[:, removed] = 0.0
            return CutRecord(
                layer=site.name,
                unit="channel",
                kept=groups.tolist(),
                total=problem.groups,
                error=0.0,
                share=0.0,
                tokens=sums.tokens,
            )

    stack = _Patches()
    stack.add(patch.object(ResidualSums, "update", flat))
    stack.add(patch.object(shrink_pipeline, "Cutter", Patched))
    if selection.blocks != "kl":
        stack.add(patch.object(shrink_choice, "choose_removals", _REMOVALS[selection.blocks]))
    return stack


@dataclass
class _Patches:
    """Several patches as one context."""

    patches: list[Any] = field(default_factory=list)

    def add(self, one: Any) -> None:
        self.patches.append(one)

    def __enter__(self) -> None:
        for one in self.patches:
            one.start()

    def __exit__(self, *_: object) -> None:
        for one in self.patches:
            one.stop()


def _last(_model: Any, blocks: list[Block], _windows: Tensor, count: int, **_: Any) -> list[BlockRemoval]:
    last = len(blocks) - 1
    return [BlockRemoval(block=last - 1 - number, kl=None) for number in range(count)]


def _influence(model: Any, blocks: list[Block], windows: Tensor, count: int, **options: Any) -> list[BlockRemoval]:
    """Remove the blocks whose outputs are most like their inputs (ShortGPT, arXiv 2403.03853)."""
    windows = windows[: max(REMOVAL_TOKENS // windows.shape[1], 1)]
    states = capture_block_inputs(model, blocks, windows, len(windows))
    influence = {}
    for block in blocks:
        before = states.hidden[0].float()
        with on_device(block, options["device"]):
            states.advance(block.index, block.module, options["device"])
        influence[block.index] = 1 - float(torch.cosine_similarity(before, states.hidden[0].float(), dim=-1).mean())
    lowest = sorted(influence, key=lambda index: influence[index])[:count]
    return [BlockRemoval(block=index, kl=None) for index in lowest]


_REMOVALS: dict[str, Any] = {"last": _last, "influence": _influence}


def table(runs: list[Run]) -> str:
    """Return the runs as a Markdown table: means over the seeds, with the range where there are several."""
    texts = list(dict.fromkeys(text for run in runs for text in run["perplexity"]))
    lines = [f"| row | tokens | seeds | removed | {' | '.join(texts)} | s |", "|---|---:|---:|---:|" + "---:|" * 3]
    keys = list(dict.fromkeys((run["row"], run["samples"] * run["seqlen"]) for run in runs))
    for row, tokens in keys:
        same = [run for run in runs if (run["row"], run["samples"] * run["seqlen"]) == (row, tokens)]
        cells = []
        for text in texts:
            values = [run["perplexity"][text] for run in same]
            spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        removed = 100 * same[0].get("removed", 0.0)
        seconds = statistics.mean(run.get("seconds", 0.0) for run in same)
        lines.append(f"| {row} | {tokens} | {len(same)} | {removed:.1f} % | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def _read(path: Path) -> list[Run]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--rows", required=True, help="rows, with semicolons between them")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--eval-seqlen", type=int, default=1024)
    parser.add_argument("--keep", help="folder for the shrunk models")
    parser.add_argument("--results", required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
