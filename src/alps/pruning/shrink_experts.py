"""Removal of experts, and of channels inside them, from the mixture of one block, and the refit of what stays.

The set of experts is chosen for the whole model before the first block is shrunk, see `alps.pruning.expert_choice`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor, nn

from alps.calibration.activation_store import ActivationStore
from alps.calibration.block_inputs import BlockInputs
from alps.calibration.expert_records import MixtureTokens, record_tokens, states_of
from alps.calibration.expert_refit import refit_experts
from alps.calibration.expert_width import narrow_experts, narrow_shared_expert
from alps.calibration.masked_router import Mixture, down_inputs, find_mixture
from alps.core.distributed import ProcessGroup
from alps.core.errors import ConfigError
from alps.models.blocks import Block
from alps.models.shrink_slices import Kept
from alps.models.structure import Structure, Target
from alps.pruning.expert_choice import ExpertChoice, ExpertChooser
from alps.pruning.shrink_context import ShrinkContext
from alps.reporting.shrink_report import CutRecord, ExpertCandidate, ExpertSelection

# Share of the dense model's outputs in the target of a refit. The other part are outputs of the mixture with all
# experts behind the smaller blocks.
SHARE = 0.5
# Bytes of recorded inputs and targets of a mixture; there are fewer tokens if they exceed it.
_RECORD_BYTES = 2**31


@dataclass(frozen=True)
class ExpertCut:
    """Experts, and channels of experts, that stay in all mixtures of a model.

    Attributes:
        structure: of the dense model.
        target: complete numbers of units that stay.
        kept: experts that stay, by the index of the block; empty if all do.
    """

    structure: Structure
    target: Target
    kept: Mapping[int, Sequence[int]] = field(default_factory=dict)

    @property
    def is_needed(self) -> bool:
        """True if experts or their channels go."""
        return self.cuts_experts or self.cuts_width

    @property
    def cuts_experts(self) -> bool:
        """True if experts go."""
        return self.target.experts != self.structure.experts

    @property
    def cuts_width(self) -> bool:
        """True if channels of experts go."""
        return self.target.expert_width != self.structure.expert_width

    def mixture(self, block: Block) -> Mixture | None:
        """Return the mixture of a block from which something is removed.

        Raises:
            UnsupportedModel: if the routing among a part of the experts cannot be taken from the model's code.
        """
        return find_mixture(block) if self.is_needed else None

    def cut(
        self,
        mixture: Mixture,
        block: Block,
        inputs: BlockInputs,
        dense_outputs: Sequence[Tensor],
        *,
        device: torch.device,
        group: ProcessGroup,
    ) -> tuple[Kept, list[CutRecord]]:
        """Narrow the kept experts of a dense mixture, and refit them to the dense outputs; the block keeps its shape.

        The main rank computes on the tokens of all ranks, and broadcasts the weights.

        Args:
            mixture: of the block.
            block: on `device`.
            inputs: of the block in the smaller model.
            dense_outputs: outputs of the mixture in the dense model, batch by batch.
            device: where the block runs.
            group: ranks that have the other windows.
        """
        features, itemsize = dense_outputs[0].shape[-1], dense_outputs[0].element_size()
        tokens = record_tokens(
            mixture,
            block,
            inputs,
            device=device,
            tokens=_RECORD_BYTES // (features * (itemsize + 4)),
            dense_outputs=dense_outputs,
            share=SHARE,
            group=group,
        )
        name = f"{block.name}.{mixture.name}"
        kept = list(self.kept.get(block.index, range(mixture.count)))
        result: tuple[Kept, list[CutRecord]] = group.broadcast_from_main(lambda: self._cut(mixture, tokens, kept, name))
        if group.size > 1:
            group.broadcast(down_inputs(mixture, tokens.hidden[:1], 0)[0].parameter.data, 0)
            for site in mixture.shared_sites:
                group.broadcast(site.parameter.data, 0)
        return result

    def _cut(
        self, mixture: Mixture, tokens: MixtureTokens, experts: Sequence[int], name: str
    ) -> tuple[Kept, list[CutRecord]]:
        structure, width = self.structure, self.target.expert_width or 0
        records, experts_narrow, shared_narrow = list[CutRecord](), None, None

        def add(unit: str, numbers: Sequence[int], total: int, error: float) -> None:
            share = SHARE if unit == "expert" else 0.0
            count = len(tokens.hidden)
            records.append(
                CutRecord(
                    layer=name, unit=unit, kept=list(numbers), total=total, error=error, share=share, tokens=count
                )
            )

        if self.cuts_width:
            experts_narrow = narrow_experts(mixture, tokens, experts, width)
            # Each expert keeps channels of its own, too many to list.
            add("expert_channel", [], structure.expert_width or 0, fmean(experts_narrow.errors))
            if structure.shared_width is not None:
                shared_narrow = narrow_shared_expert(mixture, tokens, self.target.shared_width(structure) or 0)
                numbers = shared_narrow.channels[0].tolist()
                add("shared_channel", numbers, structure.shared_width, shared_narrow.errors[0])
        narrowed = [narrow for narrow in (experts_narrow, shared_narrow) if narrow is not None]
        refit = refit_experts(
            mixture, tokens, experts, channels=[row for narrow in narrowed for row in narrow.channels]
        )
        add("expert", experts, mixture.count, refit.error_after)
        records[-1] = records[-1].model_copy(update={"error_before": refit.error_before})
        kept = Kept(
            experts=torch.tensor(experts) if self.cuts_experts else None,
            expert_channels=None if experts_narrow is None else experts_narrow.channels.cpu(),
            shared_channels=None if shared_narrow is None else shared_narrow.channels[0].cpu(),
        )
        return kept, records


@contextmanager
def recorded_outputs(module: nn.Module, activations: ActivationStore) -> Iterator[list[Tensor]]:
    """Context that gives a list, to which the hidden states of every forward of a module are added."""
    outputs = list[Tensor]()
    handle = module.register_forward_hook(
        lambda _module, _args, output: outputs.append(activations.store(states_of(output).detach()))
    )
    try:
        yield outputs
    finally:
        handle.remove()


def choose_kept_experts(
    model: nn.Module, blocks: Sequence[Block], windows: Tensor, count: int, context: ShrinkContext
) -> ExpertSelection:
    """Choose the experts that all mixtures keep, or read the choice from the journal, where it is kept.

    Args:
        model: dense, in evaluation mode.
        blocks: all of its blocks.
        windows: calibration token ids (windows, tokens) of all ranks.
        count: experts that each mixture keeps.
        context: device, ranks, journal.
    """
    if (selection := context.journal.load_experts()) is not None:
        return selection
    chooser = ExpertChooser(
        model=model,
        blocks=blocks,
        device=context.device,
        activations=context.activation_store(),
    )
    # The selections and the divergence are a pass each; how many the continuations need is seen at their end.
    context.progress.start("choose experts", 2 * len(blocks))
    steps = iter(range(2 * len(blocks)))

    def on_step() -> None:
        if next(steps, None) is not None:
            context.progress.step("")

    try:
        with context.computation(model, fewer_samples=False):
            choice = context.group.run_on_main(lambda: chooser.choose(windows, count), on_step)
    finally:
        context.progress.finish()
    selection = _selection(choice)
    context.journal.save_experts(selection)
    return selection


def check_windows(windows: Tensor) -> None:
    """Refuse a single calibration window, from which nothing could be held out.

    Raises:
        ConfigError: see above.
    """
    if len(windows) < 2:
        raise ConfigError("Experts cannot be refitted on one calibration window: give at least two.")


def _selection(choice: ExpertChoice) -> ExpertSelection:
    return ExpertSelection(
        chosen=choice.name,
        candidates=[
            ExpertCandidate(name=name, kl=quality.kl, repetition=quality.repetition)
            for name, quality in choice.measured.items()
        ],
        dense_repetition=choice.dense_repetition,
        kept=choice.kept,
    )
