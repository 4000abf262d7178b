"""Distillation of the dense model into the pruned one on calibration text; every pruned weight stays zero.

The loss is the mean over tokens of KL(dense || pruned) between the next-token distributions at temperature 1. The kept
weights of the pruned layers, norms and biases are trained; embeddings, the output head and other parameters are not. Of
a shrunk model, which has lost whole structures, all layers are trained.
The KL on a few held-back windows is measured at intervals, and the best state is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from alps.core.device import pick_device
from alps.core.half_precision import half_matmul_in_float32
from alps.core.memory import out_of_memory_as_error, peak_device_bytes, peak_host_bytes
from alps.core.progress import Progress
from alps.core.provenance import provenance
from alps.core.text_format import dtype_name
from alps.data.loaded_model import LoadedModel, load
from alps.data.text_sources import Text, load_text
from alps.finetuning.checkpoint_pair import (
    check_pair,
    check_request,
    count_zeros,
    describe,
    is_shrunk,
    write_changed,
)
from alps.finetuning.distill_config import DistillConfig
from alps.finetuning.masked_adamw import MaskedAdamW, TrainableParameter
from alps.finetuning.training_loop import Distillation
from alps.models.blocks import find_blocks
from alps.models.routers import routing_parameters
from alps.models.save import staged_side_files
from alps.reporting.records import DistillationReport, calibration_record
from alps.reporting.run_report import RunReport


def distill_directory(dense: str, pruned: str, out: Path, settings: DistillConfig, progress: Progress) -> RunReport:
    """Check everything that can be checked, then load both models, distill into the pruned one and write it to `out`.

    Returns:
        The report of the pruned directory with the distillation added, as written.

    Raises:
        ConfigError, UnsupportedModel, CheckpointError: one sentence each; nothing is written then.
    """
    settings.schedule()
    earlier = check_request(dense, pruned, out, device=settings.device, dtype=settings.dtype)
    text = load_text(settings.calibration, "calibration")
    teacher, student = load(dense, settings.dtype), load(pruned, settings.dtype)
    with staged_side_files(student.writer, out) as side_files:
        record = distill_model(teacher, student, settings, progress, text)
        report = earlier or describe(student, teacher, record.device)
        report.distillations.append(record)
        write_changed(student, report, out, side_files)
    return report


def distill_model(
    dense: LoadedModel, pruned: LoadedModel, settings: DistillConfig, progress: Progress, text: Text | None = None
) -> DistillationReport:
    """Train a pruned model in place towards the dense one.

    Args:
        dense: the teacher; moved to the device, otherwise unchanged.
        pruned: the student; moved to the device. Its zeros, and all that is not trained, keep their bits.
        settings: see `DistillConfig`.
        progress: counts steps, or hundredths of the time.
        text: calibration text; None loads the one that the settings name.

    Returns:
        The record of the training. The model is unchanged if no check measured a smaller divergence.

    Raises:
        ConfigError: for models that do not belong together, a text too short, or too little time for a step.
        UnsupportedModel: when the models have no decoder blocks.
    """
    schedule = settings.schedule()
    check_pair(dense, pruned)
    device = pick_device(settings.device)
    text = text or load_text(settings.calibration, "calibration")
    windows = pruned.calibration(text, settings.samples, settings.seqlen, settings.seed)
    pruned.check_ids(windows)
    zeros, shrunk = count_zeros(pruned.model), is_shrunk(dense.model, pruned.model)
    training = dense.model.training, pruned.model.training
    try:
        with out_of_memory_as_error("lower --batch-tokens and --seqlen, or use --device cpu"):
            dense.model.to(device).eval()
            with (
                half_matmul_in_float32(device, dense.model, pruned.model),
                _trainable_in_float32(pruned.model.to(device).eval(), all_layers=shrunk) as trainable,
                MaskedAdamW(pruned.model, trainable, settings.lr) as optimiser,
            ):
                run = Distillation(
                    dense.model,
                    pruned.model,
                    optimiser,
                    windows.ids,
                    schedule=schedule,
                    device=device,
                    progress=progress,
                )
                run.train()
                entries, seconds = optimiser.entries, run.clock.elapsed
    finally:
        dense.model.train(training[0])
        pruned.model.train(training[1])
    before = run.checks[0].kl
    assert before is not None and count_zeros(pruned.model) == zeros
    return DistillationReport(
        dense=dense.name,
        pruned=pruned.name,
        minutes=settings.minutes,
        lr=settings.lr,
        batch_tokens=settings.batch_tokens,
        stopped=run.stopped,
        steps=run.clock.steps,
        best_step=run.best_step,
        tokens=run.tokens,
        seconds=seconds,
        trained_entries=entries,
        zeros=zeros,
        kl_before=before,
        kl_after=run.best,
        checks=run.checks,
        calibration=calibration_record(windows, settings.seed),
        held_back_windows=settings.held_back,
        dtype=dtype_name(next(pruned.model.parameters()).dtype),
        device=str(device),
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=peak_device_bytes(device),
        versions=provenance(),
    )


@contextmanager
def _trainable_in_float32(model: nn.Module, *, all_layers: bool) -> Iterator[list[TrainableParameter]]:
    """Context with the parameters to train, in which a float16 model computes in float32."""
    stored_dtypes = {id(parameter): parameter.dtype for parameter in model.parameters()}
    if torch.float16 in stored_dtypes.values():
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
    try:
        yield _trainable(model, stored_dtypes, all_layers)
    finally:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(stored_dtypes[id(parameter)])


def _trainable(model: nn.Module, stored_dtypes: dict[int, torch.dtype], all_layers: bool) -> list[TrainableParameter]:
    """List layers that have zeros, or all layers, with masks, and vectors (norms, biases) outside head and routers."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    frozen = set() if head is None else {id(parameter) for parameter in head.parameters()}
    blocks = find_blocks(model)
    frozen |= {parameter for block in blocks for parameter in routing_parameters(block.module)}
    weights = {id(site.parameter) for block in blocks for site in block.sites}
    trainable = []
    for parameter in model.parameters():
        if id(parameter) in weights and (all_layers or not bool(parameter.all())):
            trainable.append(TrainableParameter(parameter, parameter.detach() != 0, stored_dtypes[id(parameter)]))
        elif parameter.ndim == 1 and id(parameter) not in frozen:
            trainable.append(TrainableParameter(parameter, None, stored_dtypes[id(parameter)]))
    return trainable
