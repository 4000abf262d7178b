"""Records of a mixture of experts on calibration tokens: inputs, outputs to reproduce, and outputs of every expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from alps.calibration.block_inputs import BlockInputs
from alps.calibration.masked_router import Mixture, expert_output, route
from alps.core.distributed import SINGLE_PROCESS, ProcessGroup
from alps.core.errors import UnsupportedModel
from alps.core.seeds import derive_seed
from alps.models.blocks import Block
from alps.solvers.expert_selection import ExpertProblem, replayed_output

# Tokens and bytes of recorded expert outputs. Selection compares sets on the same tokens, so that a few thousand do.
SELECTION_TOKENS, SELECTION_BYTES = 4096, 2**32
# Tokens that pass a mixture at once.
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class MixtureTokens:
    """Inputs of a mixture, and the outputs that it has to reproduce.

    Attributes:
        hidden: inputs (tokens, features) of the mixture behind the smaller blocks, in the model's dtype.
        target: outputs of the dense mixture, shared experts included, shape (tokens, features), float32.
        windows: number of each token's calibration window, shape (tokens,).
    """

    hidden: Tensor
    target: Tensor
    windows: Tensor

    @property
    def weights(self) -> Tensor:
        """Weight of each token, shape (tokens,), float32.

        1 / (||y||^2 + mean ||y||^2) for a target y, so that no token counts more than the mean token's error permits.
        The mean weight is 1.
        """
        squares = self.target.square().sum(dim=1)
        weights = 1 / (squares + squares.mean()).clamp_min(torch.finfo(torch.float32).tiny)
        return weights / weights.mean()

    def part(self, rows: Tensor) -> MixtureTokens:
        """Return a part of the tokens, by their numbers or by a mask."""
        return MixtureTokens(self.hidden[rows], self.target[rows], self.windows[rows])

    def split(self, interval: int) -> tuple[MixtureTokens, MixtureTokens]:
        """Return the tokens to fit, and those of every `every`-th window, which are held out."""
        held_out = self.windows % interval == interval - 1
        return self.part(~held_out), self.part(held_out)


def record_tokens(
    mixture: Mixture,
    block: Block,
    inputs: BlockInputs,
    *,
    device: torch.device,
    tokens: int,
    seed: int = 0,
    dense_outputs: Sequence[Tensor] | None = None,
    share: float = 0.0,
    group: ProcessGroup = SINGLE_PROCESS,
) -> MixtureTokens:
    """Record the inputs of a mixture on equally many tokens of each window, and its outputs with all experts.

    Args:
        mixture: of the block, with its dense weights.
        block: on `device`.
        inputs: of the block, behind the smaller blocks.
        device: where the block runs, and of the records.
        tokens: largest number of tokens, at least one of each window.
        seed: of the tokens' positions.
        dense_outputs: outputs of the mixture in the dense model on the same windows, batch by batch; needed for a
            share.
        share: share t of the dense model's outputs in the target: y = M(x) + t (M(x_dense) - M(x)).
        group: ranks that have the other windows; the records of all windows are the same on each rank.
    """
    counts: list[int] = group.all_gather_object(sum(map(len, inputs.hidden)))
    windows = sum(counts)
    count = min(max(tokens // windows, 1), inputs.window_tokens)
    generator = torch.Generator().manual_seed(derive_seed(seed, "tokens of mixtures"))
    chosen = [torch.randperm(inputs.window_tokens, generator=generator)[:count].sort().values for _ in range(windows)]
    positions = torch.stack(chosen[group.rank :: group.size]).to(device)
    hidden, output = _collect(mixture.module, block, inputs, positions, device)
    if dense_outputs is not None and share:
        parts, first = list[Tensor](), 0
        for batch in dense_outputs:
            parts.append(_select(batch.to(device), positions, first, inputs.window_tokens).float())
            first += len(parts[-1])
        output += share * (torch.cat(parts) - output)
    hidden, output = (_gather(states, group) for states in (hidden, output))
    numbers = torch.arange(windows, device=device).repeat_interleave(count)
    return MixtureTokens(hidden.flatten(0, 1), output.flatten(0, 1), numbers)


def expert_problem(
    mixture: Mixture, tokens: MixtureTokens, *, most: int = SELECTION_TOKENS, limit: int = SELECTION_BYTES
) -> ExpertProblem:
    """Record the outputs of all experts, one expert after the other.

    They take experts x tokens x features values in the model's dtype, such as 2.1 GB for 128 experts, 4096 tokens, 2048
    features and bfloat16. There are fewer tokens if they exceed the limit.

    Args:
        mixture: with its dense weights.
        tokens: recorded inputs and targets; a part of them, equally spaced, is used if they are too many.
        most: largest number of tokens.
        limit: largest number of bytes.
    """
    features, itemsize = tokens.target.shape[1], tokens.hidden.element_size()
    count = min(len(tokens.hidden), most, max(limit // (mixture.count * features * itemsize), 1))
    rows = torch.arange(count, device=tokens.hidden.device) * len(tokens.hidden) // count
    tokens = tokens.part(rows)
    outputs = tokens.hidden.new_empty(mixture.count, count, features)
    for expert in range(mixture.count):
        outputs[expert] = expert_output(mixture, tokens.hidden, expert)

    def route_rows(kept: Sequence[int], rows: Tensor) -> tuple[Tensor, Tensor]:
        return route(mixture, tokens.hidden[rows], kept)

    problem = ExpertProblem(outputs, tokens.target, tokens.weights, route_rows, mixture.groups)
    # Shared experts are the same for every set, and are no part of the replay.
    shared = run_in_batches(mixture.run, tokens.hidden) - replayed_output(problem, problem.experts)
    return replace(problem, target=tokens.target - shared)


def run_in_batches(run: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """Return the float32 outputs (tokens, features) of a map for inputs (tokens, features), batch by batch."""
    with torch.no_grad():
        return torch.cat([run(part).float() for part in torch.split(hidden, _BATCH_TOKENS)])


def _collect(
    module: nn.Module, block: Block, inputs: BlockInputs, positions: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return inputs and float32 outputs of a module, (windows, count, features), at positions (windows, count)."""
    selected, outputs = list[Tensor](), list[Tensor]()

    def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Any) -> None:
        values = (*args, *kwargs.values())
        if len(values) != 1:
            raise UnsupportedModel(
                f"Experts cannot be removed from {type(module).__name__}: its routing depends on more than the hidden "
                "states."
            )
        first = sum(map(len, selected))
        selected.append(_select(values[0], positions, first, inputs.window_tokens))
        outputs.append(_select(states_of(output), positions, first, inputs.window_tokens).float())

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            for batch in range(len(inputs.hidden)):
                inputs.run(block.index, block.module, batch, device)
    finally:
        handle.remove()
    return torch.cat(selected), torch.cat(outputs)


def states_of(output: Any) -> Tensor:
    """Return the hidden states in what a mixture returns, with its scores or without."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _select(states: Tensor, positions: Tensor, first: int, window_tokens: int) -> Tensor:
    """Return the states at the positions of some windows, (windows, count, features), from window `first` on."""
    states = states.reshape(-1, window_tokens, states.shape[-1])
    rows = positions[first : first + len(states)]
    return states.gather(1, rows[..., None].expand(-1, -1, states.shape[-1]))


def _gather(states: Tensor, group: ProcessGroup) -> Tensor:
    """Return the states (windows, ...) of the windows of all ranks, in the order of the windows."""
    if group.size == 1:
        return states
    parts: list[Tensor] = group.all_gather_object(states.cpu())
    whole = torch.empty(sum(map(len, parts)), *states.shape[1:], dtype=states.dtype)
    for rank, part in enumerate(parts):
        whole[rank :: group.size] = part
    return whole.to(states.device)
