"""Removal of channels and heads from the layers of one block, and the exact refit of what stays.

The block keeps its shape here: columns of the output projections become zero, which computes the same as the smaller
block. The tensors are sliced afterwards, see `alps.models.shrink_slices`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alps.calibration.block_inputs import BlockInputs
from alps.calibration.masked_router import Mixture
from alps.calibration.residual_statistics import ResidualSums, SplitSums, advance_recording, collect_residuals
from alps.core.distributed import ProcessGroup
from alps.core.errors import SolveFailed
from alps.models.blocks import Block
from alps.models.shrink_layout import Family
from alps.models.shrink_slices import Kept
from alps.models.sites import Site
from alps.models.structure import Structure, Target
from alps.pruning.shrink_experts import ExpertCut, recorded_outputs
from alps.reporting.shrink_report import CutRecord
from alps.solvers.dense_residual import NO_CORRECTION, choose_correction, corrected_weight, damped_gram
from alps.solvers.group_choice import choose_groups
from alps.solvers.group_elimination import eliminate
from alps.solvers.group_problem import GroupProblem, objective, refit
from alps.solvers.group_swaps import improve_by_swaps

# A channel is protected if its largest contribution to an output is this many times that of the median channel.
MASSIVE = 100


@dataclass(frozen=True, kw_only=True)
class BlockStates:
    """Hidden states around a block in both models, batch by batch.

    Attributes:
        inputs: of the block in the shrunk model.
        dense_inputs: copies of the dense model's inputs of the block.
        dense_sites: outputs of the layers in the dense model, by the layers' names.
        dense_outputs: dense hidden states that the block has to reach: after it, or after the removed blocks behind it.
    """

    inputs: BlockInputs
    dense_inputs: Sequence[Tensor]
    dense_sites: dict[str, list[Tensor]]
    dense_outputs: Sequence[Tensor]


@dataclass(frozen=True)
class ChannelChoice:
    """Channels that stay.

    Attributes:
        kept: their indices, ascending.
        swaps: exchanges after the elimination.
        protected: number of channels that stay because they carry a massive activation.
    """

    kept: Tensor
    swaps: int = 0
    protected: int = 0


@dataclass(frozen=True, kw_only=True)
class Cutter:
    """Removal of structure from blocks of one model. Benchmarks override the public methods to compare selections.

    Attributes:
        family, structure: of the dense model.
        target: complete numbers of units that stay.
        adds_output: True when the outputs of attention and MLP are added to the residual stream as they are.
        device: where blocks run and layers are solved.
        group: ranks of the run.
        experts: experts that stay, and their widths; None if mixtures do not change.
    """

    family: Family
    structure: Structure
    target: Target
    adds_output: bool
    device: torch.device
    group: ProcessGroup
    experts: ExpertCut | None = None

    @property
    def cuts_heads(self) -> bool:
        """True if query heads or KV groups go."""
        return (self.target.heads, self.target.kv_heads) != (self.structure.heads, self.structure.kv_heads)

    @property
    def cuts_mlp(self) -> bool:
        """True if MLP channels go."""
        return self.target.mlp_width != self.structure.mlp_width

    def sites(self, block: Block) -> tuple[Site | None, Site | None]:
        """Return the output projections of attention and MLP, None for one that is not touched."""
        attention, mlp = self.family.attention, self.family.mlp
        by_name = {site.name: site for site in block.sites}
        heads = by_name.get(f"{block.name}.{attention.outer}") if attention is not None else None
        channels = by_name.get(f"{block.name}.{mlp.outer}") if mlp is not None else None
        return heads, channels

    def record_dense(self, block: Block, dense: BlockInputs) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
        """Run a dense block on the dense model's hidden states.

        Returns:
            Outputs of its output projections, and of its mixture, by name, and the inputs of the block, batch by batch.
            `dense` holds the outputs of the block afterwards.
        """
        sites = [site for site in self.sites(block) if site is not None]
        before = list(dense.hidden)
        if (mixture := self.mixture(block)) is None:
            return advance_recording(block, dense, sites, self.device), before
        with recorded_outputs(mixture.module, dense.activations) as outputs:
            by_name = advance_recording(block, dense, sites, self.device)
        if len(outputs) > len(dense.hidden):
            # A block that hands values on runs a single window of the first batch again.
            del outputs[1]
        return {**by_name, f"{block.name}.{mixture.name}": outputs}, before

    def mixture(self, block: Block) -> Mixture | None:
        """Return the mixture of a block from which something is removed."""
        return None if self.experts is None else self.experts.mixture(block)

    def cut(self, block: Block, states: BlockStates) -> tuple[Kept, list[CutRecord]]:
        """Remove heads, then MLP channels or experts, from a dense block on the device; refit their output maps."""
        heads_site, mlp_site = self.sites(block)
        kept, records = Kept(), list[CutRecord]()
        if heads_site is not None:
            heads, kv_heads, record = self._cut_heads(block, heads_site, states)
            records.append(record)
            kept = Kept(heads=heads, kv_heads=kv_heads)
        if mlp_site is not None:
            channels, record = self._cut_mlp(block, mlp_site, states)
            records.append(record)
            kept = replace(kept, channels=channels)
        if self.experts is not None and (mixture := self.mixture(block)) is not None:
            outputs = states.dense_sites[f"{block.name}.{mixture.name}"]
            units, cuts = self.experts.cut(mixture, block, states.inputs, outputs, device=self.device, group=self.group)
            records += cuts
            kept = replace(units, heads=kept.heads, kv_heads=kept.kv_heads)
        result: tuple[Kept, list[CutRecord]] = self.group.broadcast_from_main(lambda: (kept, records))
        return result

    def _cut_heads(
        self, block: Block, site: Site, states: BlockStates
    ) -> tuple[Tensor | None, Tensor | None, CutRecord]:
        """Remove KV groups, then query heads within every kept group, and refit the output projection.

        Returns:
            Query heads and KV heads that stay, None for all, and the record.
        """
        sums = self.collect(block, site, states)
        problem, share = self.build_problem(site, sums, self.structure.head_dim or 1)
        heads, kv_heads = self._choose_heads(problem)
        kept = torch.arange(self.structure.heads or 0, device=self.device) if heads is None else heads
        record = self.write(site, problem, kept, sums.total)
        changes: dict[str, object] = {"unit": "head", "share": share}
        if kv_heads is not None and len(kept) == len(kv_heads) * self.structure.group:
            # Whole KV groups went; else the query heads say which groups did.
            changes |= {"unit": "kv_head", "kept": kv_heads.tolist(), "total": self.structure.kv_heads}
        record = record.model_copy(update=changes)
        return heads, kv_heads, record

    def _choose_heads(self, problem: GroupProblem) -> tuple[Tensor | None, Tensor | None]:
        """Return the query heads and the KV heads that stay, None for all."""
        structure, target = self.structure, self.target
        if not self.cuts_heads:
            return None, None
        size, kv_heads = structure.group, None
        heads = torch.arange(structure.heads or 0, device=self.device)
        if target.kv_heads != structure.kv_heads:
            whole = GroupProblem(problem.hessian, problem.target, problem.row_weights, problem.group * size)
            kv_heads = choose_groups(whole, target.kv_heads or 0).kept
            heads = whole_groups(kv_heads, size)
        per_group = (target.heads or 0) // (target.kv_heads or 1)
        if per_group < size:
            columns = problem.columns(heads)
            # The problem without the removed groups has the refitted weight as its target.
            inner = GroupProblem(
                problem.hessian[columns][:, columns], refit(problem, heads), problem.row_weights, problem.group
            )
            classes = torch.arange(len(heads), device=self.device) // size
            heads = heads[choose_groups(inner, per_group, classes=classes).kept]
        return heads, kv_heads

    def _cut_mlp(self, block: Block, site: Site, states: BlockStates) -> tuple[Tensor | None, CutRecord]:
        """Remove MLP channels and refit the output projection; return the channels that stay, None for all."""
        sums = self.collect(block, site, states)
        problem, share = self.build_problem(site, sums, 1)
        width = self.structure.mlp_width or 0
        choice = ChannelChoice(torch.arange(width, device=self.device))
        if self.cuts_mlp:
            choice = self.choose_channels(problem, sums.total, site, self.target.mlp_width or width)
        record = self.write(site, problem, choice.kept, sums.total)
        changes = {"share": share, "swaps": choice.swaps, "protected": choice.protected}
        return choice.kept if self.cuts_mlp else None, record.model_copy(update=changes)

    def choose_channels(self, problem: GroupProblem, sums: ResidualSums, site: Site, keep: int) -> ChannelChoice:
        """Choose MLP channels by their exact prices, one removal at a time, then by swaps.

        Args:
            problem: of the output projection.
            sums: of its inputs.
            site: the output projection.
            keep: number of channels that stay.
        """
        massive = massive_channels(sums, site.read(), keep)
        selection = eliminate(problem, keep, protected=massive)
        exchange = improve_by_swaps(problem, selection.kept, protected=massive)
        return ChannelChoice(exchange.kept, exchange.swaps, len(massive))

    def collect(self, block: Block, site: Site, states: BlockStates) -> SplitSums:
        """Sum up the inputs of an output projection, and what is missing behind it."""
        is_mlp = self.family.mlp is not None and site.name == f"{block.name}.{self.family.mlp.outer}"

        def missing(batch: int, y: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
            goal = states.dense_outputs[batch].to(self.device).reshape(output.shape).float()
            weights = 1 / goal.square().sum(dim=-1).clamp_min(1e-12)
            if is_mlp and self.adds_output:
                return goal - output, weights
            dense = states.dense_sites[site.name][batch].to(self.device)
            r = dense.reshape(y.shape).float() - y
            if self.adds_output:
                hidden, before = states.inputs.hidden[batch], states.dense_inputs[batch]
                r += (before.to(self.device).float() - hidden.to(self.device).float()).reshape(r.shape)
            return r, weights

        return collect_residuals(block, states.inputs, site, missing, device=self.device, group=self.group)

    def build_problem(self, site: Site, sums: SplitSums, group: int) -> tuple[GroupProblem, float]:
        """Return the layer problem, and the share of the dense model's hidden states in its target."""
        fitted, held_back, total = sums.fitted, sums.held_back, sums.total
        try:
            correction = NO_CORRECTION
            if held_back.tokens:
                correction = choose_correction(fitted.gram, fitted.cross, held_back.gram, held_back.cross)
            target = corrected_weight(site.read(), total.gram, total.cross, correction)
            problem = GroupProblem(damped_gram(total.gram), target, group=group, dead=total.gram.diagonal() == 0)
        except SolveFailed as error:
            raise SolveFailed(f"{site.name}: {error}") from None
        return problem, correction.share

    def write(self, site: Site, problem: GroupProblem, groups: Tensor, sums: ResidualSums) -> CutRecord:
        """Write the refitted weight with zeros for what goes, and return a record of the error."""
        weight = torch.zeros_like(problem.target)
        weight[:, problem.columns(groups)] = refit(problem, groups)
        # Ranks on other machines might round otherwise.
        self.group.broadcast(weight, 0)
        site.write(weight.to(torch.float32))
        size = float(((problem.target @ problem.hessian) * problem.target).sum())
        lost = objective(problem, groups)
        return CutRecord(
            layer=site.name,
            unit="channel",
            kept=groups.tolist(),
            total=problem.groups,
            error=lost / size if size > 0 else 0.0,
            share=0.0,
            tokens=sums.tokens,
        )


def whole_groups(groups: Tensor, size: int) -> Tensor:
    """Return the members of groups of `size` members each, in order."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


def massive_channels(sums: ResidualSums, weight: Tensor, keep: int) -> list[int]:
    """Return the channels that carry a massive activation (Sun et al., arXiv 2402.17762), at most `keep`.

    Args:
        sums: of the inputs.
        weight: of the layer, shape (out, in).
        keep: number of channels that stay.
    """
    contribution = sums.largest * weight.double().norm(dim=0)
    # Channels without any activation say nothing of the others; in models with ReLU they may be the majority.
    active = contribution[contribution > 0]
    massive = contribution > MASSIVE * (active.median() if len(active) else 0)
    order = contribution.argsort(descending=True, stable=True)
    return sorted(order[massive[order]][:keep].tolist())
