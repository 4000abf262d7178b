"""Distillation and block reconstruction of a pruned checkpoint from Python."""

from __future__ import annotations

from pathlib import Path

from alps.core.progress import NoProgress, Progress
from alps.core.settings import ARGUMENTS, make_config
from alps.finetuning.distill_config import DistillConfig
from alps.finetuning.distillation import distill_directory
from alps.finetuning.reconstruct_checkpoint import reconstruct_directory
from alps.finetuning.reconstruct_config import ReconstructConfig
from alps.reporting.run_report import RunReport


def distill(
    dense: str | Path,
    pruned: str | Path,
    out: str | Path,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    lr: float = 3e-4,
    batch_tokens: int = 2048,
    calibration: str | Path = "c4",
    samples: int = 512,
    seqlen: int = 512,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> RunReport:
    """Train the kept weights of a pruned checkpoint towards the dense model by distillation; zeros stay zero.

    Args:
        dense: dense model, as MODEL of `alps prune`.
        pruned: directory pruned from it, by any program.
        out: directory to create.
        minutes: length of the training; this or `steps`.
        steps: number of optimiser steps.
        lr: largest learning rate of Adam.
        batch_tokens: tokens per step.
        calibration: training text.
        samples: windows; an eighth of them, at most 8, is held back to choose the best weights.
        seqlen: tokens in each of them.
        seed: of their choice and order.
        device: `auto` is the first GPU if any.
        dtype: `auto` keeps the checkpoints' data types.
        progress: receives every step.

    Returns:
        The report of the pruned directory with the distillation added, as written to `out`.

    Raises:
        ConfigError, UnsupportedModel, CheckpointError: `out` is not written then.
    """
    values = {
        "minutes": minutes,
        "steps": steps,
        "lr": lr,
        "batch_tokens": batch_tokens,
        "calibration": str(calibration),
        "samples": samples,
        "seqlen": seqlen,
        "seed": seed,
        "device": device,
        "dtype": dtype,
    }
    config = make_config(DistillConfig, values, ARGUMENTS)
    return distill_directory(str(dense), str(pruned), Path(out), config, progress or NoProgress())


def reconstruct(
    dense: str | Path,
    pruned: str | Path,
    out: str | Path,
    *,
    epochs: int = 1,
    target: float = 1.0,
    lr: float = 3e-4,
    calibration: str | Path = "c4",
    samples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    offload: bool = False,
    progress: Progress | None = None,
) -> RunReport:
    """Tune the kept weights of a pruned checkpoint, block by block, to the dense blocks' outputs; zeros stay zero.

    Args:
        dense: dense model, as MODEL of `alps prune`.
        pruned: directory pruned from it, by any program.
        out: directory to create.
        epochs: passes over the calibration windows.
        target: share of the dense model's hidden states in the target.
        lr: largest learning rate of Adam.
        calibration: text, as in `alps.prune`.
        samples: calibration windows; at least one of them is held back to choose the best weights.
        seqlen: tokens in each of them.
        seed: of their choice and order.
        device: `auto` is the first GPU if any.
        dtype: `auto` keeps the checkpoints' data types.
        offload: keep activations in CPU memory between blocks.
        progress: receives every block.

    Returns:
        The report of the pruned directory with the reconstruction added, as written to `out`.

    Raises:
        ConfigError, UnsupportedModel, SolveFailed, CheckpointError: `out` is not written then.
    """
    values = {
        "epochs": epochs,
        "target": target,
        "lr": lr,
        "calibration": str(calibration),
        "samples": samples,
        "seqlen": seqlen,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "offload": offload,
    }
    config = make_config(ReconstructConfig, values, ARGUMENTS)
    return reconstruct_directory(str(dense), str(pruned), Path(out), config, progress or NoProgress())
