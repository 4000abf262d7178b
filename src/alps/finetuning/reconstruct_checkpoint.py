"""Block reconstruction of a pruned checkpoint: the blocks of the pruned model are tuned to those of the dense model.

The job runs through both models block by block. Dense activations pass through dense blocks, the pruned model's through
its reconstructed blocks. Only one block of each model is on the device at a time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from alps.calibration.activation_store import ActivationStore
from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.block_inputs import BlockInputs
from alps.calibration.block_probe import probe_blocks
from alps.calibration.lm_head import LMHead
from alps.calibration.replay_check import check_replay
from alps.core.device import exact_float32, pick_device
from alps.core.errors import ConfigError
from alps.core.half_precision import half_matmul_in_float32
from alps.core.memory import out_of_memory_as_error, peak_device_bytes, peak_host_bytes
from alps.core.progress import Progress
from alps.core.provenance import provenance
from alps.core.text_format import dtype_name
from alps.data.loaded_model import LoadedModel, load
from alps.data.mixture import CalibrationMix, load_calibration
from alps.finetuning.block_reconstruction import OutputLoss, reconstruct_block
from alps.finetuning.checkpoint_pair import (
    check_pair,
    check_request,
    count_zeros,
    describe,
    kept_blocks,
    write_changed,
)
from alps.finetuning.reconstruct_config import ReconstructConfig
from alps.models.blocks import Block, find_blocks, on_device
from alps.models.save import staged_side_files
from alps.reporting.records import ReconstructionRecord, ReconstructionRun, calibration_record
from alps.reporting.run_report import RunReport


def reconstruct_directory(
    dense: str, pruned: str, out: Path, settings: ReconstructConfig, progress: Progress
) -> RunReport:
    """Load a dense and a pruned checkpoint, reconstruct the blocks of the pruned one, and write it to `out`.

    Everything that can be checked is checked before the models are loaded.

    Returns:
        The report of the pruned directory with the reconstruction added, as written.

    Raises:
        ConfigError, UnsupportedModel, SolveFailed, CheckpointError: nothing is written then.
    """
    earlier = check_request(dense, pruned, out, device=settings.device, dtype=settings.dtype)
    source = load_calibration(settings.calibration, settings.samples)
    teacher, student = load(dense, settings.dtype), load(pruned, settings.dtype)
    with staged_side_files(student.writer, out) as side_files:
        records, run = reconstruct_model(teacher, student, settings, source, progress=progress)
        report = earlier or describe(student, teacher, run.device)
        report.reconstructions += records
        report.reconstruction_runs.append(run)
        write_changed(student, report, out, side_files)
    return report


def reconstruct_model(
    dense: LoadedModel,
    pruned: LoadedModel,
    settings: ReconstructConfig,
    source: CalibrationMix,
    *,
    progress: Progress,
) -> tuple[list[ReconstructionRecord], ReconstructionRun]:
    """Reconstruct every block of a pruned model in place.

    Args:
        dense: gives the targets, and samples the windows of `self`; unchanged.
        pruned: tuned; its zeros, and all parameters outside its blocks, keep their bits.
        settings: see `ReconstructConfig`.
        source: of the calibration windows.
        progress: counts the blocks.

    Returns:
        A record of every block, and one of the run.

    Raises:
        ConfigError: for models that do not belong together, a model without a weight left, or too little text.
        UnsupportedModel: when the blocks cannot be found, or not be run one by one.
        SolveFailed: when outputs of a block are not finite.
    """
    check_pair(dense, pruned)
    zeros = count_zeros(pruned.model)
    if zeros == sum(site.entries for block in find_blocks(pruned.model) for site in block.sites):
        raise ConfigError(
            f"Nothing is left to tune in '{pruned.name}': every weight of its linear layers is zero; prune less."
        )
    kept = kept_blocks(dense.model, pruned.model, Path(pruned.name))
    if settings.target < 1 and len(kept) < len(find_blocks(dense.model)):
        raise ConfigError(
            f"'{pruned.name}' lacks whole blocks, behind which only the dense model's hidden states can be the target: "
            "give --target 1, or leave it out."
        )
    device = pick_device(settings.device)
    # `check_pair` compared the vocabularies, so either tokenizer may be used.
    reader = LoadedModel(dense.name, dense.model, pruned.tokenizer if dense.tokenizer is None else dense.tokenizer)
    windows = reader.calibration(source, settings.samples, settings.seqlen, settings.seed, device, progress)
    reader.check_ids(windows)
    training = dense.model.training, pruned.model.training
    start = time.perf_counter()
    try:
        records = _reconstruct_blocks(
            dense.model.eval(), pruned.model.eval(), kept, windows.ids, settings, device=device, progress=progress
        )
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


def _reconstruct_blocks(
    dense: nn.Module,
    pruned: nn.Module,
    kept: Sequence[int],
    ids: Tensor,
    settings: ReconstructConfig,
    *,
    device: torch.device,
    progress: Progress,
) -> list[ReconstructionRecord]:
    """Tune all blocks of `pruned` in order, on windows of token ids (windows, seqlen).

    The target of a block is behind its dense counterpart, number `kept[i]`, and behind the removed blocks that follow.
    """
    parameters = settings.parameters()
    dense_blocks, blocks = (probe_blocks(model, find_blocks(model)) for model in (dense, pruned))
    # At least two batches, since one is held back.
    batch_size = max(min(parameters.windows_per_step(ids.shape[1]), len(ids) // 2), 1)
    storage_device = torch.device("cpu") if settings.offload else device
    records = []
    progress.start("reconstruct", len(blocks))
    try:
        with (
            out_of_memory_as_error("use --offload, or give fewer --samples or a lower --seqlen"),
            exact_float32(),
            half_matmul_in_float32(device, dense, pruned),
        ):
            targets = _capture(dense, dense_blocks, ids, batch_size, storage_device)
            inputs = _capture(pruned, blocks, ids, batch_size, storage_device)
            for model, model_blocks, captured in ((dense, dense_blocks, targets), (pruned, blocks, inputs)):
                check_replay(model, model_blocks, captured, ids, device)
            output_loss = OutputLoss(LMHead(pruned, blocks, inputs.calls.layout), torch.split(ids, batch_size))
            ends = [*kept[1:], len(dense_blocks)]
            for skipped in dense_blocks[: kept[0]]:
                with on_device(skipped, device):
                    targets.advance(skipped.index, skipped.module, device)
            for block, index, end in zip(blocks, kept, ends, strict=True):
                is_last, dense_block = block is blocks[-1], dense_blocks[index]
                with on_device(dense_block, device), on_device(block, device):
                    targets.advance(dense_block.index, dense_block.module, device)
                    for skipped in dense_blocks[index + 1 : end]:
                        with on_device(skipped, device):
                            targets.advance(skipped.index, skipped.module, device)
                    record = reconstruct_block(
                        block,
                        inputs,
                        targets.hidden,
                        parameters,
                        device=device,
                        dense_block=dense_block,
                        output_loss=output_loss if is_last else None,
                        seed=settings.seed,
                    )
                    if not is_last:
                        inputs.advance(block.index, block.module, device)
                records.append(record)
                progress.step(f"block {block.index}  loss {record.before:.4f} -> {record.after:.4f}")
    finally:
        progress.finish()
    return records


def _capture(
    model: nn.Module, blocks: Sequence[Block], ids: Tensor, batch_size: int, storage_device: torch.device
) -> BlockInputs:
    return capture_block_inputs(model, blocks, ids, batch_size, activations=ActivationStore(storage_device))
