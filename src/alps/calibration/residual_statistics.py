"""Sums over the inputs of a layer and what is missing behind it, from which its weights are fitted to the dense model.

legend  x   input of the layer in the shrunk model                                            (in,)
        r   what is missing in its output: dense hidden states minus those of the shrunk model  (out,)
        w   weight of a token                                                                 scalar
        G   sum of w x x^T                                                                    (in, in)
        R   sum of w r x^T                                                                    (out, in)
A change D of the layer's weight leaves the error sum of w ||r - D x||^2 = const - 2 tr(D R^T) + tr(D G D^T), so that
the best change is D = R G^{-1}.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alps.calibration.block_inputs import BlockInputs
from alps.core.distributed import SINGLE_PROCESS, ProcessGroup
from alps.models.blocks import Block
from alps.models.sites import Site

# Every eighth window is held back: it chooses how far the refit goes towards the dense model.
HELD_BACK = 8
# Tokens that are summed up: the first number for each input of a layer, and at least the second one. The excess error
# of a least-squares fit with n inputs on 32 n tokens is 1 / 32 in theory; it was not measured here.
TOKENS_PER_INPUT, LEAST_TOKENS = 32, 2**15


@dataclass
class ResidualSums:
    """Running sums in float64 on the device of the layer.

    Products within one window are float32, and windows are added in float64, so that the result depends neither on
    the order of the windows nor on the number of ranks.

    Attributes:
        tokens: number of tokens.
        gram: G, shape (in, in).
        cross: R, shape (out, in).
        energy: sum of w ||r||^2, shape (1,).
        largest: largest |x| of every input feature, shape (in,).
    """

    tokens: int
    gram: Tensor
    cross: Tensor
    energy: Tensor
    largest: Tensor

    @classmethod
    def zeros(cls, shape: tuple[int, int], device: torch.device | str = "cpu") -> ResidualSums:
        """Create empty sums for a layer of a shape (out, in)."""

        def empty(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=device)

        outputs, inputs = shape
        return cls(0, empty(inputs, inputs), empty(outputs, inputs), empty(1), empty(inputs))

    def update(self, inputs: Tensor, missing: Tensor, weights: Tensor) -> None:
        """Add the tokens of one window.

        Args:
            inputs: x, shape (tokens, in), any float dtype.
            missing: r, shape (tokens, out).
            weights: w, shape (tokens,).
        """
        x, r, w = inputs.float(), missing.float(), weights.float()[:, None]
        scaled = x * w.sqrt()
        self.tokens += len(x)
        self.gram += scaled.T @ scaled
        self.cross += (r * w).T @ x
        self.energy += (r.square() * w).sum()
        self.largest = torch.maximum(self.largest, x.abs().amax(dim=0).double())

    def tensors(self) -> Iterator[Tensor]:
        """Yield the sums that ranks add up."""
        yield from (self.gram, self.cross, self.energy)

    def __add__(self, other: ResidualSums) -> ResidualSums:
        """Return the sums over both sets of tokens."""
        return ResidualSums(
            self.tokens + other.tokens,
            self.gram + other.gram,
            self.cross + other.cross,
            self.energy + other.energy,
            torch.maximum(self.largest, other.largest),
        )

    def reduce(self, group: ProcessGroup) -> ResidualSums:
        """Return the sums over the tokens of all ranks."""
        if group.size == 1:
            return self
        sums = [group.all_reduce_sum(tensor) for tensor in self.tensors()]
        parts = group.all_gather_object((self.tokens, self.largest.cpu()))
        largest = torch.stack([part for _, part in parts]).amax(dim=0).to(self.largest.device)
        gram, cross, energy = sums
        return ResidualSums(sum(tokens for tokens, _ in parts), gram, cross, energy, largest)


@dataclass(frozen=True)
class SplitSums:
    """Sums of the windows that layers are fitted to, and of those that are held back.

    Attributes:
        fitted: of seven in eight windows, or of all if there are fewer than eight.
        held_back: of every eighth window.
    """

    fitted: ResidualSums
    held_back: ResidualSums

    @property
    def total(self) -> ResidualSums:
        """Sums of all windows."""
        return self.fitted + self.held_back


# Of a batch, the site's output and the block's output: what is missing, and the weights of the tokens.
Missing = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


def collect_residuals(
    block: Block,
    inputs: BlockInputs,
    site: Site,
    missing: Missing,
    *,
    device: torch.device,
    group: ProcessGroup = SINGLE_PROCESS,
) -> SplitSums:
    """Run a block and sum up the inputs of a layer, together with what is missing behind it.

    Only as many windows are run as the sums need: `TOKENS_PER_INPUT` tokens for each input, or `LEAST_TOKENS`.

    Args:
        block: on `device`.
        inputs: of the block in the shrunk model.
        site: layer that the block calls once, with all tokens.
        missing: of a batch number, the layer's output and the block's output, both (windows, tokens, features),
            computes what is missing, (windows, tokens, out), and the weights of the tokens, (windows, tokens).
        device: where to run.
        group: ranks that have the other windows.
    """
    sums = [ResidualSums.zeros(site.shape, device) for _ in range(2)]
    first, limit = 0, _needed_windows(site.shape[1], inputs.window_tokens)
    with torch.no_grad():
        for batch, hidden in enumerate(inputs.hidden):
            if first * group.size + group.rank >= limit:
                break
            x, y, output = _run(block, inputs, site, batch, device)
            windows = len(hidden)
            features = [tensor.reshape(windows, -1, tensor.shape[-1]) for tensor in (x, y, output)]
            r, weights = missing(batch, features[1], features[2])
            for window in range(windows):
                number = (first + window) * group.size + group.rank
                if number >= limit:
                    break
                held = number % HELD_BACK == HELD_BACK - 1
                sums[held].update(features[0][window], r[window], weights[window])
            first += windows
    return SplitSums(*(part.reduce(group) for part in sums))


def _needed_windows(inputs: int, window_tokens: int) -> int:
    """Return the number of windows, of all ranks, that are summed up for a layer."""
    return -(-max(TOKENS_PER_INPUT * inputs, LEAST_TOKENS) // window_tokens)


def advance_recording(
    block: Block, states: BlockInputs, sites: Sequence[Site], device: torch.device
) -> dict[str, list[Tensor]]:
    """Replace the inputs of a block by its outputs, and return the outputs of layers in it.

    Args:
        block: on `device`.
        states: inputs of the block.
        sites: layers that the block calls once, with all tokens.
        device: where to run.

    Returns:
        For every layer, by name, its outputs in the storage of the states, batch by batch.
    """
    outputs: dict[str, list[Tensor]] = {site.name: [] for site in sites}

    def hook(name: str) -> Callable[..., None]:
        return lambda _module, _args, output: outputs[name].append(states.activations.store(output.detach()))

    handles = [site.module.register_forward_hook(hook(site.name)) for site in sites]
    try:
        states.advance(block.index, block.module, device)
    finally:
        for handle in handles:
            handle.remove()
    for recorded in outputs.values():
        if len(recorded) > len(states.hidden):
            # A block that hands values on runs a single window of the first batch again.
            del recorded[1]
    return outputs


def _run(
    block: Block, inputs: BlockInputs, site: Site, batch: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a block on a batch; return a layer's input and output, and the block's output."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = site.module.register_forward_hook(lambda _module, args, output: seen.append((args[0], output)))
    try:
        output = inputs.run(block.index, block.module, batch, device)
    finally:
        handle.remove()
    ((x, y),) = seen
    return x, y, output
