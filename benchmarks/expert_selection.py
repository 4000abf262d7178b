"""Compare selections of experts on a mixture made of a dense LLaMA: divergence from the mixture with all experts.

No trained mixture fits here, so that one is made by `split_mixture.py`. Example:

    python benchmarks/expert_selection.py --calibration c4.jsonl --text wikitext2:validation.txt --keep 6
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MixtralForCausalLM

from alps.calibration.activation_store import ActivationStore
from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.expert_records import MixtureTokens, expert_problem, record_tokens
from alps.calibration.expert_refit import refit_experts
from alps.calibration.expert_width import narrow_experts
from alps.calibration.masked_router import Mixture, find_mixture, masked_routing
from alps.core.distributed import SINGLE_PROCESS
from alps.core.kl_divergence import kl_divergence
from alps.data.loaded_model import load
from alps.data.text_sources import load_text
from alps.models.blocks import Block, find_blocks
from alps.pruning.expert_choice import ExpertChooser
from alps.pruning.shrink_experts import recorded_outputs
from alps.solvers.expert_selection import ExpertProblem, joint_selection, keep_highest, msan_scores, reap_scores
from layers import calibration_options, markdown, origin
from split_mixture import split

_CPU = torch.device("cpu")
Select = Callable[[ExpertProblem, int], list[int]]


def _random(problem: ExpertProblem, count: int) -> list[int]:
    # The problem's outputs are the seed, so that the draw of a block does not depend on the order of calls.
    seed = int(problem.outputs.float().abs().sum()) % 2**31
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(len(problem.experts), generator=generator)[:count].tolist())


SELECTIONS: dict[str, Select] = {
    "random": _random,
    "MSAN": lambda problem, count: keep_highest(msan_scores(problem), count),
    "REAP": lambda problem, count: keep_highest(reap_scores(problem), count),
    "joint": joint_selection,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    calibration_options(parser, samples=16)
    parser.add_argument("--text", action="append", default=[], help="text of a figure; the first windows are used")
    parser.add_argument("--windows", type=int, default=8, help="windows of each text, and of held-out calibration text")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--keep", type=int, default=6)
    parser.add_argument("--sharpness", type=float, default=0.5)
    parser.add_argument("--refit", default="random,REAP,joint,narrow", help="selections to refit")
    parser.add_argument("--share", type=float, default=0.5, help="share of the mixture with all experts in a refit")
    parser.add_argument("--mixture", type=Path, help="directory to keep the mixture in, or to take it from")
    options = parser.parse_args()
    start = time.perf_counter()
    loaded = load(options.model, "float32")
    drawn = loaded.calibration(
        load_text(options.calibration, "calibration"), options.samples + options.windows, options.seqlen, options.seed
    ).ids
    calibration, held_out = drawn[: options.samples], drawn[options.samples :]
    texts = {"held-out calibration": held_out}
    texts |= {text: loaded.evaluation(text, options.seqlen, options.windows).ids for text in options.text}
    model = _mixture_model(options, loaded.model, calibration)
    print(f"{time.perf_counter() - start:.0f} s for the mixture", flush=True)
    figures = Figures(model, texts)
    rows = [figures.row("dense model", loaded.model), figures.row("mixture", model)]
    mixtures, sets = select_all(model, calibration, options.keep)
    print(f"{time.perf_counter() - start:.0f} s with the selections", flush=True)
    for name, kept in sets.items():
        with routing_among(mixtures, kept):
            rows.append(figures.row(name, model))
    for name in filter(None, options.refit.split(",")):
        shrunk = copy.deepcopy(model)
        if name == "narrow":
            width = model.config.intermediate_size * options.keep // options.experts
            narrow_and_refit(shrunk, calibration, width, options.share)
            rows.append(figures.row(f"all, {width} channels wide, refitted", shrunk))
            continue
        with routing_among(*select_and_refit(shrunk, calibration, options.keep, SELECTIONS[name], options.share)):
            rows.append(figures.row(f"{name}, in order, refitted", shrunk))
    blocks = find_blocks(model)
    chooser = ExpertChooser(model=model, blocks=blocks, device=_CPU, activations=ActivationStore())
    candidates = {name: dict(enumerate(sets[name])) for name in ("joint", "REAP", "MSAN")}
    choice = SINGLE_PROCESS.run_on_main(lambda: chooser.compare(candidates, held_out), lambda: None)
    heads = [
        f"{options.keep} of {options.experts} experts",
        *(f"KL, perplexity on {Path(text).name}" for text in texts),
    ]
    print(markdown(heads, rows))
    measured = ", ".join(f"{n} {q.kl:.3f} nats and {q.repetition:.0%} repeated" for n, q in choice.measured.items())
    print(f"Chosen: {choice.name} ({measured}; all experts {choice.dense_repetition:.0%}).")
    print(f"{origin(options)}, {time.perf_counter() - start:.0f} s")


class Figures:
    """Divergence from a mixture, and perplexity, on some texts; the mixture's logits are kept."""

    def __init__(self, model: Any, texts: dict[str, Tensor]) -> None:
        self._texts = texts
        self._expected = {name: [_logits(model, ids) for ids in torch.split(texts[name], 4)] for name in texts}

    def row(self, name: str, model: Any) -> list[str]:
        """Return a name and a cell for every text; the row is printed, too."""
        cells = [name]
        for name, ids in self._texts.items():
            divergence = loss = 0.0
            for part, expected in zip(torch.split(ids, 4), self._expected[name], strict=True):
                logits = _logits(model, part)
                divergence += float(kl_divergence(logits.flatten(0, 1), expected.flatten(0, 1), ids.numel()))
                loss += (
                    float(
                        torch.nn.functional.cross_entropy(
                            logits[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
                        )
                    )
                    / ids[:, 1:].numel()
                )
            cells.append(f"{divergence:.4f}, {torch.tensor(loss).exp():.2f}")
        print(*cells, sep="; ", flush=True)
        return cells


def select_all(model: Any, windows: Tensor, count: int) -> tuple[list[Mixture], dict[str, list[list[int]]]]:
    """Return the mixtures, and the sets of every selection, from the inputs behind blocks with all experts."""
    sets: dict[str, list[list[int]]] = {name: [] for name in SELECTIONS}

    def visit(_mixture: Mixture, _tokens: MixtureTokens, problem: ExpertProblem) -> Sequence[int]:
        for name, select in SELECTIONS.items():
            sets[name].append(select(problem, count))
        return problem.experts

    return _walk(model, windows, visit)[0], sets


def select_and_refit(
    model: Any, windows: Tensor, count: int, select: Select, share: float
) -> tuple[list[Mixture], list[Sequence[int]]]:
    """Select and refit behind blocks that are smaller already; the weights of the model are changed."""

    def visit(mixture: Mixture, tokens: MixtureTokens, problem: ExpertProblem) -> Sequence[int]:
        kept = select(problem, count)
        refit_experts(mixture, tokens, kept)
        return kept

    return _walk(model, windows, visit, share)


def narrow_and_refit(model: Any, windows: Tensor, width: int, share: float) -> None:
    """Narrow all experts of a Mixtral to the same width, and refit them behind narrower blocks."""

    def visit(mixture: Mixture, tokens: MixtureTokens, problem: ExpertProblem) -> Sequence[int]:
        narrow = narrow_experts(mixture, tokens, problem.experts, width)
        with torch.no_grad():
            for expert, channels in enumerate(narrow.channels):
                removed = torch.ones(mixture.sites[-1].shape[1], dtype=torch.bool)
                removed[channels] = False
                mixture.experts.get_parameter("gate_up_proj")[expert, removed.repeat(2)] = 0
        refit_experts(mixture, tokens, problem.experts)
        return problem.experts

    _walk(model, windows, visit, share)


def _walk(
    model: Any,
    windows: Tensor,
    visit: Callable[[Mixture, MixtureTokens, ExpertProblem], Sequence[int]],
    share: float = 0.0,
) -> tuple[list[Mixture], list[Sequence[int]]]:
    """Visit the mixture of every block, behind blocks with the experts that were kept."""
    blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, windows, max(4096 // windows.shape[1], 1))
    dense, mixtures, sets = inputs.copy(), list[Mixture](), list[Sequence[int]]()
    for block in blocks:
        mixture = _mixture_of(block)
        with recorded_outputs(mixture.module, dense.activations) as outputs:
            dense.advance(block.index, block.module, _CPU)
        tokens = record_tokens(
            mixture, block, inputs, device=_CPU, tokens=inputs.tokens, dense_outputs=outputs, share=share
        )
        kept = visit(mixture, tokens, expert_problem(mixture, tokens))
        with masked_routing(mixture, kept):
            inputs.advance(block.index, block.module, _CPU)
        mixtures.append(mixture)
        sets.append(kept)
    return mixtures, sets


@contextmanager
def routing_among(mixtures: Sequence[Mixture], sets: Sequence[Sequence[int]]) -> Iterator[None]:
    """Context in which every mixture routes tokens to its kept experts only."""
    with ExitStack() as stack:
        for mixture, kept in zip(mixtures, sets, strict=True):
            stack.enter_context(masked_routing(mixture, kept))
        yield


def _mixture_model(options: argparse.Namespace, model: Any, windows: Tensor) -> Any:
    if options.mixture and options.mixture.exists():
        return MixtralForCausalLM.from_pretrained(options.mixture, experts_implementation="eager").eval()
    made = split(
        model,
        windows,
        experts=options.experts,
        top_k=options.top_k,
        sharpness=options.sharpness,
        seed=options.seed,
    )
    if options.mixture:
        made.save_pretrained(options.mixture)
    return made


def _mixture_of(block: Block) -> Mixture:
    mixture = find_mixture(block)
    assert mixture is not None
    return mixture


def _logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return logits


if __name__ == "__main__":
    main()
