"""What `alps match` does: a dense checkpoint and one pruned from it in, the latter with its blocks matched out.

Both models are walked side by side. The dense activations advance through the dense blocks, the pruned ones through
the pruned blocks as they are once matched; only one block of each model is on the device at a time.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from alps.calibration.block_inputs import BlockInputs, capture_block_inputs
from alps.calibration.lm_head import Head
from alps.core.device import exact_float32, pick_device
from alps.core.errors import ConfigError
from alps.core.half_precision import half_matmul_in_float32
from alps.core.memory import out_of_memory_as_error, peak_device_bytes, peak_host_bytes
from alps.core.progress import Progress
from alps.core.provenance import provenance
from alps.core.settings import CALIBRATION, HOW, RESOURCES, Setting
from alps.core.text_format import dtype_name
from alps.data.calibration import LoadedModel, load
from alps.data.mixture import CalibrationMix, load_calibration
from alps.finetuning.block_reconstruction import (
    DEFAULT_RECONSTRUCT_TARGET,
    OutputLoss,
    ReconstructionParameters,
    reconstruct_block,
)
from alps.finetuning.checkpoint_pair import (
    check_pair,
    check_request,
    count_zeros,
    describe,
    write_changed,
)
from alps.models.blocks import find_blocks, on_device
from alps.reporting.records import ReconstructionRecord, ReconstructionRun, calibration_record
from alps.reporting.run_report import RunReport


class ReconstructConfig(BaseModel):
    """All settings of `alps reconstruct`; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    epochs: Annotated[int, Setting(HOW, "N")] = Field(
        default=1, ge=1, description="Passes over the calibration windows."
    )
    target: Annotated[float, Setting(HOW, "SHARE")] = Field(
        default=DEFAULT_RECONSTRUCT_TARGET,
        ge=0,
        le=1,
        description="Share of the dense model's hidden states in the target, from 0 to 1; 0 takes the dense block's "
        "output for the pruned model's inputs.",
    )
    lr: Annotated[float, Setting(HOW, "RATE")] = Field(
        default=3e-4, gt=0, allow_inf_nan=False, description="Largest learning rate of Adam."
    )
    calibration: Annotated[str, Setting(CALIBRATION, "TEXT")] = Field(
        default="c4", description="Calibration text, as in `alps prune`; self is sampled from the dense model."
    )
    samples: Annotated[int, Setting(CALIBRATION, "N")] = Field(
        default=128,
        ge=2,
        description="Calibration windows; at least one of them is held back to choose the best weights.",
    )
    seqlen: Annotated[int, Setting(CALIBRATION, "N")] = Field(
        default=2048, ge=2, description="Tokens per calibration window."
    )
    seed: Annotated[int, Setting(CALIBRATION, "N")] = Field(
        default=0, ge=0, lt=2**63, description="Seed of the choice and the order of the calibration windows."
    )
    device: Annotated[str, Setting(RESOURCES, "NAME")] = Field(
        default="auto", description="Device to compute on: auto, cpu or cuda:N."
    )
    dtype: Annotated[str, Setting(RESOURCES, "NAME")] = Field(
        default="auto", description="Data type of the weights: auto (the checkpoints'), float32, bfloat16 or float16."
    )
    offload: Annotated[bool, Setting(RESOURCES)] = Field(
        default=False, description="Keep activations in CPU memory between blocks."
    )

    def parameters(self) -> ReconstructionParameters:
        """Return the parameters of the block reconstruction."""
        return ReconstructionParameters(epochs=self.epochs, target=self.target, rate=self.lr)


def reconstruct_directory(
    dense: str, pruned: str, out: Path, settings: ReconstructConfig, progress: Progress
) -> RunReport:
    """Check everything that can be checked, then load both models, match the pruned one's blocks and write it to `out`.

    Returns:
        The report of the pruned directory with the matching added, as written.

    Raises:
        ConfigError, UnsupportedModel, SolveFailed, CheckpointError: one sentence each; nothing is written then.
    """
    earlier = check_request(dense, pruned, out, device=settings.device, dtype=settings.dtype)
    source = load_calibration(settings.calibration, settings.samples)
    teacher, student = load(dense, settings.dtype), load(pruned, settings.dtype)
    records, run = reconstruct_model(teacher, student, settings, source, progress)
    report = earlier or describe(student, dense, run.device)
    report.reconstructions += records
    report.reconstruction_runs.append(run)
    write_changed(student, report, out)
    return report


def reconstruct_model(
    dense: LoadedModel,
    pruned: LoadedModel,
    settings: ReconstructConfig,
    source: CalibrationMix,
    progress: Progress,
) -> tuple[list[ReconstructionRecord], ReconstructionRun]:
    """Match every block of a pruned model, in place, to the dense model's.

    Args:
        dense: gives the targets, and the windows of `self`; unchanged.
        pruned: tuned; its zeros, and all that is outside its blocks, keep their bits.
        settings: see `ReconstructConfig`.
        source: what the calibration windows are drawn from.
        watcher: told after every block.

    Returns:
        A record of every block, and one of the whole.

    Raises:
        ConfigError: for models that do not belong together, a model without a weight left, or too little text.
        UnsupportedModel: when the models have no decoder blocks or cannot be walked.
        SolveFailed: when outputs of a block are not finite.
    """
    check_pair(dense, pruned)
    zeros = count_zeros(pruned.model)
    if zeros == sum(site.entries for block in find_blocks(pruned.model) for site in block.sites):
        raise ConfigError(
            f"Nothing is left to tune in '{pruned.name}': every weight of its linear layers is zero; prune less."
        )
    device = pick_device(settings.device)
    # The two vocabularies are the same where both are known; either tokenizer will do.
    reader = LoadedModel(dense.name, dense.model, pruned.tokenizer if dense.tokenizer is None else dense.tokenizer)
    windows = reader.calibration(source, settings.samples, settings.seqlen, settings.seed, device, progress)
    reader.check_ids(windows)
    training = dense.model.training, pruned.model.training
    start = time.perf_counter()
    try:
        records = _match_blocks(dense.model.eval(), pruned.model.eval(), windows.ids, settings, device, progress)
    finally:
        dense.model.train(training[0])
        pruned.model.train(training[1])
    assert count_zeros(pruned.model) == zeros
    return records, ReconstructionRun(
        dense=dense.name,
        pruned=pruned.name,
        epochs=settings.epochs,
        target=settings.parameters().target,
        lr=settings.lr,
        blocks=len(records),
        zeros=zeros,
        seconds=time.perf_counter() - start,
        calibration=calibration_record(windows, settings.seed),
        dtype=dtype_name(next(pruned.model.parameters()).dtype),
        device=str(device),
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=peak_device_bytes(device),
        versions=provenance(),
    )


def _match_blocks(
    dense: nn.Module,
    pruned: nn.Module,
    ids: Tensor,
    settings: ReconstructConfig,
    device: torch.device,
    progress: Progress,
) -> list[ReconstructionRecord]:
    matching = settings.parameters()
    models, tuned = find_blocks(dense), find_blocks(pruned)
    # Two batches at least: one is held back.
    batch = max(min(matching.tokens // ids.shape[1], len(ids) // 2), 1)
    storage = torch.device("cpu") if settings.offload else device
    records = []
    progress.start("match", len(tuned))
    try:
        with (
            out_of_memory_as_error("use --offload, or give fewer --samples or a lower --seqlen"),
            exact_float32(),
            half_matmul_in_float32(device, dense, pruned),
        ):
            targets = _captured(capture_block_inputs(dense, models, ids, batch), storage)
            inputs = _captured(capture_block_inputs(pruned, tuned, ids, batch), storage)
            output_loss = OutputLoss(Head(pruned, tuned), torch.split(ids, batch))
            for model, block in zip(models, tuned, strict=True):
                with on_device(model, device), on_device(block, device):
                    targets.advance(model.index, model.module, device)
                    record = reconstruct_block(
                        block,
                        inputs,
                        targets.hidden,
                        matching,
                        device=device,
                        dense_block=model,
                        output_loss=output_loss if block is tuned[-1] else None,
                        seed=settings.seed,
                    )
                    records.append(record)
                    if block is not tuned[-1]:
                        inputs.advance(block.index, block.module, device)
                progress.step(f"block {block.index}  loss {records[-1].before:.4f} -> {records[-1].after:.4f}")
    finally:
        progress.finish()
    return records


def _captured(inputs: BlockInputs, storage: torch.device) -> BlockInputs:
    inputs.hidden = [hidden.to(storage) for hidden in inputs.hidden]
    return inputs
